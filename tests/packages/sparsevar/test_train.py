import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_core.testing import assert_close
from hone_sparsevar.config import HostConfig, TrainHostConfig
from hone_sparsevar.host import SCHEDULE, load_host
from hone_sparsevar.train import Making, scale_weights, self_corrected, train_host

CONFIG = TrainHostConfig(
    host=HostConfig(depth=1, width=32, heads=2, ae_channels=32, ae_multipliers=(1, 1, 1), grader_channels=8),
    steps=6,
    batch=4,
    eval_images=2,
    log_every=1,
    tokenizer_share=0.4,
    grader_share=0.2,
)


def start(out, config=CONFIG):
    return Run.start(
        config=config, package="hone-sparsevar", verb="train-host", out=out, seed=0, device="cpu", quiet=True,
        command="hone-sparsevar train-host",
    )  # fmt: skip


def test_a_host_is_trained_graded_and_loads(tmp_path):
    with start(tmp_path / "run") as run:
        report = train_host(CONFIG, run)
    assert report.steps == 6
    assert not report.passed
    assert set(report.result) == {"reconstruction_psnr", "grader", "reconstructed", "objects"}
    assert load_host(path=report.checkpoint).config == CONFIG.host
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [0, 0, 0, 1, 2, 2]
    # Every scale weighs the same, so that the loss is the mean of theirs; at the start all are at chance.
    scales = [lines[-1][f"nats_scale_{k}"] for k in range(7)]
    assert sum(scales) / 7 == pytest.approx(lines[-1]["loss"], rel=1e-4)
    assert scales == pytest.approx([0.693] * 7, abs=0.1)
    assert "nats_scale_0" not in lines[0]


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path):
    whole = Making(CONFIG, torch.device("cpu"), tmp_path / "whole.pt")
    for _ in whole.train():
        pass
    cut = Making(CONFIG, torch.device("cpu"), tmp_path / "cut.pt")
    for at, _ in enumerate(cut.train()):
        if at == 3:
            break
    cut.training.save()
    again = Making(CONFIG, torch.device("cpu"), tmp_path / "cut.pt")
    assert again.training.resume()
    for _ in again.train():
        pass
    for first, second in zip(
        whole.result().transformer.parameters(), again.result().transformer.parameters(), strict=True
    ):
        assert torch.equal(first, second)
    other = Making(TrainHostConfig(host=CONFIG.host, steps=9), torch.device("cpu"), tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match=r"differs in .*steps"):
        other.training.resume()


def test_self_correction_without_flips_is_the_tokenizers_own_encoding():
    making = Making(CONFIG, torch.device("cpu"), "unused.pt")
    tokenizer = making.host.tokenizer
    features = torch.randn(2, 12, 16, 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inputs, bits = self_corrected(tokenizer, features, torch.zeros(7), generator)
        indices, latent = tokenizer.to_scales(features, SCHEDULE)
        assert torch.equal(bits, torch.cat([i.flatten(2).transpose(1, 2) for i in indices], 1))
        last = tokenizer.spread(tokenizer.embed(indices[-1].movedim(1, -1)).movedim(-1, 1), (16, 16), scale=6, scales=7)
        assert_close(inputs[:, -256:].transpose(1, 2).unflatten(2, (16, 16)), latent - last)
        flipped, repaired = self_corrected(tokenizer, features, torch.tensor([1.0] + 6 * [0.0]), generator)
    # The first scale's bits are all turned round, its targets are not, and the second's differ: they repair it.
    assert torch.equal(repaired[:, :1], bits[:, :1])
    assert not torch.equal(repaired[:, 1:5], bits[:, 1:5])
    assert_close(flipped[:, 0], -inputs[:, 0])


def test_scales_weigh_the_same():
    weights = scale_weights(torch.device("cpu"))
    assert_close(weights.mean(), torch.tensor(1.0))
    assert_close(weights[-1] / weights[0], torch.tensor(1 / 256))


def test_blocks_that_do_not_compile_are_trained_as_they_are(tmp_path, monkeypatch, caplog):
    making = Making(CONFIG, torch.device("cpu"), tmp_path / "c.pt")
    monkeypatch.setattr(making, "device", SimpleNamespace(type="cuda"))
    state = making.generator.get_state()

    def fail(stage):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(making, "loss", fail)
    monkeypatch.setattr(torch, "compile", lambda function, **options: partial(function))
    making._compile()
    assert "do not compile (no compiler)" in caplog.text
    block = making.host.transformer.layers[0]
    assert block.before == type(block).before.__get__(block)
    assert torch.equal(making.generator.get_state(), state)
