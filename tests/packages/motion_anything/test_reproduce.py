import json

import pytest
from hone_core.claims import verdict_over_margins
from hone_core.runs import Run
from hone_motion_anything.config import ReproduceConfig
from hone_motion_anything.reproduce import CLAIMS, _margins, reproduce


def test_verdicts():
    assert verdict_over_margins([0.1, 0.2, 0.3]) == "CONFIRMED"
    assert verdict_over_margins([-0.1, -0.2, -0.3]) == "REFUTED"
    assert verdict_over_margins([0.1, -0.2, 0.3]) == "MIXED, 2 of 3"
    assert verdict_over_margins([0.1]).startswith("UNDECIDED")


def test_margins_are_positive_where_the_claim_holds():
    better = {"events": 0.75, "frechet": 0.25, "mask_recall": 0.75, "mask_share": 0.5}
    worse = better | {"events": 0.5, "frechet": 0.5}
    graded = {"attention 0": better, "random 0": worse, "events 0": better, "cosine 0": worse}
    assert _margins(ReproduceConfig(seeds=(0,)), graded) == {claim: [0.25] for claim in CLAIMS}
    some = ReproduceConfig(seeds=(0,), arms=("events", "random"))
    assert list(_margins(some, graded)) == ["C5 known events over random"]


def test_arms_are_trained_graded_judged_and_not_trained_twice(untrained, tmp_path, monkeypatch):
    cfg = ReproduceConfig(host=untrained, seeds=(0, 1), steps=2, batch=2, clips=4, limit=3)

    def start():
        return Run.start(
            config=cfg, package="hone-motion-anything", verb="reproduce", out=tmp_path / "run", seed=0, device="cpu",
            quiet=True, command="x",
        )  # fmt: skip

    with start() as run:
        report = reproduce(cfg, run)
    assert set(report.verdicts) == set(CLAIMS)
    assert all(found.startswith("UNDECIDED") for found in report.verdicts.values())
    arms = json.loads((run.artifacts / "arms.json").read_text())
    assert len(arms) == 8
    # The masks of all arms are looked at with the same shares.
    assert len({round(grades["mask_share"], 6) for grades in arms.values()}) == 1
    rows = [row for row in report.rows if row.metric == "events"]
    assert {(row.variant, row.split) for row in rows} == {
        (arm, f"seed {seed}") for arm in cfg.arms for seed in cfg.seeds
    }
    assert "C3 masks find events" in str(report)

    # Stopped after the arms: nothing is trained again.
    results = tmp_path / "run" / "results.json"
    results.write_text(results.read_text().replace('"status": "done"', '"status": "failed"'))
    monkeypatch.setattr("hone_motion_anything.reproduce.train_arm", lambda *_: pytest.fail("trained again"))
    with start() as run:
        assert reproduce(cfg, run).verdicts == report.verdicts
