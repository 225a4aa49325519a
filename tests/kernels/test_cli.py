import importlib.util
import json

import hone_kernels.attention.bench as bench_module
import pytest
import torch
from hone_core.testing import requires_gpu
from hone_kernels import cli
from hone_kernels.attention.bench import SHAPES, Shape, bench
from hone_kernels.timing import Times


def row(provider, density, ms, **fields):
    facts = dict(op="attention", shape="small", dtype="bfloat16", mode="forward", error=None, tflops=100 * density / ms)
    return {**facts, "provider": provider, "density": density, "ms_p50": ms, **fields}


ROWS = [
    row("hone triton", 1.0, 2.0, error=0.003),
    row("hone triton", 0.1, 0.25, error=0.003),
    row("cudnn dense", 1.0, 1.0),
    row("flash-attn dense", 1.0, 1.5),
    row("cudnn dense", 0.1, 1.0),
]


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


def test_table_compares_with_the_fastest_dense_provider():
    lines = cli.table(ROWS).splitlines()
    assert [line.split()[-2] for line in lines[1:]] == ["0.50", "4.00", "1.00", "0.67", "1.00"]
    assert lines[1].endswith("3.0e-03")


def test_plot_is_a_picture_or_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:  # the extra bench is not installed
        with pytest.raises(ValueError, match="pip install"):
            cli._plot(ROWS, tmp_path / "rate.png")
        return
    cli._plot(ROWS, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")


def test_bench_end_to_end_on_the_reference(monkeypatch):
    """Every mode and dtype on a CPU: what is measured, and how it is counted; only the clock is replaced."""
    calls = {}

    def clock(named, *, rounds, seed):
        for name, call in named.items():
            call()
            calls[name] = call
        return {name: Times(1.0, 2.0, 3.0, rounds) for name in named}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_module, "_DEVICE", "cpu")
    monkeypatch.setattr(bench_module, "interleaved", clock)
    monkeypatch.setattr(bench_module, "_cudnn", torch.nn.functional.scaled_dot_product_attention)
    lines = []
    rows = bench(
        [Shape.parse("2x300x32")], densities=[1.0, 0.5], dtypes=[torch.float32, torch.float8_e4m3fn],
        backends=["reference", "triton"], rounds=3, say=lines.append,
    )  # fmt: skip
    assert sum("no backend 'triton', since" in line for line in lines) == 2
    seen = {(r["dtype"], r["mode"], r["provider"]) for r in rows}
    assert seen == {
        *[("float32", mode, "hone reference") for mode in ("forward", "forward pooled", "backward")],
        *[("float8_e4m3fn", mode, "hone reference") for mode in ("forward", "backward", "prologue")],
        ("float8_e4m3fn", "forward", "hone reference and prologue"),
        *[("float8_e4m3fn", mode, "cudnn dense") for mode in ("forward", "backward")],
        ("float8_e4m3fn", "prologue", "device copy"),
    }
    (dense,) = (r for r in rows if (r["dtype"], r["mode"], r["density"]) == ("float32", "forward", 1.0))
    assert dense["tflops"] == pytest.approx(4 * 32 * 2 * 300**2 / 2.0 / 1e9)
    (prologue,) = (r for r in rows if r["mode"] == "prologue" and r["provider"] == "hone reference")
    assert prologue["gbps"] == pytest.approx(9 * 2 * 300 * 32 / 2.0 / 1e6)
    assert 0.02 < prologue["error"] < 0.1
    assert len(cli.table(rows).splitlines()) == len(rows) + 1


def test_shapes_by_name_and_by_size():
    assert Shape.parse("cogvideox-5b") is SHAPES["cogvideox-5b"]
    assert Shape.parse("12x4096x64") == Shape("12x4096x64", 12, 4096, 64, 12)
    for text in ("wan", "12x4096", "0x4096x64", "12x-1x64"):
        with pytest.raises(ValueError, match="HEADSxTOKENSxHEAD_SIZE"):
            Shape.parse(text)


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert run("bench", "attention") == 1
    assert "CUDA device" in capsys.readouterr().err
    assert run("info", "--json") == 0
    backends = json.loads(capsys.readouterr().out)["backends"]
    assert backends["reference"] is None
    assert "CUDA device" in backends["triton"]


def test_a_missing_folder_is_said_before_any_work(capsys, tmp_path):
    assert run("bench", "attention", "--out", str(tmp_path / "no" / "x.json")) == 1
    assert "does not exist" in capsys.readouterr().err
    assert run("bench", "attention", "--shapes", "no-such-shape") == 1
    assert "HEADSxTOKENSxHEAD_SIZE" in capsys.readouterr().err


@requires_gpu(min_sm=80)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.compile's own
def test_bench_on_a_gpu(capsys, tmp_path):
    argv = ["--shapes", "4x1024x64", "4x1000x128", "--densities", "0.5", "--rounds", "2", "--backends", "triton"]
    assert run("bench", "attention", *argv, "--out", str(tmp_path / "x.json"), "--json") == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert result == json.loads(capsys.readouterr().out)
    seen = {(r["shape"], r["mode"], r["provider"]) for r in result["rows"]}
    assert ("4x1024x64", "backward", "flex") in seen
    assert ("4x1000x128", "forward pooled", "hone triton") in seen
    assert ("4x1000x128", "prologue", "hone triton") in seen
    assert all(0 < r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"] for r in result["rows"])
    with pytest.raises(ValueError, match="density"):
        bench([Shape.parse("4x1024x64")], densities=[0.0], dtypes=[], backends=["triton"])
