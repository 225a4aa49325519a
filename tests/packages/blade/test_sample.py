import contextlib
import copy
import dataclasses
import json
import logging
import subprocess

import huggingface_hub
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from hone_blade.config import PRESETS, BladeConfig, EvalConfig, GenerateConfig, Rollout
from hone_blade.evaluate import evaluate
from hone_blade.inputs import find_evaluated, find_inputs
from hone_blade.inspection import inspect_pipeline
from hone_blade.lora import load_blade_lora, lora_targets, save_blade_lora
from hone_blade.models import attach
from hone_blade.sample import GenerateReport, Sampler, generate
from hone_blade.scheduler import TDMScheduler
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_video.architectures import tiny, tiny_pipeline
from hone_video.attachment import Processor
from hone_video.vbench_config import VBenchConfig
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])
SPARSE = BladeConfig(block=16, samples=8, max_density=0.4, pool=8)
# diffusers calls functions that other libraries have deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("wan", "cogvideox"):
        made[kind] = tmp_path_factory.mktemp(kind)
        tiny_pipeline(kind).save_pretrained(made[kind])
    return made


def config(folder, **options):
    defaults = {"prompts": ("a red cat runs left", "a blue dog"), "steps": 2, "height": 64, "width": 96, "frames": 5}
    defaults |= {"attention": SPARSE} if not options.get("dense") else {}
    return GenerateConfig(model=str(folder), **{**defaults, **options})


def make_run(cfg, out):
    settings = find_inputs(cfg).config
    return Run.start(package="hone-blade", verb="generate", config=settings, out=out, device="cpu", quiet=True)


def produce(cfg, out):
    with make_run(cfg, out) as run:
        return GenerateReport.of(run) if run.done else generate(cfg, run)


def read(path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, 64, 96, 3)


@KINDS
def test_generates_one_video_per_prompt_and_resumes(kind, folders, tmp_path):
    cfg, out = config(folders[kind], frames=9), tmp_path / "run"
    report = produce(cfg, out)
    first, second = (read(video) for video in report.videos)
    assert first.shape == (9, 64, 96, 3)
    assert (first != second).any()
    assert (report.attention, report.scheduler) == ("custom", "tdm")
    assert [video.name for video in report.videos] == ["0000-a-red-cat-runs-left.mp4", "0001-a-blue-dog.mp4"]
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "done"
    rows = [row for row in results["rows"] if row["metric"] == "seconds"]
    assert [row["labels"]["prompt"] for row in rows] == [0, 1]
    assert [row["labels"]["seed"] for row in rows] == [0, 1]
    assert rows[0]["variant"] == "blade"
    assert report.sparse_steps == rows[0]["labels"]["sparse_steps"] == 2
    assert report.seconds == pytest.approx(sum(row["value"] for row in rows) / 2)
    # A run that stopped between the two prompts: the first video stays, the second is made again, the same.
    unfinished = tmp_path / "unfinished"
    with contextlib.suppress(KeyboardInterrupt), make_run(cfg, unfinished) as run:
        generate(dataclasses.replace(cfg, limit=1), run)
        raise KeyboardInterrupt
    kept = unfinished / "artifacts" / "0000-a-red-cat-runs-left.mp4"
    stamp = kept.stat().st_mtime_ns
    again = produce(cfg, unfinished)
    assert kept.stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(read(again.videos[1]), second)
    finished = produce(cfg, out)
    assert finished == report
    assert str(finished).startswith(str(report.videos[0]))


def latents(pipe, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipe.scheduler, TDMScheduler):
        pipe.scheduler.generator = generator
    settings = {"prompt": "a red cat", "height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2}
    settings |= {"guidance_scale": 1.0, "generator": generator, "output_type": "latent"}
    return pipe(**{**settings, **options}).frames


@KINDS
def test_tdm_in_the_pipeline_is_the_rollout_of_its_transformer(kind):
    """The pipeline's latents against the scheduler's definition, written out with the pipeline's own embeddings."""
    pipe = tiny_pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config)
    out = latents(pipe, num_inference_steps=4)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 2, 8, 12) if kind == "wan" else (1, 2, 4, 8, 12)
    x = torch.randn(shape, generator=generator)
    length = 512 if kind == "wan" else 226
    text, _ = pipe.encode_prompt("a red cat", do_classifier_free_guidance=False, max_sequence_length=length)
    more = {}
    if kind == "cogvideox":
        more["image_rotary_emb"] = pipe._prepare_rotary_positional_embeddings(64, 96, 2, torch.device("cpu"))
    for time in (999, 749, 499, 249):
        with torch.no_grad():
            v = pipe.transformer(x, encoder_hidden_states=text, timestep=torch.tensor([time]), **more).sample
        if kind == "wan":
            alpha, sigma = 1 - time / 1000, time / 1000
            x0, e = x - sigma * v, x + (1 - sigma) * v
        else:
            signal = float(pipe.scheduler.alphas_cumprod[time])
            alpha, sigma = signal**0.5, (1 - signal) ** 0.5
            x0, e = alpha * x - sigma * v, sigma * x + alpha * v
        e = 0.9 * e + 0.19**0.5 * torch.randn(shape, generator=generator) if time > 249 else e
        if kind == "wan":
            x = (1 - (time - 250) / 1000) * x0 + (time - 250) / 1000 * e if time > 249 else x0
        else:
            signal = float(pipe.scheduler.alphas_cumprod[time - 250]) if time > 249 else 1.0
            x = signal**0.5 * x0 + (1 - signal) ** 0.5 * e
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)


@KINDS
def test_guidance_calls_are_one_step(kind):
    """CogVideoX guides with a batch of two, Wan with two calls."""
    pipe = tiny_pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, dataclasses.replace(SPARSE, dense_steps=1)) as handle, handle.record() as rows:
        latents(pipe, num_inference_steps=3, guidance_scale=4.0)
        latents(pipe, num_inference_steps=3, guidance_scale=4.0)
    calls = 2 if kind == "wan" else 1
    assert [(row.step, row.call) for row in rows] == sorted([(s, c) for s in (1, 2) for c in range(calls)] * 2)
    assert rows[0].stats.density.shape[0] == (1 if kind == "wan" else 2)


def test_wan_with_two_transformers_and_with_per_token_times():
    pipe = tiny_pipeline("wan", transformer_2=tiny("wan", seed=1, num_layers=1), boundary_ratio=0.6)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config)
    expected = latents(pipe, num_inference_steps=4)
    with attach(pipe, SPARSE) as handle, handle.record() as rows:
        assert not torch.equal(latents(pipe, num_inference_steps=4), expected)
        assert len(handle.models) == 2
    assert [(row.step, row.model) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert torch.equal(latents(pipe, num_inference_steps=4), expected)
    with pytest.raises(ValueError, match=r"has two transformers; pass pipe\.transformer"):
        load_blade_lora(pipe, "x.safetensors")
    pipe = tiny_pipeline("wan", expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    expected = latents(pipe)
    with attach(pipe, BladeConfig(block=16, samples=8, max_density=1.0, min_density=1.0)):
        torch.testing.assert_close(latents(pipe), expected, atol=1e-4, rtol=1e-4)


@KINDS
def test_a_pipeline_with_the_tdm_scheduler_saves_and_loads(kind, folders, tmp_path):
    pipe = type(tiny_pipeline(kind)).from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, eta=0.5)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, TDMScheduler)
    assert loaded.scheduler.config.eta == 0.5
    assert torch.equal(latents(loaded), latents(pipe))


@pytest.mark.parametrize(
    ("kind", "scheduler", "expected"),
    [
        ("wan", "unipc", UniPCMultistepScheduler),
        ("wan", "default", FlowMatchEulerDiscreteScheduler),
        ("cogvideox", "dpm", CogVideoXDPMScheduler),
    ],
)
def test_other_schedulers_and_dense(kind, scheduler, expected, folders, tmp_path, monkeypatch):
    used = []
    pipeline = type(tiny_pipeline(kind))
    call = pipeline.__call__

    def spy(self, *args, **kwargs):
        used.append((self.scheduler, self.transformer.attn_processors, kwargs))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(pipeline, "__call__", spy)
    folder, frames = folders[kind], {"wan": 5, "cogvideox": 1}[kind]
    if scheduler == "default":
        pipe = tiny_pipeline("wan")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        folder = tmp_path / "pipe"
        pipe.save_pretrained(folder)
    options = {"prompts": ("a cat",), "guidance": 3.0, "negative_prompt": "blue", "frames": frames}
    cfg = config(folder, scheduler=scheduler, dense=True, **options)
    report = produce(cfg, tmp_path / "run")
    [(object_used, processors, kwargs)] = used
    assert type(object_used) is expected
    assert not any(isinstance(processor, Processor) for processor in processors.values())
    assert (kwargs["guidance_scale"], kwargs["negative_prompt"]) == (3.0, "blue")
    assert (report.attention, report.sparse_steps) == ("dense", 0)
    if scheduler == "unipc":
        assert object_used.config.flow_shift == 3.0
    if scheduler == "dpm":
        assert object_used.config.timestep_spacing == "trailing"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A red and a blue PNG, of another shape than the videos."""
    folder = tmp_path_factory.mktemp("images")
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (50, 70), color).save(folder / f"{name}.png")
    return folder


@KINDS
def test_image_to_video(kind, images, tmp_path):
    """The pipeline gets the image at the video's size; a second image, all else the same, makes another video."""
    pipe = tiny_pipeline(kind, image=True)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    pipe.save_pretrained(tmp_path / "pipe")
    both = (str(images / "red.png"), str(images / "blue.png"))
    cfg = config(tmp_path / "pipe", prompts=("a cat", "a cat"), frames=9, images=both)
    sampler = Sampler.load(find_inputs(cfg), "cpu")
    with sampler.attached() as handle, handle.record() as rows:
        red = sampler.draw(0, output_type="latent")
    assert [row.step for row in rows] == [0, 1]
    pipe = sampler.pipe
    given = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    for name in ("red", "blue"):
        generator = torch.Generator().manual_seed(0)
        pipe.scheduler.generator = generator
        image = Image.new("RGB", (96, 64), name)
        with attach(pipe, SPARSE):
            wanted = pipe(image, prompt="a cat", generator=generator, output_type="latent", **given).frames
        assert torch.equal(wanted, red) == (name == "red")
    report = produce(cfg, tmp_path / "run")
    assert read(report.videos[0]).shape == (9, 64, 96, 3)
    assert (read(report.videos[0]) != read(report.videos[1])).any()
    one = find_inputs(dataclasses.replace(cfg, images=both[:1])).config
    assert one.images == both[:1] * 2
    assert find_inputs(one).config == one


def test_images_that_do_not_fit_are_refused(folders, images, tmp_path):
    tiny_pipeline("wan", image=True).save_pretrained(tmp_path / "pipe")
    red = str(images / "red.png")
    cases = [
        (config(folders["wan"], images=(red,)), ValueError, "images are for an image-to-video pipeline"),
        (config(tmp_path / "pipe"), ValueError, r"one for each of the 2 \(--image FILE\); got none"),
        (config(tmp_path / "pipe", images=(red,) * 3), ValueError, "one for each of the 2 .*got 3"),
        (config(tmp_path / "pipe", images=("none.png",)), FileNotFoundError, "image none.png does not exist"),
        (config(tmp_path / "pipe", images=(__file__,)), ValueError, "test_sample.py cannot be read"),
    ]
    for cfg, error, message in cases:
        with pytest.raises(error, match=message):
            find_inputs(cfg)


def test_image_to_video_by_two_transformers_with_a_lora_each(images, tmp_path):
    """Wan2.2: no CLIP; each LoRA goes on its transformer."""
    kind = {"num_layers": 1, "in_channels": 12}
    parts = {"image_encoder": None, "image_processor": None, "boundary_ratio": 0.6}
    pipe = tiny_pipeline(
        "wan", image=True, transformer=tiny("wan", **kind), transformer_2=tiny("wan", 1, **kind), **parts
    )
    pipe.save_pretrained(tmp_path / "pipe")
    files = [adapter(tmp_path, seed, SPARSE, pipe.transformer_2) for seed in (0, 1)]
    cfg = config(
        tmp_path / "pipe", prompts=("a cat",), images=(str(images / "red.png"),), lora=files[0], lora_2=files[1],
        attention=None, steps=4,
    )  # fmt: skip
    sampler = Sampler.load(find_inputs(cfg), "cpu")
    with sampler.attached() as handle, handle.record() as rows:
        both = sampler.draw(0, output_type="latent")
    assert [(row.step, row.model) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    for part in ("transformer", "transformer_2"):
        getattr(sampler.pipe, part).disable_lora()
        with sampler.attached():
            assert not torch.equal(sampler.draw(0, output_type="latent"), both)
        getattr(sampler.pipe, part).enable_lora()


def adapter(tmp_path, seed=0, config=None, model=None):
    """A LoRA file of the tiny Wan's layout, in the published form unless it states settings."""
    model = tiny_pipeline("wan").transformer if model is None else copy.deepcopy(model)
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False), "blade")
    return str(save_blade_lora(model, tmp_path / f"lora{seed}.safetensors", config=config))


def test_files_that_state_no_settings_are_sampled_as_their_authors_do(folders, tmp_path):
    published, stating = adapter(tmp_path), adapter(tmp_path, 1, SPARSE)
    chosen = find_inputs(config(folders["wan"], lora=published)).config
    assert (chosen.scheduler, chosen.flow_shift) == ("unipc", 3.0)
    assert find_inputs(chosen).config == chosen
    for other in (
        config(folders["wan"], lora=stating),
        config(folders["wan"], lora=published, scheduler="tdm"),
        config(folders["wan"]),
    ):
        assert find_inputs(other).config.scheduler == "tdm"
    report = produce(config(folders["wan"], lora=published, prompts=("a cat",)), tmp_path / "run")
    assert report.scheduler == "unipc"
    assert "Sampled with UniPC, flow shift 3, as the authors" in str(report)
    sampler = Sampler.load(find_inputs(config(folders["wan"], lora=published, scheduler="unipc", flow_shift=5)), "cpu")
    assert sampler.pipe.scheduler.config.flow_shift == 5
    assert len(sampler.notices) == 1
    with pytest.raises(ValueError, match=r"goes with scheduler 'unipc'; got 3\.0 with 'tdm'"):
        config(folders["wan"], scheduler="tdm", flow_shift=3.0)


def test_lora_of_each_transformer_of_wan22(folders, tmp_path):
    first, second = adapter(tmp_path, 0, SPARSE), adapter(tmp_path, 1, SPARSE)
    pipe = tiny_pipeline("wan", transformer_2=tiny("wan", seed=1, num_layers=1), boundary_ratio=0.5)
    pipe.save_pretrained(tmp_path / "wan22")
    both = find_inputs(config(tmp_path / "wan22", lora=first, lora_2=second, attention=None))
    pipe = Sampler.load(both, "cpu").pipe
    loaded = [part.blocks[0].attn1.to_q.lora_A["blade"].weight for part in (pipe.transformer, pipe.transformer_2)]
    for weight, file in zip(loaded, (first, second), strict=True):
        assert torch.equal(weight, load_file(file)["transformer.blocks.0.attn1.to_q.lora_A.weight"])
    pipe = Sampler.load(find_inputs(config(tmp_path / "wan22", lora_2=second)), "cpu").pipe
    assert not hasattr(pipe.transformer, "peft_config")
    assert "blade" in pipe.transformer_2.peft_config
    with pytest.raises(ValueError, match="lora_2 is for a second transformer, as Wan2"):
        find_inputs(config(folders["wan"], lora_2=second))
    with pytest.raises(ValueError, match="must state the same attention settings"):
        find_inputs(config(tmp_path / "wan22", lora=first, lora_2=adapter(tmp_path, 2)))


def test_lora_brings_its_settings_and_its_licence(folders, tmp_path, caplog):
    model = tiny("wan", num_layers=1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False), "blade")
    file = save_blade_lora(model, tmp_path / "lora.safetensors", config=SPARSE, licence="Apache-2.0")
    cfg = config(folders["wan"], prompts=("a cat",), lora=str(file), attention=None)
    with caplog.at_level(logging.WARNING):
        report = produce(cfg, tmp_path / "with")
        assert "no LoRA" not in caplog.text
        without = produce(dataclasses.replace(cfg, lora=None, attention=SPARSE), tmp_path / "without")
    assert report.attention == "custom"
    assert report.notices == ("Licence of these weights, as the file says: Apache-2.0",)
    assert "no LoRA" in caplog.text
    assert (read(report.videos[0]) != read(without.videos[0])).any()


def test_a_lora_that_does_not_fit_is_named_before_anything_is_loaded(folders, tmp_path):
    fitting = adapter(tmp_path, 0, SPARSE)
    find_inputs(config(folders["wan"], lora=fitting, attention=None))
    with pytest.raises(CheckpointError, match="does not fit this CogVideoXTransformer3DModel: 16 unknown tensors"):
        find_inputs(config(folders["cogvideox"], lora=fitting, attention=None))
    tensors = load_file(fitting)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    changes = {
        "tensors of another shape": {name: tensors[name][:, :1].contiguous()},  # of another rank
        "1 unknown tensors": {"transformer.blocks.0.ffn.net.2.lora_A.weight": torch.zeros(4, 8)},  # of another target
    }
    for message, change in changes.items():
        save_file(tensors | change, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=message):
            find_inputs(config(folders["wan"], lora=str(tmp_path / "other.safetensors")))
    tiny_pipeline("wan", transformer_2=tiny("wan", seed=1, num_layers=2), boundary_ratio=0.5).save_pretrained(
        tmp_path / "wan22"
    )
    with pytest.raises(CheckpointError, match="does not fit this WanTransformer3DModel: 16 missing"):
        find_inputs(config(tmp_path / "wan22", lora=fitting, lora_2=fitting, attention=None))


def test_settings_that_leave_every_step_dense_are_refused(folders, tmp_path, monkeypatch):
    dense = dataclasses.replace(SPARSE, dense_steps=2)
    model = tiny("wan", num_layers=1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "blade")
    lora = str(save_blade_lora(model, tmp_path / "lora.safetensors", config=dense))
    options = {"prompts": ("a cat",), "attention": None}
    cases = [
        (
            config("no/where", **options | {"preset": "wan2.1-1.3b-free", "steps": 8}),
            "12 first steps that preset wan.*8",
        ),
        (
            config("no/where", **options | {"attention": dense}),
            "2 first steps that the attention settings leave dense.*2",
        ),
        (config(folders["wan"], lora=lora, **options), "2 first steps that the attention settings leave dense.*got 2"),
        (config("no/where", **options | {"attention": BladeConfig(mask="dense")}), "must be sparse; got mask 'dense'"),
    ]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # asking the hub would be an error
    for cfg, message in cases:
        with pytest.raises(ValueError, match=message):
            find_inputs(cfg)
    report = produce(config(folders["wan"], lora=lora, steps=3, **options), tmp_path / "run")
    assert (report.attention, report.sparse_steps) == ("custom", 1)
    [row] = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert (row["labels"]["steps"], row["labels"]["sparse_steps"]) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "preset"), [("wan", "cogvideox-5b"), ("cogvideox", "wan2.1-14b"), ("cogvideox", "wan2.1-1.3b-official")]
)
def test_presets_of_another_family_are_refused(kind, preset, folders):
    own = {"wan": "wan2.1-1.3b, ", "cogvideox": "cogvideox-5b, "}[kind]
    with pytest.raises(ValueError, match=rf"preset must be one of {own}.*tiny for a .*Pipeline; got '{preset}'"):
        find_inputs(config(folders[kind], attention=None, preset=preset))
    find_inputs(config(folders[kind], attention=None, preset="tiny", frames=9))


def test_prompts_are_read_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        find_inputs(config("Wan-AI/Wan2.1", prompts=(), prompt_file=str(tmp_path / "none.txt")))


def test_prompt_files(folders, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog runs  \n", encoding="utf-8")
    cfg = config(folders["wan"], prompts=(), prompt_file=str(file), attention=None)
    inputs = find_inputs(cfg)
    assert inputs.config.prompts == ("a cat", "a dog runs")
    assert inputs.config.prompt_file is None
    assert (inputs.pipeline, inputs.lora) == ("WanPipeline", None)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no prompt"):
        find_inputs(cfg)
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        find_inputs(dataclasses.replace(cfg, prompt_file=str(tmp_path / "none.txt")))


# What is missing is said before anything is loaded.


def test_missing_inputs_are_refused(folders, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("loaded before everything was checked")

    monkeypatch.setattr(WanPipeline, "from_pretrained", forbidden)
    with pytest.raises(CheckpointError, match=r"nothing does not exist; expected the folder of a diffusers pipeline"):
        find_inputs(config(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        find_inputs(config(folders["wan"], lora=str(tmp_path / "none.safetensors")))
    with pytest.raises(ValueError, match="scheduler must be one of tdm, unipc, default for a WanPipeline; got 'dpm'"):
        find_inputs(config(folders["wan"], scheduler="dpm"))


def test_sizes_that_a_pipeline_would_round_are_refused_before_the_run(folders):
    with pytest.raises(ValueError, match="height must be a multiple of 16 for this model; got 40"):
        find_inputs(config(folders["wan"], height=40))


def test_frames_that_are_not_finite_are_no_video(folders, tmp_path):
    pipe = tiny_pipeline("wan")
    next(pipe.vae.decoder.parameters()).data.fill_(torch.nan)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(RuntimeError, match="prompt 0 gave frames that are not finite"):
        produce(config(tmp_path / "pipe"), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.mp4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "give prompts .* or prompt_file .*; got no prompt"),
        ({"prompt_file": "x.txt"}, "give prompts .* or prompt_file .*; got both"),
        ({"prompts": (" ",)}, "must not be empty"),
        ({"preset": "tiny"}, "give preset or attention, not both"),
        ({"preset": "none", "attention": None}, "no preset 'none'; the presets are wan2.1-1.3b"),
        ({"dense": True, "preset": "tiny", "attention": None}, "dense leaves attention as it is"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"guidance": 0.5}, "guidance must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        config("folder", **options)


def test_the_preset_follows_the_pipeline(folders, tmp_path):
    cfg = config(folders["cogvideox"], attention=None, prompts=("a cat",), frames=1)
    assert produce(cfg, tmp_path / "run").attention == "cogvideox-5b"
    assert "cogvideox-5b" in PRESETS


def test_inspects_a_pipeline(folders, tmp_path):
    cfg = config(folders["wan"], steps=3, guidance=2.0)
    with Run.start(package="hone-blade", verb="inspect", config=cfg, out=tmp_path / "run") as run:
        report = inspect_pipeline(cfg, run)
    rows = json.loads((tmp_path / "run" / "artifacts" / "inspection.json").read_text())
    assert [(row["step"], row["call"]) for row in rows] == [(s, c) for s in range(3) for c in range(2)]
    assert report.calls == 6
    assert report.density == pytest.approx(1 / 3)  # 48 tokens are 3 blocks, of which one is kept
    assert 0 < report.recall < 1
    with pytest.raises(ValueError, match="nothing to inspect in dense attention"):
        inspect_pipeline(config(folders["wan"], dense=True), run)


def test_eval_makes_vbench_s_videos(folders, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\na dog\n")
    size = {"height": 64, "width": 96, "frames": 5, "guidance": 1.0, "videos_per_prompt": 2}
    suite = VBenchConfig(model=str(folders["wan"]), vbench_info=text, grade=False, **size)
    cfg = EvalConfig(protocol="vbench", vbench=suite, preset="tiny", prompts=1)
    assert find_inputs(cfg.videos(("a", "b"))).config.steps == 8
    cfg = dataclasses.replace(cfg, comparison=dataclasses.replace(cfg.comparison, steps=2))
    cfg = find_evaluated(cfg)
    run = Run.start(package="hone-blade", verb="eval", config=cfg, out=tmp_path / "run", device="cpu", quiet=True)
    with run:
        report = evaluate(cfg, run)
    assert [path.name for path in sorted((tmp_path / "run/artifacts/videos").iterdir())] == [
        "a cat-0.mp4",
        "a cat-1.mp4",
    ]
    assert "not graded" in str(report)
    with pytest.raises(ValueError, match="preset and lora_2: for protocol vbench"):
        EvalConfig(preset="tiny", lora_2="x")
    with pytest.raises(ValueError, match="host is the tiny one of protocol clips"):
        EvalConfig(protocol="vbench", vbench=suite, host=tmp_path)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, r"the weight blocks\.0\.attn1\.to_v\.weight of the transformer holds NaN"),
        (3e38, RuntimeError, "prompt 0: the model's activations became NaN or infinite in step 0"),
    ],
)
def test_what_is_not_finite_is_named_before_time_is_spent(value, error, message, tmp_path):
    pipe = tiny_pipeline("wan")
    pipe.transformer.blocks[0].attn1.to_v.weight.data[0] = value
    pipe.save_pretrained(tmp_path / "wan")
    with pytest.raises(error, match=message):
        produce(config(tmp_path / "wan"), tmp_path / "run")


@pytest.fixture
def student(folders, tmp_path):
    """A LoRA of the tiny Wan pipeline whose header states attention and sampling."""
    model = tiny("wan", num_layers=1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=lora_targets(model)), "student")
    stated = Rollout(steps=3, eta=0.25)
    return save_blade_lora(model, tmp_path / "lora.safetensors", adapter_name="student", config=SPARSE, rollout=stated)


def test_a_student_is_sampled_as_it_was_trained(folders, student):
    inputs = find_inputs(config(folders["wan"], lora=str(student), steps=None, attention=None))
    assert (inputs.config.scheduler, inputs.config.steps, inputs.config.eta) == ("tdm", 3, 0.25)
    sampler = Sampler.load(inputs, "cpu")
    assert sampler.pipe.scheduler.config.eta == 0.25
    assert sampler.attention == SPARSE
    # What is asked for comes before what the file states.
    inputs = find_inputs(config(folders["wan"], lora=str(student), steps=2, eta=1.0))
    assert (inputs.config.steps, inputs.config.eta) == (2, 1.0)
    assert find_inputs(config(folders["wan"], steps=None)).config.steps == 8


def test_vbench_s_videos_of_a_student_are_those_of_generate(folders, student, tmp_path):
    """Same attention, steps and eta, which its file states; same noise for the first video of a prompt."""
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\n")
    size = {"height": 64, "width": 96, "frames": 5}
    suite = VBenchConfig(
        model=str(folders["wan"]), vbench_info=text, grade=False, guidance=1.0, videos_per_prompt=1, **size
    )
    cfg = find_evaluated(EvalConfig(protocol="vbench", vbench=suite, lora=str(student)))
    with Run.start(
        package="hone-blade", verb="eval", config=cfg, out=tmp_path / "run", device="cpu", quiet=True
    ) as run:
        evaluate(cfg, run)
    sampler = json.loads((tmp_path / "run" / "artifacts" / "sampler.json").read_text())
    assert (sampler["attention"], sampler["sparse_steps"], sampler["scheduler"]) == ("custom", 3, "tdm")
    same = GenerateConfig(model=str(folders["wan"]), prompts=("a cat",), lora=str(student), **size)
    [video] = produce(same, tmp_path / "videos").videos
    assert (read(tmp_path / "run/artifacts/videos/a cat-0.mp4") == read(video)).all()


def test_a_header_that_is_none_is_named(folders, student):
    tensors = load_file(student)
    save_file(tensors, student, metadata={"hone_blade_rollout": '{"steps": 0}'})
    with pytest.raises(CheckpointError, match="sampling in its header cannot be read: student_steps must lie in"):
        find_inputs(config(folders["wan"], lora=str(student), steps=None))


def test_a_prompt_file_that_is_not_text_is_refused(folders, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        find_inputs(config(folders["wan"], prompts=(), prompt_file=str(file)))


@pytest.mark.parametrize(("eta", "scheduler"), [(1.5, "tdm"), (0.9, "unipc")])
def test_an_eta_that_says_nothing_is_refused(eta, scheduler):
    with pytest.raises(ValueError, match="eta lies in"):
        GenerateConfig(model="x", prompts=("a",), eta=eta, scheduler=scheduler)
