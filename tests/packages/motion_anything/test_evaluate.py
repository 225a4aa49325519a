import hone_motion_anything.evaluate as module
import numpy as np
import pytest
from hone_core.runs import Run
from hone_motion_anything.config import EvalConfig, UnmaskConfig
from hone_motion_anything.evaluate import evaluate, with_hands


def test_metrics_of_real_and_generated_with_intervals(untrained, tmp_path):
    cfg = EvalConfig(
        host=untrained,
        repetitions=2,
        limit=6,
        dances=4,
        real_dances=16,
        many_texts=2,
        many=4,
        unmask=UnmaskConfig(steps=2),
    )
    run = Run.start(
        config=cfg, package="hone-motion-anything", verb="eval", out=tmp_path / "run", seed=0, device="cpu", quiet=True,
        command="x",
    )  # fmt: skip
    with run:
        report = evaluate(cfg, run)
    found = {(row.split, row.variant, row.metric): row for row in report.rows}
    assert {metric for _, _, metric in found} == {
        *("R1", "R2", "R3", "FID", "MM-Dist", "Diversity", "MModality", "events"),
        *("FIDk", "FIDg", "Divk", "Divg", "BAS"),
    }
    assert found["text", "real", "events"].value > 0.9
    assert found["dance", "real", "BAS"].value > 0.3
    row = found["text", "generated", "FID"]
    assert row.n == 2
    assert row.interval[1] - row.interval[0] == pytest.approx(2 * 1.96 * row.spread / np.sqrt(2))
    assert "R1" in str(report)


def test_a_stopped_run_goes_on_with_the_repetitions_that_are_missing(untrained, tmp_path, monkeypatch):
    cfg = EvalConfig(
        host=untrained, repetitions=2, limit=4, dances=3, real_dances=8, many_texts=1, many=3,
        unmask=UnmaskConfig(steps=1),
    )  # fmt: skip

    def result(name):
        with Run.start(
            config=cfg, package="hone-motion-anything", verb="eval", out=tmp_path / name, seed=0, device="cpu",
            quiet=True, command="x",
        ) as run:  # fmt: skip
            return evaluate(cfg, run)

    whole, original, drawn = result("whole"), module.draw_clips, []

    def draw_clips(host, clips, seed, settings):
        if len(drawn) == 3:
            drawn.append(None)
            raise KeyboardInterrupt
        drawn.append(seed)
        return original(host, clips, seed, settings)

    monkeypatch.setattr(module, "draw_clips", draw_clips)
    with pytest.raises(KeyboardInterrupt):
        result("run")
    again = result("run")
    assert drawn == [40_000, 40_000, 40_001, None, 40_001, 40_001]
    assert again.rows == whole.rows


def test_hands_lie_on_as_forearms_point():
    joints = np.zeros((2, 22, 3))
    joints[:, 20] = [0.3, 0, 0]
    joints[:, 21, 1] = -0.3
    found = with_hands(joints)
    assert found.shape == (2, 24, 3)
    assert found[0, 22] == pytest.approx([0.3 + np.linalg.norm([0.0867, -0.0106, -0.0156]), 0, 0])
    assert found[0, 23, 1] < -0.38
