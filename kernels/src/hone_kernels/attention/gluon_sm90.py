"""Block-sparse attention forward for Hopper (compute capability 9.x) in Gluon: warp-specialised and persistent.

A program holds one producer warp, which only starts tensor-memory copies, and one or two consumer warpgroups of 64
queries each that share the keys and values it brings. Programs stay for the whole call and claim rows (a block of
queries of one head) from a schedule that two small kernels write first: long rows first, so that no program starts a
long one when the others are done; rows of about one length in the order of their heads, so that programs running side
by side find each other's keys in the L2 cache.

A row's keys come in steps of ``BN``: pooled keys first, then the listed blocks, both from the last to the first. They
make runs, of which only the first step is masked: the listed blocks one, pooled keys one where all biases but those of
the last step are alike, as ``ln n`` of means of n keys is, else one for each step. A bias that is alike is left out of
the logits of its run, and the running maximum is put right behind it. With ``k_valid`` every step is a run: listed ones
are masked unless all of their keys exist, pooled ones always, and these come from the first to the last. Two listed
blocks of 64 keys make one step of 128; one block of 128 keys may make two steps of 64.

Exponentials are base 2 inside (``LOG2E`` is folded into the scale); the log-sum-exp that leaves is natural.

Why nothing waits for ever. Each buffer has a barrier ``full``, at which consumers wait for the producer's copy, and a
barrier ``empty``, at which the producer waits for one arrival of each consumer that reads the buffer. Both sides walk
the same rows and steps: the producer writes row and step count into a header that travels with Q, and every row has a
step (one of zeros, all masked, if it has no key). In each step a consumer waits once for K and once for V and releases
each once; Q and the header it takes and releases once a row. The producer's order is K_0, Q, K_1, V_0, K_2, V_1 ..., a
consumer needs K_0, Q and then, for each step, V_{j-1} and K_j. So whenever the producer waits for the buffer of K_j or
V_j, the consumers hold, or have on its way, all they need to finish step j - stages, which releases it; and when it
waits for Q's buffer, all of the row before is on its way. The last header says -1 and the consumers leave; a program
that gets no row begins with it.
"""

from __future__ import annotations

from collections.abc import Hashable
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

from .triton import LN2, LOG2E, _describable, _descriptor_strides, _strides

__all__ = ["CONFIGS", "Config", "attention_forward", "config_for", "pad_bias", "schedule"]

# Of a header: row (-1: no more), steps over listed blocks, how many keys of the first of them exist.
HEADER_WORDS = gl.constexpr(3)


@dataclass(frozen=True)
class Config:
    """A launch configuration.

    Attributes:
        keys: In a step.
        stages: Buffers of K, and of V.
        q_registers: Hold Q in registers: less shared-memory traffic for ``dim / 4`` registers.
        turns: Two consumers take turns at the matrix units, so that the softmax of one runs under the products of the
            other. Without, they drift apart by themselves.
        claim: Programs claim the next row when they are free; else each takes every n-th.
    """

    keys: int
    stages: int
    q_registers: bool = False
    turns: bool = False
    claim: bool = True


# (head size, queries in a block) -> configuration, measured on an H200 by hone-kernels tune. A block of 128 queries
# takes a multiprocessor to itself, with two consumers; of blocks of 64, with one consumer each, two share it.
CONFIGS: dict[tuple[int, int], Config] = {
    (64, 64): Config(keys=128, stages=2, q_registers=True),
    (64, 128): Config(keys=128, stages=4, q_registers=True, turns=True),
    (128, 64): Config(keys=64, stages=2, q_registers=True),
    (128, 128): Config(keys=128, stages=2, q_registers=True),
}

# Of a running maximum, in base 2: what float32 loses by it is less than what it loses in a logit of that size. The log
# of a number of keys is far below.
LARGEST_SHIFT = tl.constexpr(64.0)

# Rows that a program of the schedule sorts, and length classes: four an octave up to 2**16 blocks.
_SORTED, _CLASSES = 128, 64

# consumers -> registers per thread: at launch, of a consumer, of the producer. The launch has a whole warpgroup per
# producer warp, and the multiprocessor 512 registers for each of 128 threads.
_REGISTERS = {1: (128, 216, 40), 2: (168, 232, 40)}


def config_for(dim: int, block_q: int) -> Config:
    """The configuration for these inputs.

    Args:
        dim: Head size.
        block_q: Queries in a block.
    """
    return CONFIGS[dim, block_q]


@triton.jit
def _length_class(num_ptr, snb, snh, heads, rows, total, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """Rows of this program, their counts, and in ``[ROWS, CLASSES]`` which class each is of: four classes an octave."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num = tl.load(num_ptr + at // (heads * rows) * snb + at // rows % heads * snh + at % rows, mask=at < total, other=0)
    length = tl.minimum((tl.log2(num.to(tl.float32) + 1.0) * 4.0).to(tl.int32), CLASSES - 1)
    member = (length[:, None] == tl.arange(0, CLASSES)[None, :]) & (at < total)[:, None]
    return at, num, length, member.to(tl.int32)


@triton.jit
def _count_kernel(num_ptr, count_ptr, snb, snh, heads, rows, total, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """How many of this program's rows are of each class."""
    _, _, _, member = _length_class(num_ptr, snb, snh, heads, rows, total, ROWS, CLASSES)
    tl.store(count_ptr + tl.program_id(0) * CLASSES + tl.arange(0, CLASSES), tl.sum(member, 0))


@triton.jit
def _schedule_kernel(num_ptr, count_ptr, table_ptr, snb, snh, heads, rows, total, ROWS: tl.constexpr,
                     CLASSES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """A stable counting sort, the longest class first."""
    at, num, length, member = _length_class(num_ptr, snb, snh, heads, rows, total, ROWS, CLASSES)
    classes = tl.arange(0, CLASSES)
    every = tl.zeros([CLASSES], tl.int32)
    before = tl.zeros([CLASSES], tl.int32)  # of the programs before this one
    for start in range(0, tl.num_programs(0), CHUNK):
        program = start + tl.arange(0, CHUNK)
        known = (program < tl.num_programs(0))[:, None]
        counts = tl.load(count_ptr + program[:, None] * CLASSES + classes[None, :], mask=known, other=0)
        every += tl.sum(counts, 0)
        before += tl.sum(tl.where((program < tl.program_id(0))[:, None], counts, 0), 0)
    longer = tl.sum(tl.where(classes[:, None] > classes[None, :], every[:, None], 0), 0)
    place = tl.sum(member * (longer + before)[None, :], 1)
    local = tl.arange(0, ROWS)
    place += tl.sum(((length[:, None] == length[None, :]) & (local[:, None] > local[None, :])).to(tl.int32), 1)
    tl.store(table_ptr + 2 * place, at, mask=at < total)
    tl.store(table_ptr + 2 * place + 1, num, mask=at < total)
    if tl.program_id(0) == 0:
        tl.store(table_ptr + 2 * total, 0)


@triton.jit
def _bias_kernel(bias_ptr, padded_ptr, sbb, sbh, sbg, heads, pooled, steps, BIASED: tl.constexpr, BN: tl.constexpr):
    """Bias in base 2, minus infinity behind its end, so that loads of whole steps need no mask.

    Behind it comes what all are but those of the last step, if they are one number that a maximum can be shifted by and
    lose nothing that counts, else NaN.
    """
    row = tl.program_id(0)
    padded_ptr += row.to(tl.int64) * (steps * BN + 1)
    low = tl.full([BN], float("inf"), tl.float32)
    high = -low
    for step in range(steps):
        at = step * BN + tl.arange(0, BN)
        bias = tl.zeros([BN], tl.float32)
        if BIASED:
            place = row // heads * sbb + row % heads * sbh + at * sbg
            bias = tl.load(bias_ptr + place, mask=at < pooled, other=0.0) * LOG2E
        bias = tl.where(at < pooled, bias, -float("inf"))
        tl.store(padded_ptr + at, bias)
        if step < steps - 1:
            low = tl.minimum(low, bias, tl.PropagateNan.ALL)
            high = tl.maximum(high, bias, tl.PropagateNan.ALL)
    least, most = tl.min(low, 0), tl.max(high, 0)
    alike = (least == most) & (tl.abs(least) < LARGEST_SHIFT) & (tl.sum((low == low).to(tl.int32), 0) == BN)
    tl.store(padded_ptr + steps * BN, tl.where(alike, least, float("nan")))


# One lane takes the next number for its warp. Assembly, since a scalar atomic of Triton would go through shared memory.
# Each row takes one number, so the counter, which wraps around at that many, is 0 again at the end of the launch. One
# less is worked out in here, where it takes no register from the loop.
_CLAIM = gl.constexpr(
    "{ .reg .pred first; .reg .b32 lane, old, last; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; "
    "mov.b32 old, 0; sub.u32 last, $2, 1; @first atom.global.gpu.relaxed.inc.u32 old, [$1], last; "
    "shfl.sync.idx.b32 $0, old, 0, 31, 0xffffffff; }"
)


@gluon.jit
def _claim_row(counter, total):
    arguments = [counter.to(gl.int64), total]
    return gl.inline_asm_elementwise(_CLAIM, "=r,l,r", arguments, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _named_barrier(operation: gl.constexpr, number: gl.constexpr):
    """Of the 256 threads of both consumers. Numbers 8 and 9 are clear of those that Triton gives out."""
    code: gl.constexpr = operation + " " + number + ", 256; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(code, "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _turn_begin(TURNS: gl.constexpr, WG: gl.constexpr):
    """Wait for this consumer's turn at the matrix units.

    Consumer 1 gives consumer 0 its first turn before any row. From then on each gives the other one turn at the end of
    each of its own, and both take one a step, so neither waits for a turn that is not to come.
    """
    if TURNS:
        _named_barrier("bar.sync", "8" if WG == 0 else "9")


@gluon.jit
def _turn_end(TURNS: gl.constexpr, WG: gl.constexpr):
    if TURNS:
        _named_barrier("bar.arrive", "9" if WG == 0 else "8")


@gluon.jit
def _put(memory, value):
    memory.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def _get(memory):
    return gl.max(memory.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _place(tile, heads, rows):
    """Batch, head, and row of the head."""
    return tile // (heads * rows), tile // rows % heads, tile % rows


@gluon.jit
def _first_key(list_ptr, step, pooled_steps, listed, num, tokens_k, HALF: gl.constexpr, BN: gl.constexpr,
               BLOCK_K: gl.constexpr, POOLED: gl.constexpr, VALID: gl.constexpr):  # fmt: skip
    """First key of a step, or of a half of one that holds two blocks; past the end, where zeros come, if there is none.

    Steps past the last one have none, so they may be asked for ahead. With ``k_valid``, where every pooled step is
    masked, pooled keys come from the first to the last, which takes fewer registers.
    """
    back = listed - 1 - (step - pooled_steps)
    if BN > BLOCK_K:
        at = back * 2 + HALF
        inside = (back >= 0) & (at < num)
        first = gl.load(list_ptr + at, mask=inside, other=0) * BLOCK_K
    else:
        SUB: gl.constexpr = BLOCK_K // BN
        at = back // SUB
        inside = (back >= 0) & (at < num)
        first = gl.load(list_ptr + at, mask=inside, other=0) * BLOCK_K + back % SUB * BN
    first = gl.where(inside, first, tokens_k)
    if POOLED:
        if VALID:
            first = gl.where(step < pooled_steps, step * BN + HALF * BLOCK_K, first)
        elif BN > BLOCK_K:  # with what is known already: the producer has few registers
            first = gl.where(back >= listed, (back - listed) * BN + HALF * BLOCK_K, first)
        else:
            first = gl.where(step < pooled_steps, (pooled_steps - 1 - step) * BN, first)
    return first


@gluon.jit
def _copy(desc, batch, head, first, second, buffer, full):
    """Start the copies of a step's keys or values: one, or one for each half."""
    ROWS: gl.constexpr = desc.block_shape[2]
    tma.async_copy_global_to_shared(desc, [batch, head, first, 0], full, buffer.slice(0, ROWS, dim=2))
    if buffer.shape[2] > ROWS:
        tma.async_copy_global_to_shared(desc, [batch, head, second, 0], full, buffer.slice(ROWS, ROWS, dim=2))


@gluon.jit
def _fill(desc, pooled_desc, is_pooled, batch, head, first, second, buffers, full, empty, turn, STAGES: gl.constexpr,
          POOLED: gl.constexpr):  # fmt: skip
    """Copy a step's keys or values into their buffer once it is empty."""
    at = turn % STAGES
    BYTES: gl.constexpr = buffers.shape[3] * buffers.shape[4] * buffers.dtype.primitive_bitwidth // 8
    mbarrier.wait(empty.index(at), (turn // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(at), BYTES)
    if POOLED:
        if is_pooled:
            _copy(pooled_desc, batch, head, first, second, buffers.index(at), full.index(at))
        else:
            _copy(desc, batch, head, first, second, buffers.index(at), full.index(at))
    else:
        _copy(desc, batch, head, first, second, buffers.index(at), full.index(at))


@gluon.jit
def _existing(valid_ptr, first, tokens_k, BLOCK_K: gl.constexpr):
    """How many keys of a block exist from ``first`` on; none, or less, past the end."""
    valid = gl.load(valid_ptr + first // BLOCK_K, mask=first < tokens_k, other=0)
    return gl.minimum(valid - first % BLOCK_K, tokens_k - first)


@gluon.jit
def _fill_limits(valid_ptr, first, second, tokens_k, limits, full, empty, turn, BN: gl.constexpr,
                 BLOCK_K: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Write beside the buffer of K, under its barriers, how many of the keys exist. A pooled step's do not count."""
    at = turn % STAGES
    low = _existing(valid_ptr, first, tokens_k, BLOCK_K)
    mbarrier.wait(empty.index(at), (turn // STAGES & 1) ^ 1)
    _put(limits.index(2 * at), low)
    if BN > BLOCK_K:
        _put(limits.index(2 * at + 1), _existing(valid_ptr, second, tokens_k, BLOCK_K))
    mbarrier.arrive(full.index(at))


@gluon.jit
def _producer(q_desc, k_desc, v_desc, pk_desc, pv_desc, table_ptr, idx_ptr, valid_ptr, sib, sih, siq, sval, tokens_k,
              total, sizes, memory, config: gl.constexpr):  # fmt: skip
    q_buf, k_buf, v_buf, header, limits, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    pooled_steps, heads, rows = sizes
    BLOCK_K: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    CONSUMERS: gl.constexpr = config[2]
    GROUP: gl.constexpr = config[3]
    VALID: gl.constexpr = config[4]
    POOLED: gl.constexpr = config[5]
    CLAIM: gl.constexpr = config[8]
    BN: gl.constexpr = k_buf.shape[3]
    Q_BYTES: gl.constexpr = q_buf.shape[3] * q_buf.shape[4] * q_buf.dtype.primitive_bitwidth // 8
    turn = 0
    row_turn = 0
    place = gl.program_id(0)
    tile = gl.load(table_ptr + 2 * place)
    num = gl.load(table_ptr + 2 * place + 1)
    while place < total:
        batch, head, row = _place(tile, heads, rows)
        head_k = head // GROUP
        list_ptr = idx_ptr + batch.to(gl.int64) * sib + head.to(gl.int64) * sih + row.to(gl.int64) * siq
        # Only the last listed block can be the ragged one: lists ascend.
        last = gl.load(list_ptr + gl.maximum(num - 1, 0), mask=num > 0, other=0)
        keys = gl.minimum(tokens_k - last * BLOCK_K, BLOCK_K)
        if BN > BLOCK_K:
            listed = (num + 1) // 2
            keys += (1 - num % 2) * BLOCK_K
        else:
            listed = num * (BLOCK_K // BN) - (BLOCK_K - keys) // BN
            keys = (keys - 1) % BN + 1
        listed = gl.where(num > 0, listed, 0 if POOLED else 1)
        keys = gl.where(num > 0, keys, 0)
        steps = listed
        if POOLED:
            steps += pooled_steps

        first = _first_key(list_ptr, 0, pooled_steps, listed, num, tokens_k, 0, BN, BLOCK_K, POOLED, VALID)
        second = _first_key(list_ptr, 0, pooled_steps, listed, num, tokens_k, 1, BN, BLOCK_K, POOLED, VALID)
        # Indices are read two steps ahead of the copies that need them.
        first_1 = _first_key(list_ptr, 1, pooled_steps, listed, num, tokens_k, 0, BN, BLOCK_K, POOLED, VALID)
        second_1 = _first_key(list_ptr, 1, pooled_steps, listed, num, tokens_k, 1, BN, BLOCK_K, POOLED, VALID)
        if VALID:
            valid_at = valid_ptr + batch.to(gl.int64) * sval
            _fill_limits(valid_at, first, second, tokens_k, limits, k_full, k_empty, turn, BN, BLOCK_K, STAGES)
        _fill(k_desc, pk_desc, pooled_steps > 0, batch, head_k, first, second, k_buf, k_full, k_empty, turn, STAGES,
              POOLED)  # fmt: skip
        for wg in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(wg), (row_turn & 1) ^ 1)
            _put(header.index(HEADER_WORDS * wg), tile)
            _put(header.index(HEADER_WORDS * wg + 1), listed)
            _put(header.index(HEADER_WORDS * wg + 2), keys)
            mbarrier.arrive(q_full.index(wg))
            mbarrier.expect(q_full.index(wg), Q_BYTES)
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, (row * CONSUMERS + wg) * 64, 0], q_full.index(wg), q_buf.index(wg)
            )
        row_turn += 1

        if CLAIM:
            place = gl.num_programs(0) + _claim_row(table_ptr + 2 * total, total)
        else:
            place += gl.num_programs(0)
        tile = gl.load(table_ptr + 2 * place, mask=place < total, other=0)
        num_next = gl.load(table_ptr + 2 * place + 1, mask=place < total, other=0)
        for step in range(1, steps):
            first_2 = _first_key(list_ptr, step + 1, pooled_steps, listed, num, tokens_k, 0, BN, BLOCK_K, POOLED, VALID)
            second_2 = _first_key(
                list_ptr, step + 1, pooled_steps, listed, num, tokens_k, 1, BN, BLOCK_K, POOLED, VALID
            )
            if VALID:
                _fill_limits(valid_at, first_1, second_1, tokens_k, limits, k_full, k_empty, turn + 1, BN, BLOCK_K,
                             STAGES)  # fmt: skip
            _fill(k_desc, pk_desc, step < pooled_steps, batch, head_k, first_1, second_1, k_buf, k_full, k_empty,
                  turn + 1, STAGES, POOLED)  # fmt: skip
            _fill(v_desc, pv_desc, step <= pooled_steps, batch, head_k, first, second, v_buf, v_full, v_empty, turn,
                  STAGES, POOLED)  # fmt: skip
            first, second, first_1, second_1 = first_1, second_1, first_2, second_2
            turn += 1
        _fill(v_desc, pv_desc, steps <= pooled_steps, batch, head_k, first, second, v_buf, v_full, v_empty, turn,
              STAGES, POOLED)  # fmt: skip
        turn += 1
        num = num_next
    for wg in gl.static_range(CONSUMERS):
        mbarrier.wait(q_empty.index(wg), (row_turn & 1) ^ 1)
        _put(header.index(HEADER_WORDS * wg), -1)
        mbarrier.arrive(q_full.index(wg), count=2)


@gluon.jit
def _offsets(is_pooled, bias_at, keys, limits, stage, LAYOUT: gl.constexpr, BN: gl.constexpr, BLOCK_K: gl.constexpr,
             VALID: gl.constexpr, POOLED: gl.constexpr):  # fmt: skip
    """What is added to the logits of a step, ``[BN]``: minus infinity where no key is, a pooled key's bias, or zero."""
    column = gl.arange(0, BN, LAYOUT)
    if VALID:
        exists = column < _get(limits.index(2 * stage))
        if BN > BLOCK_K:
            high = column - BLOCK_K
            exists = gl.where(high < 0, exists, high < _get(limits.index(2 * stage + 1)))
    else:
        exists = column < keys
    offsets = gl.where(exists, 0.0, -float("inf"))
    if POOLED:
        offsets = gl.where(is_pooled, gl.load(bias_at + column, mask=is_pooled, other=0.0), offsets)
    return offsets


@gluon.jit
def _whole(limits, stage, BN: gl.constexpr, BLOCK_K: gl.constexpr):
    """Whether all keys of a listed step exist, with ``k_valid``."""
    if BN > BLOCK_K:
        return (_get(limits.index(2 * stage)) >= BLOCK_K) & (_get(limits.index(2 * stage + 1)) >= BLOCK_K)
    else:
        return _get(limits.index(2 * stage)) >= BN


@gluon.jit
def _softmax(s, offsets, top, scale, MASKED: gl.constexpr):
    """Weights of a step ``[64, BN]``, the new running maximum of the scaled logits, how far the old one fades."""
    if MASKED:
        s = s * scale + offsets[None, :]
        new = gl.maximum(top, gl.max(s, 1))
        # A row that has met no key yet would compute inf - inf.
        shift = gl.where(new == -float("inf"), 0.0, new)
        p = gl.exp2(s - shift[:, None])
    else:
        new = gl.maximum(top, gl.max(s, 1) * scale)
        shift = new
        p = gl.exp2(s * scale - shift[:, None])
    return p, new, gl.exp2(top - shift)


@gluon.jit
def _thread_sums(p):
    """Sums over the columns that one thread holds, ``8 i + 2 (lane % 4) + b``: ``[64, 4]``, without a shuffle."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _products(weights, q, acc, no_logits, k_buf, v_buf, k_full, v_full, turn, STAGES: gl.constexpr,
              TURNS: gl.constexpr, WG: gl.constexpr):  # fmt: skip
    """Weights of one step times its values, queries times the keys of the next: issued together, awaited together.

    Both are awaited before the softmax: what runs beside it is the other consumer's products. Nothing may be converted
    to the next weights before, since the running product still reads the registers of these.
    """
    BN: gl.constexpr = k_buf.shape[3]
    D: gl.constexpr = k_buf.shape[4]
    ahead = turn + 1
    mbarrier.wait(v_full.index(turn % STAGES), turn // STAGES & 1)
    _turn_begin(TURNS, WG)
    acc = warpgroup_mma(weights, v_buf.index(turn % STAGES).reshape([BN, D]), acc, is_async=True)
    mbarrier.wait(k_full.index(ahead % STAGES), ahead // STAGES & 1)
    keys_t = k_buf.index(ahead % STAGES).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q, keys_t, no_logits, use_acc=False, is_async=True)
    _turn_end(TURNS, WG)
    s, acc = warpgroup_mma_wait(0, deps=(s, acc))
    return s, acc


@gluon.jit
def _weigh(s, offsets, top, sums, acc, scale, dtype: gl.constexpr, MASKED: gl.constexpr,
           FIRST: gl.constexpr = False):  # fmt: skip
    """Logits of one step to weights, an operand of the product with V; the sums before it fade."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    p, top, fade = _softmax(s, offsets, top, scale, MASKED)
    if FIRST:
        sums = _thread_sums(p)
    else:
        sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, sums.type.layout))[:, None] + _thread_sums(p)
        acc *= gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(p.to(dtype), WEIGHTS), top, sums, acc


@gluon.jit
def _first_logits(q, no_logits, k_buf, k_full, turn, STAGES: gl.constexpr, TURNS: gl.constexpr, WG: gl.constexpr):
    """Queries times the keys of a row's first step."""
    BN: gl.constexpr = k_buf.shape[3]
    D: gl.constexpr = k_buf.shape[4]
    mbarrier.wait(k_full.index(turn % STAGES), turn // STAGES & 1)
    _turn_begin(TURNS, WG)
    keys_t = k_buf.index(turn % STAGES).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q, keys_t, no_logits, use_acc=False, is_async=True)
    _turn_end(TURNS, WG)
    return warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def _run(s, offsets, shift, length, more, q, top, sums, acc, no_logits, turn, scale, buffers, whole,
         STAGES: gl.constexpr, TURNS: gl.constexpr, Q_REGISTERS: gl.constexpr, WG: gl.constexpr, FIRST: gl.constexpr,
         VALID: gl.constexpr):  # fmt: skip
    """A run of steps: the first is masked by ``offsets``, the others are whole; with ``k_valid`` the first may be, too.

    ``s`` are the logits of its first step, and what comes back the next run's, if there is ``more``. ``shift`` is what
    all of its logits are short of, in base 2.
    """
    k_buf, v_buf, k_full, k_empty, v_full, v_empty, q_empty = buffers
    BN: gl.constexpr = k_buf.shape[3]
    D: gl.constexpr = k_buf.shape[4]
    mbarrier.arrive(k_empty.index(turn % STAGES))
    if not FIRST:
        top -= shift
    if VALID:
        if whole:
            weights, top, sums, acc = _weigh(s, None, top, sums, acc, scale, v_buf.dtype, False)
        else:
            weights, top, sums, acc = _weigh(s, offsets, top, sums, acc, scale, v_buf.dtype, True)
    else:
        weights, top, sums, acc = _weigh(s, offsets, top, sums, acc, scale, v_buf.dtype, True, FIRST)
    for _ in range(1, length):
        s, acc = _products(weights, q, acc, no_logits, k_buf, v_buf, k_full, v_full, turn, STAGES, TURNS, WG)
        turn += 1
        mbarrier.arrive(k_empty.index(turn % STAGES))
        mbarrier.arrive(v_empty.index((turn - 1) % STAGES))
        weights, top, sums, acc = _weigh(s, None, top, sums, acc, scale, v_buf.dtype, False)
    if not FIRST:
        top += shift
    if more:
        s, acc = _products(weights, q, acc, no_logits, k_buf, v_buf, k_full, v_full, turn, STAGES, TURNS, WG)
    else:
        if not Q_REGISTERS:
            mbarrier.arrive(q_empty.index(WG))
        mbarrier.wait(v_full.index(turn % STAGES), turn // STAGES & 1)
        acc = warpgroup_mma(weights, v_buf.index(turn % STAGES).reshape([BN, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        s = no_logits
    mbarrier.arrive(v_empty.index(turn % STAGES))
    return s, top, sums, acc, turn + 1


@gluon.jit
def _store_row(acc, sums, top, out_desc, out_buf, lse_ptr, batch, head, heads, row, tokens_q,
               CONSUMERS: gl.constexpr, WG: gl.constexpr):  # fmt: skip
    """Output and log-sum-exp of this consumer's 64 queries of a row; the copy of the output is under way then."""
    LOGIT_ROWS: gl.constexpr = top.type.layout
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    weight = gl.convert_layout(gl.sum(sums, 1), LOGIT_ROWS)
    some = weight != 0.0  # so that NaN stays NaN
    weight = gl.where(some, weight, 1.0)
    out = acc * gl.convert_layout(gl.where(some, 1.0 / weight, 0.0), OUT_ROWS)[:, None]
    start = (row * CONSUMERS + WG) * 64
    tma.store_wait(0)  # until the row before has left the buffer
    out_buf.reshape([64, acc.shape[1]]).store(out.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [batch, head, start, 0], out_buf)
    at = start + gl.arange(0, 64, LOGIT_ROWS)
    lse = gl.where(some, (top + gl.log2(weight)) * LN2, -float("inf"))
    gl.store(lse_ptr + (batch.to(gl.int64) * heads + head) * tokens_q + at, lse, mask=at < tokens_q)


@gluon.jit
def _consumer(out_desc, lse_ptr, bias_ptr, out_buf, tokens_q, scale, sizes, memory, config: gl.constexpr,
              WG: gl.constexpr):  # fmt: skip
    q_buf, k_buf, v_buf, header, limits, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    pooled_steps, heads, rows = sizes
    BLOCK_K: gl.constexpr = config[0]
    STAGES: gl.constexpr = config[1]
    CONSUMERS: gl.constexpr = config[2]
    GROUP: gl.constexpr = config[3]
    VALID: gl.constexpr = config[4]
    POOLED: gl.constexpr = config[5]
    Q_REGISTERS: gl.constexpr = config[6]
    TURNS: gl.constexpr = config[7]
    BN: gl.constexpr = k_buf.shape[3]
    D: gl.constexpr = k_buf.shape[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LOGIT_ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    ONCE: gl.constexpr = not (POOLED or VALID)
    if TURNS and WG == 1:
        _named_barrier("bar.arrive", "8")
    no_logits = gl.zeros([64, BN], gl.float32, LOGITS)
    buffers = (k_buf, v_buf, k_full, k_empty, v_full, v_empty, q_empty)
    turn = 0
    row_turn = 0
    mbarrier.wait(q_full.index(WG), 0)
    tile = _get(header.index(HEADER_WORDS * WG))
    while tile >= 0:
        listed = _get(header.index(HEADER_WORDS * WG + 1))
        keys = _get(header.index(HEADER_WORDS * WG + 2))
        batch, head, row = _place(tile, heads, rows)
        q = q_buf.index(WG).reshape([64, D])
        if Q_REGISTERS:
            q = q.load(gl.DotOperandLayout(0, LOGITS, 2))
            fence_async_shared()
            mbarrier.arrive(q_empty.index(WG))
        steps = listed
        bias_at = bias_ptr
        if POOLED:
            steps += pooled_steps
            bias_at += (batch * (heads // GROUP) + head // GROUP).to(gl.int64) * (pooled_steps * BN + 1)
            if not VALID:
                bias_at += (pooled_steps - 1) * BN

        s = _first_logits(q, no_logits, k_buf, k_full, turn, STAGES, TURNS, WG)
        top = gl.full([64], -float("inf"), gl.float32, LOGIT_ROWS)
        sums = _thread_sums(no_logits)
        acc = gl.zeros([64, D], gl.float32, OUT)
        runs = 1
        if VALID:
            runs = steps
            pooled_runs = pooled_steps
        elif POOLED:
            shift = gl.load(bias_at + BN)
            alike = shift == shift
            pooled_runs = gl.where(alike, 1, pooled_steps)
            runs = pooled_runs + gl.minimum(listed, 1)
        for run in range(runs):
            is_pooled = False
            if POOLED:
                is_pooled = run < pooled_runs
            offsets = _offsets(is_pooled, bias_at, keys, limits, turn % STAGES, COLUMNS, BN, BLOCK_K, VALID, POOLED)
            base = 0.0
            length = steps
            whole = False
            if VALID:
                length = 1
                whole = _whole(limits, turn % STAGES, BN, BLOCK_K)
                if POOLED:
                    whole = whole & (run >= pooled_runs)
            elif POOLED:
                base = gl.where(is_pooled & alike, shift, 0.0)
                offsets -= base
                length = gl.where(is_pooled, gl.where(alike, pooled_steps, 1), listed)
            if POOLED:
                bias_at += BN if VALID else -BN
            s, top, sums, acc, turn = _run(s, offsets, base, length, run + 1 < runs, q, top, sums, acc, no_logits, turn,
                                           scale, buffers, whole, STAGES, TURNS, Q_REGISTERS, WG, ONCE,
                                           VALID)  # fmt: skip

        _store_row(acc, sums, top, out_desc, out_buf, lse_ptr, batch, head, heads, row, tokens_q, CONSUMERS, WG)
        row_turn += 1
        mbarrier.wait(q_full.index(WG), row_turn & 1)
        tile = _get(header.index(HEADER_WORDS * WG))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "sib", "sih", "siq", "sval", "tokens_q", "tokens_k", "pooled_steps", "heads", "rows", "total",
    ],
    # Wide loads of the bias want their registers in order, which at head size 128 makes others spill.
    do_not_specialize_on_alignment=["bias_ptr"],
)  # fmt: skip
def _forward_kernel(
    q_desc, k_desc, v_desc, pk_desc, pv_desc, out_desc, bias_ptr, lse_ptr, table_ptr, idx_ptr, valid_ptr,
    sib, sih, siq, sval,
    tokens_q, tokens_k, pooled_steps, heads, rows, total, scale,
    BLOCK_K: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr,
    VALID: gl.constexpr, POOLED: gl.constexpr, Q_REGISTERS: gl.constexpr, TURNS: gl.constexpr, CLAIM: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_desc.block_shape[3]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, 64, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    header = gl.allocate_shared_memory(gl.int32, [CONSUMERS * HEADER_WORDS, 1], WORD)
    limits = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], WORD)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for wg in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(wg), count=2)  # the header and the copy
        mbarrier.init(q_empty.index(wg), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=2 if VALID else 1)  # (the limits and) the copy
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    memory = (q_buf, k_buf, v_buf, header, limits, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (pooled_steps, heads, rows)
    config: gl.constexpr = (BLOCK_K, STAGES, CONSUMERS, GROUP, VALID, POOLED, Q_REGISTERS, TURNS, CLAIM)
    out_0 = gl.allocate_shared_memory(out_desc.dtype, [1, 1, 64, D], out_desc.layout)
    # Constants stay constants in a tuple only where the call makes it.
    if CONSUMERS == 2:
        out_1 = gl.allocate_shared_memory(out_desc.dtype, [1, 1, 64, D], out_desc.layout)
        gl.warp_specialize(
            [
                (_consumer, (out_desc, lse_ptr, bias_ptr, out_0, tokens_q, scale, sizes, memory, config, 0)),
                (_consumer, (out_desc, lse_ptr, bias_ptr, out_1, tokens_q, scale, sizes, memory, config, 1)),
                (_producer, (q_desc, k_desc, v_desc, pk_desc, pv_desc, table_ptr, idx_ptr, valid_ptr, sib, sih, siq,
                             sval, tokens_k, total, sizes, memory, config)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (out_desc, lse_ptr, bias_ptr, out_0, tokens_q, scale, sizes, memory, config, 0)),
                (_producer, (q_desc, k_desc, v_desc, pk_desc, pv_desc, table_ptr, idx_ptr, valid_ptr, sib, sih, siq,
                             sval, tokens_k, total, sizes, memory, config)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _addressable(x: Tensor) -> Tensor:
    """``x``, or a copy where the copy engine cannot address it."""
    # A clone even of what is contiguous: its base may be the reason.
    return x if _describable(x) else x.clone(memory_format=torch.contiguous_format)


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    dim = x.shape[3]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), _descriptor_strides(x), [1, 1, rows, dim], layout)


def schedule(kv_num: Tensor, batch: int, heads: int, key: Hashable | None = None, notes: Notes | None = None) -> Tensor:
    """The order in which rows are computed.

    Args:
        kv_num: ``[B or 1, H or 1, NQ]`` int32, key blocks of each row.
        batch: B.
        heads: H.
        key: Of the call, see ``launch``.
        notes: Where to take it down.

    Returns:
        ``[B * H * NQ + 1, 2]`` int32: row ``(b * H + h) * NQ + i`` and its count; behind them the counter from which
        the programs claim, 0.
    """
    rows = kv_num.shape[2]
    total = batch * heads * rows
    programs = -(-total // _SORTED)
    table = torch.empty((total + 1, 2), dtype=torch.int32, device=kv_num.device)
    counts = torch.empty((programs, _CLASSES), dtype=torch.int32, device=kv_num.device)
    shape = dict(ROWS=_SORTED, CLASSES=_CLASSES, num_warps=4)

    def sizes(kv_num: Tensor) -> tuple[int, ...]:
        return (*_strides(kv_num, (0, 1)), heads, rows, total)

    def count(kv_num, counts):
        return (programs,), (kv_num, counts, *sizes(kv_num)), shape

    def sort(kv_num, counts, table):
        return (programs,), (kv_num, counts, table, *sizes(kv_num)), dict(CHUNK=16, **shape)

    if notes is not None:
        notes.made(table)
        notes.made(counts)
    launch(_count_kernel, key, (kv_num, counts), count, notes)
    launch(_schedule_kernel, key, (kv_num, counts, table), sort, notes)
    return table


def pad_bias(
    bias: Tensor | None,
    pooled: Tensor,
    keys: int,
    key: Hashable | None = None,
    notes: Notes | None = None,
) -> Tensor:
    """Bias of whole steps of pooled keys, ``[B, HK, ceil(G / keys) * keys + 1]`` float32, base 2: see the kernel."""
    batch, heads, groups = pooled.shape[:3]
    steps = -(-groups // keys)
    padded = torch.empty((batch, heads, steps * keys + 1), dtype=torch.float32, device=pooled.device)

    def build(padded, bias):
        strides = (0, 0, 0) if bias is None else bias.stride()
        args = (bias, padded, *strides, heads, groups, steps)
        return (batch * heads,), args, dict(BIASED=bias is not None, BN=keys, num_warps=1)

    if notes is not None:
        notes.made(padded)
    launch(_bias_kernel, key, (padded, bias), build, notes)
    return padded


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
    config: Config | None = None,
    *,
    table: Tensor | None = None,
    bias: Tensor | None = None,
    key: Hashable | None = None,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor]:
    """Output in q's strides and natural log-sum-exp ``[B, H, TQ]`` float32; arguments as the public op's.

    ``table`` is ``schedule``'s, if it is there already. The launch counts in it and leaves it as it was, so that those
    that share it must follow one another. ``bias`` is ``pad_bias``'s of the pooled keys, likewise. ``key`` and
    ``notes`` are for ``launch``.
    """
    batch, heads, tokens_q, dim = q.shape
    if key is None:
        facts = geometry(q, k, v, kv_num, kv_idx, k_valid, pooled_k, pooled_v, pooled_bias)
        key = facts and number((facts, block_q, block_k, scale, config))
    config = config or config_for(dim, block_q)
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q.device)
    if table is None:
        table = schedule(kv_num, batch, heads, key, notes)
    if pooled_k is not None and bias is None:
        bias = pad_bias(pooled_bias, pooled_k, config.keys, key, notes)
    if notes is not None:
        notes.made(out)
        notes.made(lse)

    def build(q, k, v, pooled_k, pooled_v, out, bias, lse, table, kv_num, kv_idx, k_valid):
        consumers = block_q // 64
        registers, consumer, producer = _REGISTERS[consumers]
        total = table.shape[0] - 1
        # At head size 128 masks and biases need the registers.
        masked = k_valid is not None or pooled_k is not None
        q_registers = config.q_registers and not (masked and dim == 128 and consumers == 2)
        tall = min(config.keys, block_k)
        steps = 0 if bias is None else bias.shape[2] // config.keys
        pooled_descs = [None, None]
        if pooled_k is not None:
            pooled_descs = [_describe(_addressable(x), tall) for x in (pooled_k, pooled_v)]
        args = (
            _describe(_addressable(q), 64), _describe(_addressable(k), tall), _describe(_addressable(v), tall),
            *pooled_descs, _describe(out, 64), bias, lse, table, kv_idx, k_valid,
            *_strides(kv_idx, (0, 1)), kv_idx.stride(2), *_strides(k_valid, (0,)),
            tokens_q, k.shape[2], steps, heads, kv_num.shape[2], total, scale * LOG2E.value,
        )  # fmt: skip
        named = dict(
            BLOCK_K=block_k, BN=config.keys, STAGES=config.stages, CONSUMERS=consumers, GROUP=heads // k.shape[1],
            VALID=k_valid is not None, POOLED=bias is not None, Q_REGISTERS=q_registers,
            TURNS=config.turns and consumers == 2, CLAIM=config.claim, CONSUMER_REGISTERS=consumer,
            PRODUCER_REGISTERS=producer, num_warps=4, maxnreg=registers,
        )  # fmt: skip
        return (min(total, _multiprocessors(q) * (2 // consumers)),), args, named

    tensors = (q, k, v, pooled_k, pooled_v, out, bias, lse, table, kv_num, kv_idx, k_valid)
    launch(_forward_kernel, key, tensors, build, notes)
    return out, lse
