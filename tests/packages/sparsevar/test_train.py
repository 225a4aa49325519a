import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_core.testing import assert_close
from hone_core.training import rate_at
from hone_sparsevar.config import HostConfig, TrainHostConfig
from hone_sparsevar.data import random_labels, word_table, words
from hone_sparsevar.host import SCHEDULE, Host, load_host
from hone_sparsevar.train import Making, check_scales, scale_weights, self_corrected, train_host
from hone_visual_ar.schedules import ScaleSchedule

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


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_kept_follows_the_weights_at_each_stages_rate(tmp_path, ema):
    rates = {"tokenizer": 1e-3, "grader": 1e-3, "transformer": 4e-3}
    cfg = replace(CONFIG, ema=ema, tokenizer_lr=1e-3, lr=4e-3)
    making = Making(cfg, torch.device("cpu"), tmp_path / "x.pt")
    names = ("head.weight", "word_embed.weight")

    def read(model):
        return [model.state_dict()[name].clone() for name in names]

    want = read(making.host.transformer)
    for _ in making.train():
        if making.training.step > 4:  # four steps are of the tokenizer and the grader
            want = [w + (1 - ema) * (now - w) for w, now in zip(want, read(making.host.transformer), strict=True)]
    for found, w in zip(read(making.result().transformer), want, strict=True):
        assert_close(found, w)
    # The last steps of each stage lie at these shares of it.
    for (stage, peak), done in zip(rates.items(), (2 / 6 / 0.4, 0.1 / 0.2, (5 / 6 - 0.6) / 0.4), strict=True):
        assert making.optimizers[stage].param_groups[0]["lr"] == pytest.approx(peak * rate_at(done))


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_share_of_prompts_is_dropped(tmp_path, drop, monkeypatch):
    making = Making(replace(CONFIG, drop=drop), torch.device("cpu"), tmp_path / "x.pt")
    seen, condition = [], making.host.transformer.condition
    monkeypatch.setattr(
        making.host.transformer,
        "condition",
        lambda *args, **options: seen.append(options) or condition(*args, **options),
    )
    making.loss("transformer")
    assert seen[0]["drop"].tolist() == [bool(drop)] * CONFIG.batch


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


def test_a_device_whose_attention_counts_padding_is_refused(monkeypatch):
    host, cpu = Host.untrained(CONFIG.host), torch.device("cpu")
    check_scales(host, cpu)

    def padded(q, k, v, context, layer):
        # Keys filled up to a tile of 64 with zeros that are not masked.
        out = []
        for begin, end in pairwise((0, *context.ends)):
            keys, values = (F.pad(x[:, :, :end], (0, 0, 0, -end % 64)) for x in (k, v))
            out.append(F.scaled_dot_product_attention(q[:, :, begin:end], keys, values, scale=1.0))
        return torch.cat(out, 2)

    def ahead(q, k, v, context, layer):
        # Each scale reads the next one too.
        ends = (*context.ends[1:], context.ends[-1])
        parts = [
            F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :last], v[:, :, :last], scale=1.0)
            for (begin, end), last in zip(pairwise((0, *context.ends)), ends, strict=True)
        ]
        return torch.cat(parts, 2)

    for wrong in (padded, ahead):
        monkeypatch.setattr("hone_sparsevar.train.attend", wrong)
        with pytest.raises(RuntimeError, match="attention on cpu is wrong at scale 0"):
            check_scales(host, cpu)


def test_bits_of_every_place_are_learned_from_the_prompt_alone(tmp_path):
    """Inputs are zero, so that words and rotary positions are all there is to tell bits by."""
    config = replace(CONFIG, host=replace(CONFIG.host, depth=2, width=64))
    transformer = Making(config, torch.device("cpu"), tmp_path / "x.pt").host.transformer
    schedule, generator = ScaleSchedule(SCHEDULE.grids[:3], SCHEDULE.rope_grid), torch.Generator().manual_seed(0)
    text, lengths = words(random_labels(8, generator), word_table(generator))
    bits = torch.randint(2, (8, schedule.total, 12), generator=generator)
    optimizer = torch.optim.AdamW(transformer.parameters(), 4e-3)

    def loss(text, lengths):
        condition = transformer.condition(text, lengths, guided=False)
        logits = transformer(condition, torch.zeros(8, schedule.total - 1, 12), schedule)
        return F.cross_entropy(logits.flatten(0, 2), bits.flatten(), reduction="none").view(bits.shape).mean((0, 2))

    for _ in range(150):
        optimizer.zero_grad()
        loss(text, lengths).mean().backward()
        optimizer.step()
    with torch.no_grad():
        right, other = loss(text, lengths), loss(text.roll(1, 0), lengths[-1:] + lengths[:-1])
    assert right.max() < 0.3
    assert other.mean() > 0.7
