from pathlib import Path

import pytest
from hone_zpressor.config import (
    PRESETS,
    BenchConfig,
    DemoConfig,
    EvalConfig,
    ReproduceConfig,
    TrainHostConfig,
    ZPressorConfig,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ZPressorConfig(anchors=1), "anchors must be at least 2; got 1"),
        (lambda: ZPressorConfig(layers=0), "layers must be at least 1"),
        (lambda: ZPressorConfig(attention="varlen", precision="float32"), 'needs precision="bfloat16"; got float32'),
        (lambda: DemoConfig(views=4), "2 <= anchors <= views"),
        (lambda: DemoConfig(frames=1), "two frames"),
        (lambda: DemoConfig(views=40, targets=11), "at most 50 views with the targets"),
        (lambda: TrainHostConfig(steps=0), "steps must be at least 1; got 0"),
        (lambda: TrainHostConfig(steps=0), "steps must be at least 1"),
        (lambda: TrainHostConfig(base_share=1.0), "base_share must lie in"),
        (lambda: TrainHostConfig(context=5), "anchors <= context <= gap"),
        (lambda: TrainHostConfig(gap=(10, 60)), "anchors <= context <= gap"),
        (lambda: TrainHostConfig(targets=0), "must be positive"),
        (lambda: TrainHostConfig(gap=(12, 15)), "largest gap, 15 frames; got 12 and 4"),
        (lambda: EvalConfig(near=0.0, far=9.0), "expected 0 < near < far; got 0.0 and 9.0"),
        (lambda: BenchConfig(views=(4,)), "anchors <= each number of views"),
        (lambda: ReproduceConfig(judged=(48,)), "judged views that are among views"),
        (lambda: ReproduceConfig(views=(6, 24, 36, 46)), "to 50 with the targets"),
        (lambda: ReproduceConfig(views=(6, 12), judged=(12,), targets=27), "24 where there are anchor_counts"),
        (lambda: ReproduceConfig(anchor_counts=(1,)), "anchor_counts must lie in 2..24"),
        (lambda: ReproduceConfig(hosts=(Path("a"), Path("a"))), "one is named twice"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_released_settings():
    assert {name: preset.config.anchors for name, preset in PRESETS.items()} == {
        "depthsplat": 6, "mvsplat": 6, "pixelsplat": 4, "tiny": 6,
    }  # fmt: skip
    assert PRESETS["mvsplat"].config.precision == "bfloat16"
