"""Every kernel once on small odd shapes, with compute-sanitizer watching.

    python tools/gpu_sanitize.py --tools memcheck --out results/kernels/sanitize_memcheck_h200.json

runs itself under each of --tools (all three unless given) for each backend and part, writes what the tools counted, and
fails if that is not nothing. Without PyTorch's caching allocator every tensor is an allocation of its own, so that
a read past its end is seen. Values are compared with the reference as well. racecheck does not follow ``mbarrier``
between the warps of the Gluon kernel and reports hazards there (kernels/LOG.md): they are counted and do not fail.
Without ``--out`` it runs the kernels and no tool.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from hone_core.environment import environment
from hone_kernels.attention import SUPPORT, BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention_fp8 import SUPPORT as FP8_SUPPORT
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention
from hone_kernels.block_scores import KINDS, block_scores
from hone_kernels.block_select import select_blocks

PARTS = ("attention", "fp8", "scores")
TOOLS = ("memcheck", "synccheck", "racecheck")
FOUND = 9
"""Exit code that compute-sanitizer is told to give where it reports something."""


def close(what: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    seen = want != -math.inf
    if not torch.equal(got.double() == -math.inf, ~seen):
        sys.exit(f"{what}: another set of empty rows")
    error = ((got.double() - want)[seen].norm() / want[seen].norm().clamp(min=1e-30)).item()
    if not error < limit:
        sys.exit(f"{what}: relative error {error:.2e} is not under {limit}")


def attention(backend: str) -> None:
    """Ragged ends, an empty row, padded blocks, grouped heads, pooled keys; forward and backward.

    Inputs and reference stay on the CPU: racecheck follows every access to shared memory, in torch's kernels too.
    """
    dims = [d for d in SUPPORT[backend].head_dims if d in (64, 128)]
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
        for name, device, dtype in ((backend, "cuda", torch.bfloat16), ("reference", "cpu", torch.float64)):
            layout = BlockLayout.from_mask(mask, 301, 277, block_q=block, block_k=block, k_valid=valid)
            tensors = {n: getattr(layout, n) for n in ("kv_num", "kv_idx", "k_valid")}
            layout = dataclasses.replace(layout, **{n: x if x is None else x.to(device) for n, x in tensors.items()})
            leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v, *extra)]
            leaves += [x.to(device).requires_grad_() for x in bias]
            out, lse = block_sparse_attention(
                *leaves[:3], layout, pooled=PooledKV(*leaves[3:]) if pooled else None, return_lse=True, backend=name
            )
            grads = torch.autograd.grad(out, leaves, dout.to(device, dtype))
            results.append([x.detach().double().cpu() for x in (out, lse, *grads)])
        what = f"attention {backend} d{dim} block {block} padded {padded} pooled {pooled}"
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            close(f"{what} [{i}]", got, want, 2e-2)


def attention_fp8(backend: str) -> None:
    """The prologue with and without all it can do, and the forward, on ragged ends and padded blocks."""
    for dim, block, everything in itertools.product((64, 128), (64, 128), (False, True)):
        q = torch.randn(2, 301, 4, dim).bfloat16().transpose(1, 2)
        k, v = (torch.randn(2, 301, 2, dim).bfloat16().transpose(1, 2) for _ in range(2))
        angle = torch.rand(301, dim // 2)
        blocks = -(-301 // block)
        mask = torch.rand(2, 4, blocks, blocks) < 0.6
        mask[:, :, 1] = False
        results = []
        for name, device in ((backend, "cuda"), ("reference", "cpu")):
            options = {}
            if everything:
                tables = (angle.cos().to(device), angle.sin().to(device))
                valid = (torch.arange(2 * blocks, dtype=torch.int32).view(2, blocks) * 29 % block + 1).to(device)
                order = torch.arange(300, -1, -1, device=device)
                options = dict(rope=tables, order=order, smooth_k=True, k_valid=valid, group=2)
            x = quantize_qkv(*(y.to(device) for y in (q, k, v)), block=block, backend=name, **options)
            sizes = dict(block_q=block, block_k=block, k_valid=options.get("k_valid"))
            layout = BlockLayout.from_mask(mask.to(device), 301, 301, **sizes)
            out, lse = quantized_attention(x, layout, return_lse=True, backend=name)
            results.append([y.double().cpu() for y in (*x.dequantize(), out, lse)])
        what = f"attention_fp8 {backend} d{dim} block {block} everything {everything}"
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            # P is rounded against another maximum where tiles differ.
            close(f"{what} [{i}]", got, want, 6e-2 if i == 3 else 1e-2)


def scores_and_selection() -> None:
    q = torch.randn(2, 4, 301, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 2, 301, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(0, 320, 8, device="cuda", dtype=torch.int32).clamp(max=300).reshape(1, 1, 5, 8)
    for kind in KINDS:
        got = block_scores(q, k, index, index, kind=kind, backend="triton")
        want = block_scores(q.double(), k.double(), index, index, kind=kind, backend="reference")
        close(f"block_scores {kind}", got, want.double(), 1e-3)
        for mass in (None, 0.9):
            select_blocks(got, backend="triton", min_keep=1, max_keep=4, mass=mass, keep_diagonal=True, forced=1)


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or of an installed CUDA toolkit."""
    return shutil.which("compute-sanitizer") or next(
        iter(sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))), None
    )


def counts(tool: str, output: str) -> dict[str, int]:
    """What a tool says that it found.

    Raises:
        ValueError: It says nothing: it did not come to its end.
    """
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


def cases(tools: list[str], backends: list[str], parts: list[str]) -> list[tuple[str, str, str]]:
    """Tool, backend and part; the FP8 and score kernels are Triton's alone."""
    known = [(b, part) for b, part in itertools.product(backends, parts) if part == "attention" or b == "triton"]
    return [(tool, *case) for tool, case in itertools.product(tools, known)]


def clean(row: dict) -> bool:
    """Whether a row holds nothing, or only what is known of racecheck and mbarriers."""
    known = row["tool"] == "racecheck" and row["backend"] == "gluon"
    return known or not (row["errors"] or row.get("hazards"))


def sanitize(tool: str, backend: str, part: str, seconds: float) -> dict:
    """One part under one tool, as a row of results. What goes wrong beside the tool's findings ends the run."""
    command = [
        find_sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND), sys.executable,
        *(["-P"] if sys.flags.safe_path else []), __file__, "--backends", backend, "--parts", part,
    ]  # fmt: skip
    what = f"{tool}, {backend}, {part}"
    begun = time.perf_counter()
    # A session of its own: the tool and the Python under it end together.
    process = subprocess.Popen(
        command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        sys.exit(f"{what}: not done after {seconds:g} s\n{process.communicate()[0][-4000:]}")
    try:
        found = counts(tool, output)
    except ValueError as error:
        sys.exit(f"{what}: {error}, exit code {process.returncode}\n{output[-4000:]}")
    reported = bool(found["errors"] or found.get("hazards"))
    if "values right" not in output or process.returncode not in ((0, FOUND) if reported else (0,)):
        sys.exit(f"{what}: {found}, exit code {process.returncode}\n{output[-4000:]}")
    row = {"tool": tool, "backend": backend, "part": part, **found, "seconds": round(time.perf_counter() - begun, 1)}
    if not clean(row):
        print(output[-4000:], flush=True)
    return row


def run_kernels(backends: list[str], parts: list[str]) -> None:
    for backend in backends:
        if "attention" in parts:
            attention(backend)
            print(f"attention {backend}: values right", flush=True)
        if "fp8" in parts and backend in FP8_SUPPORT:
            attention_fp8(backend)
            print(f"attention_fp8 {backend}: values right", flush=True)
    if "scores" in parts:
        scores_and_selection()
        torch.cuda.synchronize()
        print("block_scores, block_select: values right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backends = [name for name, support in SUPPORT.items() if support.min_sm is not None]
    parser.add_argument("--backends", nargs="+", default=backends, choices=backends)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS, help="with --out")
    parser.add_argument("--out", type=Path, help="JSON file to write; runs the parts under the tools")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one part under one tool")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.out is None:
        run_kernels(args.backends, args.parts)
        return
    if find_sanitizer() is None:
        sys.exit("compute-sanitizer is neither on the PATH nor under /usr/local/cuda*/bin")
    rows = []
    for case in cases(args.tools, args.backends, args.parts):
        rows.append(sanitize(*case, args.timeout))
        print(rows[-1], flush=True)
    result = {
        "schema": 1, "package": "hone-kernels", "verb": "sanitize", "environment": environment(),
        "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if bad := [row for row in rows if not clean(row)]:
        sys.exit(f"{len(bad)} of {len(rows)} reported something")


if __name__ == "__main__":
    main()
