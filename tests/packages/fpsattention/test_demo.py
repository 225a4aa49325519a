import dataclasses

import pytest
import torch
from hone_core.runs import Run
from hone_fpsattention.config import PRESETS, DemoConfig, EvalConfig
from hone_fpsattention.demo import DemoReport, demo
from hone_fpsattention.evaluate import EvalReport, Variant, compare, evaluate, load_variants, mean_density
from hone_fpsattention.host import save_host
from hone_video.host import load_host


def start(verb, cfg, out):
    return Run.start(package="hone-fpsattention", verb=verb, config=cfg, out=out, device="cpu", quiet=True)


@pytest.fixture
def tuned_host(tiny_host, tmp_path):
    return save_host(load_host(path=tiny_host), PRESETS["tiny"].config, tmp_path / "tuned" / "host.safetensors")


def test_the_demo_draws_every_variant(tiny_host, tuned_host, tmp_path):
    cfg = DemoConfig(host=tiny_host, tuned=tuned_host, limit=1)
    with start("demo", cfg, tmp_path / "run") as run:
        report = demo(cfg, run)
    assert report.video.is_file()
    assert report.sheet.is_file()
    rows = {(row.metric, row.variant): row.value for row in report.rows}
    assert rows["psnr", "dense"] == 100
    assert rows["psnr", "e4m3"] > rows["psnr", "window"]
    assert rows["density", "e4m3"] == rows["density", "dense"] == 1
    assert rows["density", "window"] == rows["density", "both"] == rows["density", "trained"] < 1
    # The tuned host here has the dense weights.
    assert rows["psnr", "trained"] == rows["psnr", "both"]
    text = str(report)
    assert "E4M3 and window, trained" in text
    assert str(DemoReport.of(run)) == text


def test_eval_without_a_tuned_host(tiny_host, tmp_path):
    cfg = EvalConfig(host=tiny_host, prompts=3, batch=2)
    with start("eval", cfg, tmp_path / "run") as run:
        report = evaluate(cfg, run)
    accuracy = [row for row in report.rows if row.metric == "accuracy"]
    assert [row.variant for row in accuracy] == ["dense", "e4m3", "window", "both"]
    assert all(row.n == 3 and row.interval is not None for row in accuracy)
    assert str(EvalReport.of(run)) == str(report)


def test_a_preset_is_what_is_attached_and_not_what_the_tuned_host_has():
    wide = load_variants(torch.device("cpu"), host=None, tuned=None, preset="tiny-wide")
    assert list(wide) == ["dense", "e4m3", "window", "both"]
    assert wide["both"].attention == PRESETS["tiny-wide"].config
    own = load_variants(torch.device("cpu"), host=None, tuned=None, preset=None)
    assert list(own) == [*wide, "trained"]
    assert own["both"].attention == own["trained"].attention == PRESETS["tiny"].config


def test_parts_of_a_batch_make_the_same_clips(tiny_host):
    variants = load_variants(torch.device("cpu"), host=tiny_host, tuned=None, preset="tiny")
    labels = torch.tensor([[7, 0, 4, 0, 0], [3, 1, 1, 2, 0], [0, 2, 2, 1, 1]])
    one, parts = (compare({"dense": variants["dense"]}, labels, batch=batch, quiet=True) for batch in (3, 2))
    assert torch.allclose(one["dense"].clips, parts["dense"].clips, atol=1e-6)


def test_mean_density_weighs_steps_by_their_evaluations():
    host = load_host()
    tiny = PRESETS["tiny"].config
    # Windows read 3, 9 and 4 of 16 tiles in a quarter, a half and a quarter of the steps.
    counts = host.evaluations()
    shares = [3 / 16] * 2 + [9 / 16] * 4 + [4 / 16] * 2
    expected = sum(a * b for a, b in zip(shares, counts, strict=True)) / sum(counts)
    assert mean_density(host, tiny) == pytest.approx(expected)
    assert mean_density(host, None) == 1
    assert mean_density(host, tiny.parts()["e4m3"]) == 1


def test_the_schedule_reads_as_much_as_its_constant_window():
    counts = 8
    wide = PRESETS["tiny-wide"].config
    host = load_host()
    unguided = dataclasses.replace(host.config, guidance=1.0, steps=counts)
    host.config = unguided
    assert mean_density(host, wide) == pytest.approx(0.5625)


def test_a_variant_is_attached_only_while_it_samples(tiny_host):
    host = load_host(path=tiny_host)
    before = [block.attn1.processor for block in host.transformer.blocks]
    compare({"both": Variant(host, PRESETS["tiny"].config)}, torch.tensor([[7, 0, 4, 0, 0]]), quiet=True)
    assert [block.attn1.processor for block in host.transformer.blocks] == before
