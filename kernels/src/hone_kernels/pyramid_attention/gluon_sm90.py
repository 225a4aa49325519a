"""Attention over a pyramid of keys for Hopper (compute capability 9.x) in Gluon: the forward.

It is the kernel of ``attention.gluon_sm90``, with its schedule, barriers and order of steps, but for what a
step holds: 128 keys of one level. At level ``l`` these are ``2 ** l`` entries of the row's list, of ``128 >> l``
consecutive keys each, which the producer brings by as many copies under one barrier. Beside the keys it leaves a word:
the level, which is what their weight ``2 ** l`` adds to the logits in base 2, and how many of the keys exist. The level
costs two additions a row and step. The last step of a level, which may not be full, is its first to be computed; where
entries are missing the last one is copied again, and masked.

A step's word is written before its barrier ``k_full`` completes and read before ``k_empty`` is given back, so the
argument there why nothing waits for ever holds here too.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
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

from hone_kernels.attention.gluon_sm90 import (
    _REGISTERS,
    HEADER_WORDS,
    Config,
    _addressable,
    _claim_row,
    _describe,
    _get,
    _multiprocessors,
    _named_barrier,
    _place,
    _products,
    _put,
    _thread_sums,
    _turn_begin,
    _turn_end,
    config_for,
    schedule,
)
from hone_kernels.attention.triton import LN2, LOG2E
from hone_kernels.launch import geometry, launch, number

__all__ = ["attention_forward"]

BLOCK = gl.constexpr(128)
"""Keys of an entry at level 0, and of every step."""


@gluon.jit
def _step_of(step, num_0, num_1, num_2, num_3):
    """Level of a step, first and last place in the row's list of its entries, and how many keys of the level remain.

    Coarse levels come first, and of each its last step. At level 0 what remains does not know of a short last block.
    """
    end_3 = (num_3 + 7) // 8
    end_2 = end_3 + (num_2 + 3) // 4
    end_1 = end_2 + (num_1 + 1) // 2
    end_0 = end_1 + num_0
    level = gl.where(step < end_1, 1, 0)
    end = gl.where(step < end_1, end_1, end_0)
    begin = gl.where(step < end_1, num_0, 0)
    num = gl.where(step < end_1, num_1, num_0)
    level = gl.where(step < end_2, 2, level)
    end = gl.where(step < end_2, end_2, end)
    begin = gl.where(step < end_2, num_0 + num_1, begin)
    num = gl.where(step < end_2, num_2, num)
    level = gl.where(step < end_3, 3, level)
    end = gl.where(step < end_3, end_3, end)
    begin = gl.where(step < end_3, num_0 + num_1 + num_2, begin)
    num = gl.where(step < end_3, num_3, num)
    done = (end - 1 - step) << level
    exist = (num - done) * (BLOCK >> level)
    return level, begin + done, begin + num - 1, exist


@gluon.jit
def _copy_entries(desc, batch, head, entries, offset, buffer, full):
    """Start the copies of a step's keys or values at one level above 0."""
    ROWS: gl.constexpr = desc.block_shape[2]
    for u in gl.static_range(BLOCK // ROWS):
        first = offset + entries[u] * ROWS
        tma.async_copy_global_to_shared(desc, [batch, head, first, 0], full, buffer.slice(u * ROWS, ROWS, dim=2))


@gluon.jit
def _copy_step(desc, half, quarter, eighth, level, batch, head, entries, first, whole, buffer, full):
    if level == 0:
        tma.async_copy_global_to_shared(desc, [batch, head, first, 0], full, buffer)
    elif level == 1:
        _copy_entries(half, batch, head, entries, 0, buffer, full)
    elif level == 2:
        _copy_entries(quarter, batch, head, entries, whole * 64, buffer, full)
    else:
        _copy_entries(eighth, batch, head, entries, whole * 96, buffer, full)


@gluon.jit
def _entries(list_ptr, at, last):
    """Key blocks of a step: at level 0 all of them are one."""
    e0 = gl.load(list_ptr + gl.minimum(at, last))
    e1 = gl.load(list_ptr + gl.minimum(at + 1, last))
    e2 = gl.load(list_ptr + gl.minimum(at + 2, last))
    e3 = gl.load(list_ptr + gl.minimum(at + 3, last))
    e4 = gl.load(list_ptr + gl.minimum(at + 4, last))
    e5 = gl.load(list_ptr + gl.minimum(at + 5, last))
    e6 = gl.load(list_ptr + gl.minimum(at + 6, last))
    e7 = gl.load(list_ptr + gl.minimum(at + 7, last))
    return e0, e1, e2, e3, e4, e5, e6, e7


@gluon.jit
def _producer(q_desc, k_descs, v_descs, table_ptr, num_ptr, idx_ptr, width, tokens_k, total, sizes, memory,
              config: gl.constexpr):  # fmt: skip
    q_buf, k_buf, v_buf, header, words, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    heads, rows = sizes
    STAGES: gl.constexpr = config[0]
    GROUP: gl.constexpr = config[1]
    CLAIM: gl.constexpr = config[4]
    k_0, k_1, k_2, k_3 = k_descs
    v_0, v_1, v_2, v_3 = v_descs
    Q_BYTES: gl.constexpr = q_buf.shape[3] * q_buf.shape[4] * q_buf.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = k_buf.shape[3] * k_buf.shape[4] * k_buf.dtype.primitive_bitwidth // 8
    whole = tokens_k // BLOCK
    turn = 0
    row_turn = 0
    place = gl.program_id(0)
    tile = gl.load(table_ptr + 2 * place)
    steps = gl.load(table_ptr + 2 * place + 1)
    while place < total:
        batch, head, row = _place(tile, heads, rows)
        head_k = head // GROUP
        num_at = num_ptr + tile.to(gl.int64) * 4
        num_0 = gl.load(num_at)
        num_1 = gl.load(num_at + 1)
        num_2 = gl.load(num_at + 2)
        num_3 = gl.load(num_at + 3)
        list_ptr = idx_ptr + tile.to(gl.int64) * width
        some = steps > 0
        steps = gl.maximum(steps, 1)
        next_tile = 0
        next_steps = 0
        for step in range(0, steps + 1):
            if step < steps:
                level, at, last, exist = _step_of(step, num_0, num_1, num_2, num_3)
                last = gl.where(level == 0, at, last)
                entries = _entries(list_ptr, gl.maximum(at, 0), gl.maximum(last, 0))
                first = gl.where(some, entries[0] * BLOCK, tokens_k)
                exist = gl.where(level == 0, tokens_k - first, exist)
                stage = turn % STAGES
                mbarrier.wait(k_empty.index(stage), (turn // STAGES & 1) ^ 1)
                _put(words.index(stage), level * 256 + gl.minimum(exist, BLOCK))
                mbarrier.arrive(k_full.index(stage))
                mbarrier.expect(k_full.index(stage), BYTES)
                _copy_step(k_0, k_1, k_2, k_3, level, batch, head_k, entries, first, whole, k_buf.index(stage),
                           k_full.index(stage))  # fmt: skip
            if step == 0:
                for wg in gl.static_range(2):
                    mbarrier.wait(q_empty.index(wg), (row_turn & 1) ^ 1)
                    _put(header.index(HEADER_WORDS * wg), tile)
                    _put(header.index(HEADER_WORDS * wg + 1), steps)
                    mbarrier.arrive(q_full.index(wg))
                    first_q = (row * 2 + wg) * 64
                    mbarrier.expect(q_full.index(wg), Q_BYTES)
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, head, first_q, 0], q_full.index(wg), q_buf.index(wg)
                    )
                row_turn += 1
                if CLAIM:
                    place = gl.num_programs(0) + _claim_row(table_ptr + 2 * total, total)
                else:
                    place += gl.num_programs(0)
                next_tile = gl.load(table_ptr + 2 * place, mask=place < total, other=0)
                next_steps = gl.load(table_ptr + 2 * place + 1, mask=place < total, other=0)
            else:
                before = turn - 1
                level, at, last, exist = _step_of(step - 1, num_0, num_1, num_2, num_3)
                last = gl.where(level == 0, at, last)
                entries = _entries(list_ptr, gl.maximum(at, 0), gl.maximum(last, 0))
                first = gl.where(some, entries[0] * BLOCK, tokens_k)
                stage = before % STAGES
                mbarrier.wait(v_empty.index(stage), (before // STAGES & 1) ^ 1)
                mbarrier.expect(v_full.index(stage), BYTES)
                _copy_step(v_0, v_1, v_2, v_3, level, batch, head_k, entries, first, whole, v_buf.index(stage),
                           v_full.index(stage))  # fmt: skip
            turn += 1
        # The last round brought values only.
        turn -= 1
        tile = next_tile
        steps = next_steps
    for wg in gl.static_range(2):
        mbarrier.wait(q_empty.index(wg), (row_turn & 1) ^ 1)
        _put(header.index(HEADER_WORDS * wg), -1)
        mbarrier.arrive(q_full.index(wg), count=2)


@gluon.jit
def _softmax(s, word, top, scale):
    """Weights of a step ``[64, 128]``, the new running maximum of the logits, how far the old one fades."""
    exist = word % 256
    level = (word // 256).to(gl.float32)
    if exist < BLOCK:
        column = gl.arange(0, BLOCK, gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < exist)[None, :], s, -float("inf"))
    new = gl.maximum(top, gl.max(s, 1) * scale + level)
    # A row that has met no key yet would compute inf - inf.
    shift = gl.where(new == -float("inf"), 0.0, new)
    return gl.exp2(s * scale - (shift - level)[:, None]), new, gl.exp2(top - shift)


@gluon.jit
def _consumer(out_desc, lse_ptr, out_buf, tokens_q, scale, sizes, memory, config: gl.constexpr, WG: gl.constexpr):
    q_buf, k_buf, v_buf, header, words, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    heads, rows = sizes
    STAGES: gl.constexpr = config[0]
    Q_REGISTERS: gl.constexpr = config[2]
    TURNS: gl.constexpr = config[3]
    D: gl.constexpr = k_buf.shape[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LOGIT_ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    if TURNS and WG == 1:
        _named_barrier("bar.arrive", "8")
    no_logits = gl.zeros([64, BLOCK], gl.float32, LOGITS)
    turn = 0
    row_turn = 0
    mbarrier.wait(q_full.index(WG), 0)
    tile = _get(header.index(HEADER_WORDS * WG))
    while tile >= 0:
        steps = _get(header.index(HEADER_WORDS * WG + 1))
        batch, head, row = _place(tile, heads, rows)
        q = q_buf.index(WG).reshape([64, D])
        if Q_REGISTERS:
            q = q.load(gl.DotOperandLayout(0, LOGITS, 2))
            fence_async_shared()
            mbarrier.arrive(q_empty.index(WG))

        # The first step has no values before it and no running maximum.
        mbarrier.wait(k_full.index(turn % STAGES), turn // STAGES & 1)
        _turn_begin(TURNS, WG)
        keys_t = k_buf.index(turn % STAGES).reshape([BLOCK, D]).permute((1, 0))
        s = warpgroup_mma(q, keys_t, no_logits, use_acc=False, is_async=True)
        _turn_end(TURNS, WG)
        s = warpgroup_mma_wait(0, deps=(s,))
        word = _get(words.index(turn % STAGES))
        mbarrier.arrive(k_empty.index(turn % STAGES))
        top = gl.full([64], -float("inf"), gl.float32, LOGIT_ROWS)
        p, top, _ = _softmax(s, word, top, scale)
        sums = _thread_sums(p)
        weights = gl.convert_layout(p.to(v_buf.dtype), WEIGHTS)
        acc = gl.zeros([64, D], gl.float32, OUT)
        for _ in range(1, steps):
            s, acc = _products(weights, q, acc, no_logits, k_buf, v_buf, k_full, v_full, turn, STAGES, TURNS, WG)
            turn += 1
            word = _get(words.index(turn % STAGES))
            mbarrier.arrive(k_empty.index(turn % STAGES))
            mbarrier.arrive(v_empty.index((turn - 1) % STAGES))
            p, top, fade = _softmax(s, word, top, scale)
            sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, sums.type.layout))[:, None] + _thread_sums(p)
            acc *= gl.convert_layout(fade, OUT_ROWS)[:, None]
            weights = gl.convert_layout(p.to(v_buf.dtype), WEIGHTS)
        if not Q_REGISTERS:
            mbarrier.arrive(q_empty.index(WG))
        mbarrier.wait(v_full.index(turn % STAGES), turn // STAGES & 1)
        acc = warpgroup_mma(weights, v_buf.index(turn % STAGES).reshape([BLOCK, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(turn % STAGES))
        turn += 1

        weight = gl.convert_layout(gl.sum(sums, 1), LOGIT_ROWS)
        some = weight != 0.0  # so that NaN stays NaN
        weight = gl.where(some, weight, 1.0)
        out = acc * gl.convert_layout(gl.where(some, 1.0 / weight, 0.0), OUT_ROWS)[:, None]
        start = (row * 2 + WG) * 64
        tma.store_wait(0)  # until the row before has left the buffer
        out_buf.reshape([64, D]).store(out.to(out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, head, start, 0], out_buf)
        at = start + gl.arange(0, 64, LOGIT_ROWS)
        lse = gl.where(some, (top + gl.log2(weight)) * LN2, -float("inf"))
        gl.store(lse_ptr + (batch.to(gl.int64) * heads + head) * tokens_q + at, lse, mask=at < tokens_q)
        row_turn += 1
        mbarrier.wait(q_full.index(WG), row_turn & 1)
        tile = _get(header.index(HEADER_WORDS * WG))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["width", "tokens_q", "tokens_k", "heads", "rows", "total"])
def _pyramid_kernel(
    q_desc, k_0, k_1, k_2, k_3, v_0, v_1, v_2, v_3, out_desc, lse_ptr, table_ptr, num_ptr, idx_ptr,
    width, tokens_q, tokens_k, heads, rows, total, scale,
    STAGES: gl.constexpr, GROUP: gl.constexpr, Q_REGISTERS: gl.constexpr, TURNS: gl.constexpr, CLAIM: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_desc.block_shape[3]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_buf = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(k_0.dtype, [STAGES, 1, 1, BLOCK, D], k_0.layout)
    v_buf = gl.allocate_shared_memory(v_0.dtype, [STAGES, 1, 1, BLOCK, D], v_0.layout)
    header = gl.allocate_shared_memory(gl.int32, [2 * HEADER_WORDS, 1], WORD)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, 1], WORD)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for wg in gl.static_range(2):
        mbarrier.init(q_full.index(wg), count=2)  # the header and the copy
        mbarrier.init(q_empty.index(wg), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=2)  # the word and the copies
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    memory = (q_buf, k_buf, v_buf, header, words, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (heads, rows)
    config: gl.constexpr = (STAGES, GROUP, Q_REGISTERS, TURNS, CLAIM)
    out_0 = gl.allocate_shared_memory(out_desc.dtype, [1, 1, 64, D], out_desc.layout)
    out_1 = gl.allocate_shared_memory(out_desc.dtype, [1, 1, 64, D], out_desc.layout)
    gl.warp_specialize(
        [
            (_consumer, (out_desc, lse_ptr, out_0, tokens_q, scale, sizes, memory, config, 0)),
            (_consumer, (out_desc, lse_ptr, out_1, tokens_q, scale, sizes, memory, config, 1)),
            (_producer, (q_desc, (k_0, k_1, k_2, k_3), (v_0, v_1, v_2, v_3), table_ptr, num_ptr, idx_ptr, width,
                         tokens_k, total, sizes, memory, config)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _describe_levels(x: Tensor, pooled: Tensor) -> list[TensorDescriptor]:
    """What the copies of a step read at each level."""
    return [_describe(x, 128), *(_describe(pooled, 128 >> level) for level in (1, 2, 3))]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    num: Tensor,
    idx: Tensor,
    tiles: Tensor,
    scale: float,
    config: Config | None = None,
    *,
    key: Hashable | None = None,
) -> tuple[Tensor, Tensor]:
    """Output in q's strides and natural log-sum-exp ``[B, H, TQ]`` float32; arguments as ``triton``'s.

    ``tiles`` says of each row ``[B, H, NQ]`` how many steps it has.
    """
    batch, heads, tokens_q, dim = q.shape
    if key is None:
        facts = geometry(q, k, v, pooled_k, pooled_v, num, idx, tiles)
        key = facts and number((facts, scale, config, "pyramid"))
    config = config or config_for(dim, 128)
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q.device)
    table = schedule(tiles, batch, heads, key)

    def build(q, k, v, pooled_k, pooled_v, out, lse, table, num, idx):
        registers, consumer, producer = _REGISTERS[2]
        total = table.shape[0] - 1
        k, v, pooled_k, pooled_v = (_addressable(x) for x in (k, v, pooled_k, pooled_v))
        args = (
            _describe(_addressable(q), 64),
            *_describe_levels(k, pooled_k), *_describe_levels(v, pooled_v),
            _describe(out, 64), lse, table, num, idx,
            idx.shape[3], tokens_q, k.shape[2], heads, idx.shape[2], total, scale * LOG2E.value,
        )  # fmt: skip
        named = dict(
            STAGES=config.stages, GROUP=heads // k.shape[1], Q_REGISTERS=config.q_registers, TURNS=config.turns,
            CLAIM=config.claim, CONSUMER_REGISTERS=consumer, PRODUCER_REGISTERS=producer, num_warps=4,
            maxnreg=registers,
        )  # fmt: skip
        return (min(total, _multiprocessors(q)),), args, named

    launch(_pyramid_kernel, key, (q, k, v, pooled_k, pooled_v, out, lse, table, num, idx), build)
    return out, lse
