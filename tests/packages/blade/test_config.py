import dataclasses
import math
import subprocess
import sys

import pytest
from hone_blade.config import PRESETS, BladeConfig, InspectConfig
from hone_core.config import from_dict, to_dict


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_round_trip(name):
    preset = PRESETS[name]
    assert preset.provenance
    assert preset.model
    assert from_dict(BladeConfig, to_dict(preset.config)) == preset.config


def test_config_imports_no_torch():
    code = "import sys, hone_blade.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parity
def test_published_constants():
    wan, cog = PRESETS["wan2.1-1.3b-official"].config, PRESETS["cogvideox-5b-official"].config
    assert (wan.max_density, wan.min_density, wan.mass, wan.pool) == (0.17, 0.05, 0.95, 30)
    assert (cog.max_density, cog.min_density, cog.mass, cog.pool) == (0.10, 0.05, 0.95, 15)
    for cfg in (wan, cog):
        assert (cfg.score, cfg.samples, cfg.offsets) == ("official", 32, "random")
        assert (cfg.inclusive, cfg.pool_exact, cfg.keep_diagonal) == (False, False, False)
    # int(256 * 0.17), int(139 * 0.10): the block counts behind the published sparsities 0.798 and 0.82.
    assert wan.keep_bounds(256) == (12, 43)
    assert cog.keep_bounds(139) == (6, 13)


def test_keep_bounds():
    cfg = BladeConfig(min_density=0.05, max_density=0.29)
    assert cfg.keep_bounds(100) == (5, 29)  # 100 * 0.29 is 28.999999999999996
    assert cfg.keep_bounds(3) == (1, 1)
    assert BladeConfig(max_density=1.0).keep_bounds(7) == (1, 7)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_tile_holds_a_block(block):
    frames, height, width = BladeConfig(block=block, samples=8).tile
    assert frames * height * width == block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "max"}, "score must be one of .*'lse'.*; got 'max'"),
        ({"offsets": "fixed"}, "offsets must be one of"),
        ({"order": "hilbert"}, "order must be one of"),
        ({"mask": "none"}, "mask must be one of"),
        ({"selection": "topp"}, "selection must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"block": 100}, "block must be one of .* got 100"),
        ({"max_density": 0}, "max_density is a fraction"),
        ({"max_density": 17}, "max_density is a fraction"),
        ({"min_density": 0.5}, r"min_density must lie in \[0, max_density = 0.17\]; got 0.5"),
        ({"mass": 0.0}, "mass is a share"),
        ({"samples": 0}, "samples must lie in"),
        ({"samples": 129}, r"samples must lie in \[1, block = 128\]; got 129"),
        ({"pool": -1}, "pool must not be negative; got -1"),
        ({"dense_steps": -2}, "dense_steps must not be negative"),
        ({"dense_layers": (0, -1)}, "dense_layers counts layers from 0"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        BladeConfig(**change)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BladeConfig(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1.5}, r"samples must be a whole number \(int\); got 1\.5 of type float"),
        ({"pool": 1.5}, "pool must be a whole number"),
        ({"block": 128.0}, "block must be a whole number .* got 128.0 of type float"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number .* got None of type NoneType"),
        ({"dense_steps": 2.5}, "dense_steps must be a whole number"),
        ({"dense_steps": True}, "dense_steps must be a whole number .* got True of type bool"),
        ({"min_tokens": math.inf}, "min_tokens must be a whole number .* got inf of type float"),
        ({"max_density": True}, r"max_density must be a number \(float\); got True of type bool"),
        ({"max_density": "0.3"}, "max_density must be a number .* got '0.3' of type str"),
        ({"inclusive": 1}, "inclusive must be True or False; got 1 of type int"),
        ({"score": ["paper"]}, "score must be a string; got .* of type list"),
        (
            {"dense_layers": [0]},
            r"dense_layers must be a tuple of whole numbers, such as \(0,\); got \[0\] of type list",
        ),
        ({"dense_layers": 3}, "dense_layers must be a tuple .* got 3 of type int"),
        ({"dense_layers": (0, 1.0)}, r"dense_layers must be a tuple of whole numbers, .* got \(0, 1\.0\)"),
    ],
)
def test_bad_types(change, message):
    with pytest.raises(TypeError, match=message):
        BladeConfig(**change)


@pytest.mark.parametrize("name", ["max_density", "min_density", "mass"])
def test_nan_is_no_share(name):
    with pytest.raises(ValueError, match=f"{name} .* got nan"):
        BladeConfig(**{name: math.nan})


def test_whole_fractions_may_be_integers_and_lists_come_in_as_tuples():
    assert BladeConfig(max_density=1).max_density == 1
    assert from_dict(BladeConfig, {"dense_layers": [0, 2]}).dense_layers == (0, 2)


def test_a_pipeline_is_inspected_as_it_would_generate():
    cfg = InspectConfig(
        model="folder", prompt="a fox", offload=True, height=64, width=80, frames=9, steps=4, dtype="bfloat16",
        image="a.png", lora="a", lora_2="b",
    )  # fmt: skip
    made = cfg.pipeline
    assert (made.images, made.lora, made.lora_2) == (("a.png",), "a", "b")
    assert (made.prompts, made.offload, made.dtype, made.steps) == (("a fox",), True, "bfloat16", 4)
    assert (made.height, made.width, made.frames) == (64, 80, 9)
