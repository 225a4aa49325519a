from functools import partial

import hone_nar.reproduce as reproduce_module
import pytest
import torch
from hone_core.claims import verdict_over_margins
from hone_nar.config import HostConfig, ReproduceConfig
from hone_nar.evaluate import Variant, drawing_rows
from hone_nar.method import diagonal_order
from hone_nar.reproduce import CLAIMS, reproduce
from hone_nar.tasks import TASKS
from hone_nar.train import take_step


def test_every_claim_is_judged_and_trainings_are_kept(start, tmp_path):
    cfg = ReproduceConfig(host=HostConfig(dim=16, layers=1, heads=2), seeds=(3,), steps=2, batch=4, limit=20)
    with start(cfg, "reproduce", tmp_path / "run") as run:
        report = reproduce(cfg, run)
    assert set(report.verdicts) == set(CLAIMS["digits"])
    assert set(report.verdicts.values()) == {"UNDECIDED, 1 of 3 seeds"}
    variants = {row.variant for row in report.rows if row.metric == "bits_per_token" and row.split == "mean"}
    assert variants == {
        "raster", "nar", "nar, right", "nar, below", "separate", "separate, right", "separate, below", "one-head",
        "flashar",
    }  # fmt: skip
    assert len([row for row in report.rows if row.metric == "excess_bits" and row.split == "seed 3"]) == 8
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "artifacts").glob("*.pt")}
    assert len(files) == 5
    assert "heads" in str(report)
    assert "less raster's, 1 at once: " in str(report)


def test_a_training_that_was_stopped_goes_on_and_logs_no_step_twice(start, tmp_path, monkeypatch):
    settings = partial(reproduce_module._Settings, log_every=1, checkpoint_seconds=0.0)
    monkeypatch.setattr(reproduce_module, "_Settings", settings)
    cfg = ReproduceConfig(
        host=HostConfig(dim=16, layers=1, heads=2), data="shapes", seeds=(3,), steps=4, batch=4, limit=20
    )
    with start(cfg, "reproduce", tmp_path / "whole") as run:
        want = reproduce(cfg, run)
    taken = []

    def stopped(learner, train, batch, done, seed, number, step):
        if (number, step) == (1, 3) and len(taken) < 8:
            raise KeyboardInterrupt
        taken.append((number, step))
        return take_step(learner, train, batch, done, seed, number, step)

    monkeypatch.setattr(reproduce_module, "take_step", stopped)
    with pytest.raises(KeyboardInterrupt), start(cfg, "reproduce", tmp_path / "cut") as run:
        reproduce(cfg, run)
    taken += [None]
    with start(cfg, "reproduce", tmp_path / "cut") as run:
        found = reproduce(cfg, run)
    assert taken == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), None, (1, 3), *((2, n) for n in range(4))]
    wanted = {file.name: file for file in (tmp_path / "whole" / "artifacts").iterdir()}
    files = {file.name: file for file in (tmp_path / "cut" / "artifacts").iterdir()}
    trained = ("raster-3", "nar-3", "permuted-3")
    assert set(files) == set(wanted) == {"verdicts.json", *(n + end for n in trained for end in (".pt", ".jsonl"))}
    for name, file in files.items():
        if name.endswith(".jsonl"):
            assert file.read_text() == wanted[name].read_text()
            assert len(file.read_text().splitlines()) == 4
    assert {(r.metric, r.variant): r.value for r in found.rows if "time" not in r.metric} == {
        (r.metric, r.variant): r.value for r in want.rows if "time" not in r.metric
    }


def test_locality_is_asked_of_clips(start, tmp_path):
    host = HostConfig(dim=16, layers=1, heads=2)
    cfg = ReproduceConfig(host=host, data="shapes", seeds=(3,), steps=2, batch=4, limit=20)
    with start(cfg, "reproduce", tmp_path / "run") as run:
        report = reproduce(cfg, run)
    assert set(report.verdicts) == set(CLAIMS["shapes"])
    passes = {row.variant: row.value for row in report.rows if row.metric == "passes" and row.split == "mean"}
    assert passes == {"raster": 256, "permuted": 18, "nar": 18} | {f"nar, {k}": 18 for k in ("right", "below", "back")}
    real = {row.metric: row.value for row in report.rows if row.variant == "real shapes"}
    assert real["accuracy"] > 0.9
    assert "locality: bits per token" in str(report)


def test_permuted_tokens_are_graded_in_their_places(start, tmp_path):
    """A model of permuted tokens that cannot but draw one clip draws it as it is."""
    task = TASKS["shapes"]
    places = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    clip = task.examples("test").tokens[:1]

    class Sure(torch.nn.Module):
        order = diagonal_order(task.grid)

    def draw(model, labels, seeds, **options):
        return clip[:, places].expand(len(labels), -1)

    with start(ReproduceConfig(), "reproduce", tmp_path) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hone_nar.evaluate.draw_digits", draw)
        found = drawing_rows(run, Variant("x", Sure(), None, task, places), 20, batch=10, seed=0)
    assert torch.equal(found, clip.expand(20, -1))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, 2.0], "UNDECIDED, 2 of 3 seeds"),
        ([1.0, 2.0, 0.1], "CONFIRMED"),
        ([-1.0, 0.0, -2.0], "REFUTED"),
        ([1.0, -1.0, 1.0], "MIXED, 2 of 3"),
    ],
)
def test_verdicts(values, wanted):
    assert verdict_over_margins(values) == wanted
