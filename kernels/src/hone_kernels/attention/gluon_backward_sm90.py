"""Block-sparse attention backward for Hopper (compute capability 9.x) in Gluon: five products in one kernel.

A program owns 128 keys of one head and walks the query blocks of their column, ``BM`` queries a step. Three warpgroups:

- Two of *keys*, 64 keys each. Logits and the gradient of the weights are computed transposed, ``S = K Q^T`` and
  ``dP = V dO^T``, so that weights and ``dS`` are, in registers, the first operand of ``dV += P dO`` and ``dK += dS Q``.
- One of *queries*. It starts the copies of Q, dO and of two words a query (log-sum-exp and delta), waits until both
  others have left their halves of ``dS`` in shared memory, and adds ``dQ = dS^T K`` to a buffer of 4 bytes for each
  value by reductions of the L2 cache, in the order in which its registers hold them. A small kernel puts that in order,
  scales and casts it.

The warpgroups of keys never wait for each other, so that the exponentials of one run under the products of the other.

Programs add to dQ in the order in which they come. So that its bits do not depend on that, they add whole numbers: what
a program has for a row, times the row's *unit* and its channel's *factor*, rounded. The factor of a channel of K is the
power of two that brings the channel's largest value to between two and four; dQ is multiplied from K so scaled: a
program keeps a copy of that in shared memory. Of a row of weights that sum up to one

    |sum of p_j (dout . v_j - delta) k_jc| <= |dout| max (|v| |k|) + |delta| max |k|

where ``|k|`` is the largest value of K so scaled in a block of keys, ``|v|`` the longest row of V there, and the maxima
are over the blocks that the row lists (and all of the pooled keys): the unit is what brings that to ``LIMIT``, less an
eighth for weights that sum up to more than one. Each addition rounds to within 2**-31 of the bound, and what is smaller
is lost; bfloat16 rounds dQ to within 2**-9 of itself, and of random operands at 32,768 tokens the bound is some 2**14
times what dQ is. A channel of K far above the others costs those nothing. A few long values raise the bound of the rows
whose lists have them, also of those that give them no weight (LOG.md has errors). ``fixed=False`` adds float32 instead,
four words an instruction, and the last bits of dQ then differ from run to run.

Weights sum up to one as far as the log-sum-exp says what the logits are: ``weight`` of ``attention_backward`` says up
to what they may. Float32 rounds logits to within 2**-24 of themselves: from logits of some 10**6 on they may sum up to
more than an eighth above one, and then dQ is wrong in any order, but in fixed point with any sign.

What is not finite makes NaN of the rows that read it, as in float32: in V and dO by way of delta; in K, where its
weight is zero, in its channel only, which the signs of units and factors say.

Exponentials are base 2 inside (``LOG2E`` is folded into the scale).

Why nothing waits for ever. Stage ``s % STAGES`` of the ring has a barrier ``full`` (the copies) and ``empty`` (one
arrival of each warpgroup of keys); buffer ``s % BUFFERS`` of dS has ``ds_full`` (one of each, too) and ``ds_empty``. In
step s a warpgroup of keys waits for ``full`` of step s, with ``ahead`` of step s + 1, and for ``ds_empty`` of step
s - BUFFERS, and then gives back the stage of step s. The one of queries waits in step s for dS of step s, gives it
back, and then, if there is a step s + STAGES, waits for the stage of step s to be empty before it starts the copies of
that. So keys in step s need of queries step s + 1 - STAGES, which is before s as there are two stages or more, and the
first half of step s - BUFFERS; queries in step s need of keys no more than step s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hone_kernels.launch import Notes, geometry, launch, number

from .gluon_sm90 import _addressable, _describe, _get, _put, _thread_sums
from .triton import LOG2E, _bhs, _strides, _tile

__all__ = ["CONFIGS", "Config", "attention_backward"]


@dataclass(frozen=True)
class Config:
    """A launch configuration.

    Attributes:
        queries: In a step.
        stages: Of Q, dO and their statistics.
        buffers: Of dS.
        operands: Hold K and V in registers: less shared-memory traffic for ``dim / 2`` registers.
        early: Issue dP before the exponentials, which then run under it, for ``queries / 2`` registers.
        ahead: Issue S of a step behind dK of the one before, for as many.
        exact: dS from the weights before they are rounded for dV, for ``queries / 4`` registers.
        registers: Per thread of a warpgroup of keys, and of the one of queries.
    """

    queries: int = 64
    stages: int = 2
    buffers: int = 2
    operands: bool = False
    early: bool = False
    ahead: bool = False
    exact: bool = False
    registers: tuple[int, int] = (216, 72)


CONFIGS: dict[int, Config] = {
    64: Config(stages=4, operands=True, early=True, ahead=True, exact=True),
    128: Config(stages=3, buffers=1),
}

_LAUNCH_REGISTERS = 168
"""Per thread at launch: three warpgroups of it fill the multiprocessor."""

LEAST = tl.constexpr(2.0**-126)
"""Smallest normal float32."""
SIGN = tl.constexpr(-(2**31))
"""The bit of it in 32."""

LIMIT = 2.0**31 - 2.0**24
"""Of sums in fixed point; what is left of 32 bits is for half a unit of each of up to 2**25 additions."""

# Adds four consecutive registers to four consecutive words.
_REDUCE = gl.constexpr(
    "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; "
    "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
)


# The same in fixed point: each of four registers, rounded to a whole number, to 32 consecutive words for a warp.
_ADD = gl.constexpr(
    "{ .reg .s32 whole; "
    "cvt.rni.s32.f32 whole, $8; red.relaxed.gpu.global.add.s32 [$4], whole; "
    "cvt.rni.s32.f32 whole, $9; red.relaxed.gpu.global.add.s32 [$4+128], whole; "
    "cvt.rni.s32.f32 whole, $10; red.relaxed.gpu.global.add.s32 [$4+256], whole; "
    "cvt.rni.s32.f32 whole, $11; red.relaxed.gpu.global.add.s32 [$4+384], whole; } "
    "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
)


# Two neighbours by one instruction, which the compiler does not find where the halves are widened again.
_NARROW_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
_NARROW_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_WIDEN_BF16 = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@gluon.jit
def _narrow(x, DTYPE: gl.constexpr):
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(_NARROW_BF16, "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(_NARROW_FP16, "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _widen(x, DTYPE: gl.constexpr):
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(_WIDEN_BF16, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@triton.jit
def _extent_kernel(k_ptr, v_ptr, valid_ptr, largest_ptr, skb, skh, sks, svb, svh, svs, sval, tokens, first, blocks,
                   DIM: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Of a block of keys, bits of float32: the largest value in each channel of K, and the longest row of V, squared.

    What is not finite does not count; in K it sets the sign of its channel.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    exist = tokens
    if VALID:
        exist = tl.minimum(tokens, block * 128 + tl.load(valid_ptr + batch * sval + block))
    k = tl.abs(_tile(k_ptr, batch, head, block * 128, skb, skh, sks, exist, 128, DIM, DIM, True, False).to(tl.float32))
    v = _tile(v_ptr, batch, head, block * 128, svb, svh, svs, exist, 128, DIM, DIM, True, False).to(tl.float32)
    finite = k < float("inf")
    largest = tl.max(tl.where(finite, k, 0.0), 0).to(tl.int32, bitcast=True)
    largest |= tl.max(tl.where(finite, 0, 1), 0) << 31
    # What is not finite in V shows in the delta of the rows that read it.
    longest = tl.max(tl.sum(tl.where(tl.abs(v) < float("inf"), v * v, 0.0), 1))
    largest_ptr += (batch * tl.num_programs(1) + head).to(tl.int64) * blocks * (DIM + 1)
    block += first
    tl.store(largest_ptr + block * DIM + tl.arange(0, DIM), largest)
    tl.store(largest_ptr + blocks * DIM + block, longest.to(tl.int32, bitcast=True))


@triton.jit
def _bounds_kernel(largest_ptr, factors_ptr, bounds_ptr, blocks, DIM: tl.constexpr, SHARE: tl.constexpr):
    """From what ``_extent_kernel`` found: factors of a head's channels of K, and two bounds of each block of its keys.

    ``factors``: the power of two that brings the largest finite value of a channel to between two and four; less than
    that where all are too small for it. ``bounds``: the largest value of K so scaled in a block, and before it that
    times the longest row of V. Bits of float32, with the sign of what is not finite in K: in a channel, in a block.
    """
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    channel = tl.arange(0, DIM)
    local = tl.arange(0, 32)
    largest_ptr += head.to(tl.int64) * blocks * (DIM + 1)
    top = tl.zeros([DIM], tl.int32)
    sign = tl.zeros([DIM], tl.int32)
    for start in range(0, blocks, 32):
        block = start + local
        values = tl.load(largest_ptr + block[:, None] * DIM + channel, mask=(block < blocks)[:, None], other=0)
        top = tl.maximum(top, tl.max(values & 0x7FFFFFFF, 0))
        sign = tl.minimum(sign, tl.min(values, 0))
    # Values are below 2 ** (exponent - 126), and below 2 ** -126 where it is 0.
    bits = (255 - tl.maximum(top >> 23, 1)) << 23
    factor = bits.to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(factors_ptr + head * DIM + channel, tl.where(sign < 0, bits | SIGN, bits))
    first = tl.program_id(0) * SHARE
    for start in range(first, tl.minimum(first + SHARE, blocks), 32):
        block = start + local
        here = block < blocks
        values = tl.load(largest_ptr + block[:, None] * DIM + channel, mask=here[:, None], other=0)
        size = tl.max((values & 0x7FFFFFFF).to(tl.float32, bitcast=True) * factor, 1)
        longest = tl.load(largest_ptr + blocks * DIM + block, mask=here, other=0).to(tl.float32, bitcast=True)
        # Squares too small for float32 are zero: what they may have been is added.
        longest = tl.sqrt(longest + DIM * LEAST) * size
        size = size.to(tl.int32, bitcast=True)
        size = tl.where(tl.min(values, 1) < 0, size | SIGN, size)
        bounds = bounds_ptr + 2 * (head * blocks + block)
        tl.store(bounds, longest.to(tl.int32, bitcast=True), mask=here)
        tl.store(bounds + 1, size, mask=here)


@triton.jit
def _statistics_kernel(out_ptr, dout_ptr, lse_ptr, dlse_ptr, bounds_ptr, num_ptr, idx_ptr, rows_ptr, units_ptr,
                       sums_ptr, sob, soh, sos, sdb, sdh, sds, snb, snh, sib, sih, siq, tokens, padded, group, listable,
                       blocks, limit, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
                       FIXED: tl.constexpr):  # fmt: skip
    """Words of each query, padded to whole tiles: ``unit``, and for each tile of ROWS queries ``log2``, then ``delta``.

    ``log2``: log-sum-exp in base 2; ``+inf``, so that nothing weighs, for queries without a key and past the end.
    ``delta = sum(out * dout) - dlse``: what the softmax gradient subtracts from ``dout @ v``; without ``dlse`` if None.
    ``unit``: what sums of this row of dQ are multiplied by in fixed point, ``limit`` over a bound of them; NaN where
    there is none, negative where the row reads keys that are not finite. Bounds of ``listable`` blocks count where a
    row lists them, those behind, of pooled keys, always.
    The sums of the tile become zero here, since a launch for that would cost the host more.
    """
    start = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    local = tl.arange(0, ROWS)
    at = start + local
    out = _tile(out_ptr, batch, head, start, sob, soh, sos, tokens, ROWS, DIM, DIM, True, False)
    dout = _tile(dout_ptr, batch, head, start, sdb, sdh, sds, tokens, ROWS, DIM, DIM, True, False).to(tl.float32)
    row = batch.to(tl.int64) * tl.num_programs(1) + head
    lse = tl.load(lse_ptr + row * tokens + at, mask=at < tokens, other=-float("inf"))
    rows_ptr += 2 * (row * padded + start)
    delta = tl.sum(out.to(tl.float32) * dout, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row * tokens + at, mask=at < tokens, other=0.0)
    tl.store(rows_ptr + local, tl.where(lse == -float("inf"), float("inf"), lse * LOG2E))
    tl.store(rows_ptr + ROWS + local, delta)
    if FIXED:
        bounds_ptr += 2 * blocks * (row // group)
        block = start // BLOCK_Q
        listed = tl.load(num_ptr + batch * snb + head * snh + block, mask=start < tokens, other=0)
        idx_ptr += batch.to(tl.int64) * sib + head.to(tl.int64) * sih + block.to(tl.int64) * siq
        lane = tl.arange(0, 128)
        far = tl.zeros([128], tl.int32)
        near = tl.zeros([128], tl.int32)
        sign = tl.zeros([128], tl.int32)
        # Bits of positive numbers are in the order of the numbers.
        for t in range(0, listed + blocks - listable, 128):
            read = t + lane
            here = tl.load(idx_ptr + read, mask=read < listed, other=0)
            here = bounds_ptr + 2 * tl.where(read < listed, here, read - listed + listable)
            read = read < listed + blocks - listable
            far = tl.maximum(far, tl.load(here, mask=read, other=0))
            size = tl.load(here + 1, mask=read, other=0)
            near = tl.maximum(near, size & 0x7FFFFFFF)
            sign = tl.minimum(sign, size)
        most = tl.sqrt(tl.sum(dout * dout, 1) + DIM * LEAST) * tl.max(far, 0).to(tl.float32, bitcast=True)
        most += tl.abs(delta) * tl.max(near, 0).to(tl.float32, bitcast=True)
        # Not by a maximum, for which a number is more than none.
        unit = limit / tl.where(most < 2.0**-80, 2.0**-80, most)
        unit = tl.where(tl.min(sign, 0) < 0, -unit, unit)
        tl.store(units_ptr + row * padded + at, tl.where(most < float("inf"), unit, float("nan")))
    sums_ptr += (row * padded + start) * DIM
    tl.store(sums_ptr + tl.arange(0, ROWS * DIM), tl.zeros([ROWS * DIM], sums_ptr.dtype.element_ty))


@triton.jit
def _order_kernel(sums_ptr, units_ptr, factors_ptr, dq_ptr, sob, soh, sos, tokens, padded, group, scale,
                  DIM: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """Sums of a tile of 64 queries from the order of the matrix unit's registers to dQ."""
    start = tl.program_id(0) * 64
    head = tl.program_id(1)
    batch = tl.program_id(2)
    row = batch.to(tl.int64) * tl.num_programs(1) + head
    at = tl.arange(0, 64)
    sums_ptr += (row * padded + start) * DIM
    sums = tl.load(sums_ptr + tl.arange(0, 64 * DIM))
    if FIXED:
        # Column // 8; row // 16; row % 16 // 8, column % 2 of a register; row % 8, column % 8 // 2 of a thread.
        sums = sums.to(tl.float32).reshape([DIM // 8, 4, 2, 2, 8, 4]).permute(1, 2, 4, 0, 5, 3).reshape([64, DIM])
        unit = tl.load(units_ptr + row * padded + start + at)
        factor = tl.load(factors_ptr + row // group * DIM + tl.arange(0, DIM))
        sums *= (0.5 * scale / unit)[:, None]
        # Two over a power of two, without rounding.
        sums *= (0x7F800000 - (factor & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        # Zero weights of what is not finite are no numbers, and whole numbers know none.
        sums = tl.where((unit < 0)[:, None] & (factor < 0), float("nan"), sums)
    else:
        # Column // 8; row // 16, row % 8, column % 8 // 2 of a thread; row % 16 // 8, column % 2.
        sums = sums.reshape([DIM // 8, 4, 8, 4, 2, 2]).permute(1, 4, 2, 0, 3, 5).reshape([64, DIM]) * scale
    dq_ptr += batch.to(tl.int64) * sob + head.to(tl.int64) * soh + start.to(tl.int64) * sos
    ptrs = dq_ptr + at[:, None] * sos + tl.arange(0, DIM)[None, :]
    tl.store(ptrs, sums.to(dq_ptr.dtype.element_ty), mask=(start + at < tokens)[:, None])


@gluon.jit
def _fill(q_desc, do_desc, rows_desc, list_ptr, t, batch, head, heads, tiles, memory, turn, config: gl.constexpr):
    """Start the copies of one step and note which tile it is."""
    _, _, q_buf, do_buf, rows_buf, _, header, _, full, empty, _, _ = memory
    STAGES: gl.constexpr = config[0]
    BLOCK_Q: gl.constexpr = config[2]
    DENSE: gl.constexpr = config[4]
    BM: gl.constexpr = q_buf.shape[3]
    D: gl.constexpr = q_buf.shape[4]
    SUB: gl.constexpr = BLOCK_Q // BM
    BYTES: gl.constexpr = 2 * BM * D * q_buf.dtype.primitive_bitwidth // 8 + 2 * BM * 4
    at = turn % STAGES
    tile = t if DENSE else gl.load(list_ptr + t // SUB) * SUB + t % SUB
    place = (batch * heads + head) * tiles + tile
    mbarrier.wait(empty.index(at), (turn // STAGES & 1) ^ 1)
    _put(header.index(at), place)
    bar = full.index(at)
    mbarrier.expect(bar, BYTES)
    tma.async_copy_global_to_shared(q_desc, [batch, head, tile * BM, 0], bar, q_buf.index(at))
    tma.async_copy_global_to_shared(rows_desc, [place, 0], bar, rows_buf.index(at))
    tma.async_copy_global_to_shared(do_desc, [batch, head, tile * BM, 0], bar, do_buf.index(at))


@gluon.jit
def _count(num_ptr, head, snh, tiles, config: gl.constexpr):
    """Steps over the queries of one head."""
    BLOCK_Q: gl.constexpr = config[2]
    DENSE: gl.constexpr = config[4]
    BM: gl.constexpr = config[7]
    if DENSE:
        return tiles
    else:
        return gl.load(num_ptr + head * snh) * (BLOCK_Q // BM)


@gluon.jit
def _steps(num_ptr, head_k, snh, tiles, config: gl.constexpr):
    """Steps over the queries of all heads that share these keys."""
    GROUP: gl.constexpr = config[3]
    steps = tiles * 0
    for g in gl.static_range(GROUP):
        steps += _count(num_ptr, head_k * GROUP + g, snh, tiles, config)
    return steps


@gluon.jit
def _queries(q_desc, do_desc, rows_desc, factors_ptr, units_ptr, sums_ptr, num_ptr, idx_ptr, snh, sih, exist, tiles,
             steps, memory, scaled_buf, config: gl.constexpr):  # fmt: skip
    k_buf, _, q_buf, _, _, ds_buf, header, kv_full, _, _, ds_full, ds_empty = memory
    STAGES: gl.constexpr = config[0]
    BUFFERS: gl.constexpr = config[1]
    GROUP: gl.constexpr = config[3]
    MASKED: gl.constexpr = config[5]
    FIXED: gl.constexpr = config[12]
    BM: gl.constexpr = q_buf.shape[3]
    D: gl.constexpr = q_buf.shape[4]
    # Columns of dQ at a time: more would take registers from the other warpgroups.
    WIDE: gl.constexpr = 64
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    row = gl.arange(0, BM, gl.SliceLayout(1, SUMS))
    column = gl.arange(0, WIDE, gl.SliceLayout(0, SUMS))
    # The first of the four words of which each element is one, as _order_kernel reads them.
    if FIXED:
        thread_at = (row % 64 // 16 * 128 + row % 8 * 4)[:, None] + (column % 8 // 2)[None, :]
    else:
        thread_at = (row % 64 // 16 * 128 + row % 8 * 16)[:, None] + (column % 8 // 2 * 4)[None, :]
    register_at = (row // 64 * (64 * D))[:, None] + (column // 8 * 512)[None, :]
    zeros = gl.zeros([BM, WIDE], gl.float32, SUMS)
    # K in the pieces of WIDE columns in which it lies in shared memory.
    PIECES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * WIDE, element_bitwidth=16, rank=2)
    pieces = k_buf._reinterpret(k_buf.dtype, [D // WIDE, 128, WIDE], PIECES)
    # A number that the compiler does not know, so that all pieces share one set of registers.
    parts = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [steps * 0 + D // WIDE], dtype=gl.int32, is_pure=False, pack=1
    )

    head_k = gl.program_id(1)
    batch = gl.program_id(2)
    heads = gl.num_programs(1) * GROUP
    # Where the next copy comes from: step t of ``count`` of head g.
    g = steps * 0
    t = steps * 0
    count = _count(num_ptr, head_k * GROUP, snh, tiles, config)
    for ahead in range(0, gl.minimum(STAGES, steps)):
        if GROUP > 1:
            while t >= count:
                g += 1
                t = 0
                count = _count(num_ptr, head_k * GROUP + g, snh, tiles, config)
        _fill(q_desc, do_desc, rows_desc, idx_ptr + g.to(gl.int64) * sih, t, batch, head_k * GROUP + g, heads, tiles,
              memory, ahead, config)  # fmt: skip
        t += 1
    mbarrier.wait(kv_full, 0)
    if FIXED:
        # K times the factors of its channels, and zeros for keys that do not exist.
        PARTS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        key = gl.arange(0, 32, gl.SliceLayout(1, PARTS))
        channel = gl.arange(0, WIDE, gl.SliceLayout(0, PARTS))
        factors_ptr += (batch * gl.num_programs(1) + head_k) * D
        for part in range(0, parts):
            factor = (gl.load(factors_ptr + part * WIDE + channel) & 0x7FFFFFFF).to(gl.float32, bitcast=True)
            for start in gl.static_range(0, 128, 32):
                few = pieces.index(part).slice(start, 32, dim=0).load(PARTS).to(gl.float32) * factor[None, :]
                if MASKED:
                    few = gl.where((start + key < exist)[:, None], few, 0.0)
                scaled_buf.index(part).slice(start, 32, dim=0).store(few.to(k_buf.dtype))
        fence_async_shared()
        tl.debug_barrier()
        pieces = scaled_buf
    for step in range(0, steps):
        place = _get(header.index(step % STAGES))
        at = step % BUFFERS
        tile_ptr = (sums_ptr + place.to(gl.int64) * (BM * D)).to(gl.int64)
        if FIXED:
            unit = gl.load(units_ptr + place.to(gl.int64) * BM + row)[:, None]
        mbarrier.wait(ds_full.index(at), step // BUFFERS & 1)
        ds_t = ds_buf.index(at).permute((1, 0))
        for part in range(0, parts):
            dq = warpgroup_mma(ds_t, pieces.index(part), zeros, use_acc=False, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            # Bytes; what registers of a thread differ by comes last, as a constant.
            words = tile_ptr + thread_at.to(gl.int64) * 4 + register_at.to(gl.int64) * 4
            if FIXED:
                dq *= unit
            gl.inline_asm_elementwise(
                _ADD if FIXED else _REDUCE, "=r,=r,=r,=r,l,l,l,l,r,r,r,r", [words, dq], dtype=gl.int32, is_pure=False,
                pack=4,
            )  # fmt: skip
            tile_ptr += WIDE * 256
        mbarrier.arrive(ds_empty.index(at))
        if step + STAGES < steps:
            if GROUP > 1:
                while t >= count:
                    g += 1
                    t = 0
                    count = _count(num_ptr, head_k * GROUP + g, snh, tiles, config)
            _fill(q_desc, do_desc, rows_desc, idx_ptr + g.to(gl.int64) * sih, t, batch, head_k * GROUP + g, heads,
                  tiles, memory, step + STAGES, config)  # fmt: skip
            t += 1


@gluon.jit
def _logits(k, q_buf, stage, no_logits):
    """Start the product of keys with the queries of a stage."""
    queries = q_buf.index(stage).reshape([q_buf.shape[3], q_buf.shape[4]])
    return warpgroup_mma(k, queries.permute((1, 0)), no_logits, use_acc=False, is_async=True)


@gluon.jit
def _keys(dk_desc, dv_desc, bias_ptr, dbias_ptr, sbb, sbh, sbg, exist, tokens_k, steps, scale, logit_scale, memory,
          config: gl.constexpr, WG: gl.constexpr):  # fmt: skip
    k_buf, v_buf, q_buf, do_buf, rows_buf, ds_buf, _, kv_full, full, empty, ds_full, ds_empty = memory
    STAGES: gl.constexpr = config[0]
    BUFFERS: gl.constexpr = config[1]
    MASKED: gl.constexpr = config[5]
    BIASED: gl.constexpr = config[6]
    OPERANDS: gl.constexpr = config[8]
    EARLY: gl.constexpr = config[9]
    AHEAD: gl.constexpr = config[10]
    EXACT: gl.constexpr = config[11]
    BM: gl.constexpr = q_buf.shape[3]
    D: gl.constexpr = q_buf.shape[4]
    DTYPE: gl.constexpr = q_buf.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    key = WG * 64 + gl.arange(0, 64, KEYS)
    exists = key < exist
    bias = gl.zeros([64], gl.float32, KEYS)
    if BIASED:
        bias_at = bias_ptr + gl.program_id(2) * sbb + gl.program_id(1) * sbh + (gl.program_id(0) * 128 + key) * sbg
        bias = gl.load(bias_at, mask=exists, other=0.0) * LOG2E
    no_logits = gl.zeros([64, BM], gl.float32, LOGITS)
    if BIASED:
        dbias = _thread_sums(no_logits)
    # Zeros that the compiler cannot move: between asynchronous products they would make it wait after each.
    dk = gl.zeros([64, D], gl.float32, SUMS)
    dv = gl.zeros([64, D], gl.float32, SUMS)
    dk = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [dk], dtype=gl.float32, is_pure=False, pack=1)
    dv = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [dv], dtype=gl.float32, is_pure=False, pack=1)

    mbarrier.wait(kv_full, 0)
    k = k_buf.reshape([128, D]).slice(64 * WG, 64, dim=0)
    v = v_buf.reshape([128, D]).slice(64 * WG, 64, dim=0)
    if OPERANDS:
        k = k.load(gl.DotOperandLayout(0, LOGITS, 2))
        v = v.load(gl.DotOperandLayout(0, LOGITS, 2))
    if AHEAD:
        if steps > 0:
            mbarrier.wait(full.index(0), 0)
        s = _logits(k, q_buf, 0, no_logits)
        s = warpgroup_mma_wait(0, deps=(s,))
    for step in range(0, steps):
        stage = step % STAGES
        at = step % BUFFERS
        queries = q_buf.index(stage).reshape([BM, D])
        douts = do_buf.index(stage).reshape([BM, D])
        if not AHEAD:
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            s = _logits(k, q_buf, stage, no_logits)
        if EARLY:
            dp = warpgroup_mma(v, douts.permute((1, 0)), no_logits, use_acc=False, is_async=True)
        if not AHEAD:
            s = warpgroup_mma_wait(1 if EARLY else 0, deps=(s,))
        p = s * scale
        if BIASED:
            p += bias[:, None]
        p = gl.exp2(p - rows_buf.index(stage).slice(0, BM, dim=1).load(LOGITS))
        if MASKED:
            p = gl.where(exists[:, None], p, 0.0)
        narrow = _narrow(p, DTYPE)
        if not EXACT:
            p = _widen(narrow, DTYPE)
        weights = gl.convert_layout(narrow, WEIGHTS)
        if not EARLY:
            dp = warpgroup_mma(v, douts.permute((1, 0)), no_logits, use_acc=False, is_async=True)
        dv = warpgroup_mma(weights, douts, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = p * (dp - rows_buf.index(stage).slice(BM, BM, dim=1).load(LOGITS))
        if BIASED:
            dbias += _thread_sums(ds)
        ds = _narrow(ds, DTYPE)
        # The products first: dS goes to shared memory while they run.
        if AHEAD:
            after = gl.minimum(step + 1, steps - 1)
            mbarrier.wait(full.index(after % STAGES), after // STAGES & 1)
            s = _logits(k, q_buf, after % STAGES, no_logits)
        dk = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), queries, dk, is_async=True)
        mbarrier.wait(ds_empty.index(at), (step // BUFFERS & 1) ^ 1)
        ds_buf.index(at).slice(64 * WG, 64, dim=0).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(at))
        if AHEAD:
            s, dk, dv = warpgroup_mma_wait(0, deps=(s, dk, dv))
        else:
            dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        mbarrier.arrive(empty.index(stage))
    start = gl.program_id(0) * 128
    head_k = gl.program_id(1)
    batch = gl.program_id(2)
    if BIASED:
        total = gl.convert_layout(gl.sum(dbias, 1), KEYS)
        gl.store(
            dbias_ptr + (batch * gl.num_programs(1) + head_k).to(gl.int64) * tokens_k + start + key, total, mask=exists
        )
    # V is read no more, by this warpgroup or any other.
    out = v_buf.slice(64 * WG, 64, dim=2)
    half = v_buf.reshape([128, D]).slice(64 * WG, 64, dim=0)
    half.store(dv.to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_desc, [batch, head_k, start + WG * 64, 0], out)
    tma.store_wait(0)
    half.store((dk * logit_scale).to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [batch, head_k, start + WG * 64, 0], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["snb", "snh", "sib", "sih", "siq", "sval", "sbb", "sbh", "sbg", "tokens_k", "tiles"])
def _backward_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc, factors_ptr, units_ptr, sums_ptr, bias_ptr,
    dbias_ptr, num_ptr, idx_ptr, valid_ptr, snb, snh, sib, sih, siq, sval, sbb, sbh, sbg, tokens_k, tiles, scale,
    logit_scale, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr,
    DENSE: gl.constexpr, TAIL: gl.constexpr, VALID: gl.constexpr, BIASED: gl.constexpr, OPERANDS: gl.constexpr,
    EARLY: gl.constexpr, AHEAD: gl.constexpr, EXACT: gl.constexpr, FIXED: gl.constexpr,
    KEY_REGISTERS: gl.constexpr, QUERY_REGISTERS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_desc.block_shape[3]
    BM: gl.constexpr = q_desc.block_shape[2]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [1, 1, 128, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [1, 1, 128, D], v_desc.layout)
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BM, D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 1, BM, D], do_desc.layout)
    rows_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * BM], rows_desc.layout)
    ds_buf = gl.allocate_shared_memory(q_desc.dtype, [BUFFERS, 128, BM], DS)
    PIECES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    scaled_buf = gl.allocate_shared_memory(k_desc.dtype, [D // 64, 128, 64], PIECES)
    header = gl.allocate_shared_memory(gl.int32, [STAGES, 1], WORD)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for at in gl.static_range(BUFFERS):
        mbarrier.init(ds_full.index(at), count=2)
        mbarrier.init(ds_empty.index(at), count=1)
    memory = (k_buf, v_buf, q_buf, do_buf, rows_buf, ds_buf, header, kv_full, full, empty, ds_full, ds_empty)
    config: gl.constexpr = (
        STAGES, BUFFERS, BLOCK_Q, GROUP, DENSE, TAIL or VALID, BIASED, BM, OPERANDS, EARLY, AHEAD, EXACT, FIXED,
    )  # fmt: skip

    block = gl.program_id(0)
    head_k = gl.program_id(1)
    batch = gl.program_id(2)
    start = block * 128
    BYTES: gl.constexpr = 2 * 128 * D * k_desc.dtype.primitive_bitwidth // 8
    mbarrier.expect(kv_full, BYTES)
    tma.async_copy_global_to_shared(k_desc, [batch, head_k, start, 0], kv_full, k_buf)
    tma.async_copy_global_to_shared(v_desc, [batch, head_k, start, 0], kv_full, v_buf)
    exist = gl.minimum(tokens_k - start, 128)
    if VALID:
        exist = gl.minimum(exist, gl.load(valid_ptr + batch * sval + block))
    if DENSE:
        num_at = num_ptr
        idx_at = idx_ptr
    else:
        num_at = num_ptr + batch * snb + block
        idx_at = idx_ptr + batch.to(gl.int64) * sib + block.to(gl.int64) * siq
        idx_at += (head_k * GROUP).to(gl.int64) * sih
    steps = _steps(num_at, head_k, snh, tiles, config)
    gl.warp_specialize(
        [
            (_keys, (dk_desc, dv_desc, bias_ptr, dbias_ptr, sbb, sbh, sbg, exist, tokens_k, steps, scale, logit_scale,
                     memory, config, 0)),
            (_keys, (dk_desc, dv_desc, bias_ptr, dbias_ptr, sbb, sbh, sbg, exist, tokens_k, steps, scale, logit_scale,
                     memory, config, 1)),
            (_queries, (q_desc, do_desc, rows_desc, factors_ptr, units_ptr, sums_ptr, num_at, idx_at, snh, sih, exist,
                        tiles, steps, memory, scaled_buf, config)),
        ],
        [4, 4],
        [KEY_REGISTERS, QUERY_REGISTERS],
    )  # fmt: skip


def _describe_rows(x: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, x.shape[1]], layout)


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
    config: Config | None = None,
    *,
    fixed: bool = True,
    weight: float = 1.125,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients as ``triton.attention_backward`` returns them, for blocks of 128 keys.

    ``fixed``: sums of dQ in fixed point, the same bits from run to run; for bfloat16, in which nothing becomes infinite
    that the bound of a row does not show. Else in float32, in any order.
    """
    batch, heads, tokens_q, dim = q.shape
    heads_k = k.shape[1]
    config = config or CONFIGS[dim]
    facts = geometry(dout, dlse, q, k, v, out, lse, kv_num, kv_idx, q_num, q_idx, k_valid, pooled_k, pooled_v,
                     pooled_bias)  # fmt: skip
    key = facts and number((facts, block_q, block_k, scale, config, fixed, weight))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    padded = -(-tokens_q // 128) * 128
    tall = config.queries
    device = q.device
    rows = torch.empty((batch * heads * padded // tall, 2 * tall), dtype=torch.float32, device=device)
    units = torch.empty((batch * heads * padded,), dtype=torch.float32, device=device) if fixed else None
    sums = torch.empty((batch * heads * padded, dim), dtype=torch.int32 if fixed else torch.float32, device=device)
    listable = -(-k.shape[2] // 128)
    blocks = listable + (0 if pooled_k is None else -(-pooled_k.shape[2] // 128))
    largest = factors = bounds = None
    if fixed:
        largest, factors, bounds = (
            torch.empty((batch, heads_k, n), dtype=torch.int32, device=device)
            for n in (blocks * (dim + 1), dim, blocks * 2)
        )
    if notes is not None:
        for x in (dq, dk, dv, rows, sums, units, largest, factors, bounds):
            if x is not None:
                notes.made(x)

    def extent(first: int):
        def build(keys, values, valid, largest):
            tokens = keys.shape[2]
            args = (keys, values, valid, largest, *_bhs(keys), *_bhs(values), *_strides(valid, (0,)), tokens, first,
                    blocks)  # fmt: skip
            named = dict(DIM=dim, VALID=valid is not None, num_warps=8)
            return (triton.cdiv(tokens, 128), heads_k, batch), args, named

        return build

    def bound(largest, factors, bounds):
        args = (largest, factors, bounds, blocks)
        return (triton.cdiv(blocks, 64), heads_k, batch), args, dict(DIM=dim, SHARE=64, num_warps=4)

    def statistics(out, dout, lse, dlse, bounds, kv_num, kv_idx, rows, units, sums):
        args = (out, dout, lse, dlse, bounds, kv_num, kv_idx, rows, units, sums, *_bhs(out), *_bhs(dout),
                *_strides(kv_num, (0, 1)), *_strides(kv_idx, (0, 1)), kv_idx.stride(2), tokens_q, padded,
                heads // heads_k, listable, blocks, LIMIT / weight)  # fmt: skip
        named = dict(DIM=dim, ROWS=tall, BLOCK_Q=block_q, FIXED=fixed, num_warps=4)
        return (padded // tall, heads, batch), args, named

    def order(sums, units, factors, dq):
        args = (sums, units, factors, dq, *_bhs(dq), tokens_q, padded, heads // heads_k, scale)
        return (triton.cdiv(tokens_q, 64), heads, batch), args, dict(DIM=dim, FIXED=fixed, num_warps=4)

    def gradients(dense: bool):
        def build(q, keys, values, dout, rows, dkeys, dvalues, factors, units, sums, bias, dbias, q_num, q_idx, valid):
            tokens_k = keys.shape[2]
            args = (
                _describe(_addressable(q), tall), _describe(_addressable(keys), 128),
                _describe(_addressable(values), 128), _describe(_addressable(dout), tall), _describe_rows(rows),
                _describe(dkeys, 64), _describe(dvalues, 64), factors, units, sums, bias, dbias, q_num, q_idx, valid,
                *_strides(q_num, (0, 1)), *_strides(q_idx, (0, 1)), q_idx.stride(2), *_strides(valid, (0,)),
                *((0, 0, 0) if bias is None else bias.stride()),
                tokens_k, padded // tall,
                scale * LOG2E.value, scale,
            )  # fmt: skip
            keys_registers, query_registers = config.registers
            named = dict(
                BLOCK_Q=block_q, STAGES=config.stages, BUFFERS=config.buffers, GROUP=heads // heads_k, DENSE=dense,
                TAIL=tokens_k % 128 != 0, VALID=valid is not None, BIASED=bias is not None, OPERANDS=config.operands,
                EARLY=config.early, AHEAD=config.ahead, EXACT=config.exact, FIXED=fixed,
                KEY_REGISTERS=keys_registers, QUERY_REGISTERS=query_registers, num_warps=4,
                maxnreg=_LAUNCH_REGISTERS,
            )  # fmt: skip
            return (triton.cdiv(tokens_k, 128), heads_k, batch), args, named

        return build

    if fixed:
        launch(_extent_kernel, key and (key, False), (k, v, k_valid, largest), extent(0), notes)
        if pooled_k is not None:
            launch(_extent_kernel, key and (key, True), (pooled_k, pooled_v, None, largest), extent(listable), notes)
        launch(_bounds_kernel, key, (largest, factors, bounds), bound, notes)
    launch(
        _statistics_kernel, key, (out, dout, lse, dlse, bounds, kv_num, kv_idx, rows, units, sums), statistics, notes
    )
    listed = (q, k, v, dout, rows, dk, dv, factors, units, sums, None, None, q_num, q_idx, k_valid)
    launch(_backward_kernel, key and (key, False), listed, gradients(False), notes)
    dpk = dpv = dbias = None
    if pooled_k is not None:
        assert pooled_v is not None
        dpk, dpv = torch.empty_like(pooled_k), torch.empty_like(pooled_v)
        if pooled_bias is not None:
            dbias = torch.empty(pooled_bias.shape, dtype=torch.float32, device=q.device)
        if notes is not None:
            for x in (dpk, dpv) if dbias is None else (dpk, dpv, dbias):
                notes.made(x)
        far = (pooled_bias, dbias, q_num, q_idx, None)
        dense = (q, pooled_k, pooled_v, dout, rows, dpk, dpv, factors, units, sums, *far)
        launch(_backward_kernel, key and (key, True), dense, gradients(True), notes)
    launch(_order_kernel, key, (sums, units, factors, dq), order, notes)
    return dq, dk, dv, dpk, dpv, dbias
