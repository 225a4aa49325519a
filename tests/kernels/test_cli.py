import importlib.util
import json
import sys

import hone_kernels.attention.bench as bench_module
import pytest
from hone_core.testing import requires_gpu
from hone_kernels import cli


def row(provider, density, ms, **fields):
    facts = dict(op="attention", shape="small", dtype="bfloat16", mode="forward", error=None, tflops=100 * density / ms)
    facts["speedup_over_dense"] = 1.0 / ms
    return {**facts, "provider": provider, "density": density, "ms_p50": ms, **fields}


ROWS = [
    row("hone triton", 1.0, 2.0, error=0.003),
    row("hone triton", 0.1, 0.25, error=0.003),
    row("cudnn dense", 1.0, 1.0),
    row("flash-attn 2 dense", 1.0, 1.5),
    row("cudnn dense", 0.1, 1.0),
    row("flex", 0.1, 1.0, speedup_over_dense=None),
]


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


def test_table_shows_the_speed_up_over_cudnn_and_the_error():
    lines = cli.table(ROWS).splitlines()
    assert [line.split()[-2] for line in lines[1:]] == ["0.50", "4.00", "1.00", "0.67", "1.00", "-"]
    assert lines[1].endswith("3.0e-03")


def test_plot_is_a_picture_or_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:  # the extra bench is not installed
        with pytest.raises(ValueError, match="pip install"):
            cli._plot(ROWS, tmp_path / "rate.png")
        return
    cli._plot(ROWS, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert run("bench", "attention") == 1
    assert "CUDA device" in capsys.readouterr().err
    assert run("info", "--json") == 0
    backends = json.loads(capsys.readouterr().out)["backends"]
    assert backends["reference"] is None
    assert "CUDA device" in backends["triton"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "no/x.json"], "folder no of no/x.json does not exist"),
        (["--out", "."], ". is a folder"),
        (["--shapes", "no-such-shape"], "HEADSxTOKENSxHEAD_SIZE"),
        (["--modes", "sideways"], "no mode sideways; there are forward"),
        (["--backends", "cutlass"], "no backend cutlass; there are reference"),
        (["--densities", "0.5", "1.5"], "a density lies in (0, 1]; got 1.5"),
        (["--densities", "nan"], "a density lies in (0, 1]; got nan"),
        (["--rounds", "0"], "rounds must be at least 1; got 0"),
        (["--block", "-64"], "block must be at least 1; got -64"),
        (["--modes", "prologue", "--dtypes", "bfloat16"], "nothing to measure"),
        (["--modes", "forward pooled", "--dtypes", "float8_e4m3fn"], "nothing to measure"),
        (["--modes", "prologue", "--plot", "x.png"], "--plot draws rates of attention"),
        (["--modes", "prologue", "forward pooled", "--dtypes", "float8_e4m3fn", "--plot", "x.png"], "--plot draws"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_said_before_any_work(capsys, tmp_path, monkeypatch, flags, words):
    def never(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    for name in ("random_layout", "interleaved", "_inputs"):
        monkeypatch.setattr(bench_module, name, never)
    monkeypatch.setattr(cli, "_available", never)
    assert run("bench", "attention", *flags) == 2
    assert words in capsys.readouterr().err


def test_a_missing_extra_is_wrong_usage(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("bench", "attention", "--plot", str(tmp_path / "x.png")) == 2
    assert "pip install 'hone-kernels[bench]'" in capsys.readouterr().err


def test_the_table_is_printed_before_the_plot(capsys, tmp_path, monkeypatch):
    """A picture that cannot be drawn must not cost the measurements."""

    def no_plot(rows, path):
        raise OSError("disk full")

    monkeypatch.setattr(bench_module, "bench", lambda *args, **kwargs: ROWS)
    monkeypatch.setattr(cli, "_pyplot", lambda: None)
    monkeypatch.setattr(cli, "_plot", no_plot)
    assert run("bench", "attention", "--plot", str(tmp_path / "x.png"), "--out", str(tmp_path / "x.json")) == 1
    said = capsys.readouterr()
    assert said.out.strip() == cli.table(ROWS)
    assert "disk full" in said.err
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == ROWS


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
    ours = [r for r in result["rows"] if r["provider"].startswith("hone")]
    assert all(0 < r["error"] < (0.2 if r["dtype"] == "float8_e4m3fn" else 0.01) for r in ours)
    assert all(r["speedup_over_dense"] > 0 for r in ours if r["mode"] != "prologue")
