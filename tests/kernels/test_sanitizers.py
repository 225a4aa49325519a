"""Every kernel under compute-sanitizer, by tools/gpu_sanitize.py; and what that tool makes of the sanitizer's words."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hone_core.testing import requires_gpu

TOOL = Path(__file__).parents[2] / "tools" / "gpu_sanitize.py"
SECONDS = 200

spec = importlib.util.spec_from_file_location("gpu_sanitize", TOOL)
gpu_sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_sanitize)


def check(tmp_path, tool, backend, part):
    """In a process of its own, which ends by itself before the one that waits for it gives up."""
    if gpu_sanitize.find_sanitizer() is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor under /usr/local/cuda*/bin")
    out = tmp_path / "x.json"
    command = [sys.executable, "-P", str(TOOL), "--out", str(out), "--tools", tool, "--backends", backend]
    command += ["--parts", part, "--timeout", str(SECONDS)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS + 60, check=False
    )
    assert done.returncode == 0, done.stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert row["errors"] == row.get("hazards", 0) == row.get("warnings", 0) == 0, done.stdout


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("part", gpu_sanitize.PARTS)
@pytest.mark.parametrize("tool", gpu_sanitize.TOOLS)
def test_triton_kernels(tmp_path, tool, part):
    check(tmp_path, tool, "triton", part)


# racecheck does not follow mbarriers (kernels/LOG.md): what it counts there is recorded, not judged.
@requires_gpu(min_sm=90)
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_gluon_kernels(tmp_path, tool):
    check(tmp_path, tool, "gluon", "attention")


def test_counts_are_read_and_summed_over_processes():
    counts = gpu_sanitize.counts
    assert counts("memcheck", "========= ERROR SUMMARY: 0 errors\n") == {"errors": 0}
    assert counts("synccheck", "ERROR SUMMARY: 1 error\nwords\n========= ERROR SUMMARY: 12 errors") == {"errors": 13}
    said = "========= RACECHECK SUMMARY: 7 hazards displayed (5 errors, 2 warnings)\n"
    assert counts("racecheck", said) == {"hazards": 7, "errors": 5, "warnings": 2}
    one = "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert counts("racecheck", said + one) == {"hazards": 8, "errors": 6, "warnings": 2}
    for tool, text in (
        ("memcheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
        ("racecheck", ""),
    ):
        with pytest.raises(ValueError, match=f"{tool} gave no summary"):
            counts(tool, text)


def test_each_kernel_is_run_under_each_tool_once():
    cases = gpu_sanitize.cases(["memcheck", "racecheck"], ["triton", "gluon"], list(gpu_sanitize.PARTS))
    per_tool = [("triton", "attention"), ("triton", "fp8"), ("triton", "scores"), ("gluon", "attention")]
    assert cases == [(tool, *case) for tool in ("memcheck", "racecheck") for case in per_tool]


FAKE = """#!/bin/sh
echo "environment $PYTORCH_NO_CUDA_MEMORY_CACHING"
{body}
"""
RIGHT = "echo 'attention triton: values right'"
NONE = "echo '========= ERROR SUMMARY: 0 errors'"
TWO = "echo '========= ERROR SUMMARY: 2 errors'"
HAZARDS = "echo '========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)'"


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("tool", "backend", "body", "fails", "words", "counted"),
    [
        ("memcheck", "triton", [RIGHT, NONE], False, "'errors': 0", {"errors": 0}),
        ("memcheck", "triton", [RIGHT, TWO, "exit 9"], True, "1 of 1 reported something", {"errors": 2}),
        ("memcheck", "triton", [RIGHT, TWO], True, "1 of 1 reported something", {"errors": 2}),
        ("racecheck", "triton", [RIGHT, HAZARDS, "exit 9"], True, "1 of 1 reported something", {"hazards": 3}),
        ("racecheck", "gluon", [RIGHT, HAZARDS, "exit 9"], False, "'hazards': 3", {"hazards": 3, "errors": 3}),
        ("memcheck", "triton", [RIGHT, NONE, "exit 9"], True, "exit code 9", None),
        ("memcheck", "triton", ["echo wrong", NONE, "exit 1"], True, "exit code 1", None),
        ("memcheck", "triton", [NONE], True, "exit code 0", None),
        ("memcheck", "triton", [RIGHT], True, "gave no summary", None),
        ("memcheck", "triton", ["sleep 100", RIGHT, NONE], True, "not done after 1 s", None),
    ],
)
def test_the_driver_judges_what_the_sanitizer_says(
    tmp_path, monkeypatch, capfd, tool, backend, body, fails, words, counted
):
    fake, out = tmp_path / "compute-sanitizer", tmp_path / "x.json"
    fake.write_text(FAKE.format(body="\n".join(body)))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    flags = [
        "--tools",
        tool,
        "--backends",
        backend,
        "--parts",
        "attention",
        "--timeout",
        "1" if "sleep 100" in body else "60",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize.py", "--out", str(out), *flags])
    if fails:
        with pytest.raises(SystemExit) as stop:
            gpu_sanitize.main()
        said = str(stop.value.code)
    else:
        gpu_sanitize.main()
        said = capfd.readouterr().out
    assert words in said
    if counted is None:
        assert not out.exists()
        assert "environment 1" in said
    else:
        (row,) = json.loads(out.read_text())["rows"]
        assert row.items() >= {"tool": tool, "backend": backend, "part": "attention", **counted}.items()
        assert 0 <= row["seconds"] < 60
