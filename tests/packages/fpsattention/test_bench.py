import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch.nn.functional as F
from hone_core.errors import MissingExtraError, UnsupportedHardwareError
from hone_core.runs import Run
from hone_fpsattention.bench import _Bench, bench
from hone_fpsattention.config import BenchConfig
from hone_kernels.attention_fp8 import api


def measure(tmp_path, **options):
    cfg = BenchConfig(rounds=2, forward_rounds=1, **options)
    run = Run.start(package="hone-fpsattention", verb="bench", config=cfg, out=tmp_path / "run", device="cpu")
    with run:
        return bench(cfg, run)


@pytest.mark.parametrize("model", ["tiny-wan", "tiny-cogvideox", "tiny-hunyuan"])
def test_rows_of_a_tiny_model(tmp_path, model):
    report = measure(tmp_path, model=model, parts=("attention", "forward", "loop"), loop_steps=2)
    rows = {(row.split, row.metric, row.variant): row.value for row in report.rows}
    for variant in ("dense", "window", "e4m3", "e4m3 window", "prologue", "kernel", "prologue, rotating"):
        assert rows["attention", "time", variant] > 0
    for variant in ("dense", "window", "e4m3", "e4m3 window"):
        assert rows["forward", "time", variant] > 0
    for variant in ("dense", "window", "e4m3", "e4m3 window", "schedule"):
        assert rows["loop", "time", variant] > 0
    both = rows["attention", "time", "e4m3 window"]
    assert rows["attention", "prologue_share", "e4m3 window"] == rows["attention", "time", "prologue"] / both
    share = 2 * rows["attention", "time", "dense"] / rows["forward", "time", "dense"]
    assert rows["forward", "attention_share", "dense"] == pytest.approx(share)
    assert rows["attention", "density_tiles", "e4m3"] == 1
    assert rows["attention", "density_tiles", "window"] == pytest.approx(3 / 20)
    assert rows["attention", "density_slots", "window"] > rows["attention", "density_tokens", "window"]
    saved = rows["attention", "time", "dense"] - rows["attention", "time", "window"]
    assert "x dense" in str(report)
    # Two layers, each faster or slower by what one attention was.
    assert rows["forward", "expected", "window"] == pytest.approx(rows["forward", "time", "dense"] - 2 * saved)


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    right = api.attention_fp8_reference
    monkeypatch.setattr(api, "attention_fp8_reference", lambda *a, **k: tuple(-x for x in right(*a, **k)))
    with pytest.raises(RuntimeError, match=r"e4m3 attention is wrong on cpu: .* No time is reported"):
        measure(tmp_path, model="tiny-wan", parts=("attention",))


def test_other_dense_kernels_are_compared_and_take_part_in_the_forward(tmp_path, monkeypatch):
    def kernels(spoil):
        flash = lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + spoil  # noqa: E731
        return lambda self: {"dense": F.scaled_dot_product_attention, "flash-attn 3 dense": flash}

    monkeypatch.setattr(_Bench, "dense_kernels", kernels(0))
    report = measure(tmp_path / "right", model="tiny-wan")
    for part in ("attention", "forward"):
        assert {"dense", "flash-attn 3 dense"} < {row.variant for row in report.rows if row.split == part}
    assert {row.labels["dense"] for row in report.rows if row.metric == "expected"} <= {"dense", "flash-attn 3 dense"}
    monkeypatch.setattr(_Bench, "dense_kernels", kernels(1))
    with pytest.raises(RuntimeError, match="flash-attn 3 dense is wrong on cpu"):
        measure(tmp_path / "wrong", model="tiny-wan")


SCRIPT = """
from unittest import mock
from hone_fpsattention.cli import main
# Without an accelerator diffusers divides by their number.
with mock.patch("torch.accelerator.device_count", return_value=2):
    main()
"""


@pytest.mark.slow
def test_two_processes_alone_and_together(tmp_path):
    (tmp_path / "bench.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["bench", "--model", "tiny-wan", "--parts", "parallel", "--forward-rounds", "1", "--device", "cpu"]
    command += [str(tmp_path / "bench.py"), *options, "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    found = {(row["variant"], row["labels"]["processes"]): row["value"] for row in rows if row["metric"] == "time"}
    assert set(found) == {(name, n) for name in ("dense", "window", "e4m3", "e4m3 window") for n in (1, 2)}
    assert min(found.values()) > 0
    errors = {row["variant"]: row["value"] for row in rows if row["metric"] == "relative_error"}
    assert set(errors) == {"dense", "window", "e4m3", "e4m3 window"}
    assert max(errors.values()) < 1e-4


def test_parts_for_several_processes_are_theirs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is what several processes do, .* got \('parallel',\) in 1"):
        measure(tmp_path, model="tiny-wan", parts=("parallel",))


def test_a_loop_takes_the_preset_of_its_model():
    for model, preset in (("wan2.1-14b-720p", "wan2.1-14b"), ("hunyuan-video-720p", "hunyuan-video")):
        assert BenchConfig(model=model).schedule == preset
    assert BenchConfig(model="tiny-wan").schedule == "tiny"


def test_a_published_size_needs_a_gpu(tmp_path):
    with pytest.raises(UnsupportedHardwareError, match=r"wan2.1-14b-720p at its published size needs a CUDA device"):
        measure(tmp_path)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (None, MissingExtraError, "Linear layers in E4M3 needs the extra 'linears'"),
        (ModuleType("torchao.quantization"), UnsupportedHardwareError, "need a GPU of compute capability 8.9"),
    ],
)
def test_linear_layers_need_their_extra_and_a_gpu(module, error, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    with pytest.raises(error, match=message):
        measure(tmp_path, model="tiny-wan", parts=("forward",), e4m3_linears=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "wan"},
            "model must be one of wan2.1-1.3b, .*wan2.1-14b-720p, hunyuan-video-720p, tiny-hunyuan; got 'wan'",
        ),
        ({"preset": "best"}, "no preset 'best'; the presets are"),
        ({"parts": ()}, "parts must name some of attention, forward"),
        ({"parts": ("parallel", "loop")}, "stands alone and is of Wan, which diffusers can split; got"),
        ({"parts": ("parallel",), "model": "cogvideox-5b"}, "stands alone and is of Wan"),
        ({"model": "tiny-wan", "dtype": "bfloat16"}, "tiny models are float32; leave dtype out, got 'bfloat16'"),
        ({"rounds": 0}, "rounds must be at least 1; got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**change)


def test_variants_differ_by_one_thing():
    variants = BenchConfig(model="wan2.1-1.3b").variants
    window, rounded, both = (variants[name].regimes[0] for name in ("window", "e4m3", "e4m3 window"))
    assert (window.window, window.e4m3) == ((6, 6, 1), False)
    assert (rounded.window, rounded.e4m3) == (None, True)
    assert (both.window, both.e4m3) == ((6, 6, 1), True)
