import json
from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch
from hone_blade import demo as module
from hone_blade.config import (
    PACKAGED_LORA,
    PRESETS,
    PROMPTS,
    TDM_PRESETS,
    BladeConfig,
    Comparison,
    DemoConfig,
    DistillConfig,
)
from hone_blade.demo import DemoReport, _reached, demo
from hone_blade.distill import rollout_clips, student_host
from hone_blade.evaluate import VARIANTS
from hone_blade.inputs import find_student
from hone_blade.lora import lora_targets, save_blade_lora
from hone_blade.lora_files import read_header, read_rollout
from hone_blade.models import attach
from hone_core.errors import CheckpointError
from hone_core.runs import Run, load_results
from hone_video.grader import grade
from hone_video.host import Host, load_host, save_host
from hone_video.host_config import HostConfig
from hone_video.prompts import parse_prompt
from matplotlib.image import imread
from peft import LoraConfig

TINY = HostConfig(
    frames=4,
    height=16,
    width=16,
    layers=1,
    heads=1,
    head_dim=32,
    ffn_dim=32,
    text_dim=16,
    steps=2,
    solver="euler",
    guidance=1.0,
)
SMALL = Comparison(block=16, density=0.5, pool=4, samples=4)
METRICS = {"psnr", "ssim", "recall", "density", "accuracy", "seconds", "attention_gflop", "digit_accuracy"}


def start(cfg, path):
    return Run.start(
        package="hone-blade", verb="demo", config=cfg, out=path, seed=cfg.comparison.seed, device="cpu", quiet=True
    )


def test_demo_leaves_a_video_a_sheet_and_rows(tmp_path):
    save_host(Host.untrained(TINY), tmp_path / "host.safetensors")
    cfg = DemoConfig(limit=2, comparison=SMALL, host=tmp_path / "host.safetensors")
    with start(cfg, tmp_path / "run") as run:
        report = demo(cfg, run)
    variants: dict[str, set[str]] = {}
    for row in load_results(run.path)["rows"]:
        variants.setdefault(row["variant"], set()).add(row["metric"])
    assert list(variants) == list(VARIANTS)
    assert all(metrics >= METRICS for metrics in variants.values())
    assert imread(report.sheet).shape[0] > 100
    assert imageio_ffmpeg.count_frames_and_secs(report.video)[0] == 12
    text = str(report)
    assert "not expected to be faster" in text
    assert "2 clips" in text
    assert "no distilled student is packaged" in text
    assert str(report.video) in text
    with start(cfg, tmp_path / "run") as again:
        assert again.done
        assert DemoReport.of(again) == report


def test_a_student_is_drawn_beside_its_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TEACHER_STEPS", 3)
    made = Host.untrained(TINY)
    torch.nn.init.normal_(made.transformer.proj_out.weight, std=0.1)
    path = save_host(made, tmp_path / "host.safetensors")
    host = load_host(path=path)
    settings = BladeConfig(block=16, max_density=0.5, pool=8, samples=4)
    adapters = LoraConfig(r=2, lora_alpha=2, target_modules=lora_targets(host.transformer), init_lora_weights=False)
    host.transformer.add_adapter(adapters, "student")
    lora = save_blade_lora(host.transformer, tmp_path / "l.safetensors", adapter_name="student", config=settings)
    cfg = DemoConfig(limit=2, comparison=SMALL, host=path, lora=lora)
    with start(cfg, tmp_path / "run") as run:
        report = demo(cfg, run)
    rows = {(row.variant, row.metric): row.value for row in report.rows if row.split == "distilled"}
    assert (rows["teacher", "nfe"], rows["student", "nfe"]) == (3, 8)
    assert rows["teacher", "density"] == 1
    # Two of four blocks, and a pooled key for eight tokens.
    assert 0.25 + 1 / 8 <= rows["student", "density"] <= 0.5 + 1 / 8
    text = str(report)
    assert "distilled: 8 sparse steps        8" in text
    assert "no distilled student" not in text
    assert imread(tmp_path / "run" / "figures" / "distilled.png").shape[0] > 100
    assert imageio_ffmpeg.count_frames_and_secs(tmp_path / "run" / "artifacts" / "distilled.mp4")[0] == 12
    assert set(report.variants) == set(VARIANTS)


def test_a_missing_student_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="made by hone-blade distill"):
        find_student(DemoConfig(lora=tmp_path / "none.safetensors"))


def test_the_packaged_student_is_of_the_packaged_host(tmp_path, monkeypatch):
    there = tmp_path / "lora.safetensors"
    monkeypatch.setattr("hone_blade.config.PACKAGED_LORA", there)
    assert DemoConfig().student is None
    there.touch()
    assert DemoConfig().student == there
    assert DemoConfig(host=tmp_path / "host.safetensors").student is None


@pytest.mark.slow
def test_the_packaged_student_draws_what_it_is_asked_for():
    """In 8 sparse steps, where the teacher's weights with the same attention and noise miss most digits."""
    host = load_host()
    labels = torch.tensor([parse_prompt(prompt) for prompt in PROMPTS[:3]])
    tdm = TDM_PRESETS["tiny"].config
    assert PACKAGED_LORA.stat().st_size < 8 * 2**20
    settings = student_host(host, PACKAGED_LORA)
    assert settings == PRESETS["tiny"].config
    assert read_rollout(PACKAGED_LORA, read_header(PACKAGED_LORA)[2]) == DistillConfig().rollout
    with attach(host.transformer, settings):
        right = grade(host.classifier, rollout_clips(host, labels, tdm, seed=0), labels)["accuracy"]
        host.transformer.disable_adapters()
        before = grade(host.classifier, rollout_clips(host, labels, tdm, seed=0), labels)["accuracy"]
    assert right.sum() == 3
    assert before.sum() < 3
    facts = json.loads(PACKAGED_LORA.with_suffix(".json").read_text())
    assert facts["result"]["accuracy"] > 0.9
    assert facts["environment"]["commit"]


@pytest.mark.parametrize(
    ("densities", "text"),
    [
        ((0.25, 0.25), "25% of the query-key pairs"),
        ((0.1875, 0.1875), "18.8% of the query-key pairs (25% asked for)"),
        ((0.25, 0.2217), "22.2% to 25% of the query-key pairs (25% asked for)"),
    ],
)
def test_the_title_says_what_was_computed(densities, text):
    outcomes = {"dense": SimpleNamespace(density=1.0)}
    outcomes |= {name: SimpleNamespace(density=x) for name, x in zip(("asa", "asa_g"), densities, strict=True)}
    assert _reached(outcomes, 0.25) == text


def test_a_bad_prompt_makes_no_config():
    with pytest.raises(ValueError, match="unknown word 'cat'"):
        DemoConfig(prompts=("a red cat",), comparison=SMALL)
    with pytest.raises(ValueError, match="at least one prompt"):
        DemoConfig(prompts=())


def test_the_packaged_host_draws_what_one_prompt_asks_for_and_sparse_nearly_the_same():
    host, labels = load_host(), torch.tensor([parse_prompt(PROMPTS[0])])
    text, noise = host.encode_prompt(PROMPTS[0]), host.noise(1, 0)
    clip = host.sample(text, noise)
    grades = grade(host.classifier, clip, labels)
    assert {name: float(grades[name]) for name in ("digit", "color", "direction", "speed")} == dict.fromkeys(
        ("digit", "color", "direction", "speed"), 1.0
    )
    with attach(host.transformer, "tiny") as handle, handle.record() as stats:
        sparse = host.sample(text, noise, steps=2)
    assert sparse.isfinite().all()
    assert len(stats) == 2 * host.config.layers
    assert max(row.stats.density.max() for row in stats) < 0.25
    # another clip, but of the same picture
    assert 1e-3 < (sparse - host.sample(text, noise, steps=2)).square().mean().sqrt() < 0.2


@pytest.mark.slow
def test_the_packaged_host_draws_what_it_is_asked_for(tmp_path):
    host = load_host()
    assert host.facts.passed
    labels = torch.tensor([parse_prompt(prompt) for prompt in PROMPTS])
    clips = host.sample(host.encode_prompt(PROMPTS), host.noise(len(PROMPTS), 0))
    assert grade(host.classifier, clips, labels)["accuracy"].mean() >= 0.8
