import json
import pickle
from functools import partial

import pytest
from hone_core.claims import verdict_over_margins
from hone_core.runs import Run
from hone_core.training import Training
from hone_motion_anything.config import ARMS, ReproduceConfig
from hone_motion_anything.reproduce import CLAIMS, Job, _margins, reproduce, work


def test_verdicts():
    assert verdict_over_margins([0.1, 0.2, 0.3]) == "CONFIRMED"
    assert verdict_over_margins([-0.1, -0.2, -0.3]) == "REFUTED"
    assert verdict_over_margins([0.1, -0.2, 0.3]) == "MIXED, 2 of 3"
    assert verdict_over_margins([0.1]).startswith("UNDECIDED")


def test_margins_are_positive_where_the_claim_holds():
    better = {"events": 0.75, "frechet": 0.25, "mask_recall": 0.75, "mask_share": 0.5}
    worse = better | {"events": 0.5, "frechet": 0.5}
    graded = {Job("attention", 0): better, Job("random", 0): worse, Job("events", 0): better, Job("cosine", 0): worse}
    assert _margins(ReproduceConfig(seeds=(0,)), graded) == {claim: [0.25] for claim in CLAIMS}
    some = ReproduceConfig(seeds=(0,), arms=("events", "random"))
    assert list(_margins(some, graded)) == ["C5 known events over random"]


def start(cfg, path):
    return Run.start(
        config=cfg, package="hone-motion-anything", verb="reproduce", out=path, seed=0, device="cpu", quiet=True,
        command="x",
    )  # fmt: skip


def test_arms_are_trained_graded_judged_and_not_trained_twice(untrained, tmp_path, monkeypatch):
    cfg = ReproduceConfig(host=untrained, seeds=(0, 1), steps=2, batch=2, clips=4, limit=3)

    with start(cfg, tmp_path / "run") as run:
        report = reproduce(cfg, run)
    assert set(report.verdicts) == set(CLAIMS)
    assert all(found.startswith("UNDECIDED") for found in report.verdicts.values())
    arms = {
        (arm, seed): json.loads((run.artifacts / f"{arm}-{seed}.json").read_text()) for arm in ARMS for seed in (0, 1)
    }
    # The masks of all arms are looked at with the same shares.
    assert len({round(grades["mask_share"], 6) for grades in arms.values()}) == 1
    assert not list(run.artifacts.glob("*.checkpoint"))
    rows = [row for row in report.rows if row.metric == "events"]
    assert {(row.variant, row.split) for row in rows} == {
        (arm, f"seed {seed}") for arm in cfg.arms for seed in cfg.seeds
    }
    assert "C3 masks find events" in str(report)

    # Stopped after the arms: nothing is trained again.
    results = tmp_path / "run" / "results.json"
    results.write_text(results.read_text().replace('"status": "done"', '"status": "failed"'))
    monkeypatch.setattr("hone_motion_anything.reproduce.train_arm", lambda *_: pytest.fail("trained again"))
    with start(cfg, tmp_path / "run") as run:
        assert reproduce(cfg, run).verdicts == report.verdicts


def test_a_cut_changes_nothing_and_other_processes_can_do_the_work(untrained, tmp_path, monkeypatch):
    cfg = ReproduceConfig(host=untrained, seeds=(0,), arms=("attention", "random"), steps=4, batch=2, clips=4, limit=3)
    with start(cfg, tmp_path / "one") as run:
        one = reproduce(cfg, run)

    # What other processes get, and give: a file.
    there = pickle.loads(pickle.dumps(partial(work, cfg, tmp_path)))
    there(Job("random", 0), "cpu")
    assert (tmp_path / "random-0.json").read_text() == (run.artifacts / "random-0.json").read_text()

    # Cut in the middle of the first arm, after a checkpoint.
    follow = Training.follow

    def cut(self, loop, log, **others):
        def begun():
            for values in loop:
                if self.step == 3:
                    self.save()
                    raise KeyboardInterrupt
                yield values

        follow(self, begun(), log, **others)

    monkeypatch.setattr(Training, "follow", cut)
    with pytest.raises(KeyboardInterrupt), start(cfg, tmp_path / "cut") as run:
        reproduce(cfg, run)
    monkeypatch.setattr(Training, "follow", follow)
    assert (run.artifacts / "attention-0.checkpoint").is_file()
    with start(cfg, tmp_path / "cut") as run:
        assert reproduce(cfg, run).rows == one.rows
