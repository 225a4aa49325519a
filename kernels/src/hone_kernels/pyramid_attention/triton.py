"""Attention over a pyramid of keys in Triton: pooling, lists, forward and backward. Portable, and interpretable.

Level ``l`` holds means of ``2 ** l`` consecutive keys, so a block has ``BLOCK >> l`` of them. Level 0 is k and v
themselves; the others lie behind each other in one tensor each, ``W * (BLOCK - BLOCK / 2 ** (l - 1))`` rows from its
start, where W is how many blocks are whole.

A row's list names the blocks that it reads at level 0, then those of level 1, and so on. The keys of one level are
walked as one sequence in tiles of ``BN``, so a tile may gather keys of several blocks and only the last of a level is
not full; its missing keys are copies of the last block's that get no weight. That a key weighs as ``2 ** l`` is, in
base 2, ``l`` on its logit: the running maximum is held relative to the level instead, which costs nothing.

Gradients of keys go by columns: one launch a level, coarse ones first, whose tile is (part of) one block. Tiles of
fewer than 64 keys are the narrow side of every product, so that the matrix units still get 64 rows. The launch of level
0 adds each key's share of the gradients of its means. Where another kernel has made the gradients of level 0, those of
the other levels are added to them, and the shares in a launch of their own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.attention.triton import (
    FIXED_ZEROS,
    LN2,
    LOG2E,
    Tiles,
    _bhs,
    _describable,
    _describe,
    _dq_step,
    _precision,
    _rows_kernel,
    _sm,
    _softmax_step,
    _tile,
    tiles_for,
)
from hone_kernels.launch import geometry, launch, number

__all__ = ["LEVELS", "attention_backward", "attention_forward", "lists", "pool"]

LEVELS = tl.constexpr(4)


@triton.jit
def _lists_kernel(
    factors_ptr, num_ptr, tiles_ptr, idx_ptr, sfb, sfh, sfi, sfj, heads, rows, count, whole, width, total,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The list of one row: how many blocks of each level, how many full tiles they need, and which blocks."""
    row = tl.program_id(0)
    batch, head, i = row // (heads * rows), row // rows % heads, row % rows
    at = tl.arange(0, WIDE)
    factors_ptr += batch.to(tl.int64) * sfb + head.to(tl.int64) * sfh + i.to(tl.int64) * sfi
    factor = tl.load(factors_ptr + at.to(tl.int64) * sfj, mask=at < count, other=0)
    begin = 0
    tiles = 0
    for level in tl.static_range(LEVELS):
        member = ((factor == 1 << level) & ((at < whole) | (level == 0))).to(tl.int32)
        num = tl.sum(member, 0)
        place = begin + tl.cumsum(member, 0) - 1
        tl.store(idx_ptr + row.to(tl.int64) * width + place, at, mask=member > 0)
        tl.store(num_ptr + row * LEVELS + level, num)
        begin += num
        tiles += (num + (1 << level) - 1) // (1 << level)
        if level == 0:
            tl.store(tiles_ptr + row, num)
    tl.store(tiles_ptr + total + row, tiles)


@triton.jit
def _mean(out_ptr, a, b, place, phase, whole, stride, DIM: tl.constexpr, DIM_PAD: tl.constexpr, LEVEL: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Means of keys of one level, stored as every ``8 >> LEVEL``-th of a block from ``phase`` on."""
    SIZE: tl.constexpr = BLOCK >> LEVEL
    x = (a + b) * 0.5
    row = whole * (BLOCK - 2 * SIZE) + place * (8 >> LEVEL) + phase
    dim = tl.arange(0, DIM_PAD)
    ptrs = out_ptr + row.to(tl.int64)[:, None] * stride + dim[None, :]
    tl.store(ptrs, x.to(out_ptr.dtype.element_ty), mask=(dim < DIM)[None, :])
    return x


@triton.jit
def _every_eighth(ptr, place, phase, stride, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    row = (place * 8 + phase).to(tl.int64)
    dim = tl.arange(0, DIM_PAD)
    return tl.load(ptr + row[:, None] * stride + dim[None, :], mask=(dim < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _pool(x_ptr, out_ptr, batch, head, sxb, sxh, sxs, sob, soh, sos, whole, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Means of one block of keys or values at every level above 0, of which no two threads share any."""
    # Of groups of 8 keys.
    place = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    x_ptr += batch.to(tl.int64) * sxb + head.to(tl.int64) * sxh
    out_ptr += batch.to(tl.int64) * sob + head.to(tl.int64) * soh
    x0 = _every_eighth(x_ptr, place, 0, sxs, DIM, DIM_PAD)
    x1 = _every_eighth(x_ptr, place, 1, sxs, DIM, DIM_PAD)
    x2 = _every_eighth(x_ptr, place, 2, sxs, DIM, DIM_PAD)
    x3 = _every_eighth(x_ptr, place, 3, sxs, DIM, DIM_PAD)
    x4 = _every_eighth(x_ptr, place, 4, sxs, DIM, DIM_PAD)
    x5 = _every_eighth(x_ptr, place, 5, sxs, DIM, DIM_PAD)
    x6 = _every_eighth(x_ptr, place, 6, sxs, DIM, DIM_PAD)
    x7 = _every_eighth(x_ptr, place, 7, sxs, DIM, DIM_PAD)
    x0 = _mean(out_ptr, x0, x1, place, 0, whole, sos, DIM, DIM_PAD, 1, BLOCK)
    x2 = _mean(out_ptr, x2, x3, place, 1, whole, sos, DIM, DIM_PAD, 1, BLOCK)
    x4 = _mean(out_ptr, x4, x5, place, 2, whole, sos, DIM, DIM_PAD, 1, BLOCK)
    x6 = _mean(out_ptr, x6, x7, place, 3, whole, sos, DIM, DIM_PAD, 1, BLOCK)
    x0 = _mean(out_ptr, x0, x2, place, 0, whole, sos, DIM, DIM_PAD, 2, BLOCK)
    x4 = _mean(out_ptr, x4, x6, place, 1, whole, sos, DIM, DIM_PAD, 2, BLOCK)
    _mean(out_ptr, x0, x4, place, 0, whole, sos, DIM, DIM_PAD, 3, BLOCK)


@triton.jit
def _pool_kernel(
    k_ptr, v_ptr, pk_ptr, pv_ptr, skb, skh, sks, svb, svh, svs, spkb, spkh, spks, spvb, spvh, spvs, whole,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    batch = tl.program_id(2)
    _pool(k_ptr, pk_ptr, batch, head, skb, skh, sks, spkb, spkh, spks, whole, DIM, DIM_PAD, BLOCK)
    _pool(v_ptr, pv_ptr, batch, head, svb, svh, svs, spvb, spvh, spvs, whole, DIM, DIM_PAD, BLOCK)


@triton.jit
def _listed(source, ptr, batch, head, stride_b, stride_h, stride_s, list_ptr, num, start, offset, tokens,
            LEVEL: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
            DESC: tl.constexpr):  # fmt: skip
    """Keys ``start`` to ``start + ROWS`` of the sequence that a level's listed blocks of ``SIZE`` keys make."""
    if SIZE >= ROWS:
        first = offset + tl.load(list_ptr + start // SIZE) * SIZE + start % SIZE
        return _tile(source, batch, head, first, stride_b, stride_h, stride_s, tokens, ROWS, DIM, DIM_PAD, LEVEL == 0,
                     DESC)  # fmt: skip
    else:
        at = start + tl.arange(0, ROWS)
        dim = tl.arange(0, DIM_PAD)
        block = tl.load(list_ptr + tl.minimum(at // SIZE, num - 1))
        row = (offset + block * SIZE + at % SIZE).to(tl.int64)
        ptrs = (
            ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row[:, None] * stride_s + dim[None, :]
        )
        if DIM != DIM_PAD:
            return tl.load(ptrs, mask=(dim < DIM)[None, :], other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def _level_of(num_ptr, list_ptr, whole, tokens_k, LEVEL: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Blocks of a row at one level, where this level begins, how many keys make full tiles, and how many there are."""
    SIZE: tl.constexpr = BLOCK >> LEVEL
    num = tl.load(num_ptr + LEVEL)
    count = num * SIZE
    full = count
    if LEVEL == 0:
        # Only the last listed block can be the ragged one: lists ascend.
        last = tl.load(list_ptr + tl.maximum(num - 1, 0), mask=num > 0, other=0)
        full -= tl.where((num > 0) & (last >= whole), BLOCK, 0)
        return num, 0, full, count
    else:
        if SIZE < BN:
            full -= count % BN
        return num, whole * (BLOCK - 2 * SIZE), full, count


@triton.jit
def _forward_steps(
    acc, total, top, q, k_src, v_src, k_ptr, v_ptr, list_ptr, num, begin, end, offset, tokens, batch, head, skb, skh,
    sks, svb, svh, svs, scale, LEVEL: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys ``begin`` to ``end`` of a row's keys of one level into its running softmax."""
    bias = tl.zeros([BN], tl.float32)
    for start in tl.range(begin, end, BN, num_stages=1 if MASKED else STAGES):
        k = _listed(k_src, k_ptr, batch, head, skb, skh, sks, list_ptr, num, start, offset, tokens, LEVEL, SIZE, BN,
                    DIM, DIM_PAD, DESC)  # fmt: skip
        v = _listed(v_src, v_ptr, batch, head, svb, svh, svs, list_ptr, num, start, offset, tokens, LEVEL, SIZE, BN,
                    DIM, DIM_PAD, DESC)  # fmt: skip
        valid = end - start
        if LEVEL == 0 and MASKED:
            valid = tokens - tl.load(list_ptr + start // SIZE) * SIZE - start % SIZE
        acc, total, top = _softmax_step(acc, total, top, q, k, v, bias, valid, scale, MASKED, False, PRECISION)
    return acc, total, top


@triton.jit
def _forward_kernel(
    q_src, k_src, v_src, pk_src, pv_src, pk_ptr, pv_ptr, out_ptr, lse_ptr, num_ptr, idx_ptr,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, spkb, spkh, spks, spvb, spvh, spvs, sob, soh, sos,
    rows, width, tokens_q, tokens_k, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    head_k = head // GROUP
    start_q = tile * BM
    row = (batch.to(tl.int64) * tl.num_programs(1) + head) * rows + start_q // BLOCK
    num_ptr += row * LEVELS
    list_ptr = idx_ptr + row * width
    whole = tokens_k // BLOCK
    q = _tile(q_src, batch, head, start_q, sqb, sqh, sqs, tokens_q, BM, DIM, DIM_PAD, True, DESC)
    acc = tl.zeros([BM, DIM_PAD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)

    num, offset, full, count = _level_of(num_ptr, list_ptr, whole, tokens_k, 0, BLOCK, BN)
    acc, total, top = _forward_steps(
        acc, total, top, q, k_src, v_src, None, None, list_ptr, num, 0, full, offset, tokens_k, batch, head_k,
        skb, skh, sks, svb, svh, svs, scale, 0, BLOCK, BN, False, DIM, DIM_PAD, PRECISION, DESC, STAGES,
    )  # fmt: skip
    if TAIL:
        acc, total, top = _forward_steps(
            acc, total, top, q, k_src, v_src, None, None, list_ptr, num, full, count, offset, tokens_k, batch, head_k,
            skb, skh, sks, svb, svh, svs, scale, 0, BLOCK, BN, True, DIM, DIM_PAD, PRECISION, DESC, STAGES,
        )  # fmt: skip
    for level in tl.static_range(1, LEVELS):
        list_ptr += num
        top -= 1.0  # of what is to be added to the level
        num, offset, full, count = _level_of(num_ptr, list_ptr, whole, tokens_k, level, BLOCK, BN)
        acc, total, top = _forward_steps(
            acc, total, top, q, pk_src, pv_src, pk_ptr, pv_ptr, list_ptr, num, 0, full, offset, 0, batch, head_k,
            spkb, spkh, spks, spvb, spvh, spvs, scale, level, BLOCK >> level, BN, False, DIM, DIM_PAD, PRECISION, DESC,
            STAGES,
        )  # fmt: skip
        if BLOCK >> level < BN:
            acc, total, top = _forward_steps(
                acc, total, top, q, pk_src, pv_src, pk_ptr, pv_ptr, list_ptr, num, full, count, offset, 0, batch,
                head_k, spkb, spkh, spks, spvb, spvh, spvs, scale, level, BLOCK >> level, BN, True, DIM, DIM_PAD,
                PRECISION, DESC, STAGES,
            )  # fmt: skip
    top += LEVELS - 1.0

    at = start_q + tl.arange(0, BM)
    some = total != 0  # so that NaN stays NaN
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    lse = tl.where(some, top * LN2 + tl.log(total), -float("inf"))
    tl.store(lse_ptr + (batch.to(tl.int64) * tl.num_programs(1) + head) * tokens_q + at, lse, mask=at < tokens_q)
    dim = tl.arange(0, DIM_PAD)
    out_ptr += batch.to(tl.int64) * sob + head.to(tl.int64) * soh + start_q.to(tl.int64) * sos
    ptrs = out_ptr + tl.arange(0, BM)[:, None] * sos + dim[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=(at < tokens_q)[:, None] & (dim < DIM)[None, :])


@triton.jit
def _dq_steps(
    dq, q, dout, log2, delta, k_src, v_src, k_ptr, v_ptr, list_ptr, num, begin, end, offset, tokens, batch, head, skb,
    skh, sks, svb, svh, svs, scale, LEVEL: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What keys ``begin`` to ``end`` of a row's keys of one level add to the gradient of its queries."""
    bias = tl.zeros([BN], tl.float32)
    for start in tl.range(begin, end, BN, num_stages=1 if MASKED else STAGES):
        k = _listed(k_src, k_ptr, batch, head, skb, skh, sks, list_ptr, num, start, offset, tokens, LEVEL, SIZE, BN,
                    DIM, DIM_PAD, DESC)  # fmt: skip
        v = _listed(v_src, v_ptr, batch, head, svb, svh, svs, list_ptr, num, start, offset, tokens, LEVEL, SIZE, BN,
                    DIM, DIM_PAD, DESC)  # fmt: skip
        valid = end - start
        if LEVEL == 0 and MASKED:
            valid = tokens - tl.load(list_ptr + start // SIZE) * SIZE - start % SIZE
        dq = _dq_step(dq, q, dout, log2 - LEVEL, delta, k, v, bias, valid, scale, MASKED, False, PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q_src, k_src, v_src, pk_src, pv_src, pk_ptr, pv_ptr, dout_src, log2_ptr, delta_ptr, dq_ptr, num_ptr, idx_ptr,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, spkb, spkh, spks, spvb, spvh, spvs, sdb, sdh, sds, sob, soh, sos,
    rows, width, tokens_q, tokens_k, padded, scale, logit_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
    ABOVE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries: of all levels, or (ABOVE) of those above 0 on top of what is there."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    head_k = head // GROUP
    start_q = tile * BM
    head_row = batch.to(tl.int64) * tl.num_programs(1) + head
    row = head_row * rows + start_q // BLOCK
    num_ptr += row * LEVELS
    list_ptr = idx_ptr + row * width
    whole = tokens_k // BLOCK
    q = _tile(q_src, batch, head, start_q, sqb, sqh, sqs, tokens_q, BM, DIM, DIM_PAD, True, DESC)
    dout = _tile(dout_src, batch, head, start_q, sdb, sdh, sds, tokens_q, BM, DIM, DIM_PAD, True, DESC)
    log2 = tl.load(log2_ptr + head_row * padded + start_q + tl.arange(0, BM))
    delta = tl.load(delta_ptr + head_row * padded + start_q + tl.arange(0, BM))
    dq = tl.zeros([BM, DIM_PAD], tl.float32)

    num, offset, full, count = _level_of(num_ptr, list_ptr, whole, tokens_k, 0, BLOCK, BN)
    if not ABOVE:
        dq = _dq_steps(
            dq, q, dout, log2, delta, k_src, v_src, None, None, list_ptr, num, 0, full, offset, tokens_k, batch, head_k,
            skb, skh, sks, svb, svh, svs, scale, 0, BLOCK, BN, False, DIM, DIM_PAD, PRECISION, DESC, STAGES,
        )  # fmt: skip
        if TAIL:
            dq = _dq_steps(
                dq, q, dout, log2, delta, k_src, v_src, None, None, list_ptr, num, full, count, offset, tokens_k, batch,
                head_k, skb, skh, sks, svb, svh, svs, scale, 0, BLOCK, BN, True, DIM, DIM_PAD, PRECISION, DESC, STAGES,
            )  # fmt: skip
    for level in tl.static_range(1, LEVELS):
        list_ptr += num
        num, offset, full, count = _level_of(num_ptr, list_ptr, whole, tokens_k, level, BLOCK, BN)
        dq = _dq_steps(
            dq, q, dout, log2, delta, pk_src, pv_src, pk_ptr, pv_ptr, list_ptr, num, 0, full, offset, 0, batch, head_k,
            spkb, spkh, spks, spvb, spvh, spvs, scale, level, BLOCK >> level, BN, False, DIM, DIM_PAD, PRECISION, DESC,
            STAGES,
        )  # fmt: skip
        if BLOCK >> level < BN:
            dq = _dq_steps(
                dq, q, dout, log2, delta, pk_src, pv_src, pk_ptr, pv_ptr, list_ptr, num, full, count, offset, 0, batch,
                head_k, spkb, spkh, spks, spvb, spvh, spvs, scale, level, BLOCK >> level, BN, True, DIM, DIM_PAD,
                PRECISION, DESC, STAGES,
            )  # fmt: skip

    at = start_q + tl.arange(0, BM)
    dim = tl.arange(0, DIM_PAD)
    dq_ptr += batch.to(tl.int64) * sob + head.to(tl.int64) * soh + start_q.to(tl.int64) * sos
    ptrs = dq_ptr + tl.arange(0, BM)[:, None] * sos + dim[None, :]
    keep = (at < tokens_q)[:, None] & (dim < DIM)[None, :]
    dq *= logit_scale
    if ABOVE:
        dq += tl.load(ptrs, mask=keep, other=0.0).to(tl.float32)
    tl.store(ptrs, dq.to(dq_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _add_shares(x, x_ptr, batch, head, stride_b, stride_h, stride_s, start, whole, BLOCK: tl.constexpr,
                ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):  # fmt: skip
    """``x``, and what gradients of their means at all levels say of keys ``start`` to ``start + ROWS``."""
    at = start + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PAD)
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    keep = (at < whole * BLOCK)[:, None] & (dim < DIM)[None, :]
    for level in tl.static_range(1, LEVELS):
        row = whole * (BLOCK - 2 * (BLOCK >> level)) + at // (1 << level)
        ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_s + dim[None, :]
        x += tl.load(ptrs, mask=keep, other=0.0).to(tl.float32) * (1.0 / (1 << level))
    return x


@triton.jit
def _dkv_kernel(
    q_src, k_src, v_src, dout_src, log2_ptr, delta_ptr, dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, num_ptr, idx_ptr,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sdb, sdh, sds, sdkb, sdkh, sdks, sdvb, sdvh, sdvs, spkb, spkh, spks,
    spvb, spvh, spvs,
    rows, width, tokens_q, tokens_k, whole, padded, scale, logit_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, LEVEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one level, over the query blocks that read it at this level.

    Keys and their gradients are those of level 0 or of all levels above it. ``NARROW``: keys are the columns.
    """
    SIZE: tl.constexpr = BLOCK >> LEVEL
    TILES: tl.constexpr = (SIZE + BN - 1) // BN
    SUB: tl.constexpr = BLOCK // BM
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_k = tl.program_id(1)
    batch = tl.program_id(2)
    block = tile // TILES
    at = tile % TILES * BN + tl.arange(0, BN)  # in the block
    start_k = block * SIZE + tile % TILES * BN
    if LEVEL > 0:
        start_k += whole * (BLOCK - 2 * SIZE)
    # A tile longer than its block reads into the next one, for nothing.
    k = _tile(k_src, batch, head_k, start_k, skb, skh, sks, tokens_k, BN, DIM, DIM_PAD, True, DESC)
    v = _tile(v_src, batch, head_k, start_k, svb, svh, svs, tokens_k, BN, DIM, DIM_PAD, True, DESC)
    if NARROW:
        dk = tl.zeros([DIM_PAD, BN], tl.float32)
        dv = tl.zeros([DIM_PAD, BN], tl.float32)
    else:
        dk = tl.zeros([BN, DIM_PAD], tl.float32)
        dv = tl.zeros([BN, DIM_PAD], tl.float32)
    if FIXED_ZEROS and DESC:
        dk = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [dk], tl.float32, is_pure=False, pack=1)
        dv = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [dv], tl.float32, is_pure=False, pack=1)

    for g in range(GROUP):
        head = head_k * GROUP + g
        head_row = batch.to(tl.int64) * (tl.num_programs(1) * GROUP) + head
        row = head_row * rows + block
        list_ptr = idx_ptr + row * width
        for level in tl.static_range(LEVEL):
            list_ptr += tl.load(num_ptr + row * LEVELS + level)
        count = tl.load(num_ptr + row * LEVELS + LEVEL) * SUB
        start = tl.load(list_ptr, mask=count > 0, other=0) * BLOCK
        for t in tl.range(0, count, num_stages=STAGES):
            q = _tile(q_src, batch, head, start, sqb, sqh, sqs, tokens_q, BM, DIM, DIM_PAD, True, DESC)
            dout = _tile(dout_src, batch, head, start, sdb, sdh, sds, tokens_q, BM, DIM, DIM_PAD, True, DESC)
            log2 = tl.load(log2_ptr + head_row * padded + start + tl.arange(0, BM)) - LEVEL
            if NARROW:
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BM, BN]
                p = tl.exp2(logits - log2[:, None])
                dv = tl.dot(tl.trans(dout), p.to(dout.dtype), dv, input_precision=PRECISION)
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                delta = tl.load(delta_ptr + head_row * padded + start + tl.arange(0, BM))
                ds = p * (dp - delta[:, None])
                dk = tl.dot(tl.trans(q), ds.to(q.dtype), dk, input_precision=PRECISION)
            else:
                logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [BN, BM]
                p = tl.exp2(logits - log2[None, :])
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                delta = tl.load(delta_ptr + head_row * padded + start + tl.arange(0, BM))
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            start = tl.load(list_ptr + (t + 1) // SUB, mask=t + 1 < count, other=0) * BLOCK + (t + 1) % SUB * BM

    if NARROW:
        dk = tl.trans(dk)
        dv = tl.trans(dv)
    dim = tl.arange(0, DIM_PAD)
    local = tl.arange(0, BN)[:, None]
    keep = ((at < SIZE) & (start_k + tl.arange(0, BN) < tokens_k))[:, None] & (dim < DIM)[None, :]
    if LEVEL == 0:
        dv = _add_shares(dv, dpv_ptr, batch, head_k, spvb, spvh, spvs, start_k, whole, BLOCK, BN, DIM, DIM_PAD)
    dv_ptr += batch.to(tl.int64) * sdvb + head_k.to(tl.int64) * sdvh + start_k.to(tl.int64) * sdvs
    tl.store(dv_ptr + local * sdvs + dim[None, :], dv.to(dv_ptr.dtype.element_ty), mask=keep)
    dk *= logit_scale
    if LEVEL == 0:
        dk = _add_shares(dk, dpk_ptr, batch, head_k, spkb, spkh, spks, start_k, whole, BLOCK, BN, DIM, DIM_PAD)
    dk_ptr += batch.to(tl.int64) * sdkb + head_k.to(tl.int64) * sdkh + start_k.to(tl.int64) * sdks
    tl.store(dk_ptr + local * sdks + dim[None, :], dk.to(dk_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _spread_kernel(
    dk_ptr, dv_ptr, dpk_ptr, dpv_ptr, sdkb, sdkh, sdks, sdvb, sdvh, sdvs, spkb, spkh, spks, spvb, spvh, spvs, whole,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds to gradients of keys and values of whole blocks what gradients of their means say of them."""
    start = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    dim = tl.arange(0, DIM_PAD)
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    keep = (row < whole * BLOCK)[:, None] & (dim < DIM)[None, :]
    at = dk_ptr + batch.to(tl.int64) * sdkb + head.to(tl.int64) * sdkh + row[:, None] * sdks + dim[None, :]
    x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    x = _add_shares(x, dpk_ptr, batch, head, spkb, spkh, spks, start, whole, BLOCK, ROWS, DIM, DIM_PAD)
    tl.store(at, x.to(dk_ptr.dtype.element_ty), mask=keep)
    at = dv_ptr + batch.to(tl.int64) * sdvb + head.to(tl.int64) * sdvh + row[:, None] * sdvs + dim[None, :]
    x = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    x = _add_shares(x, dpv_ptr, batch, head, spvb, spvh, spvs, start, whole, BLOCK, ROWS, DIM, DIM_PAD)
    tl.store(at, x.to(dv_ptr.dtype.element_ty), mask=keep)


def lists(factors: Tensor, whole: int, *, columns: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of blocks, level by level and ascending in each.

    Args:
        factors: int32 ``[B, H, NQ, NK]``: 1, 2, 4 or 8, 0 where a pair is skipped.
        whole: Key blocks that are not short: the others are read at level 0 or not at all.
        columns: The list of each key block instead: of the query blocks that read it.

    Returns:
        int32 ``[B, H, N, 4]`` blocks of each level, ``[2, B, H, N]`` tiles of 128 keys that level 0 and all of
        them fill, and ``[B, H, N, M]`` which blocks; what stands behind them is undefined.
    """
    batch, heads, rows, count = factors.shape
    strides = factors.stride()
    if columns:
        rows, count = count, rows
        strides = (*strides[:2], strides[3], strides[2])
    num = torch.empty((batch, heads, rows, LEVELS.value), dtype=torch.int32, device=factors.device)
    tiles = torch.empty((2, batch, heads, rows), dtype=torch.int32, device=factors.device)
    idx = torch.empty((batch, heads, rows, count), dtype=torch.int32, device=factors.device)
    if columns:
        whole = count
    facts = geometry(factors)
    key = facts and number((facts, whole, columns))

    def build(factors, num, tiles, idx):
        args = (factors, num, tiles, idx, *strides, heads, rows, count, whole, count, batch * heads * rows)
        return (batch * heads * rows,), args, dict(WIDE=triton.next_power_of_2(count), num_warps=4)

    launch(_lists_kernel, key, (factors, num, tiles, idx), build)
    return num, tiles, idx


def pool(k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Means of 2, 4 and 8 consecutive keys and values of all whole blocks, ``[B, HK, G, D]`` each.

    One level lies behind the other. Where no block is whole, one of zeros stands for them, which nobody reads.
    """
    batch, heads, tokens, dim = k.shape
    whole = tokens // block
    if not whole:
        return k.new_zeros((batch, heads, block, dim)), v.new_zeros((batch, heads, block, dim))
    rows = whole * (block - block // 2 ** (LEVELS.value - 1))
    pooled = (k.new_empty((batch, heads, rows, dim)), v.new_empty((batch, heads, rows, dim)))
    facts = geometry(k, v)
    key = facts and number((facts, block))

    def build(k, v, pooled_k, pooled_v):
        named = dict(DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=block)
        args = (k, v, pooled_k, pooled_v, *_bhs(k), *_bhs(v), *_bhs(pooled_k), *_bhs(pooled_v), whole)
        return (whole, heads, batch), args, dict(num_warps=4, **named)

    launch(_pool_kernel, key, (k, v, *pooled), build)
    return pooled


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    num: Tensor,
    idx: Tensor,
    block: int,
    scale: float,
    *,
    key: Hashable | None = None,
) -> tuple[Tensor, Tensor]:
    """Output in q's strides and natural log-sum-exp ``[B, H, TQ]`` float32.

    Args:
        q: ``[B, H, TQ, D]``.
        k: ``[B, HK, TK, D]``.
        v: ``[B, HK, TK, D]``.
        pooled_k: What ``pool`` makes of k.
        pooled_v: What ``pool`` makes of v.
        num: Of ``lists``.
        idx: Of ``lists``.
        block: Tokens in a block.
        scale: Factor on the logits.
        key: For ``launch``, if it is known.
    """
    batch, heads, tokens_q, dim = q.shape
    if key is None:
        facts = geometry(q, k, v, pooled_k, pooled_v, num, idx)
        key = facts and number((facts, block, scale))
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q.device)

    def build(q, k, v, pooled_k, pooled_v, out, lse, num, idx):
        t = tiles_for("forward", q.dtype, dim, block, block, _sm(q))
        # Gathered tiles take registers for their addresses.
        t = replace(t, k=min(t.k, 64), registers=None)
        descriptors = t.descriptors and _describable(q, k, v, pooled_k, pooled_v)
        sources = [q, k, v, pooled_k, pooled_v]
        if descriptors:
            tall = (t.q, t.k, t.k, t.k, t.k)
            sources = [_describe(x, rows) for x, rows in zip(sources, tall, strict=True)]
        args = (
            *sources, pooled_k, pooled_v, out, lse, num, idx,
            *_bhs(q), *_bhs(k), *_bhs(v), *_bhs(pooled_k), *_bhs(pooled_v), *_bhs(out),
            num.shape[2], idx.shape[3], tokens_q, k.shape[2], scale * LOG2E.value,
        )  # fmt: skip
        named = dict(
            GROUP=heads // k.shape[1], DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, BM=t.q, BN=t.k,
            TAIL=k.shape[2] % block != 0, PRECISION=_precision(q), DESC=descriptors, STAGES=t.stages,
            num_warps=t.warps, num_stages=t.stages, maxnreg=t.registers,
        )  # fmt: skip
        return (triton.cdiv(tokens_q, t.q), heads, batch), args, named

    launch(_forward_kernel, key, (q, k, v, pooled_k, pooled_v, out, lse, num, idx), build)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    q_num: Tensor,
    q_idx: Tensor,
    block: int,
    scale: float,
    listed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in its strides. ``q_num`` and ``q_idx`` are lists of columns.

    ``listed`` are those of level 0 if they are there already, to which this adds what comes of the other levels.
    """
    batch, heads, tokens_q, dim = q.shape
    heads_k, tokens_k = k.shape[1:3]
    whole = tokens_k // block
    facts = geometry(dout, dlse, q, k, v, out, lse, num, idx, q_num, q_idx)
    key = facts and number((facts, block, scale))
    if listed is None:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    elif not whole:
        return listed
    else:
        dq, dk, dv = listed
    dpk, dpv = torch.empty_like(pooled_k), torch.empty_like(pooled_v)
    padded = -(-tokens_q // 128) * 128
    log2 = torch.empty((batch, heads, padded), dtype=torch.float32, device=q.device)
    delta = torch.empty_like(log2)
    shared: dict[str, Any] = dict(
        GROUP=heads // heads_k, DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, PRECISION=_precision(q),
    )  # fmt: skip

    def rows(out, dout, lse, dlse, log2, delta):
        count = 128 if dim <= 64 else 64
        args = (out, dout, lse, dlse, log2, delta, *_bhs(out), *_bhs(dout), tokens_q, padded)
        named = dict(DIM=dim, DIM_PAD=triton.next_power_of_2(dim), ROWS=count, num_warps=4)
        return (padded // count, heads, batch), args, named

    def query_gradient(q, k, v, pooled_k, pooled_v, dout, log2, delta, dq, num, idx):
        t = tiles_for("dq", q.dtype, dim, block, block, _sm(q))
        descriptors = t.descriptors and _describable(q, k, v, pooled_k, pooled_v, dout)
        sources = [q, k, v, pooled_k, pooled_v, dout]
        if descriptors:
            tall = (t.q, *[t.k] * 4, t.q)
            sources = [_describe(x, n) for x, n in zip(sources, tall, strict=True)]
        args = (
            *sources[:5], pooled_k, pooled_v, sources[5], log2, delta, dq, num, idx,
            *_bhs(q), *_bhs(k), *_bhs(v), *_bhs(pooled_k), *_bhs(pooled_v), *_bhs(dout), *_bhs(dq),
            num.shape[2], idx.shape[3], tokens_q, tokens_k, padded, scale * LOG2E.value, scale,
        )  # fmt: skip
        named = dict(
            BM=t.q, BN=t.k, TAIL=tokens_k % block != 0, DESC=descriptors, STAGES=t.stages, num_warps=t.warps,
            num_stages=t.stages, maxnreg=t.registers, ABOVE=listed is not None, **shared,
        )  # fmt: skip
        return (triton.cdiv(tokens_q, t.q), heads, batch), args, named

    def spread(dk, dv, dpk, dpv):
        rows = 32 if dim > 64 else 64
        args = (dk, dv, dpk, dpv, *_bhs(dk), *_bhs(dv), *_bhs(dpk), *_bhs(dpv), whole)
        named = dict(DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, ROWS=rows, num_warps=4)
        return (triton.cdiv(whole * block, rows), heads_k, batch), args, named

    def key_gradients(level: int):
        size = block >> level

        def build(q, keys, values, dout, log2, delta, dkeys, dvalues, dpk, dpv, q_num, q_idx):
            t = tiles_for("dkv", q.dtype, dim, block, block, _sm(q))
            narrow = size < min(t.k, 64)
            if narrow:
                t = narrow_tiles(t, max(size, 16))
            descriptors = t.descriptors and _describable(q, keys, values, dout)
            sources = [q, keys, values, dout]
            if descriptors:
                tall = (t.q, t.k, t.k, t.q)
                sources = [_describe(x, n) for x, n in zip(sources, tall, strict=True)]
            args = (
                *sources, log2, delta, dkeys, dvalues, dpk, dpv, q_num, q_idx,
                *_bhs(q), *_bhs(keys), *_bhs(values), *_bhs(dout), *_bhs(dkeys), *_bhs(dvalues), *_bhs(dpk),
                *_bhs(dpv),
                q_num.shape[2], q_idx.shape[3], tokens_q, keys.shape[2], whole, padded, scale * LOG2E.value, scale,
            )  # fmt: skip
            named = dict(
                LEVEL=level, BM=t.q, BN=t.k, NARROW=narrow, DESC=descriptors, STAGES=t.stages, num_warps=t.warps,
                num_stages=t.stages, maxnreg=t.registers, **shared,
            )  # fmt: skip
            blocks = whole if level else triton.cdiv(tokens_k, block)
            return (blocks * triton.cdiv(size, t.k), heads_k, batch), args, named

        return build

    launch(_rows_kernel, key, (out, dout, lse, dlse, log2, delta), rows)
    tensors = (q, k, v, pooled_k, pooled_v, dout, log2, delta, dq, num, idx)
    launch(_dq_kernel, key and (key, listed is None), tensors, query_gradient)
    coarse = (q, pooled_k, pooled_v, dout, log2, delta, dpk, dpv, dpk, dpv, q_num, q_idx)
    for level in range(LEVELS.value - 1, 0, -1) if whole else ():
        launch(_dkv_kernel, key and (key, level), coarse, key_gradients(level))
    if listed is None:
        fine = (q, k, v, dout, log2, delta, dk, dv, dpk, dpv, q_num, q_idx)
        launch(_dkv_kernel, key and (key, 0), fine, key_gradients(0))
    else:
        launch(_spread_kernel, key, (dk, dv, dpk, dpv), spread)
    return dq, dk, dv


def narrow_tiles(wide: Tiles, keys: int) -> Tiles:
    """The configuration of gradients of tiles of so few keys, from that of wide ones."""
    return replace(wide, k=keys, registers=None)
