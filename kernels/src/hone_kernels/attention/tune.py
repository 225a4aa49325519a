"""Launch settings that the attention kernels' shipped ones were chosen from, beside the alternatives."""

from __future__ import annotations

import faulthandler
import functools
import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import measure_interleaved
from torch import Tensor

from hone_kernels.rows import DENSE, timed

from .api import PooledKV, block_sparse_attention
from .bench import SHAPES as BENCH_SHAPES
from .bench import Shape, cudnn, flex, random_layout, relative
from .layout import BlockLayout
from .reference import attention_reference

__all__ = ["SHAPES", "check", "gluon", "inputs", "triton"]

SHAPES: dict[str, Shape] = {**BENCH_SHAPES, "small": Shape("small", 2, 2048, 64, 2)}
"""The last one only shows that everything runs."""

_NONE = (None, None, None, None)
"""In place of padding and pooled keys."""

DENSITIES = (1.0, 0.5, 0.2, 0.1)
_WARMUP = 2
_log = logging.getLogger(__name__)

# (kernel, head size) -> Tiles' fields in order.
TILES: dict[tuple[str, int], list[tuple[Any, ...]]] = {
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

# (head size, queries in a block) -> Config's fields: what a run compares with the shipped configuration.
CONFIGS: dict[tuple[int, int], list[dict[str, Any]]] = {
    (128, 128): [
        dict(keys=128, stages=2, q_registers=True),
        dict(keys=128, stages=2, turns=True),
        dict(keys=128, stages=2, q_registers=True, turns=True),
    ],
    (64, 128): [
        dict(keys=128, stages=4),
        dict(keys=128, stages=4, q_registers=True),
        dict(keys=128, stages=3, q_registers=True, turns=True),
    ],
    (128, 64): [
        dict(keys=64, stages=2),
        dict(keys=128, stages=1),
    ],
    (64, 64): [
        dict(keys=128, stages=3, q_registers=True),
        dict(keys=64, stages=4, q_registers=True),
        dict(keys=128, stages=2),
    ],
}


def inputs(shape: Shape, n: int = 3) -> list[Tensor]:
    """Bfloat16 ``[1, H, S, D]``."""
    make = (1, shape.heads, shape.tokens, shape.dim)
    return [torch.randn(make, device="cuda", dtype=torch.bfloat16) for _ in range(n)]


def check(what: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: float = 1e-2) -> float:
    """The largest relative error.

    Raises:
        RuntimeError: It is not under the limit.
    """
    error = relative(got, want)
    if not error < limit:
        raise RuntimeError(f"{what}: error {error:.2e} is not under {limit:g}. No time is reported")
    return error


def _work(shape: Shape, density: float = 1.0) -> float:
    """Operations of a forward."""
    return 4.0 * shape.dim * shape.heads * shape.tokens**2 * density


def triton(run: Run, shapes: Mapping[str, Shape], *, candidates: int | None, rounds: int, seed: int) -> None:
    """Tiles of the Triton forward, dq and dkv, beside FlexAttention where it takes the shape.

    Args:
        run: Gets the rows; ``split`` is the kernel.
        shapes: Name to shape.
        candidates: Only so many of each kernel, or None.
        rounds: Timed calls of each.
        seed: Of the order.
    """
    from .triton import Tiles

    for shape in shapes.values():
        for (kernel, dim), numbers in TILES.items():
            if dim == shape.dim:
                _triton(run, shape, kernel, [Tiles(*x) for x in numbers[:candidates]], rounds, seed)


def _triton(run: Run, shape: Shape, kernel: str, candidates: list[Any], rounds: int, seed: int) -> None:
    dim, scale = shape.dim, shape.dim**-0.5
    small = inputs(Shape("", 3, 1000, dim, 3), 4)
    layout = random_layout(3, 1000, 0.5)
    q, k, v = leaves = [x.float().requires_grad_() for x in small[:3]]
    out, lse = attention_reference(q, k, v, layout, scale)
    want = (out, lse) if kernel == "forward" else torch.autograd.grad(out, leaves, small[3].float())
    errors = {}
    for tiles in candidates:
        try:
            got = _call(kernel, tiles, small, layout, _state(small, layout))()
        except Exception as error:
            _log.info("%s d%d %s fails: %s", kernel, dim, tiles, str(error).splitlines()[0][:100])
            continue
        errors[str(tiles)] = check(f"{kernel} d{dim} {tiles}", got, want)
    big = inputs(shape, 4)
    for density in DENSITIES[:: len(DENSITIES) - 1]:
        layout = random_layout(shape.heads, shape.tokens, density)
        state = _state(big, layout)
        calls = {str(t): _call(kernel, t, big, layout, state) for t in candidates if str(t) in errors}
        if not shape.tokens % 128 and kernel != "dkv":
            attend, leaves = flex(layout), [x.detach().requires_grad_(kernel == "dq") for x in big[:3]]
            calls["flex"] = functools.partial(attend, *leaves)
            if kernel == "dq":
                calls["flex"] = functools.partial(
                    torch.autograd.grad, attend(*leaves), leaves, big[3], retain_graph=True
                )
        work = _work(shape, layout.density().item()) * (1 if kernel == "forward" else 2.5)
        for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
            fields: dict[str, Any] = dict(work=work, error=errors.get(name), shape=shape.name, dim=dim, density=density)
            timed(run, name, timing, split=kernel, **fields)
        del calls, state
        gc.collect()
        torch.cuda.empty_cache()


def _state(x: list[Tensor], layout: BlockLayout) -> tuple[Any, ...]:
    """What a backward needs of its forward."""
    from .triton import attention_forward

    q, k, v, _ = x
    got = attention_forward(q, k, v, layout.kv_num, layout.kv_idx, *_NONE, 128, 128, q.shape[3] ** -0.5)
    return *got, layout.transpose(), torch.zeros_like(got[1])


def _call(kernel: str, tiles: Any, x: list[Tensor], layout: BlockLayout, state: tuple[Any, ...]) -> Callable[[], Any]:
    """A call with one kernel's tiles named."""
    from .triton import attention_backward, attention_forward

    (q, k, v, dout), (out, lse, columns, dlse) = x, state
    lists, scale = (layout.kv_num, layout.kv_idx), q.shape[3] ** -0.5
    if kernel == "forward":
        return lambda: attention_forward(q, k, v, *lists, *_NONE, 128, 128, scale, tiles)
    return lambda: attention_backward(
        dout, dlse, q, k, v, out, lse, *lists, columns.kv_num, columns.kv_idx, *_NONE, 128, 128, scale, {kernel: tiles}
    )[:3]


def gluon(run: Run, shapes: Mapping[str, Shape], *, candidates: int | None, rounds: int, seed: int) -> None:
    """Configurations of the Gluon forward, the shipped one first, beside Triton's and cuDNN's dense attention.

    Arguments are those of ``triton``; ``split`` of a row is the sizes of the blocks.
    """
    from .gluon_sm90 import CONFIGS as SHIPPED
    from .gluon_sm90 import Config

    for shape in shapes.values():
        for block_q, block_k in ((128, 128), (128, 64), (64, 64)):
            best = SHIPPED[shape.dim, block_q]
            others = [Config(**x) for x in CONFIGS[shape.dim, block_q]]
            configs = [best, *others, replace(best, claim=False)][:candidates]
            _gluon(run, shape, configs, block_q, block_k, rounds, seed)
        _pooled(run, shape, rounds, seed)


def _gluon(run: Run, shape: Shape, configs: list[Any], block_q: int, block_k: int, rounds: int, seed: int) -> None:
    q, k, v = inputs(shape)
    few = _uneven_layout(2, shape.tokens, 0.1, block_q, block_k)
    part_q, part_k, part_v = (x[:, :2] for x in (q, k, v))
    want = attention_reference(part_q, part_k, part_v, few, shape.dim**-0.5)
    seen = want[1].isfinite()
    errors = {}
    for config in configs:
        # A program that waits for an arrival that never comes holds the device: it ends the process.
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            got = _forward(part_q, part_k, part_v, few, config)
            torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            _log.info("%s fails: %s", config, str(error).splitlines()[0][:100])
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        pairs = [(x[0][seen], x[1][seen]) for x in (got, want)]
        errors[str(config)] = check(f"{shape.name} {config}", pairs[0], pairs[1])
    layouts: dict[str, BlockLayout] = {}
    for density in DENSITIES if block_k == 128 else (0.5, 0.1):
        scores = torch.rand(1, shape.heads, -(-shape.tokens // block_q), -(-shape.tokens // block_k), device="cuda")
        keep = max(1, round(scores.shape[3] * density))
        sizes: dict[str, Any] = dict(block_q=block_q, block_k=block_k)
        layouts[f"{density:g}"] = BlockLayout.from_topk(scores, keep, shape.tokens, shape.tokens, **sizes)
        del scores
    layouts["0.2 uneven"] = _uneven_layout(shape.heads, shape.tokens, 0.2, block_q, block_k)
    for lists, layout in layouts.items():
        calls: dict[str, Callable[[], object]] = {
            str(c): functools.partial(_forward, q, k, v, layout, c) for c in configs if str(c) in errors
        }
        calls["triton"] = functools.partial(block_sparse_attention, q, k, v, layout, backend="triton")
        calls[DENSE] = functools.partial(cudnn, q, k, v)
        density = layout.density().item()
        for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
            work = _work(shape, 1.0 if name == DENSE else density)
            fields: dict[str, Any] = dict(
                error=errors.get(name), shape=shape.name, dim=shape.dim, lists=lists, density=density
            )
            timed(run, name, timing, split=f"{block_q} x {block_k}", work=work, **fields)
        gc.collect()
        torch.cuda.empty_cache()


def _pooled(run: Run, shape: Shape, rounds: int, seed: int) -> None:
    q, k, v = inputs(shape)
    groups = shape.tokens // 30
    far_k, far_v = inputs(Shape("", shape.heads, groups, shape.dim, shape.heads), 2)
    pooled = PooledKV(far_k, far_v, torch.full((groups,), 3.4, device="cuda"))
    layout = random_layout(shape.heads, shape.tokens, 0.1)
    density = layout.density().item()
    work = _work(shape, density) + 4.0 * shape.dim * shape.heads * shape.tokens * groups
    calls = {
        name: functools.partial(block_sparse_attention, q, k, v, layout, pooled=pooled, backend=name)
        for name in ("gluon", "triton")
    }
    check(f"{shape.name}, pooled", (calls["gluon"](),), (calls["triton"](),))
    for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
        timed(run, name, timing, split="pooled", work=work, shape=shape.name, dim=shape.dim, density=density)


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, config: Any) -> tuple[Tensor, Tensor]:
    """The Gluon kernel without the op around it, so that a configuration can be named."""
    from .gluon_sm90 import attention_forward

    blocks = (layout.block_q, layout.block_k)
    lists = (layout.kv_num, layout.kv_idx, layout.k_valid)
    return attention_forward(q, k, v, *lists, None, None, None, *blocks, q.shape[3] ** -0.5, config)


def _uneven_layout(heads: int, tokens: int, density: float, block_q: int, block_k: int) -> BlockLayout:
    """Lists of a quarter to seven quarters of the mean, but two whole rows last in each head, an empty one first."""
    rows, cols = -(-tokens // block_q), -(-tokens // block_k)
    chance = density * (0.25 + 1.5 * torch.rand(1, heads, rows, 1, device="cuda"))
    chance[:, :, -2:] = 1.0
    chance[:, :, 0] = 0.0
    mask = torch.rand(1, heads, rows, cols, device="cuda") < chance
    return BlockLayout.from_mask(mask, tokens, tokens, block_q=block_q, block_k=block_k)
