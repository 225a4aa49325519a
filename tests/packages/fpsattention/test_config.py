import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hone_core.config import from_dict, to_dict
from hone_fpsattention.config import (
    PRESETS,
    PROMPTS,
    CalibrateConfig,
    DemoConfig,
    EvalConfig,
    FPSAttentionConfig,
    InspectConfig,
    Regime,
    VideoConfig,
)
from hone_fpsattention.windows import density
from hone_video.vbench_config import VBenchConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_round_trip(name):
    preset = PRESETS[name]
    assert preset.model
    assert "Ours: " in preset.provenance
    assert from_dict(FPSAttentionConfig, to_dict(preset.config)) == preset.config


def test_config_and_schedule_import_no_torch():
    code = "import sys, hone_fpsattention.config, hone_fpsattention.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parity
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b", "window-661"])
def test_published_constants(name):
    config = PRESETS[name].config
    assert config.tile == (6, 8, 8)
    assert config.regimes[0].window == (6, 6, 1)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("wan2.1-1.3b", (21, 30, 52)),
        ("wan2.1-14b", (21, 45, 80)),
        ("cogvideox-5b", (13, 30, 45)),
        ("hunyuan-video", (33, 45, 80)),
        ("tiny", (16, 8, 8)),
        ("tiny-wide", (16, 8, 8)),
    ],
)
def test_the_middle_of_a_staged_preset_is_densest_and_its_start_sparsest(name, grid):
    config = PRESETS[name].config
    early, middle, late = (density(grid, config.tile, regime.window).tiles for regime in config.regimes)
    assert early < late < middle <= 1


def test_constant_takes_one_regime_for_all_steps():
    config = PRESETS["tiny"].config
    for chosen in (1, config.regimes[1]):
        constant = config.constant(chosen)
        assert constant.regimes == (config.regimes[1],)
        assert constant.boundaries == ()
        assert constant.tile == config.tile


def test_plain_is_neither_windowed_nor_rounded():
    assert Regime(e4m3=False).plain
    assert not Regime().plain
    assert not Regime(window=(1, 1, 1), e4m3=False).plain


TWO = (Regime(), Regime())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": (6, 0, 8)}, r"tile must be positive along each axis .* got \(6, 0, 8\)"),
        ({"block": 96}, r"block must be one of \(64, 128\); got 96"),
        ({"border": "wrap"}, "border must be one of .* got 'wrap'"),
        ({"delta": "none"}, "delta must be one of"),
        ({"backend": "gluon"}, "backend must be one of .* got 'gluon'"),
        ({"regimes": ()}, "at least one Regime"),
        ({"regimes": TWO}, r"boundaries must be one fewer than regimes: 1 for 2; got \(\)"),
        ({"boundaries": (0.5,)}, "boundaries must be one fewer than regimes: 0 for 1"),
        ({"regimes": (*TWO, Regime()), "boundaries": (0.8, 0.2)}, "ascending; got .*noisiest"),
        ({"regimes": (*TWO, Regime()), "boundaries": (0.5, 0.5)}, "ascending"),
        ({"regimes": TWO, "boundaries": (1.0,)}, "between 0 and 1"),
        ({"regimes": TWO, "boundaries": (0.0,)}, "between 0 and 1"),
        ({"regimes": TWO, "boundaries": (float("nan"),)}, "between 0 and 1"),
        ({"shift": 0.0}, "shift must be a positive number, 1 for none; got 0.0"),
        ({"shift": float("inf")}, "shift must be a positive number"),
        ({"shift": float("nan")}, "shift must be a positive number"),
        ({"dense_layers": (-1,)}, "dense_layers must be a tuple of layer numbers from 0"),
        ({"dense_layers": 0}, "dense_layers must be a tuple"),
        ({"regimes": (Regime(scale_tile=(8, 8, 8)),)}, "scale_tile of regime 0 must be a multiple of tile"),
        ({"regimes": (Regime(scales="token"),), "backend": "triton"}, "scales='token', which no kernel does"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        FPSAttentionConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": (6, 8)}, r"tile must be three whole numbers .* got \(6, 8\)"),
        ({"tile": [6, 8, 8]}, "tile must be three whole numbers"),
        ({"tile": (6, 8.0, 8)}, "tile must be three whole numbers"),
        ({"regimes": Regime()}, "regimes must be a tuple of Regime"),
        ({"boundaries": 0.2}, "boundaries must be a tuple of numbers"),
        ({"smooth_k": 1}, "smooth_k must be True or False; got 1"),
    ],
)
def test_bad_types_are_named(change, message):
    with pytest.raises(TypeError, match=message):
        FPSAttentionConfig(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": (3, 3)}, TypeError, "window must be three whole numbers"),
        ({"window": (3, 0, 3)}, ValueError, "window must be positive"),
        ({"scales": "row"}, ValueError, "scales must be one of .* got 'row'"),
        ({"scales": "tensor", "scale_tile": (6, 8, 8)}, ValueError, "scale_tile is the box of scales='tile'"),
        ({"e4m3": 1}, TypeError, "e4m3 must be True or False; got 1"),
    ],
)
def test_bad_regimes_are_named(change, error, message):
    with pytest.raises(error, match=message):
        Regime(**change)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FPSAttentionConfig().tile = (1, 1, 1)


@pytest.mark.parametrize("cls", [CalibrateConfig, InspectConfig])
def test_what_the_tiny_host_would_not_read_is_refused(cls):
    prompts = ("a red 7 moving left, slow",)
    assert cls(video=VideoConfig(prompts=prompts, seed=3)).video.seed == 3
    with pytest.raises(ValueError, match=r"steps, height: of a pipeline, not of the tiny host; pass --model FOLDER"):
        cls(video=VideoConfig(prompts=prompts, steps=3, height=32))
    assert cls(video=VideoConfig(model="folder", prompts=prompts, steps=3)).video.steps == 3


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (DemoConfig, {"preset": "tiny", "tuned": Path("x")}, "tuned is a host with its attention; drop preset"),
        (EvalConfig, {"preset": "tiny", "tuned": Path("x")}, "tuned is a host with its attention; drop preset"),
        (EvalConfig, {"schedule": Path("x")}, "schedule: of a pipeline, for protocol vbench"),
        (EvalConfig, {"flow_shift": 5.0}, "flow_shift: of a pipeline, for protocol vbench"),
        (EvalConfig, {"protocol": "vbench", "vbench": VBenchConfig(model="x"), "batch": 4}, "batch is of protocol"),
    ],
)
def test_what_would_not_be_looked_at_is_refused(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(**given)


def test_vbench_takes_a_schedule_and_a_shift():
    cfg = EvalConfig(
        protocol="vbench", vbench=VBenchConfig(model="x"), schedule=Path("s.json"), flow_shift=3.0, tuned=Path("t")
    )
    made = cfg.videos(("a cat",))
    assert (made.schedule, made.video.flow_shift, made.tuned) == (Path("s.json"), 3.0, Path("t"))


def test_inspect_looks_at_one_video():
    with pytest.raises(ValueError, match="inspect looks at one video; got 2 prompts"):
        InspectConfig(video=VideoConfig(prompts=PROMPTS))
