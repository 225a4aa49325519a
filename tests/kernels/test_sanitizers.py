"""Every kernel under compute-sanitizer, by the verb ``sanitize``; and what that makes of the sanitizer's words."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from hone_core.runs import Run
from hone_core.testing import requires_gpu
from hone_kernels import sanitize as module
from hone_kernels.config import Part, SanitizeConfig, Tool
from hone_kernels.problems import GLUON
from hone_kernels.sanitize import cases, counts, explained, find_sanitizer, hazards, prepare, sanitize

SECONDS = 200


def check(tmp_path, tool, backend, part):
    """The kernels run in a process of their own, which ends by itself before the one that waits for it gives up."""
    if find_sanitizer() is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor under /usr/local/cuda*/bin")
    cfg = SanitizeConfig(tools=(tool,), backends=(backend,), parts=(part,), timeout=SECONDS)
    with Run.start(package="p", verb="sanitize", out=tmp_path / "run") as run:
        sanitize(cfg, run)
    judged = {"unexplained"} if (tool, backend) == ("racecheck", "gluon") else {"errors", "hazards", "warnings"}
    assert all(row.value == 0 for row in run.rows if row.metric in judged)
    assert judged & {row.metric for row in run.rows}
    assert {row.metric for row in run.rows} >= {"errors", "seconds"}


@requires_gpu(min_sm=80)
@pytest.mark.parametrize("part", get_args(Part))
@pytest.mark.parametrize("tool", get_args(Tool))
def test_triton_kernels(tmp_path, tool, part):
    check(tmp_path, tool, "triton", part)


@requires_gpu(min_sm=90)
@pytest.mark.parametrize("part", GLUON)
@pytest.mark.parametrize("tool", get_args(Tool))
def test_gluon_kernels(tmp_path, tool, part):
    check(tmp_path, tool, "gluon", part)


def test_counts_are_read_and_summed_over_processes():
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


def line_of(function, words):
    """Where in the forward's file these words stand first within a function."""
    lines = (Path(module.__file__).parent / "attention" / "gluon_sm90.py").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"def {function}("))
    return next(i for i, line in enumerate(lines[begin:], begin + 1) if words in line)


def race(kernel, one, *others):
    """As racecheck reports it."""
    access = [f"{kind} access at {kernel}+0x12a0 in gluon_sm90.py:{line}" for kind, line in (one, *others)]
    rest = "".join(f"=========     and {other} [160 hazards]\n" for other in access[1:])
    return f"========= Error: Race reported between {access[0]}\n{rest}========= \n"


PUT, GET, START, SPECIALISED, BARRIERS, PRODUCER = (
    line_of(*where)
    for where in (
        ("_put", ".store("),
        ("_get", ".load("),
        ("_forward_kernel", "def"),
        ("_forward_kernel", "gl.warp_specialize("),
        ("_forward_kernel", "mbarrier.init("),
        ("_producer", "list_ptr ="),
    )
)
KNOWN = [
    race("_forward_kernel", ("Read", GET), ("Write", PUT), ("Write", PUT)),
    race("_forward_kernel", ("Write", PUT), ("Read", GET)),
    race("_forward_kernel", ("Read", START), ("Write", START), ("Write", SPECIALISED)),
]
NEW = [
    race("_forward_kernel", ("Write", GET), ("Write", PUT)),  # nothing reads there
    race("_forward_kernel", ("Read", PRODUCER), ("Write", PUT)),
    race("_forward_kernel", ("Read", PRODUCER), ("Write", START)),
    race("_forward_kernel", ("Read", BARRIERS), ("Write", START)),
    race("_backward_kernel", ("Read", START), ("Write", START)),
    # Without lines.
    "Race reported between Read access at _forward_kernel+0x10\n and Write access at _forward_kernel+0x20 [1 hazards]",
]


def test_hazards_of_known_kinds_are_told_from_new_ones():
    found = [list(hazards(text)) for text in KNOWN]
    assert [len(each) for each in found] == [2, 1, 2]
    assert {hazard.write for hazard in found[0]} == {("gluon_sm90.py", PUT)}
    assert all(explained(hazard) for each in found for hazard in each)
    for text in NEW:
        (hazard,) = hazards(text)
        assert not explained(hazard), text
    assert not list(hazards("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"))


def test_each_kernel_is_run_under_each_tool_once():
    found = cases(SanitizeConfig(tools=("memcheck", "racecheck")))
    per_tool = [
        ("triton", "attention"),
        ("triton", "attention_fp8"),
        ("triton", "block_scores"),
        ("triton", "pyramid_attention"),
        ("triton", "ragged_decode"),
        ("triton", "decoding"),
        ("triton", "kept_tokens"),
        ("triton", "splat_blend"),
        ("gluon", "attention"),
        ("gluon", "pyramid_attention"),
    ]
    assert [(*c.tools, *c.backends, *c.parts) for c in found] == [
        (tool, *case) for tool in ("memcheck", "racecheck") for case in per_tool
    ]
    with pytest.raises(ValueError, match="gluon has no kernel of block_scores"):
        prepare(SanitizeConfig(backends=("gluon",), parts=("block_scores",)))


def test_without_the_sanitizer_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "find_sanitizer", lambda: None)
    with pytest.raises(FileNotFoundError, match="compute-sanitizer is neither on the PATH"):
        prepare(SanitizeConfig())


FAKE = """#!/bin/sh
echo "environment $PYTORCH_NO_CUDA_MEMORY_CACHING"
{body}
"""
RIGHT = "echo 'values right'"
NONE = "echo '========= ERROR SUMMARY: 0 errors'"
TWO = "echo '========= ERROR SUMMARY: 2 errors'"


def races(texts, errors, warnings=0):
    count = errors + warnings
    summary = f"========= RACECHECK SUMMARY: {count} hazards displayed ({errors} errors, {warnings} warnings)"
    return [RIGHT, "cat << 'EOF'", *"".join(texts).splitlines(), summary, "EOF", "exit 9"]


HAZARDS = "echo '========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)'"


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("tool", "backend", "body", "fails", "words", "counted"),
    [
        ("memcheck", "triton", [RIGHT, NONE], False, "'errors': 0", {"errors": 0}),
        ("memcheck", "triton", [RIGHT, TWO, "exit 9"], True, "1 of 1 reported something", {"errors": 2}),
        ("memcheck", "triton", [RIGHT, TWO], True, "1 of 1 reported something", {"errors": 2}),
        ("racecheck", "triton", [RIGHT, HAZARDS, "exit 9"], True, "1 of 1 reported something", {"hazards": 3}),
        ("racecheck", "gluon", races(KNOWN, 3), False, "'hazards': 3", {"unexplained": 0}),
        ("racecheck", "gluon", races(KNOWN + NEW, 9), True, "1 of 1 reported something", {"unexplained": 6}),
        ("racecheck", "gluon", races(KNOWN[:2], 3), True, "1 of 1 reported something", {"unexplained": 1}),
        ("racecheck", "gluon", races([], 0, 3), True, "1 of 1 reported something", {"unexplained": 3}),
        ("memcheck", "triton", [RIGHT, NONE, "exit 9"], True, "exit code 9", None),
        ("memcheck", "triton", ["echo wrong", NONE, "exit 1"], True, "exit code 1", None),
        ("memcheck", "triton", [NONE], True, "exit code 0", None),
        ("memcheck", "triton", [RIGHT], True, "gave no summary", None),
        ("memcheck", "triton", ["sleep 100", RIGHT, NONE], True, "not done after 1 s", None),
    ],
)
def test_the_driver_judges_what_the_sanitizer_says(
    tmp_path, monkeypatch, tool, backend, body, fails, words, counted, caplog
):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(body="\n".join(body)))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module, "the_gpu", lambda name: torch.device("cuda"))
    cfg = SanitizeConfig(tools=(tool,), backends=(backend,), parts=("attention",))
    cfg = dataclasses.replace(prepare(cfg), timeout=1 if "sleep 100" in body else 60)
    run = Run.start(package="p", verb="sanitize", out=tmp_path / "run")
    with caplog.at_level("INFO", "hone_kernels"):
        if fails:
            with pytest.raises(RuntimeError) as stop, run:
                sanitize(cfg, run)
            said = str(stop.value)
        else:
            with run:
                sanitize(cfg, run)
            said = caplog.text
    assert words in said
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored["status"] == ("failed" if fails else "done")
    if counted is None:
        assert not stored["rows"]
        assert "environment 1" in said
    else:
        values = {row["metric"]: row["value"] for row in stored["rows"]}
        assert values.items() >= counted.items()
        assert 0 <= values["seconds"] < 60
        assert {(row["variant"], row["split"], row["labels"]["tool"]) for row in stored["rows"]} == {
            (backend, "attention", tool)
        }
