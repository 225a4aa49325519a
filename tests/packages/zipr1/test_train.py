import pytest
import torch
from hone_core.runs import Run
from hone_zipr1 import train
from hone_zipr1.config import HostConfig, TrainHostConfig
from hone_zipr1.host import load_host
from hone_zipr1.rollouts import answer_logps
from safetensors.torch import load_file

SMALL = HostConfig(cells=2, layers=1, width=32, heads=2, heads_k=1, intermediate=32, vision_width=16)
SHORT = TrainHostConfig(
    host=SMALL, steps=6, batch=8, held_out=20, warmup_steps=2, log_every=2, checkpoint_seconds=0.0  # after each step
)  # fmt: skip


def run_of(folder):
    return Run.start(package="hone-zipr1", verb="train-host", config=SHORT, out=folder, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with run_of(tmp_path_factory.mktemp("whole")) as run:
        report = train.train_host(SHORT, run)
    return run, report


def test_a_run_leaves_a_graded_host(whole):
    run, report = whole
    assert report.steps == 6
    assert not report.passed
    assert report.result.keys() == {"digit", "sum"}
    assert load_host(path=report.checkpoint).config == SMALL
    assert sum(row.n for row in run.rows if row.metric == "accuracy") == 20


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_goes_on_exactly(whole, tmp_path, monkeypatch, stop):
    advance = train._advance

    def halting(cfg, step, *others):
        if step == stop:
            raise KeyboardInterrupt
        return advance(cfg, step, *others)

    monkeypatch.setattr(train, "_advance", halting)
    with pytest.raises(KeyboardInterrupt), run_of(tmp_path / "run") as run:
        train.train_host(SHORT, run)
    monkeypatch.setattr(train, "_advance", advance)
    with run_of(tmp_path / "run") as run:
        assert run.resumed
        train.train_host(SHORT, run)
    expected, found = (load_file(r.artifacts / "host.safetensors") for r in (whole[0], run))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_loss_is_the_mean_over_tokens_that_count(small_host):
    from hone_zipr1.data import mosaics

    batch = mosaics(4, 2, 0)
    gold, counts = small_host.answer_ids(batch)
    logps = answer_logps(small_host, batch, gold).detach()
    terms = [-logps[r, t, gold[r, t]] for r in range(4) for t in range(3) if counts[r, t]]
    torch.testing.assert_close(train.answer_loss(logps, gold, counts), torch.stack(terms).mean())


def test_training_learns():
    # One mosaic question kind in a 2 x 2 mosaic: the loss must fall well below that of not looking, ln 10 per digit.
    host = train.build_host(SMALL, seed=0)
    cfg = TrainHostConfig(host=SMALL, steps=120, batch=64, warmup_steps=5)
    optimizers = train.dense_optimizers(host.model, cfg)
    losses = [float(train._advance(cfg, step, step / 240, host, optimizers)) for step in range(120)]
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]
