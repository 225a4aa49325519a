import dataclasses
from types import SimpleNamespace

import pytest
from hone_fpsattention.config import PRESETS, FPSAttentionConfig, GenerateConfig, Regime, VideoConfig
from hone_fpsattention.models import describe_model
from hone_fpsattention.sample import choose_attention, draw, video_grid
from hone_fpsattention.schedule import Schedule
from hone_fpsattention.tuned import Tuned
from hone_video.architectures import tiny_pipeline

# diffusers calls functions that other libraries have deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
VIDEO = VideoConfig(model="folder", prompts=("a cat", "a dog"), steps=4, guidance=6.0, seed=3)


def test_the_pipeline_is_given_all_that_was_asked_for():
    given = {}

    def pipe(**options):
        given.update(options)
        return SimpleNamespace(frames=["a video"])

    cfg = dataclasses.replace(VIDEO, negative_prompt="blue", height=64, frames=9)
    assert draw(pipe, cfg, 1) == "a video"
    assert given.pop("generator").initial_seed() == 4
    assert callable(given.pop("callback_on_step_end"))
    # What is not given is the pipeline's own.
    assert given == {
        "prompt": "a dog", "negative_prompt": "blue", "num_inference_steps": 4, "guidance_scale": 6.0,
        "output_type": "np", "height": 64, "num_frames": 9,
    }  # fmt: skip


def test_which_attention_is_attached():
    pipe = tiny_pipeline("wan")
    own = Schedule(
        config=FPSAttentionConfig(regimes=(Regime(),)), model=describe_model(pipe), sampler="UniPCMultistepScheduler",
        steps=4, grid=(3, 4, 4), budget=1.0, provenance="a test",
    )  # fmt: skip
    tuned = Tuned(own, "transformer", None, None)

    def preset(name):
        return dataclasses.replace(PRESETS[name].config, shift=3.0)

    assert choose_attention(GenerateConfig(video=VIDEO), pipe, tuned) == own
    assert choose_attention(GenerateConfig(video=VIDEO, preset="tiny"), pipe, tuned) == preset("tiny")
    assert choose_attention(GenerateConfig(video=VIDEO, dense=True), pipe, tuned) is None
    assert choose_attention(GenerateConfig(video=VIDEO), pipe, None) == preset("wan2.1-1.3b")


def test_the_grid_of_what_a_pipeline_makes_unasked():
    pipe = tiny_pipeline("cogvideox")
    config = pipe.transformer.config
    assert video_grid(pipe, dataclasses.replace(VIDEO, frames=9, height=64, width=96)) == (3, 4, 6)
    rows, columns = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    assert video_grid(pipe, VIDEO)[1:] == (rows, columns)
