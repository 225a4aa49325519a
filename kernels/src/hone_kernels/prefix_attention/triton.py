"""Attention over prefixes in Triton: a block of rows reads keys to the end of its last row, and no further."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.checks import unit_last

__all__ = ["prefix_backward", "prefix_forward"]

LOG2E = math.log2(math.e)


@triton.jit
def _weights(
    q, k, ends, m, n, WORDS, batch, conditions, scale, lse, tokens, BACK: tl.constexpr
):  # fmt: skip
    """Logits ``[M, N]``, minus infinity where a key is not read; if ``BACK``, weights, whose sum is known."""
    seen = (n[None, :] < ends[:, None]) & (n < tokens)[None, :]
    if WORDS is not None:
        word = tl.load(WORDS + batch * conditions + n, mask=n < conditions, other=True)
        seen = seen & (word[None, :] | (n[None, :] == m[:, None]))
    logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
    if BACK:
        logits = tl.exp2(logits - lse[:, None])
    return logits


@triton.jit
def _rows(SOURCE, at, tokens, d, stride, DIM: tl.constexpr):
    return tl.load(
        SOURCE + at.to(tl.int64)[:, None] * stride + d[None, :],
        mask=(at < tokens)[:, None] & (d < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _forward_kernel(
    Q, K, V, ENDS, WORDS, OUT, LSE, scale, tokens, heads, conditions, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED)
    ends = tl.load(ENDS + m, mask=m < tokens, other=0)
    q = _rows(Q + batch * q_batch + head * q_head, m, tokens, d, q_row, DIM)
    keys = K + batch * k_batch + head // GROUPS * k_head
    values = V + batch * v_batch + head // GROUPS * v_head
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in range(0, tl.max(ends, 0), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _rows(keys, n, tokens, d, k_row, DIM)
        v = _rows(values, n, tokens, d, v_row, DIM)
        logits = _weights(q, k, ends, m, n, WORDS, batch, conditions, scale, top, tokens, False)
        higher = tl.maximum(top, tl.max(logits, 1))
        # A row that has read nothing yet has no highest logit.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    line = (batch * heads + head) * tokens + m
    # Rows of the tile that are none have read nothing.
    total = tl.where(m < tokens, total, 1.0)
    out = sums / total[:, None]
    tl.store(OUT + line[:, None] * DIM + d[None, :], out, mask=(m < tokens)[:, None] & (d < DIM)[None, :])
    tl.store(LSE + line, top + tl.log2(total), mask=m < tokens)


@triton.jit
def _queries_kernel(
    Q, K, V, ENDS, WORDS, OUT, LSE, GRAD, DELTA, DQ, scale, tokens, heads, conditions, q_batch, q_head, q_row, k_batch,
    k_head, k_row, v_batch, v_head, v_row, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED)
    ends = tl.load(ENDS + m, mask=m < tokens, other=0)
    q = _rows(Q + batch * q_batch + head * q_head, m, tokens, d, q_row, DIM)
    of_head = (batch * heads + head) * tokens
    grad = _rows(GRAD + of_head * DIM, m, tokens, d, DIM, DIM)
    out = _rows(OUT + of_head * DIM, m, tokens, d, DIM, DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + of_head + m, delta, mask=m < tokens)
    lse = tl.load(LSE + of_head + m, mask=m < tokens, other=0.0)
    keys = K + batch * k_batch + head // GROUPS * k_head
    values = V + batch * v_batch + head // GROUPS * v_head
    sums = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in range(0, tl.max(ends, 0), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _rows(keys, n, tokens, d, k_row, DIM)
        v = _rows(values, n, tokens, d, v_row, DIM)
        weights = _weights(q, k, ends, m, n, WORDS, batch, conditions, scale, lse, tokens, True)
        change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        sums += tl.dot(change.to(k.dtype), k, input_precision="ieee")
    # The scale of the logits is in base 2.
    place = (of_head + m)[:, None] * DIM + d[None, :]
    tl.store(DQ + place, sums * (scale / 1.4426950408889634), mask=(m < tokens)[:, None] & (d < DIM)[None, :])


@triton.jit
def _keys_kernel(
    Q, K, V, ENDS, WORDS, FIRST, LSE, GRAD, DELTA, DK, DV, scale, tokens, heads, conditions, q_batch, q_head, q_row,
    k_batch, k_head, k_row, v_batch, v_head, v_row, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head_k = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, PADDED)
    k = _rows(K + batch * k_batch + head_k * k_head, n, tokens, d, k_row, DIM)
    v = _rows(V + batch * v_batch + head_k * v_head, n, tokens, d, v_row, DIM)
    dk = tl.zeros([BLOCK_N, PADDED], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED], tl.float32)
    # Rows before this one end before the block's first key.
    first = tl.load(FIRST + tl.program_id(0)) // BLOCK_M * BLOCK_M
    for group in range(GROUPS):
        head = head_k * GROUPS + group
        of_head = (batch * heads + head) * tokens
        queries = Q + batch * q_batch + head * q_head
        for start in range(first, tokens, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            ends = tl.load(ENDS + m, mask=m < tokens, other=0)
            q = _rows(queries, m, tokens, d, q_row, DIM)
            grad = _rows(GRAD + of_head * DIM, m, tokens, d, DIM, DIM)
            lse = tl.load(LSE + of_head + m, mask=m < tokens, other=0.0)
            delta = tl.load(DELTA + of_head + m, mask=m < tokens, other=0.0)
            weights = _weights(q, k, ends, m, n, WORDS, batch, conditions, scale, lse, tokens, True)
            dv += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
            change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            dk += tl.dot(tl.trans(change.to(q.dtype)), q, input_precision="ieee")
    heads_k = heads // GROUPS
    place = ((batch * heads_k + head_k) * tokens + n)[:, None] * DIM + d[None, :]
    inside = (n < tokens)[:, None] & (d < DIM)[None, :]
    tl.store(DK + place, dk * (scale / 1.4426950408889634), mask=inside)
    tl.store(DV + place, dv, mask=inside)


def _shared(q: Tensor, k: Tensor, v: Tensor, words: Tensor | None) -> tuple[list[Any], dict[str, int]]:
    """Sizes and strides that every kernel takes, and its constants."""
    heads, tokens, dim = q.shape[1:]
    sizes = [tokens, heads, 0 if words is None else words.shape[1]]
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    padded = max(16, triton.next_power_of_2(dim))
    block = 64 if q.element_size() == 2 and padded <= 128 else 32
    constants = {"GROUPS": heads // k.shape[1], "DIM": dim, "PADDED": padded, "BLOCK_M": block, "BLOCK_N": block}
    return sizes + strides, constants


def prefix_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, words: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``prefix_attention``; also the logarithm (base 2) of each row's sum, ``[B, H, S]``."""
    q, k, v = (unit_last(x) for x in (q, k, v))
    words = None if words is None else words.contiguous()
    shared, constants = _shared(q, k, v, words)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(q.shape[2], constants["BLOCK_M"]), q.shape[1], q.shape[0])
    _forward_kernel[grid](
        q, k, v, ends.contiguous(), words, out, lse, scale * LOG2E, *shared, **constants, num_warps=4, num_stages=2
    )
    return out, lse


def prefix_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    words: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    q, k, v = (unit_last(x) for x in (q, k, v))
    words, ends, grad = None if words is None else words.contiguous(), ends.contiguous(), grad.contiguous()
    shared, constants = _shared(q, k, v, words)
    tokens, block = q.shape[2], constants["BLOCK_N"]
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _queries_kernel[(triton.cdiv(tokens, block), q.shape[1], q.shape[0])](
        q, k, v, ends, words, out, lse, grad, delta, dq, scale * LOG2E, *shared, **constants, num_warps=4, num_stages=2
    )
    begins = torch.arange(0, tokens, block, dtype=torch.int32, device=q.device)
    first = torch.searchsorted(ends, begins, right=True, out_int32=True)
    # Two sums of 64 x 128 spill in four warps, by newer Triton.
    _keys_kernel[(len(begins), k.shape[1], q.shape[0])](
        q, k, v, ends, words, first, lse, grad, delta, dk, dv, scale * LOG2E, *shared, **constants,
        num_warps=4 if constants["PADDED"] < 128 else 8, num_stages=2,
    )  # fmt: skip
    return dq, dk, dv
