from dataclasses import replace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_nar.checkpoints import load_published
from hone_nar.codes import write_class, write_index
from hone_nar.config import EvalConfig, TrainConfig
from hone_nar.evaluate import evaluate
from hone_nar.finetune import TINY, check, rate, train
from hone_nar.transformer import LlamaGenForImageGeneration, NARForImageGeneration
from hone_video.training import Group, Loop
from hone_video.training_config import LoopConfig

LOOP = LoopConfig(
    steps=4, batch=4, micro_batch=2, lr=1e-3, warmup_steps=1, weight_decay=0.05, ema=0.5, log_every=1,
    checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("codes")
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        write_class(path, number, torch.randint(16, (3, 2, 9), generator=generator))
    write_index(path, grid=(3, 3), choices=16, classes=["a", "b"])
    return path


@pytest.fixture
def cfg(data):
    return TrainConfig(data=data, model="tiny", grid=(3, 3), codebook=16, classes=2, loop=LOOP, dropout=0.2)


def weights(report):
    return NARForImageGeneration.from_pretrained(report.model).state_dict()


def run_train(start, cfg, out):
    with start(cfg, "train", out) as run:
        return train(cfg, run)


def test_a_stopped_training_goes_on_as_if_it_had_not(cfg, start, tmp_path, monkeypatch):
    whole = run_train(start, cfg, tmp_path / "whole")
    save = Loop.save

    def stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(start, cfg, tmp_path / "cut")
    torch.rand(5)
    again = run_train(start, cfg, tmp_path / "cut")
    first, second = weights(whole), weights(again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "nats per token" in str(whole)


def test_the_trained_model_has_exact_likelihoods_of_codes(cfg, start, tmp_path):
    report = run_train(start, cfg, tmp_path / "run")
    asked = EvalConfig(model=report.model, data=cfg.data, nll=True)
    with start(asked, "eval", tmp_path / "eval") as run:
        (row,) = evaluate(asked, run).rows
    assert row.n == 6
    assert 3 < row.value < 5  # near log2 of 16


def test_training_begins_with_weights_that_are_given(cfg, start, tmp_path):
    options = {**TINY, "grid": (3, 3), "vocab_size": 16, "num_classes": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        raster, nar = LlamaGenForImageGeneration(**options), NARForImageGeneration(**options)
        torch.nn.init.normal_(raster.output.weight)
    torch.save({"model": raster.state_dict()}, tmp_path / "raster.pt")
    torch.save({"model": nar.state_dict()}, tmp_path / "nar.pt")
    still = replace(cfg, loop=replace(LOOP, steps=1, lr=1e-12, ema=0.0, weight_decay=0.0))
    warm = weights(run_train(start, replace(still, raster=tmp_path / "raster.pt"), tmp_path / "a"))
    assert torch.allclose(warm["medusa_output.weight"], raster.output.weight)
    assert torch.allclose(warm["layers.2.attention.wo.weight"], raster.state_dict()["layers.1.attention.wo.weight"])
    same = weights(run_train(start, replace(still, start=tmp_path / "nar.pt"), tmp_path / "b"))
    assert all(torch.allclose(value, same[name]) for name, value in nar.state_dict().items())
    with pytest.raises(CheckpointError, match="would stay random"):
        load_published(NARForImageGeneration(**options), tmp_path / "raster.pt")


def test_vectors_are_spared_from_weight_decay(cfg, start, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("hone_nar.finetune.Group", lambda **options: made.append(Group(**options)) or made[0])
    run_train(start, replace(cfg, loop=replace(LOOP, steps=1)), tmp_path)
    found = {(p.ndim > 1, part["weight_decay"]) for part in made[0].optimizer.param_groups for p in part["params"]}
    assert found == {(True, 0.05), (False, 0.0)}


def test_the_rate_falls_at_milestones():
    shares = [rate(done, (0.5, 2 / 3, 5 / 6), 0.2) for done in (0.0, 0.49, 0.5, 0.7, 0.9)]
    assert shares == pytest.approx([1, 1, 0.2, 0.04, 0.008])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": (4, 4)}, ValueError, "codes are of a grid of 3 x 3; got --grid 4 4"),
        ({"codebook": 32}, ValueError, "codebook of 16 entries; got --codebook 32"),
        ({"classes": 1}, ValueError, "codes are of 2 classes; got --classes 1"),
        ({"model": "nar_s"}, ValueError, "model must be of tiny, nar_b"),
        ({"model": "llamagen_b", "loss": "separate"}, ValueError, "a raster model has one head"),
    ],
)
def test_what_does_not_fit_is_named_before_work(cfg, options, error, message):
    with pytest.raises(error, match=message):
        check(replace(cfg, **options))


def test_missing_files_are_named_before_work(cfg, tmp_path):
    with pytest.raises(CheckpointError, match="there are no weights at"):
        check(replace(cfg, raster=tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match="there is no folder of codes"):
        check(replace(cfg, data=tmp_path / "none"))
    with pytest.raises(CheckpointError, match="holds no codes"):
        check(replace(cfg, data=tmp_path))
