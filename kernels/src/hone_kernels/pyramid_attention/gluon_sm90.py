"""Attention over a pyramid of keys for Hopper (compute capability 9.x) in Gluon: the forward.

It is the kernel of ``attention.gluon_sm90``, with its schedule, barriers and runs of steps, but for what a step holds:
128 keys of one level. At level ``l`` these are ``2 ** l`` entries of the row's list, of ``128 >> l`` consecutive keys
each, which the producer brings by as many copies under one barrier. A lane of the producer holds one of them, and all
are read two steps ahead, those of the next row too.

The steps of a level are a run, coarse levels first, and of each level its last step first. That one alone may not be
full: it is masked, and where entries are missing the last one is copied again. In base 2 the weight ``2 ** l`` of a key
adds ``l`` to its logit, which the logits of the run leave out. The header says of each level how many steps it has, and
how many keys of the first one exist.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hone_kernels.attention.gluon_sm90 import (
    _REGISTERS,
    Config,
    _addressable,
    _claim_row,
    _describe,
    _first_logits,
    _get,
    _multiprocessors,
    _named_barrier,
    _place,
    _put,
    _run,
    _store_row,
    _thread_sums,
    config_for,
    schedule,
)
from hone_kernels.attention.triton import LOG2E
from hone_kernels.launch import geometry, launch, number

__all__ = ["attention_forward"]

BLOCK = gl.constexpr(128)
"""Keys of an entry at level 0, and of every step."""

# Of a header: row (-1: no more), and the runs of levels 0 to 3.
HEADER_WORDS = gl.constexpr(5)


@gluon.jit
def _step_of(step, num_0, num_1, num_2, num_3):
    """Level of a step, and the first and the last place in the row's list of its entries.

    Coarse levels come first, and of each its last step.
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
    return level, begin + done, begin + num - 1


@gluon.jit
def _run_of(num, level: gl.constexpr):
    """Steps of a level and, in the lower 8 bits, how many keys of the first exist; at level 0 of a whole last block."""
    steps = (num + (1 << level) - 1) >> level
    return steps * 256 + (num - ((steps - 1) << level)) * (BLOCK >> level)


# A lane has an entry of its own: one register holds all of a step. A lane past the last takes that one.
_LOAD = gl.constexpr(
    "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; min.s32 lane, lane, $2; mul.wide.s32 at, lane, 4; "
    "add.s64 at, at, $1; ld.global.b32 $0, [at]; }"
)
_OF_LANE = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;")


@gluon.jit
def _fetch(step, tile, num_0, num_1, num_2, num_3, idx_ptr, width, tokens_k):
    """Level of a step of a row, and its entries: at level 0 one, behind the last block of keys if the row has none."""
    level, at, last = _step_of(step, num_0, num_1, num_2, num_3)
    last = gl.where(level == 0, at, last)
    at = gl.maximum(at, 0)
    address = (idx_ptr + tile.to(gl.int64) * width + at).to(gl.int64)
    entries = gl.inline_asm_elementwise(
        _LOAD, "=r,l,r", [address, gl.maximum(last - at, 0)], dtype=gl.int32, is_pure=False, pack=1
    )
    return level, gl.where(num_0 + num_1 + num_2 + num_3 > 0, entries, (tokens_k + BLOCK - 1) // BLOCK)


@gluon.jit
def _copy_entries(desc, batch, head, entries, offset, buffer, full):
    """Start the copies of a step's keys or values at one level."""
    ROWS: gl.constexpr = desc.block_shape[2]
    for u in gl.static_range(BLOCK // ROWS):
        entry = gl.inline_asm_elementwise(_OF_LANE, "=r,r,r", [entries, u], dtype=gl.int32, is_pure=False, pack=1)
        tma.async_copy_global_to_shared(
            desc, [batch, head, offset + entry * ROWS, 0], full, buffer.slice(u * ROWS, ROWS, dim=2)
        )


@gluon.jit
def _fill(descs, level, batch, head, entries, whole, buffers, full, empty, turn, STAGES: gl.constexpr):
    """Copy a step's keys or values into their buffer once it is empty."""
    desc, half, quarter, eighth = descs
    at = turn % STAGES
    BYTES: gl.constexpr = buffers.shape[3] * buffers.shape[4] * buffers.dtype.primitive_bitwidth // 8
    mbarrier.wait(empty.index(at), (turn // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(at), BYTES)
    if level == 0:
        _copy_entries(desc, batch, head, entries, 0, buffers.index(at), full.index(at))
    elif level == 1:
        _copy_entries(half, batch, head, entries, 0, buffers.index(at), full.index(at))
    elif level == 2:
        _copy_entries(quarter, batch, head, entries, whole * 64, buffers.index(at), full.index(at))
    else:
        _copy_entries(eighth, batch, head, entries, whole * 96, buffers.index(at), full.index(at))


@gluon.jit
def _counts(num_ptr, tile):
    num_at = num_ptr + tile.to(gl.int64) * 4
    return gl.load(num_at), gl.load(num_at + 1), gl.load(num_at + 2), gl.load(num_at + 3)


@gluon.jit
def _producer(q_desc, k_descs, v_descs, table_ptr, num_ptr, idx_ptr, width, tokens_k, total, sizes, memory,
              config: gl.constexpr):  # fmt: skip
    q_buf, k_buf, v_buf, header, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    heads, rows = sizes
    STAGES: gl.constexpr = config[0]
    GROUP: gl.constexpr = config[1]
    CLAIM: gl.constexpr = config[4]
    Q_BYTES: gl.constexpr = q_buf.shape[3] * q_buf.shape[4] * q_buf.dtype.primitive_bitwidth // 8
    whole = tokens_k // BLOCK
    turn = 0
    row_turn = 0
    place = gl.program_id(0)
    tile = gl.load(table_ptr + 2 * place)
    steps = gl.maximum(gl.load(table_ptr + 2 * place + 1), 1)
    num_0, num_1, num_2, num_3 = _counts(num_ptr, tile)
    # Entries are read two steps ahead of the copies that need them, of the next row too.
    level, entries = _fetch(0, tile, num_0, num_1, num_2, num_3, idx_ptr, width, tokens_k)
    level_1, entries_1 = _fetch(1, tile, num_0, num_1, num_2, num_3, idx_ptr, width, tokens_k)
    while place < total:
        batch, head, row = _place(tile, heads, rows)
        head_k = head // GROUP
        last = gl.load(idx_ptr + tile.to(gl.int64) * width + gl.maximum(num_0 - 1, 0))
        _fill(k_descs, level, batch, head_k, entries, whole, k_buf, k_full, k_empty, turn, STAGES)
        run_0 = num_0 * 256 + gl.minimum(tokens_k - last * BLOCK, BLOCK)
        # A row without an entry has a step without a key.
        run_0 = gl.where(num_0 > 0, run_0, gl.where(num_1 + num_2 + num_3 > 0, 0, 256))
        for wg in gl.static_range(2):
            mbarrier.wait(q_empty.index(wg), (row_turn & 1) ^ 1)
            _put(header.index(HEADER_WORDS * wg), tile)
            _put(header.index(HEADER_WORDS * wg + 1), run_0)
            _put(header.index(HEADER_WORDS * wg + 2), _run_of(num_1, 1))
            _put(header.index(HEADER_WORDS * wg + 3), _run_of(num_2, 2))
            _put(header.index(HEADER_WORDS * wg + 4), _run_of(num_3, 3))
            mbarrier.arrive(q_full.index(wg))
            mbarrier.expect(q_full.index(wg), Q_BYTES)
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, (row * 2 + wg) * 64, 0], q_full.index(wg), q_buf.index(wg)
            )
        row_turn += 1
        if CLAIM:
            place = gl.num_programs(0) + _claim_row(table_ptr + 2 * total, total)
        else:
            place += gl.num_programs(0)
        tile_next = gl.load(table_ptr + 2 * place, mask=place < total, other=0)
        steps_next = gl.maximum(gl.load(table_ptr + 2 * place + 1, mask=place < total, other=0), 1)
        next_0, next_1, next_2, next_3 = _counts(num_ptr, tile_next)
        if steps == 1:
            level_1, entries_1 = _fetch(0, tile_next, next_0, next_1, next_2, next_3, idx_ptr, width, tokens_k)
        for step in range(1, steps + 1):
            ahead = step + 1
            here = ahead < steps
            level_2, entries_2 = _fetch(
                gl.where(here, ahead, ahead - steps), gl.where(here, tile, tile_next), gl.where(here, num_0, next_0),
                gl.where(here, num_1, next_1), gl.where(here, num_2, next_2), gl.where(here, num_3, next_3), idx_ptr,
                width, tokens_k,
            )  # fmt: skip
            if step < steps:
                _fill(k_descs, level_1, batch, head_k, entries_1, whole, k_buf, k_full, k_empty, turn + 1, STAGES)
            _fill(v_descs, level, batch, head_k, entries, whole, v_buf, v_full, v_empty, turn, STAGES)
            level, entries, level_1, entries_1 = level_1, entries_1, level_2, entries_2
            turn += 1
        tile, steps = tile_next, steps_next
        num_0, num_1, num_2, num_3 = next_0, next_1, next_2, next_3
    for wg in gl.static_range(2):
        mbarrier.wait(q_empty.index(wg), (row_turn & 1) ^ 1)
        _put(header.index(HEADER_WORDS * wg), -1)
        mbarrier.arrive(q_full.index(wg), count=2)


@gluon.jit
def _consumer(out_desc, lse_ptr, out_buf, tokens_q, scale, sizes, memory, config: gl.constexpr, WG: gl.constexpr):
    q_buf, k_buf, v_buf, header, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    heads, rows = sizes
    STAGES: gl.constexpr = config[0]
    Q_REGISTERS: gl.constexpr = config[2]
    TURNS: gl.constexpr = config[3]
    D: gl.constexpr = k_buf.shape[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LOGIT_ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    if TURNS and WG == 1:
        _named_barrier("bar.arrive", "8")
    no_logits = gl.zeros([64, BLOCK], gl.float32, LOGITS)
    buffers = (k_buf, v_buf, k_full, k_empty, v_full, v_empty, q_empty)
    turn = 0
    row_turn = 0
    mbarrier.wait(q_full.index(WG), 0)
    tile = _get(header.index(HEADER_WORDS * WG))
    while tile >= 0:
        run_0 = _get(header.index(HEADER_WORDS * WG + 1))
        run_1 = _get(header.index(HEADER_WORDS * WG + 2))
        run_2 = _get(header.index(HEADER_WORDS * WG + 3))
        run_3 = _get(header.index(HEADER_WORDS * WG + 4))
        left = run_0 // 256 + run_1 // 256 + run_2 // 256 + run_3 // 256
        batch, head, row = _place(tile, heads, rows)
        q = q_buf.index(WG).reshape([64, D])
        if Q_REGISTERS:
            q = q.load(gl.DotOperandLayout(0, LOGITS, 2))
            fence_async_shared()
            mbarrier.arrive(q_empty.index(WG))

        s = _first_logits(q, no_logits, k_buf, k_full, turn, STAGES, TURNS, WG)
        top = gl.full([64], -float("inf"), gl.float32, LOGIT_ROWS)
        sums = _thread_sums(no_logits)
        acc = gl.zeros([64, D], gl.float32, OUT)
        for below in range(4):
            run = gl.where(below < 2, gl.where(below == 0, run_3, run_2), gl.where(below == 2, run_1, run_0))
            length = run // 256
            left -= length
            if length > 0:
                column = gl.arange(0, BLOCK, gl.SliceLayout(0, LOGITS))
                offsets = gl.where(column < run % 256, 0.0, -float("inf"))
                level = 3.0 - below
                s, top, sums, acc, turn = _run(s, offsets, level, length, left > 0, q, top, sums, acc, no_logits, turn,
                                               scale, buffers, False, STAGES, TURNS, Q_REGISTERS, WG, False,
                                               False)  # fmt: skip

        _store_row(acc, sums, top, out_desc, out_buf, lse_ptr, batch, head, heads, row, tokens_q, 2, WG)
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
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    memory = (q_buf, k_buf, v_buf, header, q_full, q_empty, k_full, k_empty, v_full, v_empty)
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
