import json
import logging
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hone_core.errors import CheckpointError
from hone_video.architectures import tiny_pipeline
from hone_video.images import cover, read_image
from hone_video.pipeline_index import PIPELINES, find_pipeline
from hone_video.pipelines import check_size, load_pipeline, make_scheduler, pipeline_on_meta, with_flow_shift
from PIL import Image

# diffusers calls functions that other libraries have deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = pytest.mark.parametrize("kind", ["wan", "cogvideox"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("wan", "cogvideox"):
        made[kind] = tmp_path_factory.mktemp(kind)
        tiny_pipeline(kind).save_pretrained(made[kind])
    return made


@KINDS
def test_finds_and_loads_a_folder(kind, folders):
    name = find_pipeline(str(folders[kind]))
    assert PIPELINES[name].family == kind
    pipe = load_pipeline(str(folders[kind]), name, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert type(pipe) is PIPELINES[name].pipeline
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == (torch.float32 if kind == "wan" else torch.bfloat16)


@KINDS
def test_image_to_video_is_found_where_it_is_asked_for(kind, tmp_path):
    tiny_pipeline(kind, image=True).save_pretrained(tmp_path)
    name = find_pipeline(str(tmp_path), images=True)
    assert (PIPELINES[name].family, PIPELINES[name].image) == (kind, True)
    pipe = load_pipeline(str(tmp_path), name, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert type(pipe) is PIPELINES[name].pipeline
    if kind == "wan":
        assert pipe.vae.dtype == pipe.image_encoder.dtype == torch.float32
    with pytest.raises(CheckpointError, match=f"is a {name}; expected WanPipeline or CogVideoXPipeline$"):
        find_pipeline(str(tmp_path))


def test_an_image_covers_the_video(tmp_path):
    wide = Image.fromarray(np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2))
    fitted = np.asarray(cover(wide, 40, 40)).astype(int)  # 60 x 20: the middle 20 columns, twice as large
    assert fitted.shape == (40, 40, 3)
    assert np.ptp(fitted[:, :, 0], axis=0).max() == 0
    np.testing.assert_allclose(fitted[0, 4:-4, 0], 80 + 2 * np.arange(4, 36) - 1, atol=2)
    sideways = wide.getexif()
    sideways[0x0112] = 6  # turned a quarter
    wide.save(tmp_path / "a.png", exif=sideways)
    assert read_image(tmp_path / "a.png").size == (20, 60)
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        read_image(tmp_path / "b.png")


@KINDS
def test_an_outline_has_what_configs_say_and_no_weights(kind, folders):
    name = find_pipeline(str(folders[kind]))
    whole = load_pipeline(str(folders[kind]), name, device=torch.device("cpu"), dtype=torch.float32)
    bare = pipeline_on_meta(str(folders[kind]), name)
    assert type(bare) is type(whole)
    assert dict(bare.scheduler.config) == dict(whole.scheduler.config)
    for part in ("transformer", "vae"):
        assert getattr(bare, part).device.type == "meta"
        have, want = (
            {key: value for key, value in getattr(pipe, part).config.items() if not key.startswith("_")}
            for pipe in (bare, whole)
        )
        assert have == want
    assert bare.text_encoder is None


def test_an_outline_knows_the_scale_of_its_own_vae(folders, tmp_path):
    # Wan2.2's smaller model: a latent is 16 pixels wide, not 8.
    folder = copy_of(folders["wan"], tmp_path / "copy")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "scale_factor_spatial": 16}))
    assert pipeline_on_meta(str(folder), "WanPipeline").vae_scale_factor_spatial == 16


# What is missing is said before anything is loaded.


def copy_of(folder, target):
    for file in folder.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return target


def test_incomplete_pipelines_are_refused(folders, tmp_path):
    def refuse(folder, message):
        with pytest.raises(CheckpointError, match=message):
            find_pipeline(str(folder))

    refuse(
        tmp_path / "nothing", r"nothing does not exist; expected the folder of a diffusers pipeline, or a hub address"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, r"holds no model_index\.json")
    (empty / "model_index.json").write_text("{")
    refuse(empty, "is not JSON")
    (empty / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refuse(empty, "is a FluxPipeline; expected WanPipeline or CogVideoXPipeline")
    refuse(empty / "model_index.json", "is a file; expected the folder")
    whole = copy_of(folders["wan"], tmp_path / "whole")
    for weights in (whole / "vae").glob("*.safetensors"):
        weights.unlink()
    refuse(whole, r"vae holds no weights \(\*\.safetensors or \*\.bin\)")
    for file in (whole / "vae").iterdir():
        file.unlink()
    (whole / "vae").rmdir()
    refuse(whole, "is not whole: there is no folder vae")
    sharded = copy_of(folders["wan"], tmp_path / "sharded") / "transformer"
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refuse(sharded.parent, r"1 of 2 shards missing: model-00002-of-00002\.safetensors")


def test_hub_models_that_cannot_be_reached(monkeypatch):
    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection and not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match=r"Wan-AI/Wan2.1 is no local folder.*no connection.*hf download Wan-AI/Wan"
    ):
        find_pipeline("Wan-AI/Wan2.1")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("wan", {"height": 40}, "height must be a multiple of 16 for this model; got 40"),
        ("wan", {"width": 47}, "width must be a multiple of 16 for this model; got 47"),
        ("wan", {"frames": 6}, r"frames must be a multiple of 4 plus 1 for this model; got 6\. Take 5 or 9"),
        ("cogvideox", {"frames": 5}, r"frames must be a multiple of 8 plus 1 for this model; got 5\. Take 1 or 9"),
    ],
)
def test_sizes_that_a_pipeline_would_round_are_refused(kind, options, message):
    pipe = tiny_pipeline(kind)
    check_size(pipe)
    check_size(pipe, height=64, width=96, frames=9)
    with pytest.raises(ValueError, match=message):
        check_size(pipe, **options)


def test_schedulers_keep_the_settings_of_the_pipelines_own():
    pipe = tiny_pipeline("wan")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made = make_scheduler("unipc", pipe)
    assert isinstance(made, UniPCMultistepScheduler)
    assert (made.config.flow_shift, made.config.use_flow_sigmas) == (5.0, True)
    assert make_scheduler("default", pipe) is pipe.scheduler
    made = make_scheduler("dpm", tiny_pipeline("cogvideox"))
    assert isinstance(made, CogVideoXDPMScheduler)
    assert made.config.timestep_spacing == "trailing"
    with pytest.raises(ValueError, match="scheduler must be unipc, dpm or default; got 'euler'"):
        make_scheduler("euler", pipe)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("shift", partial(FlowMatchEulerDiscreteScheduler, num_train_timesteps=500)),
        ("flow_shift", partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True)),
    ],
)
def test_another_shift_is_the_same_sampler_at_other_noise_levels(name, made):
    own, there = made(**{name: 3.0}), made(**{name: 5.0})
    moved = with_flow_shift(own, 5.0)
    assert type(moved) is type(own)
    for scheduler in (own, there, moved):
        scheduler.set_timesteps(4)
    assert torch.equal(moved.sigmas, there.sigmas)
    assert torch.equal(moved.timesteps, there.timesteps)
    assert (moved.sigmas[1:4] > own.sigmas[1:4]).all()


@pytest.mark.parametrize(
    "own",
    [
        CogVideoXDPMScheduler(),
        UniPCMultistepScheduler(flow_shift=3.0),  # which it reads with use_flow_sigmas alone
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ],
)
def test_a_sampler_without_a_shift_of_its_own_gets_none(own):
    with pytest.raises(ValueError, match=f"{type(own).__name__} has no timestep shift of its own to set"):
        with_flow_shift(own, 5.0)


def test_a_quiet_command_shows_no_loading(folders, capsys, caplog):
    """Configs are read without a bar, weights with one unless only warnings are shown; both libraries stay as set."""
    given = {"device": torch.device("cpu"), "dtype": torch.float32}
    pipeline_on_meta(str(folders["wan"]), "WanPipeline")
    with caplog.at_level(logging.WARNING, "hone_video"):
        load_pipeline(str(folders["wan"]), "WanPipeline", **given)
    assert capsys.readouterr().err == ""
    with caplog.at_level(logging.INFO, "hone_video"):
        load_pipeline(str(folders["wan"]), "WanPipeline", **given)
    assert "Loading pipeline components" in capsys.readouterr().err
