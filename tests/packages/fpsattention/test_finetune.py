import dataclasses
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import imageio
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, WanTransformer3DModel
from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.runs import Run
from hone_core.testing import assert_close, requires_gpu
from hone_fpsattention import cli, finetune
from hone_fpsattention.config import FPSAttentionConfig, GenerateConfig, Regime, TrainConfig, VideoConfig
from hone_fpsattention.finetune import Tuning, schedule_of
from hone_fpsattention.inputs import find_finetuned, find_video
from hone_fpsattention.models import attach, describe_model
from hone_fpsattention.sample import Sampler, generate
from hone_fpsattention.schedule import Schedule, regime_index
from hone_fpsattention.tuned import export_tuned, read_tuned
from hone_video.architectures import tiny, tiny_pipeline
from hone_video.caching import Cache
from hone_video.training import Loop
from hone_video.training_config import DataConfig, LoopConfig

# diffusers calls functions that other libraries have deprecated, and imageio leaves ffmpeg's pipes to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SIZE = {"frames": 9, "height": 64, "width": 64}
STAGED = FPSAttentionConfig(
    tile=(2, 2, 2), block=64, regimes=(Regime(window=(1, 1, 1)), Regime(e4m3=False)), boundaries=(0.5,), shift=3.0
)
CPU = {"package": "hone-fpsattention", "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("wan", "cogvideox"):
        made[kind] = tmp_path_factory.mktemp(kind)
        pipe = tiny_pipeline(kind)
        with torch.no_grad():
            torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3)
        pipe.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    lines = []
    for index, text in enumerate(["a red cat", "a blue dog", "a cat runs left"]):
        pictures = np.random.default_rng(index).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
        imageio.mimwrite(folder / f"{index}.mp4", list(pictures), fps=16, codec="libx264")
        lines.append(json.dumps({"file_name": f"{index}.mp4", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def cache(folders, videos, tmp_path_factory):
    """Encoded once for all tests of Wan."""
    from hone_video.caching import fill_cache
    from hone_video.listings import read_clips

    made = fill_cache(
        tmp_path_factory.mktemp("cache") / "wan", read_clips(videos), str(folders["wan"]),
        device=torch.device("cpu"), dtype=torch.float32, size=(9, 64, 64), quiet=True,
    )  # fmt: skip
    return made.path


def config(folders, cache, *, steps=4, **change):
    loop = LoopConfig(
        steps=steps, batch=2, micro_batch=2, seed=1, lr=1e-2, warmup_steps=1, ema=0.5, log_every=1, checkpoint_every=2
    )
    given = {"attention": STAGED, "lora_rank": 2, "data": DataConfig(cache=cache, **SIZE), "loop": loop}
    return TrainConfig(model=str(folders["wan"]), **{**given, **change})


def train(cfg, out):
    run = Run.start(verb="train", config=cfg, out=out, **CPU)
    with run:
        return finetune.train(cfg, run)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(folders, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(config(folders, cache), out), out


# ---- the loss


@pytest.fixture
def tuning(folders, cache, tmp_path):
    def make(**change):
        cfg = config(folders, cache, **change)
        pipe = DiffusionPipeline.from_pretrained(folders["wan"])
        run = Run.start(verb="train", config=cfg, out=tmp_path / "run", **CPU)
        return Tuning(cfg, STAGED, pipe, Cache.open(cache), Loop(cfg.loop, run)), pipe

    return make


def test_the_flow_loss_is_the_papers(tuning):
    made, pipe = tuning(drop=0.0)
    (part,) = made.loop.parts()
    latents, noise, times, text = made.draw(part)
    with made.attached():
        value = made.update()["loss"]
    plain = DiffusionPipeline.from_pretrained(pipe.config._name_or_path).transformer
    sigma = (times / 1000).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    assert len({regime_index(STAGED, float(level)) for level in sigma.flatten()}) == 2
    # One by one, each at its own noise level, hence in its own regime; the LoRA does nothing yet.
    with torch.no_grad(), attach(plain, STAGED):
        made_of = [plain(noisy[i : i + 1], times[i : i + 1], text[i : i + 1])[0] for i in range(2)]
    assert value == pytest.approx(float(F.mse_loss(torch.cat(made_of), noise - latents)), rel=1e-5)


@pytest.mark.parametrize("rank", [2, 0])
def test_distillation_asks_for_the_dense_models_velocity(tuning, rank):
    made, pipe = tuning(loss="distillation", lora_rank=rank)
    plain = DiffusionPipeline.from_pretrained(pipe.config._name_or_path).transformer
    (part,) = made.loop.parts()
    latents, noise, times, text = made.draw(part)
    noisy = made.denoiser.add_noise(latents, noise, times)
    with made.attached():
        made.update()  # so that student and teacher differ
        target = made._dense(noisy.latents, noisy.timestep, text)
        assert made.handle.attached
    with torch.no_grad():
        assert_close(target, plain(noisy.latents, times, text, return_dict=False)[0])
    if rank:
        moved = [p for name, p in made.model.named_parameters() if ".lora_B." in name]
        assert all(float(p.detach().abs().max()) > 0 for p in moved)


def test_both_straight_through_styles_are_in_the_forward_and_differ(folders, cache, tmp_path):
    exact = losses_of(folders, cache, tmp_path / "exact", "exact")
    forward = losses_of(folders, cache, tmp_path / "forward", "forward")
    # The same forward, so the same first loss; other gradients, so other losses later.
    assert exact[0] == forward[0]
    assert exact[2:] != forward[2:]


def losses_of(folders, cache, out, style):
    train(config(folders, cache, straight_through=style, attention=STAGED.constant(0)), out)
    return losses(out)


def test_samples_without_a_caption_have_the_empty_prompt(tuning):
    made, _ = tuning(drop=0.99)
    (part,) = made.loop.parts()
    text = made.draw(part)[3]
    assert torch.equal(text[0], made.null)


# ---- whole runs


def test_lora_is_exported_with_its_schedule_and_generate_uses_both(trained, folders, tmp_path):
    report, out = trained
    assert len(losses(out)) == 4
    tuned = read_tuned(report.tuned)
    assert tuned.schedule.config == STAGED
    assert tuned.schedule.grid == (3, 4, 4)
    assert "commit" in tuned.schedule.provenance
    pipe = DiffusionPipeline.from_pretrained(folders["wan"])
    pipe.load_lora_weights(report.tuned)
    assert any(float(p.detach().abs().max()) > 0 for n, p in pipe.transformer.named_parameters() if "lora_B" in n)
    video = VideoConfig(model=str(folders["wan"]), prompts=("a cat",), steps=2, guidance=1.0, **SIZE)
    cfg = GenerateConfig(video=video, tuned=report.tuned)
    run = Run.start(verb="generate", config=cfg, out=tmp_path / "run", **CPU)
    with run:
        made = generate(cfg, run)
    assert len(made.videos) == 1
    density = next(row.value for row in run.rows if row.metric == "density")
    # One step in each regime: an eighth of the tiles, and all.
    assert density == tuned.schedule.budget == (1 / 8 + 1) / 2


def test_every_weight_is_exported_as_from_pretrained_reads_it(folders, cache, tmp_path):
    report = train(config(folders, cache, lora_rank=0, steps=2), tmp_path / "run")
    tuned = read_tuned(report.tuned)
    model = WanTransformer3DModel.from_pretrained(tuned.transformer)
    before = WanTransformer3DModel.from_pretrained(folders["wan"], subfolder="transformer")
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before.state_dict()[n])]
    assert len(moved) > 0.9 * len(list(model.named_parameters()))
    pipe = DiffusionPipeline.from_pretrained(folders["wan"], transformer=model)
    with attach(pipe, tuned.schedule):
        pipe("a cat", num_inference_steps=1, output_type="latent", height=64, width=64, num_frames=9)


def test_weights_are_exported_in_the_dtype_of_the_run_but_what_diffusers_keeps_in_float32(tmp_path):
    model = tiny("wan")
    schedule = Schedule(
        config=STAGED, model=describe_model(model), sampler="", steps=3, grid=(3, 4, 4), budget=1.0, provenance=""
    )
    weights = {name: p.detach() for name, p in model.named_parameters()}
    export_tuned(tmp_path, weights, model, schedule, part="transformer", dtype=torch.bfloat16)
    stored = safetensors.torch.load_file(next(read_tuned(tmp_path).transformer.glob("*.safetensors")))
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["blocks.0.scale_shift_table"], weights["blocks.0.scale_shift_table"])


def test_cogvideox_trains_on_its_own_velocity(folders, videos, tmp_path):
    attention = dataclasses.replace(STAGED, shift=1.0)
    data = DataConfig(videos=videos, **SIZE)
    cfg = config(folders, None, data=data, attention=attention, steps=2)
    report = train(dataclasses.replace(cfg, model=str(folders["cogvideox"])), tmp_path / "run")
    assert np.isfinite(losses(tmp_path / "run")).all()
    DiffusionPipeline.from_pretrained(folders["cogvideox"]).load_lora_weights(report.tuned)


def test_a_run_that_was_stopped_goes_on_exactly(trained, folders, cache, tmp_path, monkeypatch):
    update, calls = Tuning.update, []

    def stop(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Tuning, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config(folders, cache), tmp_path / "run")
    monkeypatch.undo()
    train(config(folders, cache), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(trained[1])
    mine, whole = ((path / "artifacts" / "tuned").glob("*.safetensors") for path in (tmp_path / "run", trained[1]))
    assert next(mine).stat().st_size == next(whole).stat().st_size


def test_checkpointing_changes_nothing(trained, folders, cache, tmp_path):
    cfg = config(folders, cache)
    train(dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, gradient_checkpointing=True)), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(trained[1]), rel=1e-6)


def test_tensorboard_has_the_losses(folders, cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(folders, cache, steps=2)
    train(dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, tensorboard=True)), tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(tmp_path / "run"))


def launch(argv):
    """A command in two processes, as accelerate launch starts them."""
    worker = Path(__file__).with_name("finetune_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    done = subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_second_transformer_of_wan2_2_is_trained_on_its_own_steps(folders, cache, tmp_path, monkeypatch):
    pipe = tiny_pipeline("wan", transformer_2=tiny("wan", num_layers=1, seed=1), boundary_ratio=0.6)
    pipe.save_pretrained(tmp_path / "two")
    cfg = config(folders, cache, part="transformer_2", steps=2)
    cfg = dataclasses.replace(cfg, model=str(tmp_path / "two"))
    run = Run.start(verb="train", config=cfg, out=tmp_path / "look", **CPU)
    bare = DiffusionPipeline.from_pretrained(tmp_path / "two", transformer=None)
    tuning = Tuning(cfg, STAGED, bare, Cache.open(cache), Loop(cfg.loop, run))
    times = []
    for step in range(20):
        tuning.loop.step = step
        times += [time for part in tuning.loop.parts() for time in tuning.draw(part)[2].tolist()]
    assert 300 < max(times) <= 600
    report = train(cfg, tmp_path / "run")
    assert read_tuned(report.tuned).part == "transformer_2"
    video = VideoConfig(model=str(tmp_path / "two"), prompts=("a cat",), steps=2, guidance=1.0, **SIZE)
    made = sampler(GenerateConfig(video=video, tuned=report.tuned), tmp_path / "gen")
    names = {part: [n for n, _ in getattr(made.pipe, part).named_parameters() if "lora" in n]
             for part in ("transformer", "transformer_2")}  # fmt: skip
    assert names["transformer"] == []
    assert names["transformer_2"] != []
    whole = dataclasses.replace(cfg, lora_rank=0)
    report = train(whole, tmp_path / "whole")
    made = sampler(GenerateConfig(video=video, tuned=report.tuned), tmp_path / "gen_whole")
    before = DiffusionPipeline.from_pretrained(tmp_path / "two")
    for part, same in (("transformer", True), ("transformer_2", False)):
        mine, own = (getattr(of, part).proj_out.weight for of in (made.pipe, before))
        assert torch.equal(mine, own) == same
    rounded = []
    monkeypatch.setattr("hone_fpsattention.sample.round_linears", rounded.append)  # which needs a GPU
    made = sampler(GenerateConfig(video=video, tuned=report.tuned, e4m3_linears=True), tmp_path / "gen_e4m3")
    assert rounded == [made.pipe.transformer, made.pipe.transformer_2]


def sampler(cfg, out):
    run = Run.start(verb="generate", config=cfg, out=out, **CPU)
    with ExitStack() as stack:
        return Sampler(cfg, torch.device("cpu"), stack, run)


@pytest.mark.slow
def test_two_processes_train_what_one_does(trained, tmp_path):
    stored = json.loads((trained[1] / "config.json").read_text())
    stored["loop"]["micro_batch"] = 1
    (tmp_path / "train.json").write_text(json.dumps(stored))
    launch(["train", "--config", tmp_path / "train.json", "--out", tmp_path / "run", "--device", "cpu", "--quiet"])
    assert losses(tmp_path / "run") == pytest.approx(losses(trained[1]), rel=1e-4)
    mine, whole = (safetensors.torch.load_file(read_tuned(path / "artifacts" / "tuned").lora)
                   for path in (tmp_path / "run", trained[1]))  # fmt: skip
    for name, value in whole.items():
        assert_close(mine[name], value, rtol=1e-2, atol=1e-4)


@requires_gpu()
def test_two_gpus_train_what_one_does_whole_and_sharded(trained, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs")
    stored = json.loads((trained[1] / "config.json").read_text())
    stored["loop"]["micro_batch"] = 1
    stored["attention"]["backend"] = "reference"  # the tiny model's heads are too small for the kernels
    (tmp_path / "train.json").write_text(json.dumps(stored))
    sharded = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    for name, options in {
        "one": ["--num_processes", "1"],
        "two": ["--num_processes", "2", "--multi_gpu"],
        "sharded": ["--num_processes", "2", *sharded],
    }.items():
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", *options, str(Path(__file__).with_name("finetune_worker.py")), "train"]
        command += ["--config", str(tmp_path / "train.json"), "--dtype", "float32", "--out", str(tmp_path / name)]
        done = subprocess.run([*command, "--device", "cuda", "--quiet"], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
    # float32, but matrix products in another order.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_prompts_out(trained, folders, tmp_path):
    prompts = ("a cat", "a dog", "a red cat")
    video = VideoConfig(model=str(folders["wan"]), prompts=prompts, steps=1, guidance=1.0, **SIZE)
    cfg = GenerateConfig(video=video, tuned=trained[0].tuned)
    run = Run.start(verb="generate", config=cfg, out=tmp_path / "alone", **CPU)
    with run:
        alone = generate(cfg, run)
    out = tmp_path / "together"
    argv = ["generate", "--config", tmp_path / "alone" / "config.json", "--out", out, "--device", "cpu", "--quiet"]
    # The first one prints, and it alone.
    assert launch(argv).count("0000-a-cat.mp4") == 1
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "done"
    assert sorted(row["labels"]["prompt"] for row in results["rows"] if row["metric"] == "seconds") == [0, 1, 2]
    made = sorted((out / "artifacts").glob("*.mp4"))
    # What is drawn depends on the prompt's number, not on the process.
    assert [file.name for file in made] == [file.name for file in alone.videos]
    assert [file.read_bytes() for file in made] == [file.read_bytes() for file in alone.videos]


# ---- refusals, before anything is encoded


def refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(cfg)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(folders, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("hone_fpsattention.finetune.fill_cache", None)
    cfg = config(folders, cache)
    data = dataclasses.replace
    refused(data(cfg, data=data(cfg.data, frames=10)), "frames must be a multiple of 4 plus 1")
    refused(data(cfg, data=data(cfg.data, height=72)), r"must be multiples of the patch \(1, 2, 2\)")
    refused(data(cfg, attention=data(STAGED, shift=5.0)), "the pipeline's scheduler has shift 3, but these settings")
    refused(data(cfg, attention=STAGED.constant(Regime(window=(9, 9, 9)))), "are larger than the grid")
    with pytest.raises(CheckpointError, match="has no transformer_2"):
        schedule_of(data(cfg, part="transformer_2"))
    good = Schedule(
        config=STAGED, model=describe_model(tiny_pipeline("wan")), sampler="UniPCMultistepScheduler", steps=3,
        grid=(3, 4, 4), budget=0.6, provenance="a test",
    )  # fmt: skip
    for change, message in (
        ({"model": "Other, 3 layers"}, "calibrated with model"),
        ({"sampler": "Other"}, "calibrated with sampler"),
        ({"config": data(STAGED, shift=4.0)}, "calibrated with shift 4.0, but here it is 3.0"),
    ):
        file = data(good, **change).save(tmp_path / "schedule.json")
        refused(data(cfg, attention=None, schedule=file), message)
    assert schedule_of(data(cfg, attention=None, schedule=good.save(tmp_path / "good.json")))[0] == good


def test_a_shift_is_that_of_the_sampler_trained_for(folders, cache, tmp_path):
    cfg = config(folders, cache, attention=None, preset="tiny", flow_shift=5.0)
    assert schedule_of(cfg)[0].config.shift == 5.0
    file = schedule_of(cfg)[0].save(tmp_path / "schedule.json")
    given = dataclasses.replace(cfg, preset=None, schedule=file)
    assert schedule_of(given)[0].config.shift == 5.0
    refused(dataclasses.replace(given, flow_shift=None), "calibrated with shift 5.0, but here it is 3.0")
    wrong = dataclasses.replace(cfg, model=str(folders["cogvideox"]))
    refused(wrong, "flow_shift is of Wan's samplers; CogVideoXPipeline has none")


def test_a_cache_of_another_size_is_refused(folders, cache, tmp_path):
    cfg = config(folders, cache)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, frames=17))
    message = r"holds videos of \[9, 64, 64\] \(frames, height, width\); asked for \[17, 64, 64\]"
    with pytest.raises(ValueError, match=message):
        find_finetuned(cfg)
    with pytest.raises(ValueError, match=message):
        train(cfg, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_training(folders, cache, tmp_path):
    cfg = config(folders, cache)
    wild = dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, lr=1e30, clip=1e30))
    with pytest.raises(RuntimeError, match="the loss became nan at step"):
        train(wild, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataConfig()}, "train needs videos"),
        ({"preset": "tiny"}, "give one of preset and schedule"),
        ({"lora_rank": -1}, "rank must be positive, or 0"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\)"),
        ({"flow_shift": 0.0}, "flow_shift must be a positive number"),
        ({"straight_through": "other"}, "straight_through must be one of"),
    ],
)
def test_bad_settings(folders, cache, change, message):
    with pytest.raises(ValueError, match=message):
        config(folders, cache, **change)


def test_a_lora_without_peft_is_refused_before_anything_is_encoded(folders, videos, trained, monkeypatch):
    monkeypatch.setattr("hone_fpsattention.tuned.importlib.util.find_spec", lambda name: None)
    install = "needs the extra 'train' of hone-fpsattention"
    cfg = TrainConfig(model=str(folders["wan"]), preset="tiny", data=DataConfig(videos=videos, **SIZE))
    with pytest.raises(MissingExtraError, match=f"LoRA training {install}"):
        find_finetuned(cfg)
    assert find_finetuned(dataclasses.replace(cfg, lora_rank=0)).data.videos == videos
    video = VideoConfig(model=str(folders["wan"]), prompts=("a cat",), **SIZE)
    with pytest.raises(MissingExtraError, match=f"A LoRA {install}"):
        find_video(GenerateConfig(video=video, tuned=trained[0].tuned))


def test_what_is_no_export_is_refused(tmp_path, trained):
    with pytest.raises(CheckpointError, match="is not what hone-fpsattention train exports"):
        read_tuned(tmp_path)
    tuned = read_tuned(trained[0].tuned)
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / tuned.lora.name).write_bytes(tuned.lora.read_bytes())
    dataclasses.replace(tuned.schedule, steps=77).save(copied / "schedule.json")
    with pytest.raises(CheckpointError, match="was trained with another schedule than"):
        read_tuned(copied)


def test_dry_run_looks_at_the_videos(capsys, monkeypatch, folders, videos):
    argv = ["train", "--model", str(folders["wan"]), "--videos", str(videos), "--preset", "window-661", "--dry-run"]
    monkeypatch.setattr("sys.argv", ["hone-fpsattention", *argv])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err
