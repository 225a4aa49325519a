import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import hone_kernels.attention.bench as attention_bench
import hone_kernels.bench as bench_module
import pytest
import torch
from hone_core.runs import Row, Run
from hone_core.testing import requires_gpu
from hone_kernels import cli
from hone_kernels.config import BenchConfig, SpillsConfig
from hone_kernels.rows import table


def rows(variant, density, ms, error=None):
    labels = {"shape": "small", "dtype": "bfloat16", "density": density}
    values = {"time": (ms, "ms", "lower"), "rate": (100 * density / ms, "TFLOP/s", "higher")}
    values |= {"error": (error, "", "lower")} if error else {}
    return [
        Row(metric=metric, value=value, unit=unit, better=better, variant=variant, split="forward", labels=labels)
        for metric, (value, unit, better) in values.items()
    ]


ROWS = [
    *rows("hone triton", 1.0, 2.0, 0.003),
    *rows("hone triton", 0.1, 0.25, 0.003),
    *rows("cudnn dense", 1.0, 1.0),
    *rows("flash-attn 2 dense", 1.0, 1.5),
    *rows("cudnn dense", 0.1, 1.0),
    *rows("flex", 0.5, 1.0),
]


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["hone-kernels", *argv])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_table_shows_the_speed_up_over_the_dense_attention_and_the_error():
    lines = table(ROWS).splitlines()
    assert [line.split()[-3] for line in lines[1:]] == ["0.50", "4.00", "1.00", "0.67", "1.00", "-"]
    assert lines[1].endswith("3.0e-03")
    named = [dataclasses.replace(row, labels={**row.labels, "dense": "flash-attn 2 dense"}) for row in ROWS]
    lines = [" ".join(line.split()) for line in table(named).splitlines()[1:]]
    assert [line.partition(" flash-attn 2 ")[0].split()[-1] for line in lines[:4:2]] == ["0.75", "1.50"]
    assert lines[3].endswith("1.00 flash-attn 2 -")
    assert all(line.endswith("- - 3.0e-03") or line.endswith("- - -") for line in (lines[1], *lines[4:]))


def test_table_has_a_column_of_memory_where_it_was_measured():
    labels = {"shape": "small", "dtype": "bfloat16", "density": 0.1}
    held = Row(
        metric="memory", value=5.25, unit="MiB", better="lower", variant="hone triton", split="forward", labels=labels
    )
    lines = table([*ROWS, held]).splitlines()
    assert lines[0].endswith("MiB")
    assert [line.split()[-1] for line in lines[1:]] == ["-", "5.2", *"-" * (len(lines) - 3)]
    assert "MiB" not in table(ROWS)


def test_table_shows_the_time_of_the_host():
    row = Row(
        metric="host_us", value=31.25, unit="us", better="lower", variant="hone triton", split="forward", labels={}
    )
    assert "31.2 us of the host" in table([row])


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    bench_module.plot(ROWS, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("argv", ["bench --no-plot", "tune"])
def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *argv.split()) == 1
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="says what is missing where there is no GPU")
def test_info_says_of_every_op_what_runs(capsys, monkeypatch):
    assert run(monkeypatch, "info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ops = (
        "attention",
        "attention_fp8",
        "block_scores",
        "block_select",
        "column_mass",
        "decoding",
        "draw_codes",
        "few_tokens",
        "guided_draw",
        "kept_tokens",
        "logits",
        "ragged_decode",
        "nearest_points",
        "plane_sweep",
        "prefix_attention",
        "pyramid_attention",
        "splat_blend",
        "token_select",
    )
    for op in ops:
        assert found[op]["reference"] == "runs"
        assert "CUDA device" in found[op]["triton"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--export", "no/x.json"], "the folder no does not exist"),
        (["--shapes", "no-such-shape"], "HEADSxTOKENSxHEAD_SIZE"),
        (["--densities", "0.5", "1.5"], "a density lies in (0, 1]; got 1.5"),
        (["--densities", "nan"], "a density lies in (0, 1]; got nan"),
        (["--backends", "cutlass"], "invalid choice 'cutlass'"),
        (["--rounds", "0"], "rounds must be at least 1; got 0"),
        (["--block", "-64"], "block must be at least 1; got -64"),
        (["--modes", "prologue", "--dtypes", "bfloat16"], "nothing to measure"),
        (["--modes", "forward pooled", "--dtypes", "float8_e4m3fn"], "nothing to measure"),
        (["--op", "block_scores", "--densities", "0.5"], "block_scores has no densities to choose; it has shapes"),
        (["--op", "attention_fp8", "--block", "64"], "attention_fp8 has no block to choose"),
        (["--op", "attention_fp8", "--modes", "forward"], "attention_fp8 measures backward and prologue; got forward"),
        (["--op", "block_scores", "--shapes", "large"], "no shape large; there are wan-1.3b 480p"),
        (["--op", "logits", "--modes", "forward"], "logits has no modes to choose; it has shapes, dtypes"),
        (["--op", "logits", "--shapes", "64"], "a shape of logits is ROWSxVOCABULARY such as 64x151936; got '64'"),
        (["--op", "logits", "--dtypes", "float8_e4m3fn"], "logits are not float8_e4m3fn"),
        (
            ["--op", "ragged_decode", "--shapes", "1x3x2x64x64"],
            "BATCHxHEADSxKEY_HEADSxTOKENSxHEAD_SIZE such as 1x28x4x16384",
        ),
        (["--op", "kept_tokens", "--shapes", "3x8x4x64"], "ROWSxTOKENSxKEPTxCHANNELS, of an even number of rows"),
        (["--op", "column_mass", "--modes", "forward"], "column_mass has no modes to choose; it has shapes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_said_before_any_work(capsys, tmp_path, monkeypatch, flags, words):
    def never(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    for name in ("random_layout", "measure_interleaved", "inputs"):
        monkeypatch.setattr(attention_bench, name, never)
    monkeypatch.setattr(bench_module, "the_gpu", never)
    assert run(monkeypatch, "bench", *flags) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_wrong_usage(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, "bench") == 2
    assert "pip install 'hone-kernels[bench]'" in capsys.readouterr().err
    assert run(monkeypatch, "bench", "--no-plot", "--dry-run") == 0
    for name in ("hone_core", "hone_core.cli"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hone_kernels.cli")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("hone_kernels.cli")
    assert stop.value.code == 2
    assert "pip install 'hone-kernels[bench]'" in capsys.readouterr().err


def test_the_plan_is_complete(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "bench", "--no-plot", "--dry-run", "--json") == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["shapes"] == list(attention_bench.SHAPES)
    assert config["dtypes"] == ["bfloat16", "float8_e4m3fn"]
    assert (config["block"], config["densities"]) == (128, [1.0, 0.5, 0.2, 0.1])
    cfg = bench_module.prepare(BenchConfig(plot=False))
    assert bench_module.prepare(cfg) == cfg


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_measurements(tmp_path, monkeypatch):
    def no_plot(rows, path):
        raise OSError("disk full")

    def measured(run, shapes, **settings):
        for row in ROWS:
            run.row(**{field.name: getattr(row, field.name) for field in dataclasses.fields(row)})

    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))  # the extra may not be installed
    monkeypatch.setattr(bench_module, "the_gpu", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(bench_module, "_usable", lambda device: [])
    monkeypatch.setattr(attention_bench, "bench", measured)
    monkeypatch.setattr(bench_module, "plot", no_plot)
    with pytest.raises(OSError, match="disk full"), Run.start(package="p", verb="v", out=tmp_path / "run") as found:
        bench_module.bench(bench_module.prepare(BenchConfig()), found)
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored["status"] == "failed"
    assert len(stored["rows"]) == len(ROWS)


def verb(*argv):
    """A verb in a process of its own; its results."""
    out = Path(argv[argv.index("--out") + 1])
    command = [sys.executable, "-P", "-c", "from hone_kernels.cli import main; main()", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())["rows"], done.stdout


@requires_gpu(min_sm=80)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.compile's own
def test_bench_on_a_gpu(tmp_path):
    argv = ["--shapes", "4x1024x64", "4x1000x128", "--densities", "0.5", "--rounds", "2", "--backends", "triton"]
    found, shown = verb("bench", *argv, "--out", str(tmp_path / "run"))
    seen = {(r["labels"]["shape"], r["split"], r["variant"]) for r in found}
    assert ("4x1024x64", "backward", "flex") in seen
    assert ("4x1000x128", "forward pooled", "hone triton") in seen
    assert ("4x1000x128", "prologue", "hone triton") in seen
    assert all(r["value"] > 0 for r in found)
    errors = [r for r in found if r["metric"] == "error"]
    assert all(r["value"] < (0.2 if r["labels"]["dtype"] == "float8_e4m3fn" else 0.01) for r in errors)
    assert {r["variant"].split()[0] for r in errors} == {"hone"}
    assert (tmp_path / "run" / "figures" / "rate.png").exists()
    assert "x dense" in shown


@requires_gpu(min_sm=89)
def test_fp8_bench_on_a_gpu(tmp_path):
    argv = ["--op", "attention_fp8", "--shapes", "2x2080x64", "--densities", "0.5", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {r["variant"] for r in found if r["metric"] == "time"}
    assert times >= {"fp8, delta exact", "fp8, delta forward", "bf16", "plain", "rope, order", "smooth_k", "group 3"}


@requires_gpu(min_sm=80)
def test_block_scores_bench_on_a_gpu(tmp_path):
    argv = ["--op", "block_scores", "--shapes", "small", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {r["variant"] for r in found if r["metric"] == "time"}
    assert times >= {"scores paper 16", "scores mean 128", "select topk", "scores and selection", "attention pooled"}


@requires_gpu(min_sm=80)
def test_logits_bench_on_a_gpu(tmp_path):
    argv = ["--op", "logits", "--shapes", "3x1000", "--dtypes", "float16", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    assert {r["variant"] for r in found} == {"triton", "torch", "torch compiled", "torch amax alone"}


@requires_gpu(min_sm=80)
def test_column_mass_bench_on_a_gpu(tmp_path):
    argv = ["--op", "column_mass", "--shapes", "2x8x2x1000x64", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {r["variant"] for r in found if r["metric"] == "time"}
    assert times == {"column mass", "selection", "both", "torch", "causal dense"}


@requires_gpu(min_sm=80)
def test_pyramid_bench_on_a_gpu(tmp_path):
    argv = ["--op", "pyramid_attention", "--shapes", "2x2080x64", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {(r["split"], r["variant"]) for r in found if r["metric"] == "time"}
    names = ("hone pyramid", "hone pyramid, by levels", "hone lists")
    assert times >= {(split, name) for split in ("forward", "backward") for name in names}


@requires_gpu(min_sm=80)
def test_decode_bench_on_a_gpu(tmp_path):
    argv = ["--op", "ragged_decode", "--shapes", "2x8x2x1000x64", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {r["variant"] for r in found if r["metric"] == "time"}
    assert times == {"dense sdpa", "triton, all", "triton, 0.25", "sdpa under a mask, 0.25"}


@requires_gpu(min_sm=80)
def test_kept_tokens_bench_on_a_gpu(tmp_path):
    argv = ["--op", "kept_tokens", "--shapes", "2x100x40x768", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {(r["split"], r["variant"]) for r in found if r["metric"] == "time"}
    assert times == {(s, v) for s in ("gather", "change", "draw") for v in ("triton", "torch", "torch compiled")}


@requires_gpu(min_sm=80)
def test_plane_sweep_bench_on_a_gpu(tmp_path):
    argv = ["--op", "plane_sweep", "--shapes", "6x2x128x32x56x128", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    memory = {(r["split"], r["variant"]): r["value"] for r in found if r["metric"] == "memory"}
    for split, least in (("forward", 1400), ("forward and backward", 1400)):
        # Beside its output the kernel holds the features once more, channels last.
        assert memory[split, "triton"] < 5 * memory[split, "output alone"]
        assert memory[split, "torch, all at once"] * 2**20 / 1e6 > least


@requires_gpu(min_sm=80)
def test_splat_blend_bench_on_a_gpu(tmp_path):
    argv = ["--op", "splat_blend", "--shapes", "2x5000x64x64", "--rounds", "2"]
    found, _ = verb("bench", *argv, "--out", str(tmp_path / "run"))
    times = {(r["split"], r["variant"]) for r in found if r["metric"] == "time"}
    assert {(s, v) for s in ("forward", "forward and backward") for v in ("triton", "torch")} < times


@requires_gpu(min_sm=90)
@pytest.mark.parametrize("kernel", ["attention", "attention_gluon", "attention_fp8", "block_scores"])
def test_tune_on_a_gpu(tmp_path, kernel):
    argv = ["--kernel", kernel, "--shapes", "small", "--candidates", "2", "--rounds", "2"]
    found, _ = verb("tune", *argv, "--out", str(tmp_path / "run"))
    tried = {r["variant"] for r in found if r["metric"] == "time" and "(" in r["variant"]}
    assert len(tried) >= 2
    assert all(r["value"] < 0.02 for r in found if r["metric"] == "error")


def test_profile_reads_what_ncu_says():
    from hone_kernels.profile import COUNTERS, counters

    names = ['"ID"', *(f'"{metric}"' for metric in COUNTERS.values())]
    values = ['"0"', '"82.99"', '"80.25"', '"45.95"', '"9,009,376"']
    text = "\n".join(["==PROF== words", ",".join(names), '"","%","%","%","ns"', ",".join(values)])
    found = {"matrix_units": 82.99, "multiprocessors": 80.25, "l2": 45.95, "duration": 9009376.0}
    assert counters(text, COUNTERS) == found
    with pytest.raises(RuntimeError, match="ncu gave no table: nothing"):
        counters("nothing", COUNTERS)


NCU = """#!/bin/sh
echo "$@" >> {log}
echo '"ID",{names}'
echo '"","%","%","%","ns","%"'
echo '"0","1","2","3","4,000","55"'
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("op", "kernels"),
    [("column_mass", ["lse", "mass"]), ("token_select", ["select"]), ("ragged_decode", ["pieces"])],
)
def test_profile_counts_the_kernels_of_an_op_that_reads_memory(tmp_path, monkeypatch, op, kernels):
    from hone_kernels import profile as module
    from hone_kernels.config import ProfileConfig

    names = ",".join(f'"{metric}"' for metric in (module.COUNTERS | module.MEMORY).values())
    (tmp_path / "ncu").write_text(NCU.format(log=tmp_path / "log", names=names))
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module, "the_gpu", lambda name: torch.device("cuda"))
    cfg = module.prepare(ProfileConfig(op=op))
    with Run.start(package="p", verb="profile", out=tmp_path / "run") as run:
        module.profile(dataclasses.replace(cfg, shapes=cfg.shapes[:1]), run)
    values = {(row.variant, row.metric): row.value for row in run.rows}
    assert {name for name, _ in values} == set(kernels)
    assert all(values[name, "dram"] == 55 and values[name, "duration"] == 4000 for name in kernels)
    calls = (tmp_path / "log").read_text().splitlines()
    assert [f"regex:_{name}_kernel " in call for name, call in zip(kernels, calls, strict=True)] == [True] * len(
        kernels
    )


def test_profile_refuses_what_is_of_attention():
    from hone_kernels.config import ProfileConfig

    with pytest.raises(ValueError, match="kinds and densities are of attention; ragged_decode has"):
        ProfileConfig(op="ragged_decode", densities=(0.5,))


@pytest.mark.compile
def test_spills_compiles_what_is_named(tmp_path, monkeypatch):
    spills = pytest.importorskip("hone_kernels.spills", reason="Triton is for Linux only")
    every = spills.attention_launches
    monkeypatch.setattr(spills, "attention_launches", lambda *sizes, **kind: every(*sizes, **kind)[:3])
    cfg = SpillsConfig(dtypes=("float32",), dims=(32,), blocks=(32,), tokens=("padded",))
    with Run.start(package="p", verb="spills", out=tmp_path / "run") as found:
        spills.spills(spills.prepare(cfg), found)
    # The same kernel goes over the rows with and without pooled keys.
    assert sorted(row.variant for row in found.rows) == ["dq", "dq", "forward", "forward", "rows"]
    assert all(row.unit == "bytes" and row.value <= 8 for row in found.rows)
    with pytest.raises(ValueError, match=r"triton takes dims in .* got 48"):
        spills.prepare(SpillsConfig(dims=(48,)))
