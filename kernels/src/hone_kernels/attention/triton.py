"""Block-sparse attention in Triton: forward, dQ, dK/dV. Portable (sm80 and later), and runnable in the interpreter.

A program owns one tile of one head and walks its list of blocks. Keys that may not exist (the ragged tail, padded
blocks) are masked in a loop of their own, so that the steady loop carries no mask code; pooled keys come in a third
loop of the same online softmax. Rows with long lists are usually last (text behind video), so tiles are launched last
first.

On compute capability 9.0 and later the tiles come through tensor-memory descriptors, elsewhere through pointers.

Exponentials are base 2 inside (``LOG2E`` is folded into the scale); the log-sum-exp that leaves is natural.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hone_kernels.launch import Notes, geometry, launch, number

__all__ = ["Tiles", "attention_backward", "attention_forward", "tiles_for"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Triton 3.8 sets accumulators to zero on the edges around a loop, between its asynchronous products, and the assembler
# then waits after each product of the loop (its warning C7515). Zeros that the compiler cannot move stand before it.
# Triton 3.6 needs none, and what was measured is its code.
FIXED_ZEROS = tl.constexpr(not triton.__version__.startswith("3.6."))


@dataclass(frozen=True)
class Tiles:
    """A launch configuration.

    Attributes:
        q: Queries in a tile.
        k: Keys in a tile.
        warps: Of a program.
        stages: Depth of the software pipeline.
        descriptors: Load tiles of K and V (and dO) through tensor-memory descriptors.
        registers: Cap per thread, or None. A cap lets one more program share the multiprocessor.
        describe_q: With ``descriptors``, load the forward's Q tile that way too.
    """

    q: int
    k: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None
    describe_q: bool = True


# (kernel, bytes per element, padded head size) -> configuration on compute capability 9.0 and later, measured on an
# H200 by hone-kernels tune; below it the same tiles without descriptors and caps, see tiles_for. Small tiles win
# there: three programs of four warps on a multiprocessor hide each other's softmax, where two warpgroups of one do not.
# Float32 has no matrix unit: its tiles, not measured, are those whose operands fit in registers without spills.
TILES: dict[tuple[str, int, int], Tiles] = {
    ("forward", 2, 32): Tiles(64, 128, 4, 2, True),
    ("forward", 2, 64): Tiles(64, 128, 4, 2, True, registers=168, describe_q=False),
    ("forward", 2, 128): Tiles(64, 64, 4, 1, True, registers=128),
    ("forward", 4, 32): Tiles(64, 32, 4, 1),
    ("forward", 4, 64): Tiles(32, 32, 8, 1),
    ("forward", 4, 128): Tiles(32, 16, 8, 1),
    ("dq", 2, 32): Tiles(64, 64, 4, 2, True),
    ("dq", 2, 64): Tiles(64, 64, 4, 2, True),
    ("dq", 2, 128): Tiles(64, 64, 4, 2, True),
    ("dq", 4, 32): Tiles(64, 32, 4, 1),
    ("dq", 4, 64): Tiles(32, 32, 8, 1),
    ("dq", 4, 128): Tiles(32, 16, 8, 1),
    ("dkv", 2, 32): Tiles(64, 64, 4, 2, True),
    ("dkv", 2, 64): Tiles(64, 64, 4, 2, True, registers=168),
    ("dkv", 2, 128): Tiles(64, 64, 4, 2, True),
    ("dkv", 4, 32): Tiles(32, 64, 8, 1),
    ("dkv", 4, 64): Tiles(32, 32, 8, 1),
    ("dkv", 4, 128): Tiles(16, 32, 8, 1),
}


def tiles_for(kernel: str, dtype: torch.dtype, dim: int, block_q: int, block_k: int, sm: int) -> Tiles:
    """The configuration for these inputs: a tile never spans two blocks.

    Args:
        kernel: ``forward``, ``dq`` or ``dkv``.
        dtype: Of q, k and v.
        dim: Head size.
        block_q: Queries in a block.
        block_k: Keys in a block.
        sm: Compute capability times ten.
    """
    dim_pad = triton.next_power_of_2(dim)
    best = TILES[kernel, dtype.itemsize, dim_pad]
    hopper = sm >= 90 and dim == dim_pad
    # Fewer than 64 queries make no warpgroup product: operands then take registers, and at head size 128 too many.
    wide = hopper and (dim_pad < 128 or block_q >= 64 or kernel == "dkv")
    if not wide and dtype.itemsize == 2:
        # Addresses of pointer loads, and before 9.0 operands too, take the registers that wide tiles would need.
        narrow = 32 if dim_pad == 128 else 64
        if kernel == "dkv":
            best = replace(best, q=narrow, warps=8 if dim_pad == 128 else 4)
        else:
            best = replace(best, k=narrow)
    return replace(
        best,
        q=min(best.q, block_q),
        k=min(best.k, block_k),
        descriptors=best.descriptors and hopper,
        registers=best.registers if wide else None,
    )


@triton.jit
def _tile(source, batch, head, start, stride_b, stride_h, stride_s, tokens, ROWS: tl.constexpr, DIM: tl.constexpr,
          DIM_PAD: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr):  # fmt: skip
    """Rows ``start`` to ``start + ROWS`` of one head, ``[ROWS, DIM_PAD]``; rows past the end are zeros."""
    if DESC:
        return source.load([batch, head, start, 0]).reshape([ROWS, DIM_PAD])
    else:
        row = tl.arange(0, ROWS)
        dim = tl.arange(0, DIM_PAD)
        base = (
            source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(start, tl.int64) * stride_s
        )
        ptrs = base + row[:, None] * stride_s + dim[None, :]
        if MASKED:
            keep = (start + row < tokens)[:, None]
            if DIM != DIM_PAD:
                keep = keep & (dim < DIM)[None, :]
            return tl.load(ptrs, mask=keep, other=0.0)
        elif DIM != DIM_PAD:
            return tl.load(ptrs, mask=(dim < DIM)[None, :], other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def _listed(idx_ptr, t, end, BLOCK: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr):
    """First token of the ``t``-th tile of a list of blocks, each ``SUB`` tiles of ``ROWS`` tokens.

    Loops carry it from one iteration to the next: the loads that depend on it then get every pipeline stage.
    """
    return tl.load(idx_ptr + t // SUB, mask=t < end, other=0) * BLOCK + (t % SUB) * ROWS


@triton.jit
def _softmax_step(acc, total, top, q, k, v, bias, valid, scale, MASKED: tl.constexpr, BIASED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys into the running softmax. ``valid`` is how many of them exist (read only if MASKED)."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    if BIASED:
        logits = logits * scale + bias[None, :]
    if MASKED:
        logits = tl.where((tl.arange(0, k.shape[0]) < valid)[None, :], logits, -float("inf"))
    high = tl.max(logits, 1)
    if not BIASED:
        high = high * scale
    new = tl.maximum(top, high)
    shift = new
    if MASKED:
        # A row that has met no key yet would compute inf - inf.
        shift = tl.where(new == -float("inf"), 0.0, new)
    if BIASED:
        p = tl.exp2(logits - shift[:, None])
    else:
        p = tl.exp2(logits * scale - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new


@triton.jit
def _forward_kernel(
    q_src, k_src, v_src, pk_src, pv_src, bias_ptr, out_ptr, lse_ptr, num_ptr, idx_ptr, valid_ptr,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, spkb, spkh, spks, spvb, spvh, spvs, sbb, sbh, sbg, sob, soh, sos,
    snb, snh, sib, sih, siq, sval,
    tokens_q, tokens_k, pooled, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, TAIL: tl.constexpr, VALID: tl.constexpr, POOLED: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr, DESC_Q: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    head_k = head // GROUP
    start_q = tile * BM
    row = start_q // BLOCK_Q
    num = tl.load(num_ptr + batch * snb + head * snh + row)
    idx_ptr += batch.to(tl.int64) * sib + head.to(tl.int64) * sih + row.to(tl.int64) * siq
    SUB: tl.constexpr = BLOCK_K // BN

    q = _tile(q_src, batch, head, start_q, sqb, sqh, sqs, tokens_q, BM, DIM, DIM_PAD, True, DESC_Q)
    acc = tl.zeros([BM, DIM_PAD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    bias = tl.zeros([BP], tl.float32)

    # Only the last listed block can be the ragged one: lists ascend.
    full = num * SUB
    if VALID:
        full = 0
    elif TAIL:
        last = tl.load(idx_ptr + tl.maximum(num - 1, 0))
        full = tl.where((num > 0) & ((last + 1) * BLOCK_K > tokens_k), num - 1, num) * SUB
    if not VALID:
        start = _listed(idx_ptr, 0, full, BLOCK_K, SUB, BN)
        for t in tl.range(0, full, num_stages=STAGES):
            k = _tile(k_src, batch, head_k, start, skb, skh, sks, tokens_k, BN, DIM, DIM_PAD, False, DESC)
            v = _tile(v_src, batch, head_k, start, svb, svh, svs, tokens_k, BN, DIM, DIM_PAD, False, DESC)
            acc, total, top = _softmax_step(acc, total, top, q, k, v, bias, 0, scale, False, False, PRECISION)
            start = _listed(idx_ptr, t + 1, full, BLOCK_K, SUB, BN)
    if TAIL or VALID:
        for t in tl.range(full, num * SUB, num_stages=STAGES if VALID else 1):
            block = tl.load(idx_ptr + t // SUB)
            start = block * BLOCK_K + (t % SUB) * BN
            k = _tile(k_src, batch, head_k, start, skb, skh, sks, tokens_k, BN, DIM, DIM_PAD, True, DESC)
            v = _tile(v_src, batch, head_k, start, svb, svh, svs, tokens_k, BN, DIM, DIM_PAD, True, DESC)
            valid = tokens_k - start
            if VALID:
                valid = tl.minimum(valid, tl.load(valid_ptr + batch * sval + block) - (t % SUB) * BN)
            acc, total, top = _softmax_step(acc, total, top, q, k, v, bias, valid, scale, True, False, PRECISION)
    if POOLED:
        for start in tl.range(0, pooled, BP, num_stages=STAGES):
            k = _tile(pk_src, batch, head_k, start, spkb, spkh, spks, pooled, BP, DIM, DIM_PAD, True, DESC)
            v = _tile(pv_src, batch, head_k, start, spvb, spvh, spvs, pooled, BP, DIM, DIM_PAD, True, DESC)
            if BIASED:
                at = start + tl.arange(0, BP)
                bias = tl.load(bias_ptr + batch * sbb + head_k * sbh + at * sbg, mask=at < pooled, other=0.0) * LOG2E
            acc, total, top = _softmax_step(
                acc, total, top, q, k, v, bias, pooled - start, scale, True, BIASED, PRECISION
            )

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
def _rows_kernel(out_ptr, dout_ptr, lse_ptr, dlse_ptr, log2_ptr, delta_ptr, sob, soh, sos, sdb, sdh, sds, tokens,
                 padded, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """What the other backward kernels need of each query, padded to whole tiles so that they need no mask.

    ``log2``: log-sum-exp in base 2; ``+inf``, so that nothing weighs, for queries without a key and past the end.
    ``delta = sum(out * dout) - dlse``: what the softmax gradient subtracts from ``dout @ v``; without ``dlse`` if None.
    """
    start = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    at = start + tl.arange(0, ROWS)
    out = _tile(out_ptr, batch, head, start, sob, soh, sos, tokens, ROWS, DIM, DIM_PAD, True, False)
    dout = _tile(dout_ptr, batch, head, start, sdb, sdh, sds, tokens, ROWS, DIM, DIM_PAD, True, False)
    row = batch.to(tl.int64) * tl.num_programs(1) + head
    lse = tl.load(lse_ptr + row * tokens + at, mask=at < tokens, other=-float("inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row * tokens + at, mask=at < tokens, other=0.0)
    tl.store(log2_ptr + row * padded + at, tl.where(lse == -float("inf"), float("inf"), lse * LOG2E))
    tl.store(delta_ptr + row * padded + at, delta)


@triton.jit
def _dq_step(dq, q, dout, log2, delta, k, v, bias, valid, scale, MASKED: tl.constexpr, BIASED: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if BIASED:
        logits += bias[None, :]
    p = tl.exp2(logits - log2[:, None])
    if MASKED:
        p = tl.where((tl.arange(0, k.shape[0]) < valid)[None, :], p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq_kernel(
    q_src, k_src, v_src, pk_src, pv_src, bias_ptr, dout_src, log2_ptr, delta_ptr, dq_ptr, num_ptr, idx_ptr, valid_ptr,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, spkb, spkh, spks, spvb, spvh, spvs, sbb, sbh, sbg, sdb, sdh, sds,
    sob, soh, sos, snb, snh, sib, sih, siq, sval,
    tokens_q, tokens_k, pooled, padded, scale, logit_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, VALID: tl.constexpr, POOLED: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    head_k = head // GROUP
    start_q = tile * BM
    row = start_q // BLOCK_Q
    num = tl.load(num_ptr + batch * snb + head * snh + row)
    idx_ptr += batch.to(tl.int64) * sib + head.to(tl.int64) * sih + row.to(tl.int64) * siq
    SUB: tl.constexpr = BLOCK_K // BN

    q = _tile(q_src, batch, head, start_q, sqb, sqh, sqs, tokens_q, BM, DIM, DIM_PAD, True, DESC)
    dout = _tile(dout_src, batch, head, start_q, sdb, sdh, sds, tokens_q, BM, DIM, DIM_PAD, True, DESC)
    row_base = (batch.to(tl.int64) * tl.num_programs(1) + head) * padded
    log2 = tl.load(log2_ptr + row_base + start_q + tl.arange(0, BM))
    delta = tl.load(delta_ptr + row_base + start_q + tl.arange(0, BM))
    dq = tl.zeros([BM, DIM_PAD], tl.float32)
    bias = tl.zeros([BN], tl.float32)

    full = num * SUB
    if VALID:
        full = 0
    elif TAIL:
        last = tl.load(idx_ptr + tl.maximum(num - 1, 0))
        full = tl.where((num > 0) & ((last + 1) * BLOCK_K > tokens_k), num - 1, num) * SUB
    if not VALID:
        start = _listed(idx_ptr, 0, full, BLOCK_K, SUB, BN)
        for t in tl.range(0, full, num_stages=STAGES):
            k = _tile(k_src, batch, head_k, start, skb, skh, sks, tokens_k, BN, DIM, DIM_PAD, False, DESC)
            v = _tile(v_src, batch, head_k, start, svb, svh, svs, tokens_k, BN, DIM, DIM_PAD, False, DESC)
            dq = _dq_step(dq, q, dout, log2, delta, k, v, bias, 0, scale, False, False, PRECISION)
            start = _listed(idx_ptr, t + 1, full, BLOCK_K, SUB, BN)
    if TAIL or VALID:
        for t in tl.range(full, num * SUB, num_stages=STAGES if VALID else 1):
            block = tl.load(idx_ptr + t // SUB)
            start = block * BLOCK_K + (t % SUB) * BN
            k = _tile(k_src, batch, head_k, start, skb, skh, sks, tokens_k, BN, DIM, DIM_PAD, True, DESC)
            v = _tile(v_src, batch, head_k, start, svb, svh, svs, tokens_k, BN, DIM, DIM_PAD, True, DESC)
            valid = tokens_k - start
            if VALID:
                valid = tl.minimum(valid, tl.load(valid_ptr + batch * sval + block) - (t % SUB) * BN)
            dq = _dq_step(dq, q, dout, log2, delta, k, v, bias, valid, scale, True, False, PRECISION)
    if POOLED:
        for start in tl.range(0, pooled, BN, num_stages=STAGES):
            k = _tile(pk_src, batch, head_k, start, spkb, spkh, spks, pooled, BN, DIM, DIM_PAD, True, DESC)
            v = _tile(pv_src, batch, head_k, start, spvb, spvh, spvs, pooled, BN, DIM, DIM_PAD, True, DESC)
            if BIASED:
                at = start + tl.arange(0, BN)
                bias = tl.load(bias_ptr + batch * sbb + head_k * sbh + at * sbg, mask=at < pooled, other=0.0) * LOG2E
            dq = _dq_step(dq, q, dout, log2, delta, k, v, bias, pooled - start, scale, True, BIASED, PRECISION)

    at = start_q + tl.arange(0, BM)
    dim = tl.arange(0, DIM_PAD)
    dq_ptr += batch.to(tl.int64) * sob + head.to(tl.int64) * soh + start_q.to(tl.int64) * sos
    ptrs = dq_ptr + tl.arange(0, BM)[:, None] * sos + dim[None, :]
    keep = (at < tokens_q)[:, None] & (dim < DIM)[None, :]
    tl.store(ptrs, (dq * logit_scale).to(dq_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _dkv_kernel(
    q_src, k_src, v_src, bias_ptr, dout_src, log2_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr, num_ptr, idx_ptr,
    valid_ptr, sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sbb, sbh, sbg, sdb, sdh, sds, sdkb, sdkh, sdks, sdvb, sdvh,
    sdvs, snb, snh, sib, sih, siq, sval,
    tokens_q, tokens_k, padded, scale, logit_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, VALID: tl.constexpr, DENSE: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, DESC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over the query blocks that read it (DENSE: all of them)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_k = tl.program_id(1)
    batch = tl.program_id(2)
    start_k = tile * BN
    block = start_k // BLOCK_K
    SUB: tl.constexpr = BLOCK_Q // BM
    k = _tile(k_src, batch, head_k, start_k, skb, skh, sks, tokens_k, BN, DIM, DIM_PAD, True, DESC)
    v = _tile(v_src, batch, head_k, start_k, svb, svh, svs, tokens_k, BN, DIM, DIM_PAD, True, DESC)
    dk = tl.zeros([BN, DIM_PAD], tl.float32)
    dv = tl.zeros([BN, DIM_PAD], tl.float32)
    if FIXED_ZEROS and DESC:
        dk = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [dk], tl.float32, is_pure=False, pack=1)
        dv = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [dv], tl.float32, is_pure=False, pack=1)
    at = start_k + tl.arange(0, BN)
    bias = tl.zeros([BN], tl.float32)
    dbias = tl.zeros([BN], tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + batch * sbb + head_k * sbh + at * sbg, mask=at < tokens_k, other=0.0) * LOG2E

    for g in range(GROUP):
        head = head_k * GROUP + g
        row_base = (batch.to(tl.int64) * (tl.num_programs(1) * GROUP) + head) * padded
        idx = idx_ptr
        if DENSE:
            count = tl.cdiv(tokens_q, BM)
        else:
            count = tl.load(num_ptr + batch * snb + head * snh + block) * SUB
            idx = idx_ptr + batch.to(tl.int64) * sib + head.to(tl.int64) * sih + block.to(tl.int64) * siq
        start = 0
        if not DENSE:
            start = _listed(idx, 0, count, BLOCK_Q, SUB, BM)
        for t in tl.range(0, count, num_stages=STAGES):
            q = _tile(q_src, batch, head, start, sqb, sqh, sqs, tokens_q, BM, DIM, DIM_PAD, True, DESC)
            dout = _tile(dout_src, batch, head, start, sdb, sdh, sds, tokens_q, BM, DIM, DIM_PAD, True, DESC)
            log2 = tl.load(log2_ptr + row_base + start + tl.arange(0, BM))
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [BN, BM]
            if BIASED:
                logits += bias[:, None]
            p = tl.exp2(logits - log2[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            delta = tl.load(delta_ptr + row_base + start + tl.arange(0, BM))
            ds = p * (dp - delta[None, :])
            if BIASED:
                dbias += tl.sum(ds, 1)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if DENSE:
                start += BM
            else:
                start = _listed(idx, t + 1, count, BLOCK_Q, SUB, BM)

    if VALID:
        exists = at - block * BLOCK_K < tl.load(valid_ptr + batch * sval + block)
        dk = tl.where(exists[:, None], dk, 0.0)
        dv = tl.where(exists[:, None], dv, 0.0)
    dim = tl.arange(0, DIM_PAD)
    keep = (at < tokens_k)[:, None] & (dim < DIM)[None, :]
    local = tl.arange(0, BN)[:, None]
    dk_ptr += batch.to(tl.int64) * sdkb + head_k.to(tl.int64) * sdkh + start_k.to(tl.int64) * sdks
    dv_ptr += batch.to(tl.int64) * sdvb + head_k.to(tl.int64) * sdvh + start_k.to(tl.int64) * sdvs
    tl.store(dk_ptr + local * sdks + dim[None, :], (dk * logit_scale).to(dk_ptr.dtype.element_ty), mask=keep)
    tl.store(dv_ptr + local * sdvs + dim[None, :], dv.to(dv_ptr.dtype.element_ty), mask=keep)
    if BIASED:
        heads = tl.num_programs(1)
        tl.store(dbias_ptr + (batch.to(tl.int64) * heads + head_k) * tokens_k + at, dbias, mask=at < tokens_k)


def _sm(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 80  # the interpreter: the portable path
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def _strides(x: Tensor | None, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides along ``axes``; 0 where the tensor is absent or broadcast."""
    return tuple(0 if x is None or x.shape[a] == 1 else x.stride(a) for a in axes)


def _bhs(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _describable(*tensors: Tensor | None) -> bool:
    """Whether the copy engine can address these: base and strides of whole 16 bytes, no axis that repeats itself."""
    return all(
        x.data_ptr() % 16 == 0
        and all(n == 1 or (s and s * x.element_size() % 16 == 0) for n, s in zip(x.shape[:3], x.stride(), strict=False))
        for x in tensors
        if x is not None
    )


def _descriptor_strides(x: Tensor) -> list[int]:
    """Strides, with a lawful one where an axis of length 1 has any."""
    return [*(x.shape[3] if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False)), 1]


def _describe(x: Tensor | None, rows: int) -> TensorDescriptor | None:
    return None if x is None else TensorDescriptor(x, list(x.shape), _descriptor_strides(x), [1, 1, rows, x.shape[3]])


def _precision(x: Tensor) -> str:
    # TF32 would lose what float32 inputs ask for.
    return "ieee" if x.dtype == torch.float32 else "tf32"


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    pooled_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    tiles: Tiles | None = None,
    *,
    key: Hashable | None = None,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor]:
    """Output in q's strides and natural log-sum-exp ``[B, H, TQ]`` float32; arguments as the public op's.

    ``key``, if it is known, and ``notes`` are for ``launch``.
    """
    batch, heads, tokens_q, dim = q.shape
    if key is None:
        facts = geometry(q, k, v, kv_num, kv_idx, k_valid, pooled_k, pooled_v, pooled_bias)
        key = facts and number((facts, block_q, block_k, scale, tiles))
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q.device)
    if notes is not None:
        notes.made(out)
        notes.made(lse)

    def build(q, k, v, pooled_k, pooled_v, pooled_bias, out, lse, kv_num, kv_idx, k_valid):
        tokens_k = k.shape[2]
        t = tiles or tiles_for("forward", q.dtype, dim, block_q, block_k, _sm(q))
        pooled_tile = min(t.k, 64)  # a wider one would not fit in the registers beside its bias
        descriptors = t.descriptors and _describable(q, k, v, pooled_k, pooled_v)
        sources = [q, k, v, pooled_k, pooled_v]
        if descriptors:
            tall = (t.q, t.k, t.k, pooled_tile, pooled_tile)
            sources = [_describe(x, rows) for x, rows in zip(sources, tall, strict=True)]
            if not t.describe_q:
                sources[0] = q
        args = (
            *sources, pooled_bias, out, lse, kv_num, kv_idx, k_valid,
            *_bhs(q), *_bhs(k), *_bhs(v), *_bhs(pooled_k), *_bhs(pooled_v),
            *((0, 0, 0) if pooled_bias is None else pooled_bias.stride()), *_bhs(out),
            *_strides(kv_num, (0, 1)), *_strides(kv_idx, (0, 1)), kv_idx.stride(2), *_strides(k_valid, (0,)),
            tokens_q, tokens_k, 0 if pooled_k is None else pooled_k.shape[2], scale * LOG2E.value,
        )  # fmt: skip
        named = dict(
            GROUP=heads // k.shape[1], DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK_Q=block_q, BLOCK_K=block_k,
            BM=t.q, BN=t.k, BP=pooled_tile, TAIL=tokens_k % block_k != 0, VALID=k_valid is not None,
            POOLED=pooled_k is not None, BIASED=pooled_bias is not None, PRECISION=_precision(q), DESC=descriptors,
            DESC_Q=descriptors and t.describe_q, STAGES=t.stages,
            num_warps=t.warps, num_stages=t.stages, maxnreg=t.registers,
        )  # fmt: skip
        return (triton.cdiv(tokens_q, t.q), heads, batch), args, named

    tensors = (q, k, v, pooled_k, pooled_v, pooled_bias, out, lse, kv_num, kv_idx, k_valid)
    launch(_forward_kernel, key, tensors, build, notes)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    q_num: Tensor,
    q_idx: Tensor,
    k_valid: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    pooled_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    tiles: dict[str, Tiles] | None = None,
    *,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, pooled k, pooled v (each in its strides) and of the bias (``[B, HK, G]`` float32).

    ``q_num`` and ``q_idx`` are the lists of the transposed layout. ``dlse`` None: no gradient came to the log-sum-exp.
    ``notes`` is for ``launch``.
    """
    batch, heads, tokens_q, dim = q.shape
    heads_k = k.shape[1]
    facts = geometry(dout, dlse, q, k, v, out, lse, kv_num, kv_idx, q_num, q_idx, k_valid, pooled_k, pooled_v,
                     pooled_bias)  # fmt: skip
    tiles = tiles or {}
    key = facts and number((facts, block_q, block_k, scale, *tiles.items()))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    padded = -(-tokens_q // 128) * 128  # whole tiles of any configuration
    log2 = torch.empty((batch, heads, padded), dtype=torch.float32, device=q.device)
    delta = torch.empty_like(log2)
    if notes is not None:
        for x in (dq, dk, dv, log2, delta):
            notes.made(x)

    def tiles_of(kernel: str) -> Tiles:
        return tiles.get(kernel) or tiles_for(kernel, q.dtype, dim, block_q, block_k, _sm(q))

    def aligned() -> bool:
        return _describable(q, k, v, pooled_k, pooled_v, dout)

    def shared() -> dict[str, Any]:
        return dict(GROUP=heads // heads_k, DIM=dim, DIM_PAD=triton.next_power_of_2(dim), PRECISION=_precision(q))

    def rows(out, dout, lse, dlse, log2, delta):
        count = 128 if dim <= 64 else 64
        args = (out, dout, lse, dlse, log2, delta, *_bhs(out), *_bhs(dout), tokens_q, padded)
        return (
            (padded // count, heads, batch),
            args,
            dict(DIM=dim, DIM_PAD=triton.next_power_of_2(dim), ROWS=count, num_warps=4),
        )

    def query_gradient(q, k, v, pooled_k, pooled_v, bias, dout, log2, delta, dq, kv_num, kv_idx, k_valid):
        t = tiles_of("dq")
        descriptors = t.descriptors and aligned()
        sources = [q, k, v, pooled_k, pooled_v, dout]
        if descriptors:
            tall = (t.q, *[t.k] * 4, t.q)
            sources = [_describe(x, n) for x, n in zip(sources, tall, strict=True)]
        args = (
            *sources[:5], bias, sources[5], log2, delta, dq, kv_num, kv_idx, k_valid,
            *_bhs(q), *_bhs(k), *_bhs(v), *_bhs(pooled_k), *_bhs(pooled_v),
            *((0, 0, 0) if bias is None else bias.stride()), *_bhs(dout), *_bhs(dq),
            *_strides(kv_num, (0, 1)), *_strides(kv_idx, (0, 1)), kv_idx.stride(2), *_strides(k_valid, (0,)),
            tokens_q, k.shape[2], 0 if pooled_k is None else pooled_k.shape[2], padded, scale * LOG2E.value, scale,
        )  # fmt: skip
        named = dict(
            BLOCK_Q=block_q, BLOCK_K=block_k, BM=t.q, BN=t.k, TAIL=k.shape[2] % block_k != 0,
            VALID=k_valid is not None, POOLED=pooled_k is not None, BIASED=bias is not None, DESC=descriptors,
            STAGES=t.stages, num_warps=t.warps, num_stages=t.stages, maxnreg=t.registers, **shared(),
        )  # fmt: skip
        return (triton.cdiv(tokens_q, t.q), heads, batch), args, named

    def key_gradients(dense: bool):
        def build(q, keys, values, bias, dout, log2, delta, dkeys, dvalues, dbias, q_num, q_idx, valid):
            t = tiles_of("dkv")
            descriptors = t.descriptors and aligned()
            sources = [q, keys, values, dout]
            if descriptors:
                tall = (t.q, t.k, t.k, t.q)
                sources = [_describe(x, n) for x, n in zip(sources, tall, strict=True)]
            args = (
                *sources[:3], bias, sources[3], log2, delta, dkeys, dvalues, dbias, q_num, q_idx, valid,
                *_bhs(q), *_bhs(keys), *_bhs(values), *((0, 0, 0) if bias is None else bias.stride()), *_bhs(dout),
                *_bhs(dkeys), *_bhs(dvalues),
                *_strides(q_num, (0, 1)), *_strides(q_idx, (0, 1)), q_idx.stride(2), *_strides(valid, (0,)),
                tokens_q, keys.shape[2], padded, scale * LOG2E.value, scale,
            )  # fmt: skip
            named = dict(
                BLOCK_Q=block_q, BLOCK_K=t.k if dense else block_k, BM=t.q, BN=t.k, VALID=valid is not None,
                DENSE=dense, BIASED=bias is not None, DESC=descriptors, STAGES=t.stages, num_warps=t.warps,
                num_stages=t.stages, maxnreg=t.registers, **shared(),
            )  # fmt: skip
            return (triton.cdiv(keys.shape[2], t.k), heads_k, batch), args, named

        return build

    launch(_rows_kernel, key, (out, dout, lse, dlse, log2, delta), rows, notes)
    tensors = (q, k, v, pooled_k, pooled_v, pooled_bias, dout, log2, delta, dq, kv_num, kv_idx, k_valid)
    launch(_dq_kernel, key, tensors, query_gradient, notes)
    listed = (q, k, v, None, dout, log2, delta, dk, dv, None, q_num, q_idx, k_valid)
    launch(_dkv_kernel, key and (key, False), listed, key_gradients(False), notes)
    if pooled_k is None:
        return dq, dk, dv, None, None, None
    assert pooled_v is not None
    dpk, dpv = torch.empty_like(pooled_k), torch.empty_like(pooled_v)
    dbias = None
    if pooled_bias is not None:
        dbias = torch.empty(pooled_bias.shape, dtype=torch.float32, device=q.device)
    if notes is not None:
        for x in (dpk, dpv) if dbias is None else (dpk, dpv, dbias):
            notes.made(x)
    dense = (q, pooled_k, pooled_v, pooled_bias, dout, log2, delta, dpk, dpv, dbias, q_num, q_idx, None)
    launch(_dkv_kernel, key and (key, True), dense, key_gradients(True), notes)
    return dq, dk, dv, dpk, dpv, dbias
