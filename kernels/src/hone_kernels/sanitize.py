"""The verb ``sanitize``: every kernel once on small odd shapes, with compute-sanitizer watching.

It runs itself under each tool for each backend and part, and counts what the tools report. Without PyTorch's caching
allocator every tensor is an allocation of its own, so that a read past its end is seen. Values are compared with the
reference as well. racecheck does not follow ``mbarrier`` between the warps of a Gluon kernel and reports hazards there.
Those of two kinds are explained (``explained``, kernels/LOG.md); any other fails.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hone_core.config import from_dict, to_dict
from hone_core.runs import Report, Run
from torch import Tensor

from hone_kernels.attention import SUPPORT, BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_kernels.backends import Backend
from hone_kernels.block_scores import KINDS, block_scores
from hone_kernels.block_select import select_blocks
from hone_kernels.column_mass import column_mass
from hone_kernels.config import SanitizeConfig
from hone_kernels.draw_codes import draw_codes
from hone_kernels.gpu import the_gpu
from hone_kernels.group_means import group_means
from hone_kernels.pyramid_attention import FACTORS, pyramid_attention
from hone_kernels.ragged_decode import decode_attention
from hone_kernels.token_select import select_tokens

__all__ = ["Hazard", "cases", "counts", "explained", "find_sanitizer", "hazards", "prepare", "run_case", "sanitize"]

FOUND = 9
"""Exit code that compute-sanitizer is told to give where it reports something."""

_RIGHT = "values right"
_DEVICE = "cuda"
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
    """A config per tool, backend and part; Gluon has attention over lists and over a pyramid alone."""
    return [
        dataclasses.replace(cfg, tools=(tool,), backends=(backend,), parts=(part,))
        for tool, backend, part in itertools.product(cfg.tools, cfg.backends, cfg.parts)
        if part in ("attention", "pyramid_attention") or backend == "triton"
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
    parts = {"attention": _attention, "attention_fp8": _attention_fp8, "block_scores": _scores_and_selection}
    (parts | {"ragged_decode": _tokens, "pyramid_attention": _pyramid})[part](backend)
    torch.cuda.synchronize()


def _close(what: str, got: Sequence[Tensor], want: Sequence[Tensor], limits: Sequence[float]) -> None:
    for i, (mine, theirs, limit) in enumerate(zip(got, want, limits, strict=True)):
        seen = theirs != -math.inf
        if not torch.equal(mine.double() == -math.inf, ~seen):
            raise RuntimeError(f"{what} [{i}]: another set of empty rows")
        error = ((mine.double() - theirs)[seen].norm() / theirs[seen].norm().clamp(min=1e-30)).item()
        if not error < limit:
            raise RuntimeError(f"{what} [{i}]: relative error {error:.2e} is not under {limit}")


def _attention(backend: Backend) -> None:
    """Ragged ends, an empty row, padded blocks, grouped heads, pooled keys; forward and backward.

    Inputs and reference stay on the CPU: racecheck follows every access to shared memory, in torch's kernels too.
    """
    dims = [d for d in SUPPORT[backend].head_dims or () if d in (64, 128)]
    for dim, block, padded, pooled in itertools.product(dims, (64, 128), (False, True), (False, True)):
        q, dout = (torch.randn(2, 4, 301, dim).bfloat16() for _ in range(2))
        k, v = (torch.randn(2, 2, 277, dim).bfloat16() for _ in range(2))
        cols = -(-277 // block)
        mask = torch.rand(2, 4, -(-301 // block), cols) < 0.6
        mask[:, :, 1] = False
        valid = torch.randint(1, block + 1, (2, cols), dtype=torch.int32) if padded else None
        extra = [torch.randn(2, 2, 37, dim).bfloat16() for _ in range(2)] if pooled else []
        bias = [torch.randn(2, 2, 37)] if pooled else []
        results = []
        lanes: list[tuple[Backend, str, torch.dtype, bool]]
        lanes = [(backend, "cuda", torch.bfloat16, True), ("reference", "cpu", torch.float64, True)]
        if backend == "gluon":  # sums q's gradient in whole numbers, or in float32
            lanes.insert(1, (backend, "cuda", torch.bfloat16, False))
        for name, device, dtype, deterministic in lanes:
            layout = BlockLayout.from_mask(mask, 301, 277, block_q=block, block_k=block, k_valid=valid)
            tensors = {n: getattr(layout, n) for n in ("kv_num", "kv_idx", "k_valid")}
            moved: dict[str, Any] = {n: x if x is None else x.to(device) for n, x in tensors.items()}
            layout = dataclasses.replace(layout, **moved)
            leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v, *extra)]
            leaves += [x.to(device).requires_grad_() for x in bias]
            far = PooledKV(*leaves[3:]) if pooled else None
            given: dict[str, Any] = dict(pooled=far, return_lse=True, backend=name, deterministic=deterministic)
            out, lse = block_sparse_attention(leaves[0], leaves[1], leaves[2], layout, **given)
            grads = torch.autograd.grad(out, leaves, dout.to(device, dtype))
            results.append([x.detach().double().cpu() for x in (out, lse, *grads)])
        what = f"attention {backend} d{dim} block {block} padded {padded} pooled {pooled}"
        for got in results[:-1]:
            _close(what, got, results[-1], [2e-2] * len(got))


def _pyramid(backend: Backend) -> None:
    """Every factor, a row without keys, ragged ends, grouped heads; forward and backward."""
    for dim in (64, 128):
        q, dout = (torch.randn(2, 4, 301, dim).bfloat16() for _ in range(2))
        k, v = (torch.randn(2, 2, 533, dim).bfloat16() for _ in range(2))
        factors = torch.tensor([0, *FACTORS], dtype=torch.int32)[torch.randint(5, (2, 4, 3, 5))]
        factors[:, :, 1] = 0
        factors[..., -1].clamp_(max=1)
        results = []
        lanes: tuple[tuple[Backend, str, torch.dtype], ...]
        lanes = ((backend, "cuda", torch.bfloat16), ("reference", "cpu", torch.float64))
        for name, device, dtype in lanes:
            a, b, c = leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
            out, lse = pyramid_attention(a, b, c, factors.to(device), return_lse=True, backend=name)
            grads = torch.autograd.grad(out, leaves, dout.to(device, dtype))
            results.append([x.detach().double().cpu() for x in (out, lse, *grads)])
        _close(f"pyramid_attention {backend} d{dim}", results[0], results[1], [2e-2] * 5)


def _attention_fp8(backend: Backend) -> None:
    """The prologue with and without all it can do, and the forward, on ragged ends and padded blocks."""
    for dim, block, everything in itertools.product((64, 128), (64, 128), (False, True)):
        q = torch.randn(2, 301, 4, dim).bfloat16().transpose(1, 2)
        k, v = (torch.randn(2, 301, 2, dim).bfloat16().transpose(1, 2) for _ in range(2))
        angle = torch.rand(301, dim // 2)
        blocks = -(-301 // block)
        mask = torch.rand(2, 4, blocks, blocks) < 0.6
        mask[:, :, 1] = False
        results = []
        lanes: tuple[tuple[Backend, str], ...] = ((backend, "cuda"), ("reference", "cpu"))
        for name, device in lanes:
            options: dict[str, Any] = {}
            if everything:
                tables = (angle.cos().to(device), angle.sin().to(device))
                valid = (torch.arange(2 * blocks, dtype=torch.int32).view(2, blocks) * 29 % block + 1).to(device)
                order = torch.arange(300, -1, -1, device=device)
                options = dict(rope=tables, order=order, smooth_k=True, k_valid=valid, group=2)
            x = quantize_qkv(q.to(device), k.to(device), v.to(device), block=block, backend=name, **options)
            sizes: dict[str, Any] = dict(block_q=block, block_k=block, k_valid=options.get("k_valid"))
            layout = BlockLayout.from_mask(mask.to(device), 301, 301, **sizes)
            out, lse = quantized_attention(x, layout, return_lse=True, backend=name)
            results.append([y.double().cpu() for y in (*x.dequantize(), out, lse)])
        # P is rounded against another maximum where tiles differ.
        what = f"attention_fp8 {backend} d{dim} block {block} everything {everything}"
        _close(what, results[0], results[1], [1e-2, 1e-2, 1e-2, 6e-2, 1e-2])


def _scores_and_selection(backend: Backend) -> None:
    q = torch.randn(2, 4, 301, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 2, 301, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(0, 320, 8, device="cuda", dtype=torch.int32).clamp(max=300).reshape(1, 1, 5, 8)
    for kind in KINDS:
        got = block_scores(q, k, index, index, kind=kind, backend=backend)
        want = block_scores(q.double(), k.double(), index, index, kind=kind, backend="reference")
        _close(f"block_scores {kind}", [got], [want.double()], [1e-3])
        for mass in (None, 0.9):
            select_blocks(got, backend=backend, min_keep=1, max_keep=4, mass=mass, keep_diagonal=True, forced=1)
    for exact in (True, False):
        results = []
        for name in (backend, "reference"):
            x = k.detach().requires_grad_()
            means = group_means(x, q[:, :2], 30, tokens=290, exact=exact, backend=name)
            (means[0] * means[1]).sum().backward()
            assert x.grad is not None
            results.append([*(y.double() for y in means), x.grad.double()])
        _close(f"group_means exact {exact}", results[0], results[1], [1e-2] * 3)


def _draws(backend: Backend) -> None:
    logits = [torch.randn(4, 5, 1000, device=_DEVICE) for _ in range(2)]
    weight = torch.tensor([[0.5, 0.5]] * 3 + [[1.0, 0.0], [0.0, 1.0]], device=_DEVICE)
    uniform = torch.rand(2, 5, device=_DEVICE)
    for top_k in (0, 7):
        options: dict[str, Any] = {"guidance": 2.0, "top_k": top_k}
        got = draw_codes(logits, weight, uniform, **options, backend=backend)
        low, high = (
            draw_codes(logits, weight, (uniform + shift).clamp(0, 0.999999), **options, backend="reference")
            for shift in (-1e-5, 1e-5)
        )
        if not bool(((got >= low) & (got <= high)).all()):
            raise RuntimeError("draw_codes: other codes")


def _tokens(backend: Backend) -> None:
    """Masses of odd lengths with padding and absent rows, selection by mass and by budget, caches with holes; draws."""
    _draws(backend)
    for dim in (64, 128):
        q = torch.randn(2, 6, 141, dim, device=_DEVICE, dtype=torch.float16)
        k, v = (torch.randn(2, 2, 141, dim, device=_DEVICE, dtype=torch.float16) for _ in range(2))
        real = torch.ones(2, 141, dtype=torch.bool, device=_DEVICE)
        real[0, :37] = False
        rows = torch.arange(100, 141, device=_DEVICE).repeat(2, 1)
        rows[:, :3] = -1
        got = column_mass(q, k, rows, real=real, backend=backend)
        want = column_mass(q.double(), k.double(), rows, real=real, backend="reference")
        _close(f"column_mass d{dim}", got, [x.double() for x in want], [1e-3, 1e-9, 1e-3])
        protected = torch.zeros_like(real)
        protected[:, -1] = True
        budget = torch.tensor([50, 7], device=_DEVICE)
        given: dict[str, Any] = dict(real=real, protected=protected, budget=budget)
        mine, theirs = (select_tokens(got.rank, **given, backend=name) for name in (backend, "reference"))
        if not torch.equal(mine.keep, theirs.keep) or not torch.equal(mine.num, theirs.num):
            raise RuntimeError("token_select: another set of tokens")
        p = torch.tensor([0.9, 1.0], device=_DEVICE)
        select_tokens(got.rank, real=real, protected=protected, mass=got.mass, p=p, backend=backend)
        valid = torch.rand(2, 141, device=_DEVICE) < 0.5
        valid[1] = False
        out = decode_attention(q[:, :, :1], k, v, valid, backend=backend)
        exact = decode_attention(q[:, :, :1].double(), k.double(), v.double(), valid, backend="reference")
        _close(f"ragged_decode d{dim}", [out], [exact], [1e-2])


if __name__ == "__main__":
    with torch.cuda.device(sys.argv[2]):
        run_case(from_dict(SanitizeConfig, json.loads(sys.argv[1])))
    sys.stdout.write(f"{_RIGHT}\n")
