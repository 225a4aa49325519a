"""Block scores in Triton: one pass over the sampled logits, then a light reduction over the rows of each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.launch import Notes, geometry, launch, number

__all__ = ["TILES", "Tile", "block_scores_triton"]

LOG2E = 1.4426950408889634
_SCRATCH_BYTES = 256 << 20  # of row maxima held at a time; beyond it, heads are worked through in groups
_PAPER, _OFFICIAL, _LSE = 0, 1, 2
_ROUND_TO = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_KIND = {"paper": _PAPER, "official": _OFFICIAL, "lse": _LSE}


@dataclass(frozen=True)
class Tile:
    """Launch settings of the logit pass.

    Attributes:
        rows: Sampled queries of a tile.
        cols: Sampled keys of a tile; more, where one block has more samples.
        warps: Warps of a program.
        stages: Key tiles in flight.
    """

    rows: int
    cols: int
    warps: int
    stages: int


TILES: dict[tuple[int, int], Tile] = {
    # (bytes of an element, head_dim padded to a power of two)
    (2, 32): Tile(128, 128, 8, 3),
    (2, 64): Tile(64, 128, 4, 2),
    (2, 128): Tile(128, 64, 8, 3),
    (4, 32): Tile(64, 32, 4, 2),
    (4, 64): Tile(64, 32, 4, 2),
    (4, 128): Tile(64, 32, 4, 2),
}


@triton.jit
def _row_stats_kernel(
    Q, K, Q_INDEX, K_INDEX, STAT, ROW,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_qib, stride_qih, stride_kib, stride_kih,
    rows, num_k, first_bh, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, SAMPLES: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BLOCKS: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr, KIND: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """STAT[row, block]: largest sampled logit (KIND 2: log-sum-exp), base 2. ROW: what to subtract from the row."""
    local = tl.program_id(1).to(tl.int64)
    b = (local + first_bh) // H
    h = (local + first_bh) % H
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    token_q = tl.load(Q_INDEX + b * stride_qib + h * stride_qih + r, mask=r < rows, other=-1)
    q = tl.load(
        Q + b * stride_qb + h * stride_qh + token_q.to(tl.int64)[:, None] * stride_qt + d[None, :],
        mask=(token_q >= 0)[:, None] & (d < D)[None, :],
        other=0.0,
    )  # [BM, DP]
    c = tl.arange(0, BLOCKS * SP)
    index = K_INDEX + b * stride_kib + h * stride_kih + c // SP * SAMPLES + c % SP
    keys = K + b * stride_kb + h // GROUP * stride_kh
    j = tl.arange(0, BLOCKS)
    out = STAT + (local * rows + r)[:, None] * num_k + j[None, :]
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    # The loop carries the next tile's positions, so that the loads that depend on them get every pipeline stage.
    token = tl.load(index, mask=(c // SP < num_k) & (c % SP < SAMPLES), other=-1)
    for first in range(0, num_k, BLOCKS):
        k = tl.load(
            keys + token.to(tl.int64)[None, :] * stride_kt + d[:, None],
            mask=(token >= 0)[None, :] & (d < D)[:, None],
            other=0.0,
        )  # [DP, BLOCKS*SP]
        # Loaded again rather than carried: the mask is wanted in the layout of the product.
        live = tl.load(index + first * SAMPLES, mask=(first + c // SP < num_k) & (c % SP < SAMPLES), other=-1) >= 0
        after = first + BLOCKS
        token = tl.load(index + after * SAMPLES, mask=(after + c // SP < num_k) & (c % SP < SAMPLES), other=-1)
        s = tl.dot(q, k, input_precision="tf32x3") * scale_log2
        s = tl.where(live[None, :], s, -float("inf"))
        s = tl.reshape(s, [BM, BLOCKS, SP])
        stat = tl.max(s, 2)  # [BM, BLOCKS]
        new = tl.maximum(top, tl.max(stat, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        if KIND != 1:
            mass = tl.sum(tl.exp2(s - base[:, None, None]), 2)  # [BM, BLOCKS]
            total = total * tl.exp2(top - base) + tl.sum(mass, 1)
            if KIND == 2:
                # A block that underflows here is below 2**-126 of the row and stays there: the maximum only grows.
                stat = tl.where(mass > 0, base[:, None] + tl.log2(tl.maximum(mass, 1e-38)), -float("inf"))
        top = new
        if ROUNDED:
            stat = stat.to(Q.dtype.element_ty).to(tl.float32)
        tl.store(out + first, stat, mask=(r < rows)[:, None] & (first + j < num_k)[None, :])
    base = tl.where(top == -float("inf"), 0.0, top)
    if KIND != 1:
        base += tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(ROW + local * rows + r, base, mask=r < rows)


@triton.jit
def _reduce_rows_kernel(
    STAT, ROW, Q_INDEX, OUT, stride_qib, stride_qih, num_q, num_k, first_bh,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, NKP: tl.constexpr, KIND: tl.constexpr,
    ROUND_TO: tl.constexpr,
):  # fmt: skip
    """One row of scores: the sampled rows of a query block reduced, then divided by their sum."""
    i = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    bh = local + first_bh
    j = tl.arange(0, NKP)
    acc = tl.full([NKP], -float("inf") if KIND != 2 else 0.0, tl.float32)
    for start in range(0, R, RP):
        r = start + tl.arange(0, RP)
        row = i * R + r
        token = tl.load(Q_INDEX + bh // H * stride_qib + bh % H * stride_qih + row, mask=r < R, other=-1)
        base = tl.load(ROW + local * num_q * R + row, mask=r < R, other=0.0)
        stat = tl.load(
            STAT + (local * num_q * R + row)[:, None] * num_k + j[None, :],
            mask=(token >= 0)[:, None] & (j < num_k)[None, :],
            other=-float("inf"),
        )  # [RP, NKP]
        stat -= base[:, None]
        if KIND == 2:
            acc += tl.sum(tl.exp2(stat), 0)
        else:
            acc = tl.maximum(acc, tl.max(stat, 0))
    score = acc if KIND == 2 else tl.exp2(acc)
    if ROUND_TO is not None:
        score = score.to(ROUND_TO).to(tl.float32)
    total = tl.sum(score, 0)
    if ROUND_TO is not None:
        total = total.to(ROUND_TO).to(tl.float32)
    score = score / tl.where(total > 0, total, 1.0)
    if ROUND_TO is not None:
        score = score.to(ROUND_TO).to(tl.float32)
    tl.store(OUT + (bh * num_q + i) * num_k + j, score, mask=j < num_k)


@triton.jit
def _block_mean_kernel(
    X, INDEX, OUT, stride_xb, stride_xh, stride_xt, stride_ib, stride_ih, num,
    H: tl.constexpr, GROUP: tl.constexpr, SAMPLES: tl.constexpr, SP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Mean of the listed tokens of one block, float32."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh % H
    d = tl.arange(0, DP)
    total = tl.zeros([DP], tl.float32)
    count = 0
    for start in range(0, SAMPLES, SP):
        c = start + tl.arange(0, SP)
        token = tl.load(INDEX + b * stride_ib + h * stride_ih + i * SAMPLES + c, mask=c < SAMPLES, other=-1)
        x = tl.load(
            X + b * stride_xb + h // GROUP * stride_xh + token.to(tl.int64)[:, None] * stride_xt + d[None, :],
            mask=(token >= 0)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), 0)
        count += tl.sum((token >= 0).to(tl.int32), 0)
    tl.store(OUT + (bh * num + i) * D + d, total / tl.maximum(count, 1), mask=d < D)


def _index_strides(index: Tensor) -> tuple[int, int]:
    """Batch and head stride of a contiguous index, 0 along a broadcast axis."""
    return (index.stride(0) if index.shape[0] > 1 else 0, index.stride(1) if index.shape[1] > 1 else 0)


def _block_means(x: Tensor, index: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Block means ``[B, H, N, D]`` float32 and the index of them, negative where a block has no token."""
    batch, own_heads, _, dim = x.shape
    num, samples = index.shape[2:]
    means = torch.empty((batch, heads, num, dim), dtype=torch.float32, device=x.device)
    _block_mean_kernel[(num, batch * heads)](
        x, index, means, *x.stride()[:3], *_index_strides(index), num,
        H=heads, GROUP=heads // own_heads, SAMPLES=samples, SP=min(triton.next_power_of_2(samples), 64),
        D=dim, DP=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    own = torch.arange(num, dtype=torch.int32, device=x.device)
    return means, torch.where((index >= 0).any(-1), own, -1).unsqueeze(-1).contiguous()


def block_scores_triton(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    kind: str,
    scale: float,
    rounded: bool = False,
    tile: Tile | None = None,
    notes: Notes | None = None,
) -> Tensor:
    """See ``block_scores``; ``tile`` overrides the launch settings of the logit pass, ``notes`` is for ``launch``."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_index, k_index = q_index.contiguous(), k_index.contiguous()
    batch, heads, _, dim = q.shape
    if kind == "mean":
        q, q_index = _block_means(q, q_index, heads)
        k, k_index = _block_means(k, k_index, heads)
        kind = "paper"  # of one token per block
    num_q, per_q = q_index.shape[2:]
    num_k, per_k = k_index.shape[2:]
    rows = num_q * per_q
    padded = max(16, triton.next_power_of_2(dim))
    tile = tile or TILES[q.element_size(), max(32, padded)]
    per_block = triton.next_power_of_2(per_k)
    blocks = max(1, tile.cols // per_block)
    # Many float32 samples of a block fill the shared memory at once: then no second tile is in flight.
    stages = tile.stages if blocks * per_block * padded * k.element_size() <= 32 << 10 else 1
    group = max(1, min(batch * heads, _SCRATCH_BYTES // (4 * rows * num_k)))
    stat = torch.empty((group, rows, num_k), dtype=torch.float32, device=q.device)
    row = torch.empty((group, rows), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, heads, num_q, num_k), dtype=torch.float32, device=q.device)
    if notes is not None:
        for x in (stat, row, out):
            notes.made(x)
    width = triton.next_power_of_2(num_k)
    facts = geometry(q, k, q_index, k_index)
    call = facts and number((facts, kind, scale, rounded, tile))
    for first in range(0, batch * heads, group):
        count = min(group, batch * heads - first)

        def stats(q, k, q_index, k_index, stat, row, first=first, count=count):
            args = (
                q, k, q_index, k_index, stat, row,
                *q.stride()[:3], *k.stride()[:3], *_index_strides(q_index), *_index_strides(k_index),
                rows, num_k, first, scale * LOG2E,
            )  # fmt: skip
            named = dict(
                H=heads, GROUP=heads // k.shape[1], SAMPLES=per_k, D=dim, BM=tile.rows, BLOCKS=blocks, SP=per_block,
                DP=padded, KIND=_KIND[kind], ROUNDED=rounded, num_warps=tile.warps, num_stages=stages,
            )  # fmt: skip
            return (triton.cdiv(rows, tile.rows), count), args, named

        def reduce(stat, row, q_index, out, first=first, count=count):
            args = (stat, row, q_index, out, *_index_strides(q_index), num_q, num_k, first)
            named = dict(
                H=heads, R=per_q, RP=min(triton.next_power_of_2(per_q), max(1, 8192 // width)), NKP=width,
                KIND=_KIND[kind], ROUND_TO=_ROUND_TO.get(q.dtype) if rounded else None, num_warps=4,
            )  # fmt: skip
            return (num_q, count), args, named

        launch(_row_stats_kernel, call and (call, first), (q, k, q_index, k_index, stat, row), stats, notes)
        launch(_reduce_rows_kernel, call and (call, first), (stat, row, q_index, out), reduce, notes)
    return out
