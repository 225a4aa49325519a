import pytest
from hone_pmloss.config import DemoConfig, EvalConfig, PMLossConfig, TrainConfig, TrainHostConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PMLossConfig(trim=1.0), r"trim must lie in \[0, 1\); got 1.0"),
        (lambda: PMLossConfig(trim=0.1, align="none"), "trim belongs to align='umeyama'; got align='none'"),
        (lambda: PMLossConfig(cap=0.0), "cap must be positive; got 1.0 and 0.0"),
        (lambda: PMLossConfig(cap=float("nan")), "cap must be positive; got 1.0 and nan"),
        (lambda: PMLossConfig(huber_delta=0.0), "huber_delta and cap must be positive"),
        (lambda: PMLossConfig(weight=float("nan")), "weight must be at least 0; got nan"),
        (lambda: TrainConfig(chunks="a", lpips=0.0, points="b", drop_error=0.0), "drop_error must be positive"),
        (lambda: TrainConfig(chunks="a", lpips=0.0, points="b", skip_loss=-1.0), "skip_loss must be positive"),
        (lambda: TrainHostConfig(steps=0), "steps must be at least 1; got 0"),
        (lambda: TrainHostConfig(base_share=1.0), r"base_share must lie in \(0, 1\); got 1.0"),
        (lambda: TrainHostConfig(base_depth=-1.0), "base_depth must be at least 0"),
        (lambda: TrainHostConfig(teacher_noise=1.0), "expected teacher_noise in"),
        (lambda: TrainHostConfig(gap=(1, 5)), "expected 2 <= gap < 50"),
        (lambda: TrainHostConfig(graded_targets=14), "graded_targets must lie in 1 to 13"),
        (lambda: DemoConfig(size=8), "expected size >= 16"),
        (lambda: DemoConfig(blur=4), "blur must be odd"),
        (lambda: DemoConfig(lr=float("nan")), "blur must be odd, weight and lr positive"),
        (lambda: EvalConfig(ply="a", truth="b", opacity=1.0), "expected 0 <= opacity < 1"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
