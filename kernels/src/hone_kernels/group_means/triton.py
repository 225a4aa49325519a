"""Means of groups of tokens in Triton: keys and values in one launch, and their gradients in another."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.launch import Notes, launch

__all__ = ["group_means_backward_triton", "group_means_triton"]

_ROWS = 64
"""Most tokens of a group in registers at once, and those of a program of the backward."""


@triton.jit
def _mean(x_ptr, out_ptr, sxb, sxh, sxs, sob, soh, sos, n, tokens, last, D: tl.constexpr, DP: tl.constexpr,
          ROWS: tl.constexpr):  # fmt: skip
    group = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    first = group.to(tl.int64) * n
    size = tl.minimum(tokens - group * n, n)
    x_ptr += batch * sxb + head * sxh + first * sxs
    total = tl.zeros([DP], tl.float32)
    for start in range(0, size, ROWS):
        row = start + tl.arange(0, ROWS)
        at = x_ptr + row.to(tl.int64)[:, None] * sxs + d[None, :]
        x = tl.load(at, mask=(row < size)[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, DP]
        total += tl.sum(x.to(tl.float32), 0)
    count = tl.where(size < n, last, n)
    if size < n:
        x = tl.load(x_ptr + (size - 1).to(tl.int64) * sxs + d, mask=d < D, other=0.0)
        total += (last - size) * x.to(tl.float32)
    out_ptr += batch * sob + head * soh + group.to(tl.int64) * sos
    tl.store(out_ptr + d, (total / count).to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _means_kernel(
    k_ptr, v_ptr, pk_ptr, pv_ptr, skb, skh, sks, svb, svh, svs, spb, sph, sps, n, tokens, last,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One group of one head."""
    _mean(k_ptr, pk_ptr, skb, skh, sks, spb, sph, sps, n, tokens, last, D, DP, ROWS)
    _mean(v_ptr, pv_ptr, svb, svh, svs, spb, sph, sps, n, tokens, last, D, DP, ROWS)


@triton.jit
def _spread(g_ptr, out_ptr, sgb, sgh, sgs, sob, soh, sos, n, tokens, last, every, D: tl.constexpr, DP: tl.constexpr,
            ROWS: tl.constexpr):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = row // n
    size = tl.minimum(tokens - group * n, n)
    count = tl.where(size < n, last, n)
    # The last token stands for those that a short last group lacks, too.
    share = tl.where(row == tokens - 1, 1 + count - size, 1).to(tl.float32) / count.to(tl.float32)
    inside = (d < D)[None, :]
    at = g_ptr + batch * sgb + head * sgh + group.to(tl.int64)[:, None] * sgs + d[None, :]
    grad = tl.load(at, mask=(row < tokens)[:, None] & inside, other=0.0).to(tl.float32)  # [ROWS, DP]
    at = out_ptr + batch * sob + head * soh + row.to(tl.int64)[:, None] * sos + d[None, :]
    tl.store(at, (grad * share[:, None]).to(out_ptr.dtype.element_ty), mask=(row < every)[:, None] & inside)


@triton.jit
def _spread_kernel(
    dpk_ptr, dpv_ptr, dk_ptr, dv_ptr, spkb, spkh, spks, spvb, spvh, spvs, skb, skh, sks, svb, svh, svs, n, tokens,
    last, every, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of some tokens of one head; tokens that no group has get zeros."""
    _spread(dpk_ptr, dk_ptr, spkb, spkh, spks, skb, skh, sks, n, tokens, last, every, D, DP, ROWS)
    _spread(dpv_ptr, dv_ptr, spvb, spvh, spvs, svb, svh, svs, n, tokens, last, every, D, DP, ROWS)


def group_means_triton(
    k: Tensor, v: Tensor, n: int, tokens: int, last: int, *, key: Hashable | None = None, notes: Notes | None = None
) -> tuple[Tensor, Tensor]:
    """See ``group_means``; channels of k and v lie side by side. ``key`` and ``notes`` are for ``launch``."""
    batch, heads, _, dim = k.shape
    groups = triton.cdiv(tokens, n)
    pk, pv = (torch.empty((batch, heads, groups, dim), dtype=k.dtype, device=k.device) for _ in range(2))
    if notes is not None:
        notes.made(pk)
        notes.made(pv)

    def build(k, v, pk, pv):
        args = (k, v, pk, pv, *k.stride()[:3], *v.stride()[:3], *pk.stride()[:3], n, tokens, last)
        rows = min(triton.next_power_of_2(min(n, tokens)), _ROWS)
        return (groups, heads, batch), args, dict(D=dim, DP=triton.next_power_of_2(dim), ROWS=rows, num_warps=4)

    launch(_means_kernel, key, (k, v, pk, pv), build, notes)
    return pk, pv


def group_means_backward_triton(
    dpk: Tensor, dpv: Tensor, k: Tensor, v: Tensor, n: int, tokens: int, last: int, *, key: Hashable | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, in their strides, of which nothing else is read."""
    batch, heads, every, dim = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)

    def build(dpk, dpv, dk, dv):
        strides = [x for tensor in (dpk, dpv, dk, dv) for x in tensor.stride()[:3]]
        named = dict(D=dim, DP=triton.next_power_of_2(dim), ROWS=_ROWS, num_warps=4)
        return (triton.cdiv(every, _ROWS), heads, batch), (dpk, dpv, dk, dv, *strides, n, tokens, last, every), named

    launch(_spread_kernel, key, (dpk, dpv, dk, dv), build)
    return dk, dv
