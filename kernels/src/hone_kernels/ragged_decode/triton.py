"""Decoding attention in Triton: pieces of each cache in parallel, the heads of a key head together, then one join."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.checks import unit_last

__all__ = ["decode_attention_triton"]

LOG2E = 1.4426950408889634
_PROGRAMS = 792
"""To cut the caches into: six for each multiprocessor of an H200, of which three run at once."""
_PIECES = 64
"""Of a cache, at most: one program joins them."""


@triton.jit(do_not_specialize=["stride_valid"])
def _pieces_kernel(
    Q, K, V, VALID, PART, LSE,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_valid, num_k, chunk, pieces, scale_log2,
    H: tl.constexpr, HK: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    mine = g < H // HK
    h = hk * (H // HK) + g
    q = tl.load(Q + b * stride_qb + h[:, None] * stride_qh + d[None, :], mask=mine[:, None], other=0.0)
    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    first = piece * chunk
    for start in range(first, tl.minimum(first + chunk, num_k), BN):
        at = start + c
        # No branch around a tile without a valid entry, of which nothing is loaded: loads behind one are not pipelined.
        live = tl.load(VALID + b * stride_valid + at, mask=at < num_k, other=0) != 0
        token = at.to(tl.int64)
        k = tl.load(
            K + b * stride_kb + hk * stride_kh + token[None, :] * stride_kt + d[:, None],
            mask=live[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            V + b * stride_vb + hk * stride_vh + token[:, None] * stride_vt + d[None, :],
            mask=live[:, None], other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        s = tl.where(live[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new
    safe = tl.where(total > 0, total, 1.0)
    at_head = (b * H + h) * pieces + piece
    tl.store(PART + at_head[:, None] * D + d[None, :], acc / safe[:, None], mask=mine[:, None])
    tl.store(LSE + at_head, tl.where(total > 0, top + tl.log2(safe), -float("inf")), mask=mine)


@triton.jit
def _join_kernel(PART, LSE, OUT, pieces, D: tl.constexpr, PP: tl.constexpr):
    bh = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for first in range(0, pieces, PP):
        at = first + tl.arange(0, PP)
        lse = tl.load(LSE + bh * pieces + at, mask=at < pieces, other=-float("inf"))
        new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        part = tl.load(PART + (bh * pieces + at)[:, None] * D + d[None, :], mask=(at < pieces)[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        top = new
    tl.store(OUT + bh * D + d, (acc / tl.where(total > 0, total, 1.0)).to(OUT.dtype.element_ty))


def decode_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float, *, programs: int = _PROGRAMS
) -> Tensor:
    """See ``decode_attention``; ``programs`` is about how many the caches are cut into."""
    q, k, v, valid = unit_last(q), unit_last(k), unit_last(v), unit_last(valid)
    batch, heads, _, dim = q.shape
    heads_k, num_k = k.shape[1:3]
    tile = 64 if q.element_size() == 2 else 16
    chunk = max(triton.cdiv(batch * heads_k * num_k, programs), triton.cdiv(num_k, _PIECES))
    chunk = triton.cdiv(chunk, tile) * tile
    pieces = triton.cdiv(num_k, chunk)
    part = torch.empty((batch, heads, pieces, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, pieces), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, heads, 1, dim), dtype=q.dtype, device=q.device)
    _pieces_kernel[(pieces, heads_k, batch)](
        q, k, v, valid, part, lse, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], valid.stride(0),
        num_k, chunk, pieces, scale * LOG2E,
        H=heads, HK=heads_k, GP=max(16, triton.next_power_of_2(heads // heads_k)), D=dim, BN=tile,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _join_kernel[(batch * heads,)](part, lse, out, pieces, D=dim, PP=16, num_warps=1)
    return out
