"""Column sums in Triton: log-sum-exps of the rows from pieces of the keys, then the weights, tile by tile of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.checks import unit_last

__all__ = ["column_mass_triton"]

LOG2E = 1.4426950408889634
_CHUNK = 512
"""Keys of a piece, of which each program of the first pass does one."""


@triton.jit
def _lse_kernel(
    Q, K, ROWS, REAL, PART,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    num_rows, num_k, before, chunks, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """PART[bh, chunk, row]: log-sum-exp, base 2, of a row's logits in a chunk of the keys."""
    chunk = tl.program_id(0)
    bh = tl.program_id(2).to(tl.int64)
    b = bh // H
    h = bh % H
    r = tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    row = tl.load(ROWS + b * num_rows + r, mask=r < num_rows, other=-1)
    there = row >= 0
    q = tl.load(
        Q + b * stride_qb + h * stride_qh + row.to(tl.int64)[:, None] * stride_qt + d[None, :],
        mask=there[:, None], other=0.0,
    )  # fmt: skip
    keys = K + b * stride_kb + h // GROUP * stride_kh
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    first = chunk * CHUNK
    last = tl.where(there, row + before, -1)  # the last key that a row sees
    stop = tl.minimum(tl.minimum(first + CHUNK, num_k), tl.max(last, 0) + 1)
    for start in range(first, stop, BN):
        at = start + c
        k = tl.load(keys + at.to(tl.int64)[None, :] * stride_kt + d[:, None], mask=(at < num_k)[None, :], other=0.0)
        live = at < num_k
        if REAL is not None:
            live = live & (tl.load(REAL + b * num_k + at, mask=live, other=0) != 0)
        s = tl.dot(q, k, input_precision="tf32x3") * scale_log2
        s = tl.where(live[None, :] & (at[None, :] <= last[:, None]), s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(PART + (bh * chunks + chunk) * num_rows + r, lse, mask=r < num_rows)


@triton.jit
def _join_kernel(PART, LSE, num_rows, chunks, BM: tl.constexpr):
    """LSE[bh, row] over the chunks; +inf for a row that sees nothing, whose weights are then 0."""
    bh = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for chunk in range(0, chunks):
        part = tl.load(PART + (bh * chunks + chunk) * num_rows + r, mask=r < num_rows, other=-float("inf"))
        new = tl.maximum(top, part)
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.exp2(part - base)
        top = new
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(LSE + bh * num_rows + r, lse, mask=r < num_rows)


@triton.jit
def _mass_kernel(
    Q, K, ROWS, REAL, LSE, MASS, SEEN,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    num_rows, num_k, before, scale_log2,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """MASS[key head, b, column]: weights of a tile of columns, summed over rows and the heads of one key head."""
    start = tl.program_id(0) * BN
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    at = start + tl.arange(0, BN)
    d = tl.arange(0, D)
    m = tl.arange(0, BM)
    live = at < num_k
    k = tl.load(
        K + b * stride_kb + hk * stride_kh + at.to(tl.int64)[None, :] * stride_kt + d[:, None],
        mask=live[None, :], other=0.0,
    )  # fmt: skip
    if REAL is not None:
        live = live & (tl.load(REAL + b * num_k + at, mask=live, other=0) != 0)
    mass = tl.zeros([BN], tl.float32)
    seen = tl.zeros([BN], tl.int32)
    for first in range(0, num_rows, BM):
        r = first + m
        row = tl.load(ROWS + b * num_rows + r, mask=r < num_rows, other=-1)
        last = tl.where(row >= 0, row + before, -1)
        if tl.max(last, 0) >= start:
            visible = live[None, :] & (at[None, :] <= last[:, None])
            seen += tl.sum(visible.to(tl.int32), 0)
            for g in range(0, H // HK):
                h = hk * (H // HK) + g
                q = tl.load(
                    Q + b * stride_qb + h * stride_qh + row.to(tl.int64)[:, None] * stride_qt + d[None, :],
                    mask=(row >= 0)[:, None], other=0.0,
                )  # fmt: skip
                lse = tl.load(LSE + (b * H + h) * num_rows + r, mask=r < num_rows, other=float("inf"))
                s = tl.dot(q, k, input_precision="tf32x3") * scale_log2 - lse[:, None]
                mass += tl.sum(tl.where(visible, tl.exp2(s), 0.0), 0)
    tl.store(MASS + (hk * tl.num_programs(2) + b) * num_k + at, mass / H, mask=at < num_k)
    if hk == 0:
        tl.store(SEEN + b * num_k + at, seen, mask=at < num_k)


def column_mass_triton(q: Tensor, k: Tensor, rows: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """See ``column_mass``."""
    q, k = unit_last(q), unit_last(k)
    rows = rows.to(torch.int32).contiguous()
    real = None if real is None else real.contiguous()
    batch, heads, _, dim = q.shape
    heads_k, num_k = k.shape[1:3]
    num_rows = rows.shape[1]
    # Products of three rounded parts, as of float32, take many registers.
    narrow = q.element_size() == 2
    tile_q = 64 if narrow and num_rows > 32 else 16
    tile_k = 64 if narrow else 32
    chunks = triton.cdiv(num_k, _CHUNK)
    part = torch.empty((batch * heads, chunks, num_rows), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch * heads, num_rows), dtype=torch.float32, device=q.device)
    mass = torch.empty((heads_k, batch, num_k), dtype=torch.float32, device=q.device)
    seen = torch.empty((batch, num_k), dtype=torch.int32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3])
    _lse_kernel[(chunks, triton.cdiv(num_rows, tile_q), batch * heads)](
        q, k, rows, real, part, *strides, num_rows, num_k, num_k - q.shape[2], chunks, scale * LOG2E,
        H=heads, GROUP=heads // heads_k, D=dim, BM=tile_q, BN=tile_k, CHUNK=_CHUNK, num_warps=4, num_stages=3,
    )  # fmt: skip
    _join_kernel[(triton.cdiv(num_rows, 64), batch * heads)](part, lse, num_rows, chunks, BM=64, num_warps=2)
    _mass_kernel[(triton.cdiv(num_k, tile_k), heads_k, batch)](
        q, k, rows, real, lse, mass, seen, *strides, num_rows, num_k, num_k - q.shape[2], scale * LOG2E,
        H=heads, HK=heads_k, D=dim, BM=tile_q, BN=tile_k, num_warps=4 if narrow else 8, num_stages=2,
    )  # fmt: skip
    return mass.sum(0), seen
