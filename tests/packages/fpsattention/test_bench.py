import sys
from types import ModuleType

import pytest
from hone_core.errors import MissingExtraError, UnsupportedHardwareError
from hone_core.runs import Run
from hone_fpsattention.bench import bench
from hone_fpsattention.config import BenchConfig
from hone_kernels.attention_fp8 import api


def measure(tmp_path, **options):
    cfg = BenchConfig(rounds=2, forward_rounds=1, **options)
    run = Run.start(package="hone-fpsattention", verb="bench", config=cfg, out=tmp_path / "run", device="cpu")
    with run:
        return bench(cfg, run)


@pytest.mark.parametrize("model", ["tiny-wan", "tiny-cogvideox"])
def test_rows_of_a_tiny_model(tmp_path, model):
    report = measure(tmp_path, model=model)
    rows = {(row.split, row.metric, row.variant): row.value for row in report.rows}
    for variant in ("dense", "window", "e4m3", "e4m3 window", "prologue", "kernel", "back from slots"):
        assert rows["attention", "time", variant] > 0
    for variant in ("dense", "window", "e4m3", "e4m3 window"):
        assert rows["forward", "time", variant] > 0
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
        ({"model": "wan"}, "model must be one of wan2.1-1.3b, .*wan2.1-14b-720p; got 'wan'"),
        ({"preset": "best"}, "no preset 'best'; the presets are"),
        ({"parts": ()}, "parts must name some of attention, forward"),
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
