"""Distillation of whole tiny pipelines: prompts, the training, its checkpoints, what generate makes of the student."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from hone_blade.config import BladeConfig, EncodeConfig, GenerateConfig, PipelineDistillConfig, TDMConfig
from hone_blade.inputs import find_distilled, find_encoded, find_inputs
from hone_blade.lora import load_blade_lora
from hone_blade.pipelines import PipelineDistillation, beginning_with, distill_pipeline, encode_prompts, plan_of
from hone_blade.sample import Sampler, generate
from hone_blade.trio import Experts
from hone_core.config import to_dict
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_core.testing import assert_close, full_disk, requires_gpu
from hone_video.architectures import tiny, tiny_inputs, tiny_pipeline
from hone_video.caching import Cache
from hone_video.training import Loop, data_index, seeded
from hone_video.training_config import LoopConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

# diffusers calls functions that other libraries have deprecated, and imageio leaves ffmpeg's pipes to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])
SPARSE = BladeConfig(block=16, samples=8, max_density=0.4, pool=8)
TDM = TDMConfig(student_steps=3, eta=0.8, teacher_guidance=2.0, regularisation=0.5)
SIZE = {"frames": 9, "height": 64, "width": 64}
PROMPTS = ("a red cat runs left", "a blue dog", "a cat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("wan", "cogvideox", "wan2.2"):
        made[kind] = tmp_path_factory.mktemp(kind)
        options = {}
        if kind == "wan2.2":  # of the rollout's times 999, 666 and 332 the last is the second transformer's
            options = {"transformer_2": tiny("wan", 1, num_layers=1), "boundary_ratio": 0.5}
        pipe = tiny_pipeline(kind.removesuffix("2.2"), **options)
        for seed, model in enumerate((pipe.transformer, getattr(pipe, "transformer_2", None))):
            if model is not None:
                generator = torch.Generator().manual_seed(seed)
                torch.nn.init.normal_(model.proj_out.weight, std=0.3, generator=generator)
        pipe.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def caches(folders, prompts, tmp_path_factory):
    return {
        kind: work(
            encode_prompts, EncodeConfig(model=str(folder), prompt_file=prompts), tmp_path_factory.mktemp("e")
        ).prompts
        for kind, folder in folders.items()
    }


def work(verb, cfg, out, **options):
    with Run.start(package="hone-blade", verb=verb.__name__, config=cfg, out=out, device="cpu", quiet=True) as run:
        return verb(cfg, run)


def config(folders, caches, kind="wan", *, loop=None, **change):
    given = {"attention": SPARSE, "tdm": TDM, "lora_rank": 2, "fake_lr": 1e-2, "cache": caches[kind], **SIZE, **change}
    few = LoopConfig(
        steps=4, batch=2, lr=1e-2, warmup_steps=1, ema=0.0, log_every=1, checkpoint_every=2,
        gradient_checkpointing=True,
    )  # fmt: skip
    return PipelineDistillConfig(model=str(folders[kind]), loop=dataclasses.replace(few, **(loop or {})), **given)


def logged(out):
    return [
        {name: value for name, value in json.loads(line).items() if name in ("step", "loss", "fake_loss", "gap")}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def trained(folders, caches, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    return work(distill_pipeline, config(folders, caches), out), out


def test_prompts_are_encoded_as_the_pipeline_does(folders, caches):
    cache = Cache.open(caches["wan"])
    assert [cache.prompt(index) for index in range(len(cache))] == list(PROMPTS)
    pipe = DiffusionPipeline.from_pretrained(folders["wan"])
    want = pipe.encode_prompt(PROMPTS[1], do_classifier_free_guidance=False, max_sequence_length=512)[0][0]
    assert_close(cache.item(1)["text"], want)


def test_a_stopped_training_goes_on_exactly(folders, caches, trained, tmp_path, monkeypatch):
    real = PipelineDistillation.update

    def update(self):
        if self.loop.step == 3:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(PipelineDistillation, "update", update)
    cfg = config(folders, caches)
    with pytest.raises(KeyboardInterrupt):
        work(distill_pipeline, cfg, tmp_path / "run")
    monkeypatch.undo()
    report = work(distill_pipeline, cfg, tmp_path / "run")
    assert logged(tmp_path / "run") == logged(trained[1])
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]
    whole, mine = load_file(trained[0].student), load_file(report.student)
    assert whole.keys() == mine.keys()
    assert all(torch.equal(mine[name], value) for name, value in whole.items())
    assert all(value.abs().max() > 0 for value in whole.values())
    with pytest.raises(FileExistsError, match="another command"):
        work(distill_pipeline, dataclasses.replace(cfg, lora_rank=3), tmp_path / "run")


def test_a_full_disk_leaves_the_last_checkpoint(folders, caches, trained, tmp_path, monkeypatch):
    real, cfg = Loop.save, config(folders, caches)

    def save(loop):
        with full_disk(4096) if loop.step == 4 else nullcontext():
            real(loop)

    monkeypatch.setattr(Loop, "save", save)
    with pytest.raises(OSError, match=r"a checkpoint could not be written or read: .*File too large"):
        work(distill_pipeline, cfg, tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("0*")] == ["00000002"]
    report = work(distill_pipeline, cfg, tmp_path / "run")
    for name, value in load_file(trained[0].student).items():
        assert torch.equal(load_file(report.student)[name], value)


@KINDS
def test_generate_samples_the_student_as_it_was_trained(kind, folders, caches, tmp_path):
    cfg = config(folders, caches, kind, loop={"steps": 1, "batch": 1}, sample_every=1)
    report = work(distill_pipeline, cfg, tmp_path / "run")
    assert "student" in str(report)
    assert (tmp_path / "run" / "figures" / "samples-000001.png").stat().st_size > 0
    asked = GenerateConfig(model=str(folders[kind]), prompts=("a cat",), lora=str(report.student), **SIZE)
    inputs = find_inputs(asked)
    assert (inputs.config.scheduler, inputs.config.steps, inputs.config.eta) == ("tdm", 3, 0.8)
    made = work(generate, inputs.config, tmp_path / "videos")
    assert made.sparse_steps == 3
    assert len(made.videos) == 1
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    pipe.load_lora_weights(report.student.parent)
    assert pipe.transformer.peft_config


def test_a_step_moves_both_adapters_and_nothing_else(folders, caches, tmp_path):
    cfg = config(folders, caches, loop={"steps": 2})
    pipe = DiffusionPipeline.from_pretrained(folders["wan"])
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with Run.start(package="hone-blade", verb="x", config=cfg, out=tmp_path / "r", device="cpu", quiet=True) as run:
        made = PipelineDistillation(cfg, plan_of(cfg), pipe, Cache.open(cfg.cache), Loop(cfg.loop, run))
        made.update()
    assert made.loop.groups["student"].lr == cfg.loop.lr  # cosine's start
    after = {name.replace(".base_layer", ""): value for name, value in pipe.transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name in ("student", "fake"):
        moved = [p for key, p in made.loop.groups[name].parameters.items() if "lora_B" in key]
        assert moved
        assert all(p.abs().max() > 0 for p in moved)


def test_updates_are_steps_along_the_gradients_of_their_losses(folders, caches, tmp_path):
    """By hand: each sample's own numbers, losses of a mean over the batch, and AdamW without momentum."""
    cfg = config(folders, caches, loop={"clip": 0.01})
    made = []
    for name in "ab":
        pipe = DiffusionPipeline.from_pretrained(folders["wan"])
        with Run.start(
            package="hone-blade", verb="x", config=cfg, out=tmp_path / name, device="cpu", quiet=True
        ) as run:
            made.append(PipelineDistillation(cfg, plan_of(cfg), pipe, Cache.open(cfg.cache), Loop(cfg.loop, run)))
    real, plain = made
    trio, objective, cache = plain.trio, plain.objective, plain.cache
    assert objective.process.config.eta == TDM.eta
    rates = {"student": [1e-2, 1e-2 * (1 + 0.5**0.5) / 2], "fake": [1e-2, 1e-2]}
    optimizers = {
        name: torch.optim.AdamW(getattr(trio, name).parameters, betas=(0.0, 0.95), eps=1e-8, weight_decay=1e-4)
        for name in rates
    }
    for step in range(2):
        seen = real.update()
        real.loop.step += 1
        losses = dict.fromkeys(("fake_loss", "loss", "gap"), 0.0)
        kept = []
        for sample in (2 * step, 2 * step + 1):
            generator = seeded(0, "objective", sample)
            text = cache.item(data_index(sample, len(cache), 0))["text"][None]
            noise = torch.randn(1, *plain.plan.shape, generator=seeded(0, "noise", sample))
            states = objective.states(text, noise, generator)
            drawn = objective.draw(1, generator, noise.device)
            loss = objective.fake_loss(text, states, drawn, generator).mean() / 2
            loss.backward()
            losses["fake_loss"] += loss.item()
            kept.append((text, states, generator))
        step_of(optimizers["fake"], rates["fake"][step], 0.01)
        for text, states, generator in kept:
            drawn = objective.draw(1, generator, states.device)
            loss, gap = objective.student_loss(text, cache.null()[None], states, drawn, generator)
            (loss.mean() / 2).backward()
            losses["loss"] += loss.item() / 2
            losses["gap"] += gap.item() / 2
        step_of(optimizers["student"], rates["student"][step], 0.01)
        assert losses == pytest.approx({name: seen[name] for name in losses}, rel=1e-5)
        assert seen["lr"] == pytest.approx(rates["student"][step])
    for name in rates:
        own = {id(p) for p in getattr(real.trio, name).parameters}
        assert {id(p) for p in real.loop.groups[name].parameters.values()} == own
        for a, b in zip(getattr(real.trio, name).parameters, getattr(trio, name).parameters, strict=True):
            assert_close(a.detach(), b.detach())


def step_of(optimizer, rate, clip):
    (group,) = optimizer.param_groups
    group["lr"] = rate
    torch.nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def other_precision():
    """Accelerate keeps the precision of a process's first training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
def test_a_student_of_16_bits_is_trained_in_32_and_exported_averaged(folders, caches, tmp_path, monkeypatch):
    """The file holds the moving averages in the dtype of the model, and says how it was made."""
    made = []
    real = PipelineDistillation.__init__

    def keep(self, *args):
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(PipelineDistillation, "__init__", keep)
    cfg = config(folders, caches, dtype="bfloat16", loop={"steps": 2, "batch": 1, "ema": 0.9})
    report = work(distill_pipeline, cfg, tmp_path / "run")
    (found,) = made
    assert {p.dtype for group in found.loop.groups.values() for p in group.parameters.values()} == {torch.float32}
    assert not found.loop.groups["fake"].averages
    averages = {
        name.replace(".student", ""): value.bfloat16() for name, value in found.loop.groups["student"].averages.items()
    }
    stored = load_file(report.student)
    assert {name.removeprefix("transformer.") for name in stored} == averages.keys()
    for name, value in stored.items():
        assert torch.equal(value, averages[name.removeprefix("transformer.")])
        assert value.dtype == torch.bfloat16
    with safe_open(report.student, framework="pt") as file:
        assert "distill-pipeline, commit " in file.metadata()["hone_blade_made"]


def test_the_log_has_the_rate_and_the_report_the_last_gaps(trained):
    lines = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    rates = [1e-2, 1e-2 * (1 + 0.5**0.5) / 2, 0.5e-2, 1e-2 * (1 - 0.5**0.5) / 2]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    (gap,) = (row.value for row in trained[0].rows if row.metric == "gap")
    assert gap == lines[-1]["gap"] != lines[0]["gap"]


@KINDS
def test_samples_are_decoded_as_the_pipeline_does(kind, folders):
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    if kind == "wan":  # the tiny VAE's are 0 and 1
        pipe.vae.register_to_config(latents_mean=[3.0, -3.0, 2.0, -2.0], latents_std=[0.1, 5.0, 0.1, 5.0])
    given = {"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": 1.0, "num_frames": 9, "height": 64}
    latents, frames = (
        pipe(**given, width=64, generator=torch.Generator().manual_seed(0), output_type=kind).frames
        for kind in ("latent", "np")
    )
    own = SimpleNamespace(
        pipe=pipe, loop=SimpleNamespace(device=torch.device("cpu")),
        plan=SimpleNamespace(pipeline=type(pipe).__name__),
    )  # fmt: skip
    found = PipelineDistillation._decode(own, latents)
    assert found.shape == frames[0].shape
    assert abs(found.astype(float) - frames[0] * 255).max() < 1
    raw = pipe.vae.decode(latents if kind == "wan" else latents.transpose(1, 2), return_dict=False)[0][0]
    assert abs((raw.clamp(-1, 1) + 1).permute(1, 2, 3, 0).detach().numpy() * 127.5 - found).max() > 5


@KINDS
def test_a_student_trained_whole_goes_on_exactly_and_is_sampled(kind, folders, caches, tmp_path, monkeypatch):
    """Its weights all move and the teacher's do not; a stopped run is the uninterrupted one."""
    cfg = config(folders, caches, kind, lora_rank=0, fake_lr=1e-3, loop={"steps": 3, "lr": 1e-3, "checkpoint_every": 1})
    whole = work(distill_pipeline, cfg, tmp_path / "whole")
    real = PipelineDistillation.update

    def update(self):
        if self.loop.step == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(PipelineDistillation, "update", update)
    with pytest.raises(KeyboardInterrupt):
        work(distill_pipeline, cfg, tmp_path / "parts")
    monkeypatch.undo()
    parts = work(distill_pipeline, cfg, tmp_path / "parts")
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    one, two = (load_file(report.student / "diffusion_pytorch_model.safetensors") for report in (whole, parts))
    before = DiffusionPipeline.from_pretrained(folders[kind]).transformer.state_dict()
    assert one.keys() == two.keys() == before.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    moved = [name for name in one if not torch.equal(one[name], before[name])]
    assert len(moved) > 0.9 * len(one)

    asked = GenerateConfig(model=str(folders[kind]), prompts=("a cat",), transformer=str(whole.student), **SIZE)
    inputs = find_inputs(asked)
    assert (inputs.config.scheduler, inputs.config.steps, inputs.config.eta) == ("tdm", 3, 0.8)
    made = work(generate, inputs.config, tmp_path / "videos")
    assert (made.attention, made.sparse_steps) == ("custom", 3)
    with pytest.raises(CheckpointError, match="is no transformer of hone-blade distill-pipeline"):
        find_inputs(dataclasses.replace(asked, transformer=str(tmp_path)))
    with pytest.raises(ValueError, match="give lora or transformer"):
        dataclasses.replace(asked, lora="x")


def test_a_student_trained_whole_has_the_losses_of_its_roles(folders, caches, tmp_path):
    """All three begin as the teacher, each with its attention; gradients go to the one in training."""
    cfg = config(folders, caches, lora_rank=0)
    pipe = DiffusionPipeline.from_pretrained(folders["wan"])
    with Run.start(package="hone-blade", verb="x", config=cfg, out=tmp_path / "r", device="cpu", quiet=True) as run:
        made = PipelineDistillation(cfg, plan_of(cfg), pipe, Cache.open(cfg.cache), Loop(cfg.loop, run))
    lora = config(folders, caches, lora_rank=2)
    plain = DiffusionPipeline.from_pretrained(folders["wan"])
    with Run.start(package="hone-blade", verb="x", config=lora, out=tmp_path / "s", device="cpu", quiet=True) as run:
        other = PipelineDistillation(lora, plan_of(lora), plain, Cache.open(lora.cache), Loop(lora.loop, run))
    generator = torch.Generator().manual_seed(0)
    text, state = made.null, torch.randn(1, *made.plan.shape, generator=generator)
    for role in ("teacher", "student", "fake"):
        found, wanted = (x.trio.network(role, text)(state, torch.tensor([500])) for x in (made, other))
        assert_close(found.detach(), wanted.detach())
    made.trio.network("fake", text)(state, torch.tensor([500])).sum().backward()
    assert any(p.grad is not None for p in made.trio.pair.fake.parameters())
    assert all(p.grad is None for p in (*made.trio.pair.student.parameters(), *pipe.transformer.parameters()))


def test_a_fake_score_that_diverged_is_left_alone_if_asked(folders, caches, tmp_path):
    cfg = config(folders, caches, tdm=dataclasses.replace(TDM, skip_above=1e-9))
    pipe = DiffusionPipeline.from_pretrained(folders["wan"])
    with Run.start(package="hone-blade", verb="x", config=cfg, out=tmp_path / "r", device="cpu", quiet=True) as run:
        made = PipelineDistillation(cfg, plan_of(cfg), pipe, Cache.open(cfg.cache), Loop(cfg.loop, run))
        assert "fake_gradient_norm" not in made.update()
    assert all(p.abs().max() == 0 for key, p in made.loop.groups["fake"].parameters.items() if "lora_B" in key)


def launch(count, *argv, stop=None, device="cpu"):
    """A command in processes of its own, which die before the update of that number."""
    worker = Path(__file__).with_name("blade_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", worker]
    done = subprocess.run(
        list(map(str, [*command, *argv, "--device", device, "--quiet"])), capture_output=True, text=True, timeout=250,
        env=os.environ | ({} if stop is None else {"STOP": str(stop)}),
    )  # fmt: skip
    assert (done.returncode == 0) == (stop is None), done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_train_what_one_does(folders, caches, trained, tmp_path):
    launch(2, "distill-pipeline", "--config", trained[1] / "config.json", "--out", tmp_path / "run")
    for mine, whole in zip(logged(tmp_path / "run"), logged(trained[1]), strict=True):
        assert mine == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_model(folders, caches, trained, tmp_path):
    """FSDP2: the same losses and student as one process."""
    shared = ["distill-pipeline", "--config", trained[1] / "config.json", "--shard", "--sample-every", "2"]
    launch(2, *shared, "--out", tmp_path / "run")
    for mine, whole in zip(logged(tmp_path / "run"), logged(trained[1]), strict=True):
        assert mine == pytest.approx(whole, rel=1e-3)
    one, two = (load_file(folder / "artifacts" / trained[0].student.name) for folder in (trained[1], tmp_path / "run"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name].shape == value.shape
        assert (two[name] - value).norm() <= 0.05 * value.norm(), name
    sheets = sorted(file.name for file in (tmp_path / "run" / "figures").glob("samples-*"))
    assert sheets == ["samples-000002.png", "samples-000004.png"]


@pytest.mark.slow
def test_two_processes_share_models_that_are_trained_whole(folders, caches, tmp_path):
    cfg = config(folders, caches, lora_rank=0, fake_lr=1e-3, loop={"steps": 3, "lr": 1e-3})
    one = work(distill_pipeline, cfg, tmp_path / "one")
    launch(2, "distill-pipeline", "--config", one.path / "config.json", "--shard", "--out", tmp_path / "two")
    for mine, whole in zip(logged(tmp_path / "two"), logged(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(whole, rel=1e-3)
    file = Path("artifacts") / "transformer" / "diffusion_pytorch_model.safetensors"
    before = DiffusionPipeline.from_pretrained(folders["wan"]).transformer.state_dict()
    mine, whole = load_file(tmp_path / "two" / file), load_file(tmp_path / "one" / file)
    assert mine.keys() == whole.keys() == before.keys()
    step = {name: whole[name] - value for name, value in before.items()}
    apart = sum((mine[name] - whole[name]).square().sum() for name in whole)
    assert apart < 0.01 * sum(value.square().sum() for value in step.values())
    assert json.loads((tmp_path / "two" / file).with_name("config.json").read_text())["_class_name"].startswith("Wan")


@pytest.mark.slow
def test_a_sharded_training_goes_on_with_fewer_processes(folders, caches, trained, tmp_path):
    shared = ["distill-pipeline", "--config", trained[1] / "config.json", "--shard"]
    launch(2, *shared, "--out", tmp_path / "run", stop=3)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("0*")] == ["00000002"]
    cfg = config(folders, caches, shard=True)
    options = {"config": cfg, "out": tmp_path / "run", "device": "cpu", "quiet": True}
    with Run.start(package="hone-blade", verb="distill-pipeline", **options) as run:
        distill_pipeline(cfg, run)
    for mine, whole in zip(logged(tmp_path / "run"), logged(trained[1]), strict=True):
        assert mine == pytest.approx(whole, rel=1e-3)


@requires_gpu()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_train_what_one_does_whole_and_sharded(folders, caches, tmp_path, dtype):
    """In float32 to the order of sums; in 16 bits, in which gradients are rounded, to a hundredth."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    # Blocks that the kernels take. Dense attention is that of the worker: gradients that differ by 1e-4 of their size,
    # as those of the fast one can in 16 bits, would after three such updates be a loss that differs by 2 percent.
    sparse = dataclasses.replace(SPARSE, block=32, max_density=0.5)
    cfg = config(folders, caches, dtype=dtype, attention=sparse, loop={"lr": 1e-3}, fake_lr=1e-3)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(cfg)))
    for name, count, options in (("one", 1, []), ("two", 2, []), ("sharded", 2, ["--shard"])):
        argv = ["distill-pipeline", "--config", file, *options, "--out", tmp_path / name]
        launch(count, *argv, device="cuda")
    for name in ("two", "sharded"):
        for mine, whole in zip(logged(tmp_path / name), logged(tmp_path / "one"), strict=True):
            assert mine == pytest.approx(whole, rel=1e-3 if dtype == "float32" else 1e-2)


def test_both_transformers_of_wan22_are_trained_and_drawn_with(folders, caches, tmp_path):
    """A LoRA each, which says which it is for; sampled as the pipeline does, it is the rollout that was trained."""
    cfg = config(folders, caches, "wan2.2", loop={"steps": 3, "batch": 3})
    report = work(distill_pipeline, cfg, tmp_path / "run")
    assert str(report.second) in str(report)
    for file in (report.student, report.second):
        assert all(value.abs().max() > 0 for value in load_file(file).values())
    assert (load_file(report.student).keys()) == (load_file(report.second).keys())
    asked = GenerateConfig(
        model=str(folders["wan2.2"]), prompts=(PROMPTS[0],), lora=str(report.student), lora_2=str(report.second), **SIZE
    )
    inputs = find_inputs(asked)
    assert (inputs.config.scheduler, inputs.config.steps, inputs.config.eta) == ("tdm", 3, 0.8)
    sampler = Sampler.load(inputs, "cpu")
    with sampler.attached() as handle, handle.record() as rows:
        drawn = sampler.draw(0, output_type="latent")
    assert [(row.step, row.model) for row in rows] == [(0, 0), (1, 0), (2, 1)]

    pipe = DiffusionPipeline.from_pretrained(folders["wan2.2"])
    with Run.start(package="hone-blade", verb="x", config=cfg, out=tmp_path / "r", device="cpu", quiet=True) as run:
        made = PipelineDistillation(cfg, plan_of(cfg), pipe, Cache.open(cfg.cache), Loop(cfg.loop, run))
        for part, file in (("transformer", report.student), ("transformer_2", report.second)):
            own = {
                name.replace(".weight", ".student.weight").removeprefix("transformer."): value
                for name, value in load_file(file).items()
            }
            found = getattr(pipe, part).load_state_dict(own, strict=False)
            assert not found.unexpected_keys
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, *made.plan.shape, generator=generator)
        text = Cache.open(cfg.cache).item(0)["text"][None]
        assert_close(made.objective.samples(text, noise, generator), drawn)

    for wrong in ({"lora": asked.lora_2, "lora_2": None}, {"lora": None, "lora_2": asked.lora}):
        with pytest.raises(CheckpointError, match=r"is for the transformer(_2)? of its pipeline, not the transformer"):
            find_inputs(dataclasses.replace(asked, **wrong))
    pipe = DiffusionPipeline.from_pretrained(folders["wan2.2"])
    with pytest.raises(CheckpointError, match="is for the transformer_2 of its pipeline"):
        load_blade_lora(pipe, report.second, transformer="transformer")
    assert load_blade_lora(pipe, report.second, transformer="transformer_2").rank == 2
    pipe = DiffusionPipeline.from_pretrained(folders["wan2.2"])
    pipe.load_lora_weights(report.student.parent)
    pipe.load_lora_weights(str(report.second), load_into_transformer_2=True)
    assert pipe.transformer.peft_config
    assert pipe.transformer_2.peft_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two images with prompts, of another shape than the videos."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("red", "blue"):
        Image.new("RGB", (50, 70), name).save(folder / f"{name}.png")
    lines = [{"file_name": f"{name}.png", "text": f"a {name} cat"} for name in ("red", "blue")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@KINDS
def test_image_to_video_is_trained_and_drawn_with(kind, pictures, folders, caches, tmp_path):
    """What is trained reads the image as the pipeline does: its samples are those of ``generate``."""
    pipe = tiny_pipeline(kind, image=True)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    # CogVideoX draws the image's latents; of so small a variance every draw is the mean.
    vae = pipe.vae.encoder.conv_out
    out = vae.conv if kind == "cogvideox" else pipe.vae.quant_conv
    out.weight.data[4:], out.bias.data[4:] = 0.0, -30.0
    pipe.save_pretrained(tmp_path / "pipe")
    asked = EncodeConfig(model=str(tmp_path / "pipe"), image_folder=pictures, **SIZE)
    cache = work(encode_prompts, find_encoded(asked), tmp_path / "encoded").prompts
    cfg = dataclasses.replace(
        config(folders, caches, kind, loop={"steps": 2}, sample_every=1), model=str(tmp_path / "pipe"), cache=cache,
        frames=None, height=None, width=None,
    )  # fmt: skip
    cfg = find_distilled(cfg)
    report = work(distill_pipeline, cfg, tmp_path / "run")
    assert all(value.abs().max() > 0 for value in load_file(report.student).values())
    files = [str(pictures / f"{name}.png") for name in ("red", "blue")]
    drawing = GenerateConfig(
        model=str(tmp_path / "pipe"), prompts=("a red cat",) * 2, images=tuple(files), lora=str(report.student), **SIZE
    )
    sampler = Sampler.load(find_inputs(drawing), "cpu")
    with sampler.attached():
        drawn = [sampler.draw(index, output_type="latent") for index in range(2)]

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    with Run.start(package="hone-blade", verb="x", config=cfg, out=tmp_path / "r", device="cpu", quiet=True) as run:
        made = PipelineDistillation(cfg, plan_of(cfg), pipe, Cache.open(cfg.cache), Loop(cfg.loop, run))
    own = {
        name.replace(".weight", ".student.weight").removeprefix("transformer."): value
        for name, value in load_file(report.student).items()
    }
    assert not pipe.transformer.load_state_dict(own, strict=False).unexpected_keys
    for index in range(2):
        (text, _), (_, image) = made.item(0), made.item(index)
        generator = torch.Generator().manual_seed(index)
        if kind == "cogvideox":  # the pipeline draws the image's latents first
            torch.randn(1, 4, 1, 8, 8, generator=generator)
        noise = torch.randn(1, *made.plan.shape, generator=generator)
        with beginning_with(image):
            assert_close(made.objective.samples(text, noise, generator), drawn[index])
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_images_that_do_not_fit_are_named(pictures, folders, caches, prompts, tmp_path):
    tiny_pipeline("wan", image=True).save_pretrained(tmp_path / "image")
    model = str(tmp_path / "image")
    with pytest.raises(CheckpointError, match="is a WanPipeline, which takes no images; pass --prompt-file"):
        find_encoded(EncodeConfig(model=str(folders["wan"]), image_folder=pictures))
    with pytest.raises(CheckpointError, match="is a WanImageToVideoPipeline; expected WanPipeline or"):
        find_encoded(EncodeConfig(model=model, prompt_file=prompts))
    with pytest.raises(ValueError, match="give prompts: --prompt-file FILE"):
        EncodeConfig(model=model)
    with pytest.raises(ValueError, match="pass --image-folder"):
        EncodeConfig(model=model, prompt_file=prompts, height=64)
    asked = dataclasses.replace(config(folders, caches), model=model)
    with pytest.raises(CheckpointError, match="holds no images that a WanImageToVideoPipeline with this VAE"):
        find_distilled(asked)
    with pytest.raises(ValueError, match="expected prompts with images, --cache FOLDER"):
        find_distilled(dataclasses.replace(asked, cache=None, prompt_file=prompts))
    tiny_pipeline("wan", image=True, expand_timesteps=True).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="has the image in the first latent frame"):
        find_encoded(EncodeConfig(model=str(tmp_path / "first"), image_folder=pictures, **SIZE))
    with pytest.raises(ValueError, match="frames must be a multiple of 4 plus 1"):
        find_encoded(EncodeConfig(model=model, image_folder=pictures, frames=8))
    cache = work(encode_prompts, EncodeConfig(model=model, image_folder=pictures, **SIZE), tmp_path / "e").prompts
    with pytest.raises(ValueError, match=r"height must be 64, at which .* was encoded; got 80"):
        find_distilled(dataclasses.replace(asked, cache=cache, height=80))


@pytest.mark.slow
def test_two_processes_train_two_transformers(folders, caches, tmp_path):
    """Where a process calls one of them and another the other."""
    cfg = config(folders, caches, "wan2.2", loop={"steps": 3})
    one = work(distill_pipeline, cfg, tmp_path / "one")
    launch(2, "distill-pipeline", "--config", one.path / "config.json", "--out", tmp_path / "two")
    for mine, whole in zip(logged(tmp_path / "two"), logged(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(whole, rel=1e-3)
    for file in (one.student.name, one.second.name):
        mine, whole = (load_file(tmp_path / run / "artifacts" / file) for run in ("two", "one"))
        for name, value in whole.items():
            assert (mine[name] - value).norm() <= 0.05 * value.norm(), name


def test_a_call_goes_to_the_transformer_of_its_time():
    high, low = (tiny("wan", seed, num_layers=1) for seed in (0, 1))
    both, given = Experts(high, low, 500.0), tiny_inputs("wan")
    for times, model in (([500, 999], high), ([499, 0], low)):
        given["timestep"] = torch.tensor(times)
        assert torch.equal(both(**given, return_dict=False)[0], model(**given, return_dict=False)[0])
    with pytest.raises(ValueError, match=r"on one side of 500; got \[499, 500\]"):
        both(**{**given, "timestep": torch.tensor([499, 500])})


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "does not exist"),
        (b"\n \n", ValueError, "holds no prompt"),
        (b"\xff\xfe\x00a", ValueError, "is not UTF-8 text"),
    ],
)
def test_a_prompt_file_that_is_none_is_named(folders, tmp_path, content, error, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        find_encoded(EncodeConfig(model=str(folders["wan"]), prompt_file=file))
    with pytest.raises(error, match=message):
        find_distilled(PipelineDistillConfig(model=str(folders["wan"]), prompt_file=file, **SIZE))


def test_what_does_not_fit_is_named_before_anything_is_loaded(folders, caches, tmp_path):
    with pytest.raises(CheckpointError, match="is no folder of encoded prompts"):
        find_distilled(config(folders, caches, cache=tmp_path))
    with pytest.raises(CheckpointError, match="made by another text encoder"):
        find_distilled(config(folders, caches, cache=caches["cogvideox"]))
    with pytest.raises(ValueError, match="frames must be a multiple of 4 plus 1"):
        find_distilled(config(folders, caches, frames=8))
    with pytest.raises(ValueError, match="height must be a multiple of 16"):
        find_distilled(config(folders, caches, height=60))
    with pytest.raises(ValueError, match="expected dense_steps 0, got 12"):
        find_distilled(config(folders, caches, attention=None, preset="wan2.1-1.3b-free"))
    for change in ({"shard": True}, {"lora_rank": 0}):
        with pytest.raises(ValueError, match=r"has two transformers, as Wan2\.2: expected a LoRA, and no shard"):
            find_distilled(config(folders, caches, "wan2.2", **change))


def test_accelerates_own_sharding_is_refused(folders, caches, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match="pass --shard, and launch without --use_fsdp"):
        work(distill_pipeline, config(folders, caches), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": None}, "give prompts.*; got neither"),
        ({"prompt_file": Path("p")}, "give prompts.*; got both"),
        ({"preset": "tiny", "attention": SPARSE}, "give preset or attention, not both"),
        ({"objective": "tiny", "tdm": TDM}, "give objective or tdm, not both"),
        ({"objective": "none"}, "no objective 'none'"),
        ({"loop": LoopConfig(micro_batch=2)}, "micro_batch must be 1"),
        ({"sample_every": -1}, "sample_every must not be negative"),
        ({"lora_rank": -1}, "lora_rank must be positive, or 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PipelineDistillConfig(**{"model": "x", "cache": Path("c"), **change})
