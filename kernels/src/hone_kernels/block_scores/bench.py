"""Block scores and selection beside the sparse attention that they prepare: values first, then time."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import measure_interleaved
from torch import Tensor

from hone_kernels.attention import BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention.bench import cudnn
from hone_kernels.block_select import select_blocks
from hone_kernels.rows import DENSE, timed

from .api import KINDS, Kind, block_scores

__all__ = ["SHAPES", "Shape", "bench", "check_values", "inputs", "sample_index", "shipped"]

BLOCK = 128
_WARMUP = 10


@dataclass(frozen=True)
class Shape:
    """Self-attention of a video model, with what BLADE keeps of it.

    Attributes:
        batch: Sequences.
        heads: Query heads.
        tokens: Length of a sequence.
        text: How many of the tokens are text, at the end; their blocks read and are read by all.
        dim: Head size.
        most: Greatest share of blocks kept.
        pool: Keys of a pooled one.
    """

    batch: int
    heads: int
    tokens: int
    text: int
    dim: int
    most: float
    pool: int


SHAPES = {
    "wan-1.3b 480p": Shape(1, 12, 32760, 0, 128, 0.17, 30),
    "wan-14b 480p": Shape(1, 40, 32760, 0, 128, 0.17, 30),
    "wan-14b 720p": Shape(1, 40, 75600, 0, 128, 0.17, 30),
    "cogvideox-5b": Shape(1, 48, 17776, 226, 64, 0.10, 15),
    "ragged": Shape(2, 12, 20237, 77, 128, 0.17, 30),
    "small": Shape(1, 2, 2100, 52, 64, 0.5, 30),
}
"""The last one only shows that everything runs."""


def shipped() -> dict[str, str]:
    """Tiles that ship, by bytes of an element and head size."""
    from .triton import TILES

    return {f"{size} bytes d{dim}": str(tile) for (size, dim), tile in TILES.items()}


def inputs(shape: Shape, n: int = 3) -> list[Tensor]:
    """Bfloat16 views ``[B, H, S, D]`` of ``[B, S, H, D]``, as models lay their tensors out."""
    make = (shape.batch, shape.tokens, shape.heads, shape.dim)
    return [torch.randn(make, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(n)]


def sample_index(tokens: int, samples: int) -> Tensor:
    """``[1, 1, ceil(tokens / 128), samples]`` int32: as many random tokens of each block, -1 past the end."""
    start = torch.arange(0, tokens, BLOCK, device="cuda").unsqueeze(-1)
    offsets = torch.rand(len(start), BLOCK, device="cuda").topk(samples).indices.sort().values
    index = start + offsets
    return torch.where(index < tokens, index, -1).to(torch.int32)[None, None]


def check_values() -> dict[Kind, float]:
    """Errors of both ops on ragged sequences of each head size and dtype, by kind of score.

    Raises:
        RuntimeError: A score or a selection is wrong.
    """
    worst = dict.fromkeys(KINDS, 0.0)
    for (dtype, dim), kind in itertools.product(
        [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 96), (torch.float32, 128), (torch.float32, 32)],
        KINDS,
    ):
        q = torch.randn(2, 4, 3000, dim, device="cuda", dtype=dtype)
        k = torch.randn(2, 2, 3000, dim, device="cuda", dtype=dtype)
        index = sample_index(3000, BLOCK if kind == "mean" else 16)
        got = block_scores(q, k, index, index, kind=kind, backend="triton")
        want = block_scores(q.double(), k.double(), index, index, kind=kind, backend="reference")
        error = float((got - want).abs().max() / want.max())
        _check(f"block_scores {kind} {dtype} {dim}", error, 1e-4)
        worst[kind] = max(worst[kind], error)
        for mass, forced in itertools.product((None, 0.9), (0, 2)):
            rule: dict[str, Any] = {"min_keep": 2, "max_keep": 6, "mass": mass, "keep_diagonal": True, "forced": forced}
            mine, theirs = (select_blocks(got, backend=name, **rule).kv_num for name in ("triton", "reference"))
            _check(f"select_blocks {mass} {forced}: rows cut elsewhere", float((mine != theirs).float().mean()), 0.01)
    return worst


def _check(what: str, error: float, limit: float) -> None:
    if not error < limit:
        raise RuntimeError(f"{what}: error {error:.2e} is not under {limit:g}. No time is reported")


def bench(run: Run, shapes: dict[str, Shape], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run.

    Args:
        run: The run, entered.
        shapes: Name to shape.
        rounds: Timed calls of each.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    torch.manual_seed(seed)
    errors = check_values()
    for name, shape in shapes.items():
        _bench(run, name, shape, errors, rounds, seed)
        gc.collect()
        torch.cuda.empty_cache()


def _bench(run: Run, name: str, shape: Shape, errors: dict[Kind, float], rounds: int, seed: int) -> None:
    q, k, v = inputs(shape)
    tokens, blocks = shape.tokens, -(-shape.tokens // BLOCK)
    forced = blocks - (tokens - shape.text) // BLOCK if shape.text else 0
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, float] = {}
    kinds: tuple[tuple[Kind, int], ...]
    kinds = (("paper", 16), ("paper", 32), ("official", 32), ("lse", 16), ("mean", BLOCK))
    for kind, samples in kinds:
        index = sample_index(tokens, samples)
        calls[f"scores {kind} {samples}"] = functools.partial(block_scores, q, k, index, index, kind=kind)
        found[f"scores {kind} {samples}"] = errors[kind]
    index = sample_index(tokens, 16)
    most = max(1, round(shape.most * blocks))
    rule: dict[str, Any] = dict(min_keep=max(1, most // 4), max_keep=most, mass=0.95, keep_diagonal=True, forced=forced)
    scores = block_scores(q, k, index, index)
    kept = select_blocks(scores, **rule)
    layout = BlockLayout(kept.kv_num, kept.kv_idx, tokens, tokens, BLOCK, BLOCK, check=False)
    groups = -(-(tokens - shape.text) // shape.pool)
    make = (shape.batch, shape.heads, groups, shape.dim)
    far_k, far_v = (torch.randn(make, device="cuda", dtype=q.dtype) for _ in range(2))
    pooled = PooledKV(far_k, far_v, torch.tensor(float(shape.pool), device="cuda").log())
    calls |= {
        "select threshold": lambda: select_blocks(scores, **rule),
        "select topk": lambda: select_blocks(scores, max_keep=most, keep_diagonal=True, forced=forced),
        "select topk (torch)": lambda: BlockLayout.from_topk(scores, most, tokens, tokens),
        "scores and selection": lambda: select_blocks(block_scores(q, k, index, index), **rule),
        "attention": lambda: block_sparse_attention(q, k, v, layout),
        "attention pooled": lambda: block_sparse_attention(q, k, v, layout, pooled=pooled),
        DENSE: lambda: cudnn(q, k, v),
    }
    labels: dict[str, Any] = dict(
        shape=name, batch=shape.batch, heads=shape.heads, tokens=tokens, dim=shape.dim, dtype="bfloat16",
        density=float(layout.density()), pooled=groups,
    )  # fmt: skip
    kernel = f"2 bytes d{shape.dim}"
    own: dict[str, Any] = dict(kernel=kernel, settings=shipped()[kernel])
    for call, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
        fields: dict[str, Any] = dict(error=found.get(call), **labels, **(own if call.startswith("scores") else {}))
        timed(run, call, timing, split="prober", **fields)
