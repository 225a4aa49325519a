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
"""Tokens of a program of the backward."""

_VALUES = 1024
"""Channels of groups that a program of the forward holds: 16 bytes for each thread of four warps."""


@triton.jit
def _row(x_ptr, token, stride, inside):
    return tl.load(x_ptr + token[:, None] * stride, mask=inside, other=0.0)


@triton.jit
def _means_kernel(
    k_ptr, v_ptr, pk_ptr, pv_ptr, skb, skh, sks, svb, svh, svs, spb, sph, sps, n, tokens, last, longest,
    D: tl.constexpr, DP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Some groups of one head. A thread has its channels of a group alone, so that nothing is summed across threads."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    first = group.to(tl.int64) * n
    size = tl.minimum(tl.maximum(tokens - first, 0), n).to(tl.int32)  # none beyond the last group
    k_ptr += batch * skb + head * skh + d[None, :]
    v_ptr += batch * svb + head * svh + d[None, :]
    inside = (size > 0)[:, None] & (d < D)[None, :]
    k = tl.zeros([GROUPS, DP], tl.float32)
    v = tl.zeros([GROUPS, DP], tl.float32)
    for row in range(0, longest, 4):  # eight loads are on their way together
        at = first + row
        some = size[:, None] - row
        k0, v0 = _row(k_ptr, at, sks, (some > 0) & inside), _row(v_ptr, at, svs, (some > 0) & inside)
        k1, v1 = _row(k_ptr, at + 1, sks, (some > 1) & inside), _row(v_ptr, at + 1, svs, (some > 1) & inside)
        k2, v2 = _row(k_ptr, at + 2, sks, (some > 2) & inside), _row(v_ptr, at + 2, svs, (some > 2) & inside)
        k3, v3 = _row(k_ptr, at + 3, sks, (some > 3) & inside), _row(v_ptr, at + 3, svs, (some > 3) & inside)
        k += (k0.to(tl.float32) + k1.to(tl.float32)) + (k2.to(tl.float32) + k3.to(tl.float32))
        v += (v0.to(tl.float32) + v1.to(tl.float32)) + (v2.to(tl.float32) + v3.to(tl.float32))
    # The last token stands for those that a short last group lacks, too.
    short = (size < n)[:, None] & inside
    lacks = tl.where(size < n, last - size, 0)[:, None]
    k += lacks * _row(k_ptr, first + size - 1, sks, short).to(tl.float32)
    v += lacks * _row(v_ptr, first + size - 1, svs, short).to(tl.float32)
    count = tl.where(size < n, last, n)[:, None]
    at = batch * spb + head * sph + group.to(tl.int64)[:, None] * sps + d[None, :]
    tl.store(pk_ptr + at, (k / count).to(pk_ptr.dtype.element_ty), mask=inside)
    tl.store(pv_ptr + at, (v / count).to(pv_ptr.dtype.element_ty), mask=inside)


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
        args = (k, v, pk, pv, *k.stride()[:3], *v.stride()[:3], *pk.stride()[:3], n, tokens, last, min(n, tokens))
        padded = triton.next_power_of_2(dim)
        some = max(1, _VALUES // padded)
        named = dict(D=dim, DP=padded, GROUPS=some, num_warps=4)
        return (triton.cdiv(groups, some), heads, batch), args, named

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
