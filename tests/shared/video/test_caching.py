import json
import shutil

import imageio
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hone_core.errors import CheckpointError
from hone_core.testing import assert_close
from hone_video.architectures import tiny_pipeline
from hone_video.caching import Cache, fill_cache, fingerprint, read_clip
from hone_video.denoising import Denoiser
from hone_video.listings import Clip, read_clips
from hone_video.pipelines import load_pipeline

# diffusers calls functions that other libraries have deprecated, and imageio leaves ffmpeg's pipes to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CPU = {"device": torch.device("cpu"), "dtype": torch.float32, "quiet": True}
SIZES = {"wan": (5, 32, 48), "cogvideox": (9, 32, 48)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in ("wan", "cogvideox"):
        made[kind] = tmp_path_factory.mktemp(kind)
        tiny_pipeline(kind).save_pretrained(made[kind])
    return made


def write(file, *, frames=20, height=40, width=48, fps=8):
    """A video whose frame of a number has that grey, ten apart."""
    pictures = [np.full((height, width, 3), 10 * index, np.uint8) for index in range(frames)]
    imageio.mimwrite(file, pictures, fps=fps, codec="libx264", quality=10, pixelformat="yuv444p", macro_block_size=1)
    return file


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.mp4", fps=16)
    lines = [{"file_name": "a.mp4", "text": "a red cat"}, {"file_name": "b.mp4", "text": "a dog runs left"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_frames_are_taken_at_the_rate_that_is_asked_for_and_the_middle_is_kept(tmp_path):
    file = write(tmp_path / "a.mp4", fps=8)
    video = read_clip(file, frames=3, height=20, width=30, fps=4)
    assert video.shape == (3, 3, 20, 30)
    # Every other frame: 0, 20 and 40 of 255.
    grey = (video.mean((0, 2, 3)) + 1) * 127.5
    assert_close(grey, torch.tensor([0.0, 20.0, 40.0]), atol=3, rtol=0)
    with pytest.raises(ValueError, match=r"a\.mp4 is too short: 20 frames at 8 a second, and 11 at 4 need 21"):
        read_clip(file, frames=11, height=20, width=30, fps=4)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    # The cause alone, without how ffmpeg was built.
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as a video: [^\n]{,200}$"):
        read_clip(tmp_path / "a.mp4", frames=1, height=8, width=8, fps=8)


def test_captions_come_from_metadata(videos):
    assert read_clips(videos) == [Clip("a red cat", videos / "a.mp4"), Clip("a dog runs left", videos / "b.mp4")]
    with pytest.raises(ValueError, match="line 1: expected file_name and title, both text"):
        read_clips(videos, caption="title")
    with pytest.raises(FileNotFoundError, match=r"holds no metadata\.jsonl"):
        read_clips(videos.parent)
    listing = videos / "metadata.jsonl"
    odd = json.dumps({"file_name": "a.mp4", "text": "a\u2028b"}, ensure_ascii=False)
    listing.write_text(odd + "\r\n", encoding="utf-8-sig", newline="")
    assert read_clips(videos) == [Clip("a\u2028b", videos / "a.mp4")]
    listing.write_text('{"file_name": "c.mp4", "text": "a"}')
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no .*c\.mp4"):
        read_clips(videos)
    listing.write_text("nothing")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_clips(videos)
    listing.write_text("\n")
    with pytest.raises(ValueError, match="lists no video"):
        read_clips(videos)


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_a_cache_holds_what_the_pipeline_would_make_and_its_vae_gives_the_video_back(kind, folders, videos, tmp_path):
    size = SIZES[kind]
    cache = fill_cache(tmp_path / "cache", read_clips(videos), str(folders[kind]), size=size, **CPU)
    assert len(cache) == 2
    assert cache.prompt(1) == "a dog runs left"
    pipe = DiffusionPipeline.from_pretrained(folders[kind])
    length = {"wan": 512, "cogvideox": 226}[kind]
    wanted, _ = pipe.encode_prompt(
        ["a dog runs left"], do_classifier_free_guidance=False, max_sequence_length=length, device="cpu"
    )
    item = cache.item(1)
    assert_close(item["text"], wanted[0])
    assert cache.null().shape == wanted[0].shape
    fps = {"wan": 16, "cogvideox": 8}[kind]
    video = read_clip(videos / "b.mp4", frames=size[0], height=size[1], width=size[2], fps=fps)
    mode = pipe.vae.encode(video[None]).latent_dist.mode()
    scale = 1.0 if kind == "wan" else pipe.vae.config.scaling_factor
    latents = item["latents"] if kind == "wan" else item["latents"].transpose(0, 1)
    assert_close(latents, mode[0] * scale)


def test_wans_latents_are_normalised(folders, videos, tmp_path):
    pipe = tiny_pipeline("wan")
    pipe.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
    pipe.save_pretrained(tmp_path / "other")
    plain = fill_cache(tmp_path / "plain", read_clips(videos), str(folders["wan"]), size=SIZES["wan"], **CPU)
    moved = fill_cache(tmp_path / "moved", read_clips(videos), str(tmp_path / "other"), size=SIZES["wan"], **CPU)
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    assert_close(moved.item(0)["latents"], (plain.item(0)["latents"] - mean) / 2)


def test_a_stopped_fill_goes_on_and_nothing_is_made_twice(folders, tmp_path, monkeypatch):
    clips = [Clip("a cat"), Clip("a dog")]
    cache = fill_cache(tmp_path / "cache", clips, str(folders["wan"]), **CPU)
    before = cache.item(1)["text"]
    (cache.path / "000001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not filled: 1 files missing, such as 000001"):
        Cache.open(cache.path)
    kept = (cache.path / "000000.safetensors").stat().st_mtime_ns
    assert_close(fill_cache(cache.path, clips, str(folders["wan"]), **CPU).item(1)["text"], before)
    assert (cache.path / "000000.safetensors").stat().st_mtime_ns == kept
    monkeypatch.setattr("hone_video.caching.load_pipeline", None)
    assert len(fill_cache(cache.path, clips, str(folders["wan"]), **CPU)) == 2


def test_a_cache_of_something_else_is_refused(folders, tmp_path):
    fill_cache(tmp_path / "cache", [Clip("a cat")], str(folders["wan"]), **CPU)
    with pytest.raises(CheckpointError, match="holds a cache of something else: it differs in items"):
        fill_cache(tmp_path / "cache", [Clip("a dog")], str(folders["wan"]), **CPU)
    own, other = (fingerprint(str(folders[kind]), "text_encoder") for kind in ("wan", "cogvideox"))
    assert own != other
    Cache.open(tmp_path / "cache", encoder=own)
    with pytest.raises(CheckpointError, match="was made by another text encoder"):
        Cache.open(tmp_path / "cache", encoder=other)
    with pytest.raises(CheckpointError, match="is no folder of encoded prompts"):
        Cache.open(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "cache", run / "artifacts" / "prompts")
    with pytest.raises(CheckpointError, match=r"run is no folder .*run.artifacts.prompts is one"):
        Cache.open(run)
    (tmp_path / "cache" / "000000.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"000000\.safetensors cannot be read: .*\. Fill a new"):
        Cache.open(tmp_path / "cache").item(0)
    with pytest.raises(ValueError, match="there is no prompt to encode"):
        fill_cache(tmp_path / "other", [], str(folders["wan"]), **CPU)


# ---- what a transformer is asked


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_a_denoiser_calls_the_transformer_as_its_pipeline_does(kind, folders):
    name = {"wan": "WanPipeline", "cogvideox": "CogVideoXPipeline"}[kind]
    pipe = load_pipeline(
        str(folders[kind]), name, device=torch.device("cpu"), dtype=torch.float32,
        leave_out=("text_encoder", "tokenizer", "vae"),
    )  # fmt: skip
    assert pipe.vae is None
    assert pipe.text_encoder is None
    calls = []
    whole = DiffusionPipeline.from_pretrained(folders[kind])
    whole.transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    size = {"wan": {}, "cogvideox": {"num_frames": 9}}[kind] or {"num_frames": 5}
    made = whole("a cat", height=32, width=48, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **size)
    assert made.frames is not None
    (call,) = calls
    denoiser = Denoiser(pipe)
    grid = denoiser.grid(call["hidden_states"])
    assert grid == ((2, 2, 3) if kind == "wan" else (3, 2, 3))
    text, timestep = call["encoder_hidden_states"], call["timestep"]
    mine = denoiser(pipe.transformer, call["hidden_states"], timestep, text)
    calls.clear()
    assert_close(mine, whole.transformer(**call)[0])


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_noise_and_velocity_are_the_schedulers(kind):
    pipe = tiny_pipeline(kind)
    denoiser = Denoiser(pipe)
    x, noise = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    noisy = denoiser.add_noise(x, noise, torch.tensor([250.0, 999.0]))
    if kind == "wan":
        assert_close(noisy.latents[0], 0.75 * x[0] + 0.25 * noise[0])
        # One step of the flow from there ends at the data.
        assert_close(noisy.latents[0] - 0.25 * noisy.target[0], x[0])
    else:
        a = pipe.scheduler.alphas_cumprod[250]
        assert_close(noisy.latents[0], a.sqrt() * x[0] + (1 - a).sqrt() * noise[0])
        assert_close(a.sqrt() * noisy.latents[0] - (1 - a).sqrt() * noisy.target[0], x[0])
        # At the last time all is noise, and the velocity is minus the data.
        assert_close(noisy.target[1], -x[1])
    times = [denoiser.sample_timestep(torch.Generator().manual_seed(i), shift=3.0) for i in range(50)]
    assert all(0 <= time <= 1000 and time == int(time) for time in times)
    assert len(set(times)) > 40
