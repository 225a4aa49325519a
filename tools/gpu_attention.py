"""Candidate tiles of the Triton attention kernels on a GPU: values first, then speed beside FlexAttention.

    python tools/gpu_attention.py --out tune.json

The shipped tiles were chosen from these. Every candidate is compared with the float32 reference before it is timed; a
wrong value ends the run. What ships is timed by ``hone-kernels bench attention``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
from hone_core.environment import environment
from hone_core.timing import measure_interleaved
from hone_kernels.attention import BlockLayout, bench
from hone_kernels.attention.bench import flex, random_layout
from hone_kernels.attention.reference import attention_reference
from hone_kernels.attention.triton import TILES, Tiles, attention_backward, attention_forward

# heads, tokens, head size
SHAPES = {name: (shape.heads, shape.tokens, shape.dim) for name, shape in bench.SHAPES.items()}
DENSITIES = (1.0, 0.5, 0.2, 0.1)

# Tiles' fields in order.
CANDIDATES = {
    ("forward", 128): [
        (64, 64, 4, 1, True), (64, 64, 4, 1, True, 128), (64, 64, 4, 2, True), (64, 128, 4, 1, True), (128, 64, 8, 1,
        True, 128), (128, 64, 8, 3, True), (128, 128, 8, 2, True),
    ],
    ("forward", 64): [
        (64, 128, 4, 2, True, 168, False), (64, 128, 4, 2, True), (64, 128, 4, 3, True), (64, 64, 4, 2, True),
        (128, 64, 4, 3, False), (128, 128, 8, 3, True),
    ],
    ("dq", 128): [(64, 64, 4, 2, True), (64, 64, 4, 1, True), (64, 64, 4, 3, True), (128, 64, 8, 3, True)],
    ("dkv", 128): [(64, 64, 4, 2, True), (64, 64, 4, 1, True), (32, 64, 4, 2, True), (64, 128, 8, 2, True)],
    ("dq", 64): [(64, 64, 4, 2, True), (64, 64, 4, 1, True), (128, 64, 4, 2, True), (64, 128, 4, 2, True)],
    ("dkv", 64): [(64, 64, 4, 2, True, 168), (64, 64, 4, 2, True), (64, 64, 4, 1, True, 168), (128, 128, 8, 2, True)],
}  # fmt: skip


def say(*words: object) -> None:
    print(*words, flush=True)


def inputs(heads: int, tokens: int, dim: int, n: int = 3) -> list[torch.Tensor]:
    return [torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(n)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_error(name: str, error: float, limit: float) -> None:
    if not error < limit:
        sys.exit(f"{name}: error {error:.2e} is not under {limit}; no speed is reported")


def check(name: str, got: tuple, want: tuple, limit: float) -> None:
    for g, w in zip(got, want, strict=True):
        check_error(name, relative(g, w), limit)


def flops(layout: BlockLayout, heads: int, dim: int) -> float:
    """Of the listed pairs."""
    return layout.density().item() * dense_flops(heads, layout.tokens_q, dim)


def dense_flops(heads: int, tokens: int, dim: int) -> float:
    return 4.0 * dim * heads * tokens * tokens


def tune(rounds: int) -> list[dict]:
    rows = []
    for (kernel, dim), candidates in CANDIDATES.items():
        heads, tokens, _ = SHAPES["wan-1.3b 480p" if dim == 128 else "cogvideox-5b"]
        small = inputs(3, 1000, dim, 4)
        layout = random_layout(3, 1000, 0.5)
        leaves = [x.float().requires_grad_() for x in small[:3]]
        out, lse = attention_reference(*leaves, layout, dim**-0.5)
        out.backward(small[3].float())

        def run(q, k, v, dout, layout, tiles, state, kernel=kernel, dim=dim):
            lists = (layout.kv_num, layout.kv_idx)
            if kernel == "forward":
                return attention_forward(q, k, v, *lists, None, None, None, None, 128, 128, dim**-0.5, tiles)
            out, lse, columns, dlse = state
            return attention_backward(
                dout, dlse, q, k, v, out, lse, *lists, columns.kv_num, columns.kv_idx, None, None, None, None, 128, 128,
                dim**-0.5, {kernel: tiles},
            )[:3]  # fmt: skip

        def state_of(q, k, v, layout, dim=dim):
            got = attention_forward(q, k, v, layout.kv_num, layout.kv_idx, None, None, None, None, 128, 128, dim**-0.5)
            return *got, layout.transpose(), torch.zeros_like(got[1])

        good = []
        for numbers in candidates:
            tiles = Tiles(*numbers)
            try:
                got = run(*small, layout, tiles, state_of(*small[:3], layout))
            except Exception as error:
                say(kernel, dim, numbers, "fails:", str(error).splitlines()[0][:100])
                continue
            want = (out, lse) if kernel == "forward" else tuple(x.grad for x in leaves)
            check(f"{kernel} {dim} {numbers}", got, want, 1e-2)
            good.append(tiles)
        big = inputs(heads, tokens, dim, 4)
        for density in (1.0, 0.1):
            layout = random_layout(heads, tokens, density)
            state = state_of(*big[:3], layout)
            calls = {str(t): lambda t=t: run(*big, layout, t, state) for t in good}
            work = flops(layout, heads, dim)
            if kernel == "forward":
                other = flex(layout)
                calls["flex"] = lambda: other(*big[:3])
            elif kernel == "dq":
                leaves = [x.detach().requires_grad_() for x in big[:3]]
                flexed = flex(layout)(*leaves)
                calls["flex backward"] = lambda: torch.autograd.grad(flexed, leaves, big[3], retain_graph=True)
            for name, timing in measure_interleaved(calls, warmup=2, rounds=rounds).items():
                rate = work * (1 if kernel == "forward" else 2.5) / timing.ms_p50 / 1e9
                say(f"{kernel:8} d{dim:<4} {density:4} {name:70} {timing.ms_p50:8.3f} ms {rate:6.0f}")
                rows.append(dict(kernel=kernel, dim=dim, density=density, tiles=name, ms=timing.ms_p50, tflops=rate))
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of all variants in random order")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = tune(args.rounds)
    tiles = {f"{kernel} {size} bytes d{dim}": str(t) for (kernel, size, dim), t in TILES.items()}
    result = dict(schema=1, package="hone-kernels", verb="attention tune", environment=environment(), tiles=tiles)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(result, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
