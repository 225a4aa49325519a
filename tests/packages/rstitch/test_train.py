import pytest
import torch
from hone_rstitch import train
from hone_rstitch.config import DecoderConfig, TrainHostConfig
from hone_rstitch.host import open_pair
from safetensors.torch import load_file

SMALL = DecoderConfig(layers=1, width=16, heads=2, heads_k=1, intermediate=16)
SHORT = TrainHostConfig(
    small=SMALL,
    large=SMALL,
    small_steps=3,
    large_steps=4,
    verbose_steps=3,
    batch=4,
    held_out=8,
    log_every=2,
    checkpoint_seconds=0.0,  # after each step
)


def weights(run):
    return load_file(run.artifacts / "host.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from hone_core.runs import Run

    run = Run.start(
        package="hone-rstitch", verb="train-host", config=SHORT, out=tmp_path_factory.mktemp("whole"), device="cpu",
        quiet=True,
    )  # fmt: skip
    with run:
        report = train.train_host(SHORT, run)
    return run, report


def test_a_run_leaves_a_graded_pair(whole):
    run, report = whole
    assert report.steps == 10
    assert not report.passed
    stored = open_pair(path=report.checkpoint)
    assert stored.facts.result.keys() == {"small", "large", "verbose"}
    assert stored.facts.details["tokens"]["small"] > 0
    assert {row.variant for row in run.rows if row.metric == "accuracy"} == {"small", "large", "verbose"}
    assert (run.path / "metrics.jsonl").read_text().count("\n") == 5


def test_the_verbose_model_starts_from_the_large_one(whole):
    found = weights(whole[0])
    names = [name.removeprefix("large.") for name in found if name.startswith("large.")]
    near = [float((found[f"large.{name}"] - found[f"verbose.{name}"]).abs().max()) for name in names]
    other = [float((found[f"large.{name}"] - torch.roll(found[f"large.{name}"], 1, 0)).abs().max()) for name in names]
    assert 0 < max(near) < max(other)


@pytest.mark.parametrize("stop", [2, 7, 9])
def test_a_stopped_run_goes_on_exactly(whole, start, monkeypatch, stop):
    # In the first stage, between the second and the third, in the third.
    advance = train._advance

    def halting(cfg, model, optimizers, stage, step, steps):
        done = (0, 3, 7)[stage] + step
        if done == stop:
            raise KeyboardInterrupt
        return advance(cfg, model, optimizers, stage, step, steps)

    monkeypatch.setattr(train, "_advance", halting)
    with pytest.raises(KeyboardInterrupt), start(SHORT) as run:
        train.train_host(SHORT, run)
    monkeypatch.setattr(train, "_advance", advance)
    with start(SHORT) as run:
        assert run.resumed
        train.train_host(SHORT, run)
    expected, found = weights(whole[0]), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
