"""Attention over a pyramid of keys beside lists of blocks that read as many keys, values first, then times.

Every row reads ``SHARES`` of the blocks at factors 1, 2, 4 and 8: random ones, own ones per head. Rates count products
of queries with keys, pooled or not.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import measure_interleaved
from torch import Tensor
from torch.nn import functional

from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import Shape, dense_kernels, inputs, random_layout, relative
from hone_kernels.rows import DENSE, timed

from .api import pyramid_attention
from .reference import FACTORS, pyramid_reference

__all__ = ["SHAPES", "SHARES", "bench", "by_levels", "parse", "random_factors"]

_log = logging.getLogger(__name__)

SHAPES = ("wan-1.3b 480p", "wan-1.3b 480p ragged", "cogvideox-5b", "cogvideox-5b ragged")

SHARES = (0.1, 0.1, 0.1, 0.2)
"""Of a row's blocks, by factor: a fifth of its keys, half of them pooled."""

BLOCK = 128

_LIMIT = 1e-2
"""Relative error (norm) against the reference above which no time is reported."""

_ROWS_CHECKED = 16

_LEAST_TILE = 32
"""Keys of the smallest block that a kernel of lists takes."""


def parse(text: str) -> Shape:
    """A shape by name, or of HEADSxTOKENSxHEAD_SIZE.

    Raises:
        ValueError: It is neither.
    """
    return Shape.parse(text)


def random_factors(heads: int, tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Factors ``[1, heads, N, N]`` of random pairs of blocks, as many of each in every row."""
    blocks, whole = math.ceil(tokens / BLOCK), tokens // BLOCK
    order = torch.rand(1, heads, blocks, whole, device=device).argsort(-1)
    ranked, first = torch.zeros_like(order, dtype=torch.int32), 0
    for factor, share in zip(FACTORS, SHARES, strict=True):
        # Whole tiles are gathered of as many blocks as the factor says.
        count = round(share * blocks / factor) * factor
        ranked[..., first : first + count] = factor
        first += count
    factors = torch.zeros_like(ranked).scatter_(-1, order, ranked)
    return functional.pad(factors, (0, blocks - whole), value=1)


def by_levels(q: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    """The same by a call per level, whose results are merged by their log-sum-exps."""
    tokens, whole = k.shape[2], k.shape[2] // BLOCK
    outs, lses = [], []
    for factor in FACTORS:
        keys, values, wanted, valid, width, length = k, v, factors == factor, None, BLOCK, tokens
        if factor > 1:
            size = BLOCK // factor
            width = max(size, _LEAST_TILE)
            keys, values = (
                functional.pad(
                    x[:, :, : whole * BLOCK].unflatten(2, (whole, size, factor)).mean(4, dtype=torch.float32).to(x),
                    (0, 0, 0, width - size),
                ).flatten(2, 3)
                for x in (k, v)
            )
            wanted, length = wanted[..., :whole], whole * width
            if width > size:
                valid = torch.full((1, whole), size, dtype=torch.int32, device=q.device)
        layout = BlockLayout.from_mask(wanted, tokens, length, block_q=BLOCK, block_k=width, k_valid=valid)
        out, lse = block_sparse_attention(q, keys, values, layout, return_lse=True)
        outs.append(out)
        lses.append(lse + math.log(factor))
    weights = torch.stack(lses).softmax(0).unsqueeze(-1)
    return torch.stack([weight * out for weight, out in zip(weights, outs, strict=True)]).sum(0).to(q.dtype)


def bench(run: Run, shapes: Sequence[str], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run.

    Args:
        run: The run, entered.
        shapes: See ``parse``.
        rounds: Timed calls of each.
        seed: Of data, lists and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    for text in shapes:
        torch.manual_seed(seed)
        shape = parse(text)
        leaves = [x.requires_grad_() for x in inputs(shape, torch.bfloat16, memory="BSHD")]
        dout = torch.randn_like(leaves[0])
        factors = random_factors(shape.heads, shape.tokens, dout.device)
        read = _read(factors, shape.tokens)
        density = read / shape.tokens**2 / shape.heads
        layout = random_layout(shape.heads, shape.tokens, density, BLOCK)
        listed = layout.density().item() * shape.tokens**2 * shape.heads
        ways: dict[str, tuple[Callable[..., Tensor], float]] = {
            "hone pyramid": (functools.partial(pyramid_attention, factors=factors, check=False), read),
            "hone pyramid, by levels": (functools.partial(by_levels, factors=factors), read),
            "hone lists": (functools.partial(block_sparse_attention, layout=layout), listed),
        }
        for name, peer in dense_kernels(torch.bfloat16, backward=True).items():
            ways[name] = (peer, float(shape.heads * shape.tokens**2))
        errors = {name: _error(name, ways[name][0], leaves, factors, dout) for name in ways if "pyramid" in name}
        labels: dict[str, Any] = dict(shape=shape.name, dtype="bfloat16", density=round(density, 3))
        for mode in ("forward", "backward"):
            calls: dict[str, Callable[[], object]] = {}
            for name, (attend, _) in ways.items():
                try:
                    if mode == "forward":
                        call: Callable[[], object] = functools.partial(attend, *[x.detach() for x in leaves])
                    else:
                        call = functools.partial(torch.autograd.grad, attend(*leaves), leaves, dout, retain_graph=True)
                    call()
                except Exception as error:
                    if name.startswith("hone") or name == DENSE:
                        raise
                    _log.warning("%s is left out of %s, %s: %s", name, shape.name, mode, error)
                    continue
                calls[name] = call
            timings = measure_interleaved(calls, warmup=3, rounds=rounds, seed=seed)
            dense_ones = [name for name in timings if name.endswith(" dense")]
            best = min(dense_ones, key=lambda name: timings[name].ms_p50)
            for name, timing in timings.items():
                work = (10 if mode == "backward" else 4) * shape.dim * ways[name][1]
                timed(run, name, timing, split=mode, work=work, error=errors.get(name), dense=best, **labels)
            del calls
            gc.collect()
            torch.cuda.empty_cache()


def _read(factors: Tensor, tokens: int) -> float:
    """Products of queries with keys."""
    sizes = (tokens - torch.arange(0, tokens, BLOCK, device=factors.device)).clamp(max=BLOCK).double()
    share = torch.where(factors > 0, 1 / factors.clamp(min=1).double(), 0.0)
    return float(torch.einsum("bhij,i,j->", share, sizes, sizes))


def _error(name: str, attend: Callable[..., Tensor], leaves: Sequence[Tensor], factors: Tensor, dout: Tensor) -> float:
    """The largest relative error of output and gradients, of the first head and rows spread over the sequence.

    Raises:
        RuntimeError: It is above the limit.
    """
    tokens, last = dout.shape[2], factors.shape[2] - 1
    rows = torch.unique(torch.linspace(0, last, _ROWS_CHECKED, device=dout.device).long())
    within = torch.arange(BLOCK, device=dout.device)
    queries = (rows[:, None] * BLOCK + within).flatten()
    queries = queries[queries < tokens]
    taken = torch.zeros(tokens, 1, dtype=dout.dtype, device=dout.device)
    taken[queries] = 1
    out = attend(*leaves)
    got = [out[:, :1, queries], *(x[:, :1] for x in torch.autograd.grad(out, leaves, dout * taken))]
    got[1] = got[1][:, :, queries]
    parts = (leaves[0][:, :1, queries], leaves[1][:, :1], leaves[2][:, :1])
    q, k, v = (x.detach().float().requires_grad_() for x in parts)
    exact, _ = pyramid_reference(q, k, v, factors[:, :1, rows], BLOCK, dout.shape[3] ** -0.5)
    want = [exact, *torch.autograd.grad(exact, (q, k, v), dout[:, :1, queries].float())]
    error = relative([x.detach() for x in got], [x.detach() for x in want])
    if not error < _LIMIT:
        raise RuntimeError(
            f"{name} is wrong at {list(dout.shape)}: relative error {error:.2e}, expected below {_LIMIT:.2e}. No time "
            "is reported; run the tests of hone-kernels on this device."
        )
    return error
