"""The verb ``sanitize``: every kernel once on small odd shapes, with compute-sanitizer watching.

It runs itself under each tool for each backend and part, and counts what the tools report. Without PyTorch's caching
allocator every tensor is an allocation of its own, so that a read past its end is seen. ``problems`` says what runs,
and compares values with the reference. racecheck does not follow ``mbarrier`` between the warps of a Gluon kernel and
reports hazards there. Those of two kinds are explained (``explained``, kernels/LOG.md); any other fails.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hone_core.config import from_dict, to_dict
from hone_core.runs import Report, Run

from hone_kernels.config import SanitizeConfig
from hone_kernels.gpu import the_gpu
from hone_kernels.problems import GLUON, run_part

__all__ = ["Hazard", "cases", "counts", "explained", "find_sanitizer", "hazards", "prepare", "run_case", "sanitize"]

FOUND = 9
"""Exit code that compute-sanitizer is told to give where it reports something."""

_RIGHT = "values right"
_log = logging.getLogger(__name__)


def prepare(cfg: SanitizeConfig) -> SanitizeConfig:
    """Look for compute-sanitizer.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: There is no kernel of these backends and parts.
    """
    if not cases(cfg):
        raise ValueError(f"{', '.join(cfg.backends)} has no kernel of {', '.join(cfg.parts)}")
    if find_sanitizer() is None:
        raise FileNotFoundError("compute-sanitizer is neither on the PATH nor under /usr/local/cuda*/bin")
    return cfg


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or of an installed CUDA toolkit."""
    return shutil.which("compute-sanitizer") or next(
        iter(sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))), None
    )


def cases(cfg: SanitizeConfig) -> list[SanitizeConfig]:
    """A config per tool, backend and part that has such kernels."""
    return [
        dataclasses.replace(cfg, tools=(tool,), backends=(backend,), parts=(part,))
        for tool, backend, part in itertools.product(cfg.tools, cfg.backends, cfg.parts)
        if backend == "triton" or part in GLUON
    ]


def sanitize(cfg: SanitizeConfig, run: Run) -> Report:
    """Run the tools, and write what they counted into the run.

    ``variant`` of a row is the backend, ``split`` the part; the tool is a label.

    Args:
        cfg: What to run.
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: There is no CUDA device.
        RuntimeError: A tool or a kernel failed, or a tool reported something.
    """
    device, bad, known = the_gpu(run.device), 0, cases(cfg)
    for case in known:
        (tool,), (backend,), (part,) = case.tools, case.backends, case.parts
        begun = time.perf_counter()
        found, output = _watch(case, device)
        fields: dict[str, Any] = dict(variant=backend, split=part, labels={"tool": tool})
        for name, count in found.items():
            run.row(name, count, better="lower", **fields)
        run.row("seconds", round(time.perf_counter() - begun, 1), unit="s", better="none", **fields)
        _log.info("%s, %s, %s: %s", tool, backend, part, found)
        if not clean(tool, backend, found):
            bad += 1
            _log.error("%s", output[-4000:])
    if bad:
        raise RuntimeError(f"{bad} of {len(known)} reported something")
    return Report.of(run)


def clean(tool: str, backend: str, found: dict[str, int]) -> bool:
    """Whether a tool found nothing, or only what is known of racecheck and mbarriers."""
    if tool == "racecheck" and backend == "gluon":
        return not found["unexplained"]
    return not (found["errors"] or found.get("hazards"))


def _watch(case: SanitizeConfig, device: torch.device) -> tuple[dict[str, int], str]:
    """What one tool counted, and all that was printed. What goes wrong beside its findings raises ``RuntimeError``."""
    (tool,) = case.tools
    sanitizer = find_sanitizer()
    assert sanitizer is not None  # prepare has looked
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "100000",
        sys.executable, "-P", "-m", __name__, json.dumps(to_dict(case)), str(device),
    ]  # fmt: skip
    what = f"{tool}, {case.backends[0]}, {case.parts[0]}"
    # A session of its own: the tool and the Python under it end together.
    process = subprocess.Popen(
        command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=case.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0][-4000:]
        raise RuntimeError(f"{what}: not done after {case.timeout:g} s\n{said}") from None
    try:
        found = counts(tool, output)
    except ValueError as error:
        raise RuntimeError(f"{what}: {error}, exit code {process.returncode}\n{output[-4000:]}") from None
    reported = bool(found["errors"] or found.get("hazards"))
    if tool == "racecheck" and case.backends == ("gluon",):
        unknown = sorted({hazard for hazard in hazards(output) if not explained(hazard)})
        # What the summary counts and the report does not show is not explained.
        unread = max(found["hazards"], found["errors"] + found["warnings"]) - output.count(_REPORTED)
        found["unexplained"] = len(unknown) + abs(unread)
        for hazard in unknown:
            _log.error("racecheck: %s", hazard)
    if _RIGHT not in output or process.returncode not in ((0, FOUND) if reported else (0,)):
        raise RuntimeError(f"{what}: {found}, exit code {process.returncode}\n{output[-4000:]}")
    return found, output


def counts(tool: str, output: str) -> dict[str, int]:
    """What a tool says that it found.

    Raises:
        ValueError: It says nothing: it did not come to its end.
    """
    names: tuple[str, ...]
    if tool == "racecheck":
        pattern = r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)"
        names = ("hazards", "errors", "warnings")
    else:
        pattern, names = r"ERROR SUMMARY: (\d+) errors?", ("errors",)
    found = re.findall(pattern, output)
    if not found:
        raise ValueError(f"{tool} gave no summary")
    # One line per process that it watched.
    lines = [line if isinstance(line, tuple) else (line,) for line in found]
    return {name: sum(int(line[i]) for line in lines) for i, name in enumerate(names)}


class Hazard(NamedTuple):
    """Two accesses to one place of shared memory: a kernel, and where in its source, as ``(file, line)``."""

    kernel: str
    write: tuple[str, int]
    other: tuple[str, int]


_REPORTED = "Race reported between"
_ACCESS = re.compile(r"\b(Read|Write) access at (\w+)\S*(?: in (\S+):(\d+))?")


def hazards(output: str) -> Iterator[Hazard]:
    """What racecheck's report names: one for each pair of accesses."""
    first: tuple[str, ...] | None = None
    for line in output.splitlines():
        found = _ACCESS.search(line)
        if found is None:
            continue
        access = found.groups(default="")
        if _REPORTED in line:
            first = access
        elif first is not None:
            write, other = (first, access) if first[0] == "Write" else (access, first)
            yield Hazard(first[1], (write[2], int(write[3] or 0)), (other[2], int(other[3] or 0)))


def explained(hazard: Hazard) -> bool:
    """Whether it is one of two kinds that are ordered by an ``mbarrier`` between warps of different roles.

    - a word that ``_put`` writes and ``_get`` reads: a header or a limit, which a barrier hands over;
    - the state with which Triton starts the specialised warps: at the first line of the kernel, and where it calls
      ``warp_specialize``.
    """
    if not hazard.write[0] or hazard.write[0] != hazard.other[0]:
        return False
    write, other = hazard.write[1], hazard.other[1]
    # The report gives no folder. Two files of one name may hold the line: one of them has to explain both.
    return any(
        (write in words and other in reads) or {write, other} <= starts.get(hazard.kernel, set())
        for words, reads, starts in _known_lines(hazard.write[0])
    )


@functools.cache
def _known_lines(file: str) -> list[tuple[set[int], set[int], dict[str, set[int]]]]:
    """Of every file of that name: lines of ``_put``, of ``_get``, and where each function starts specialised warps."""
    found = []
    for path in sorted(Path(__file__).parent.rglob(file)):
        tree = ast.parse(path.read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        lines = [_lines(functions[name].body) if name in functions else set() for name in ("_put", "_get")]
        starts = {}
        for name, node in functions.items():
            calls = [(x.lineno, line) for x in node.body for line in _specialises(x)]
            starts[name] = {node.lineno, *(line for pair in calls for line in pair)} if calls else set()
        found.append((lines[0], lines[1], starts))
    return found


def _specialises(statement: ast.stmt) -> list[int]:
    """Lines of its calls of ``warp_specialize``."""
    calls = [x for x in ast.walk(statement) if isinstance(x, ast.Call) and isinstance(x.func, ast.Attribute)]
    return [x.lineno for x in calls if isinstance(x.func, ast.Attribute) and x.func.attr == "warp_specialize"]


def _lines(body: list[ast.stmt]) -> set[int]:
    return set(range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1))


def run_case(case: SanitizeConfig) -> None:
    """The kernels of a config of one backend and part, their values compared with the reference.

    Raises:
        RuntimeError: A value is wrong.
    """
    torch.manual_seed(case.seed)
    (backend,), (part,) = case.backends, case.parts
    run_part(part, backend, "cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    with torch.cuda.device(sys.argv[2]):
        run_case(from_dict(SanitizeConfig, json.loads(sys.argv[1])))
    sys.stdout.write(f"{_RIGHT}\n")
