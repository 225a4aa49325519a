"""The prologue of FP8 attention in Triton: rotate, permute, scale, round and, for V, transpose; and back again.

Q and K are read once and written once, in one launch, by programs that hold what shares a scale, a block, or read it
again from a cache, a few blocks in a row; V is read twice, since its scales span the sequence, and so are Q and K where
theirs span more. Memory brings an element in the time of some twenty instructions, so these count as bytes do: a block
waits as words of two 16-bit channels, which leaves room for more programs, its largest magnitude is that of integers,
and what is not finite is found by arithmetic instead of comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.attention.triton import _bhs, _strides
from hone_kernels.launch import Notes, geometry, launch, number

from .reference import AMAX_MIN, E4M3_MAX, MEAN_RUN, V_PADDING, group_amax, mean_step, scales

__all__ = ["GROUPED", "GROUPED_ROTATING", "PROLOGUE", "ROTATING", "Prologue", "dequantize_triton", "quantize_triton"]

_AMAX_MIN = tl.constexpr(AMAX_MIN)
_MAX = tl.constexpr(E4M3_MAX)
_V_ROWS = tl.constexpr(V_PADDING)


@dataclass(frozen=True)
class Prologue:
    """Launch settings.

    Attributes:
        warps: Of a program that holds one block.
        registers: Cap per thread: programs that share a multiprocessor load while others compute.
        heads: Heads of the same tokens that a program works through, when it rotates: it then finds all but the first's
            rotary tables in its cache.
        rows: Tokens that are rotated at a time: what that takes besides the block itself grows with them.
        reuse: Bytes of V between its first and second reading, so that the second finds them in the L2 cache.
        values: Warps, and cap of registers, of a program that holds a part of V.
    """

    warps: int = 8
    registers: int = 80
    heads: int = 4
    rows: int = 32
    reuse: int = 8 << 20
    values: tuple[int, int] = (4, 168)


PROLOGUE = Prologue()
ROTATING = Prologue(registers=128, heads=6)
"""With rotary tables or a mean, which need registers too."""
GROUPED = Prologue(registers=64)
"""Where blocks share scales: less is held at a time."""
GROUPED_ROTATING = Prologue(heads=6)
"""The same with rotary tables."""

_LONGEST = 8
"""Blocks that may share a scale and be read from memory once."""


@triton.jit
def _exists(slot, tokens, valid_ptr, offset, BLOCK: tl.constexpr, VALID: tl.constexpr):
    """Which slots hold a token. ``offset``: of this batch element's counts."""
    live = slot < tokens
    if VALID:
        live = live & (slot % BLOCK < tl.load(valid_ptr + offset + slot // BLOCK, mask=live, other=0))
    return live


@triton.jit
def _tokens(x_ptr, stride, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS: tl.constexpr, DIM: tl.constexpr,
            ORDER: tl.constexpr, ROPE: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """The tokens of these slots of one head, rotated: ``[ROWS, DIM]`` in their own dtype, zeros where none is.

    KEEP: whether they are read again and should stay in the caches.
    """
    at = slot
    if ORDER:
        at = tl.load(order_ptr + slot, mask=live, other=0)
    keep = live[:, None]
    x_ptr += (at.to(tl.int64) * stride)[:, None] + tl.arange(0, DIM)[None, :]
    x = tl.load(x_ptr, mask=keep, other=0.0, eviction_policy="" if KEEP else "evict_first")
    if ROPE:
        HALF: tl.constexpr = DIM // 2
        table = (at * HALF)[:, None] + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + table, mask=keep, other=0.0)
        sin = tl.load(sin_ptr + table, mask=keep, other=0.0)
        even, odd = tl.split(x.to(tl.float32).reshape([ROWS, HALF, 2]))
        x = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape([ROWS, DIM]).to(x.dtype)
    return x


@triton.jit
def _finite(x):
    """x, and NaN where it is not finite. In x's own dtype: the compiler would else keep its float32 in registers."""
    return x + x * 0.0


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """Even and odd channels as float32."""
    if dtype == tl.bfloat16:
        even, odd = (words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        even = words.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        odd = (words >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _words(even, odd, dtype: tl.constexpr):
    """What ``_halves`` takes apart, rounded to ``dtype``."""
    even = even.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
    return even | (odd.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def _piece(x_ptr, stride, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS: tl.constexpr, DIM: tl.constexpr,
           ORDER: tl.constexpr, ROPE: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """``_tokens`` as words: ``[ROWS, DIM / 2]`` of an even and an odd channel, of float32 ``[ROWS, DIM]`` of one.

    The compiler gives a 16-bit value a register of its own when it has to wait.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if dtype == tl.float32:
        x = _tokens(x_ptr, stride, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS, DIM, ORDER, ROPE, KEEP)
        words = x.to(tl.uint32, bitcast=True)
    else:
        HALF: tl.constexpr = DIM // 2
        at = slot
        if ORDER:
            at = tl.load(order_ptr + slot, mask=live, other=0)
        keep = live[:, None]
        pair = tl.arange(0, HALF)[None, :]
        word_ptr = x_ptr.to(tl.pointer_type(tl.uint32)) + (at.to(tl.int64) * (stride // 2))[:, None] + pair
        words = tl.load(word_ptr, mask=keep, other=0, eviction_policy="" if KEEP else "evict_first")
        if ROPE:
            table = (at * HALF)[:, None] + pair
            cos = tl.load(cos_ptr + table, mask=keep, other=0.0)
            sin = tl.load(sin_ptr + table, mask=keep, other=0.0)
            even, odd = _halves(words, dtype)
            words = _words(even * cos - odd * sin, even * sin + odd * cos, dtype)
    return words


@triton.jit
def _values_of(piece, dtype: tl.constexpr):
    """float32 ``[ROWS, DIM]`` of a piece."""
    if dtype == tl.float32:
        values = piece.to(tl.float32, bitcast=True)
    else:
        even, odd = _halves(piece, dtype)
        values = tl.join(even, odd).reshape([piece.shape[0], 2 * piece.shape[1]])
    return values


@triton.jit
def _top(piece, dtype: tl.constexpr):
    """The largest magnitude of each four words, as bits that ``_amax`` reads.

    As integers, magnitudes are ordered as they are. The sign is shifted out, and a constant is added that makes what is
    not finite overflow, to less than it makes of zero. The even channel below an odd one decides between equals only.
    """
    LIFT: tl.constexpr = 0x08000000 if dtype == tl.float16 else 0x01000000
    quads: tl.constexpr = [piece.shape[0], piece.shape[1] // 4, 4]
    top = tl.max((piece * 2 + LIFT).reshape(quads), 2)
    if dtype != tl.float32:
        top = tl.maximum(top, tl.max((piece * 0x20000 + LIFT).reshape(quads), 2))
    return top


@triton.jit
def _amax(pieces, dtype: tl.constexpr):
    """The largest magnitude of all pieces, of what is finite, as float32."""
    LIFT: tl.constexpr = 0x08000000 if dtype == tl.float16 else 0x01000000
    top = _top(pieces[0], dtype)
    for i in tl.static_range(1, len(pieces)):
        top = tl.maximum(top, _top(pieces[i], dtype))
    top = tl.max(top)
    bits = tl.where(top > LIFT, top - LIFT, 0) >> 1
    if dtype == tl.float32:
        amax = bits.to(tl.float32, bitcast=True)
    else:
        amax = (bits >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return amax


@triton.jit
def _cast(x, factor):
    # The largest magnitude becomes 448 but for the last bit of float32, and so rounds to 448: nothing to clamp. The
    # second term makes NaN of an infinity, which a cast would turn into the largest value, and changes nothing else.
    return (x * factor + x * 0.0).to(tl.float8e4nv)


@triton.jit
def _sums_kernel(
    x_ptr, order_ptr, cos_ptr, sin_ptr, valid_ptr, part_ptr, sxb, sxh, sxs, sval, heads, tokens, step,
    DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr, ROPE: tl.constexpr,
    VALID: tl.constexpr,
):  # fmt: skip
    """Of ROWS tokens, one run of ``step``, the sum of each channel: ``part [B, heads, parts, DIM]``."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    batch = tl.program_id(2)
    slot = part * step * ROWS + tl.arange(0, ROWS)
    live = _exists(slot, tokens, valid_ptr, batch * sval, BLOCK, VALID)
    x_ptr += batch.to(tl.int64) * sxb + head.to(tl.int64) * sxh
    x = _tokens(x_ptr, sxs, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS, DIM, ORDER, ROPE, True).to(tl.float32)
    result = tl.sum(tl.where(tl.abs(x) < float("inf"), x, 0.0), 0)
    row = (batch * heads + head) * tl.num_programs(1) + part
    tl.store(part_ptr + row.to(tl.int64) * DIM + tl.arange(0, DIM), result)


@triton.jit
def _length(groups_ptr, block, blocks):
    """Blocks of the group that begins at this one; 0 where it began before."""
    mine = tl.load(groups_ptr + block)
    length = 0
    if tl.load(groups_ptr + block - 1, mask=block > 0, other=-1) != mine:
        while tl.load(groups_ptr + block + length, mask=block + length < blocks, other=-1) == mine:
            length += 1
    return length


@triton.jit
def _pieces(
    source, stride, start, tokens, order_ptr, cos_ptr, sin_ptr, valid_ptr, offset, DIM: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, ROPE: tl.constexpr,
    VALID: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """SPAN slots of a head."""
    pieces = ()
    for i in tl.static_range(SPAN // ROWS):
        slot = start + i * ROWS + tl.arange(0, ROWS)
        live = _exists(slot, tokens, valid_ptr, offset, BLOCK, VALID)
        x = _piece(source, stride, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS, DIM, ORDER, ROPE, KEEP)
        pieces = pieces + (x,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred element)
    return pieces


@triton.jit
def _peak(pieces, mean, start, tokens, valid_ptr, offset, dtype: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
          ROWS: tl.constexpr, VALID: tl.constexpr, SUBTRACT: tl.constexpr):  # fmt: skip
    """The largest magnitude of these slots, of what is finite, without the mean if it is to be subtracted."""
    if SUBTRACT:
        OWN: tl.constexpr = 4 if dtype == tl.float32 else 8
        for i in tl.static_range(SPAN // ROWS):
            slot = start + i * ROWS + tl.arange(0, ROWS)
            live = _exists(slot, tokens, valid_ptr, offset, BLOCK, VALID)
            size = tl.abs(tl.where(live[:, None], _values_of(pieces[i], dtype) - mean, 0.0))
            size = tl.where(size < float("inf"), size, 0.0)
            # Each thread among its own first: threads wait for each other once, not for every piece.
            size = tl.max(size.reshape([ROWS, size.shape[1] // OWN, OWN]), 2)
            if i == 0:
                top = size
            else:
                top = tl.maximum(top, size)
        amax = tl.max(top)
    else:
        amax = _amax(pieces, dtype)
    return amax


@triton.jit
def _emit(pieces, mean, factor, out_ptr, dot_ptr, start, tokens, valid_ptr, offset, dtype: tl.constexpr,
          DIM: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr,
          MEAN: tl.constexpr):  # fmt: skip
    """These slots, rounded."""
    dim = tl.arange(0, DIM)
    # A zero that the compiler does not know: it would else keep float32 values, twice the size of the pieces, from the
    # search for the largest magnitude.
    zero = factor.to(tl.uint32, bitcast=True) >> 31
    for i in tl.static_range(SPAN // ROWS):
        slot = start + i * ROWS + tl.arange(0, ROWS)
        x = _values_of(pieces[i] ^ zero, dtype)
        if MEAN == "dot":
            tl.store(dot_ptr + slot, tl.sum(x * mean, 1), mask=slot < tokens)
        if MEAN == "subtract":
            live = _exists(slot, tokens, valid_ptr, offset, BLOCK, VALID)
            x = tl.where(live[:, None], x - mean, 0.0)
        out = out_ptr + (slot * DIM)[:, None] + dim[None, :]
        # As many channels a thread as 16-byte loads bring it: none changes threads.
        out = tl.max_contiguous(tl.multiple_of(out, [1, 8]), [1, 8])
        tl.store(out, _cast(x, factor), mask=(slot < tokens)[:, None])


@triton.jit
def _rows(
    x_ptr, order_ptr, cos_ptr, sin_ptr, valid_ptr, mean_ptr, x8_ptr, scale_ptr, factor_ptr, dot_ptr,
    sxb, sxh, sxs, sval, heads, tokens, blocks, chunk, length,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    ORDER: tl.constexpr, ROPE: tl.constexpr, VALID: tl.constexpr, MEAN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One block of HEADS heads of queries or keys, or of a run ``length`` blocks, SPAN tokens at a time.

    MEAN: ``"subtract"`` the mean from keys, store the ``"dot"`` of queries with it (GROUP query heads share one), or
    ``"none"``. STEP: ``"all"`` in one go; ``"run"`` where a few blocks share a scale, which are read again from the
    cache; where scales span more, ``"amax"`` first, into ``scale``, and ``"cast"`` afterwards, by ``factor``.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    SUBTRACT: tl.constexpr = MEAN == "subtract"
    block = tl.program_id(1)
    batch = tl.program_id(2)
    dim = tl.arange(0, DIM)
    offset = batch * sval
    start = block * BLOCK
    SPAN: tl.constexpr = 64
    first = chunk * HEADS
    for head in range(first, tl.minimum(first + HEADS, heads)):
        row = batch.to(tl.int64) * heads + head
        source = x_ptr + batch.to(tl.int64) * sxb + tl.cast(head, tl.int64) * sxh
        at = row * blocks + block
        out = x8_ptr + row * tokens * DIM
        dot = dot_ptr
        if MEAN == "dot":
            dot += row * tokens
        mean = 0.0
        if MEAN != "none":
            mean = tl.load(mean_ptr + (row // GROUP) * DIM + dim)[None, :]
        if STEP == "all":
            pieces = _pieces(source, sxs, start, tokens, order_ptr, cos_ptr, sin_ptr, valid_ptr, offset,
                             DIM, BLOCK, BLOCK, ROWS, ORDER, ROPE, VALID, False)  # fmt: skip
            amax = _peak(pieces, mean, start, tokens, valid_ptr, offset, dtype, BLOCK, BLOCK, ROWS, VALID, SUBTRACT)
            amax = tl.maximum(amax, _AMAX_MIN)
            tl.store(scale_ptr + at, tl.div_rn(amax, _MAX))
            _emit(pieces, mean, tl.div_rn(_MAX, amax), out, dot, start, tokens, valid_ptr, offset, dtype,
                  DIM, BLOCK, BLOCK, ROWS, VALID, MEAN)  # fmt: skip
        else:
            if STEP == "cast":
                factor = tl.load(factor_ptr + at)
            else:
                amax = 0.0
                for i in range(length * (BLOCK // SPAN)):
                    span = start + i * SPAN
                    pieces = _pieces(source, sxs, span, tokens, order_ptr, cos_ptr, sin_ptr, valid_ptr, offset,
                                     DIM, BLOCK, SPAN, ROWS, ORDER, ROPE, VALID, True)  # fmt: skip
                    peak = _peak(pieces, mean, span, tokens, valid_ptr, offset, dtype,
                                 BLOCK, SPAN, ROWS, VALID, SUBTRACT)  # fmt: skip
                    amax = tl.maximum(amax, peak)
                if STEP == "amax":
                    tl.store(scale_ptr + at, amax)
                else:
                    amax = tl.maximum(amax, _AMAX_MIN)
                    factor = tl.div_rn(_MAX, amax)
                    for i in range(length):
                        tl.store(scale_ptr + at + i, tl.div_rn(amax, _MAX))
            if STEP != "amax":
                for i in range(length * (BLOCK // SPAN)):
                    span = start + i * SPAN
                    pieces = _pieces(source, sxs, span, tokens, order_ptr, cos_ptr, sin_ptr, valid_ptr, offset,
                                     DIM, BLOCK, SPAN, ROWS, ORDER, ROPE, VALID, False)  # fmt: skip
                    _emit(pieces, mean, factor, out, dot, span, tokens, valid_ptr, offset, dtype,
                          DIM, BLOCK, SPAN, ROWS, VALID, MEAN)  # fmt: skip


@triton.jit
def _rows_kernel(
    q_ptr, k_ptr, order_ptr, cos_ptr, sin_ptr, valid_q_ptr, valid_k_ptr, mean_ptr, q8_ptr, k8_ptr, q_scale_ptr,
    k_scale_ptr, q_factor_ptr, k_factor_ptr, dot_ptr, groups_ptr, zeros_ptr,
    sqb, sqh, sqs, skb, skh, sks, svq, svk, heads, heads_k, tokens_q, tokens_k, blocks_q, blocks_k, chunks_q, zeros,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    ORDER: tl.constexpr, ROPE: tl.constexpr, VALID_Q: tl.constexpr, VALID_K: tl.constexpr, MEAN: tl.constexpr,
    DOT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Queries by the first ``chunks_q`` programs of a block, keys by the others, which so share rotary tables.

    One of them also writes the zeros from which the launch of the values counts.
    """
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    if (chunk == 0) & (block == 0) & (tl.program_id(2) == 0):
        for word in range(0, zeros, 1024):
            at = word + tl.arange(0, 1024)
            tl.store(zeros_ptr + at, tl.zeros([1024], tl.int32), mask=at < zeros)
    length = 1
    if STEP == "run":
        length = _length(groups_ptr, block, tl.num_programs(1))
    if chunk < chunks_q:
        length = tl.minimum(length, blocks_q - block)
        if length > 0:
            _rows(
                q_ptr, order_ptr, cos_ptr, sin_ptr, valid_q_ptr, mean_ptr, q8_ptr, q_scale_ptr, q_factor_ptr, dot_ptr,
                sqb, sqh, sqs, svq, heads, tokens_q, blocks_q, chunk, length,
                DIM, BLOCK, HEADS, ROWS, GROUP, ORDER, ROPE, VALID_Q, "dot" if DOT else "none", STEP,
            )  # fmt: skip
    elif tl.minimum(length, blocks_k - block) > 0:
        _rows(
            k_ptr, order_ptr, cos_ptr, sin_ptr, valid_k_ptr, mean_ptr, k8_ptr, k_scale_ptr, k_factor_ptr, dot_ptr,
            skb, skh, sks, svk, heads_k, tokens_k, blocks_k, chunk - chunks_q, tl.minimum(length, blocks_k - block),
            DIM, BLOCK, HEADS, ROWS, 1, ORDER, ROPE, VALID_K, "subtract" if MEAN else "none", STEP,
        )  # fmt: skip


@triton.jit
def _values_kernel(
    v_ptr, order_ptr, valid_ptr, amax_ptr, v8_ptr, scale_ptr, svb, svh, svs, sval, heads, tokens, rows, parts, unit,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """128 values of one head: the largest magnitude of each channel, or, when it is known, rounded and transposed.

    Programs alternate between the largest magnitudes of ``unit`` heads and the rounding of the ``unit`` heads before,
    whose values are then still in the L2 cache. Those that round wait until ``done`` counts all parts of their head.
    Programs draw their numbers as they start, so what they wait for is running or over, in whatever order they start.
    Behind the magnitudes of all rows stand the counts ``done``, and behind these the number drawn next.
    """
    done_ptr = amax_ptr + rows * DIM
    program = tl.atomic_add(done_ptr + rows, 1, sem="relaxed")
    turn = program // (unit * parts)
    within = program % (unit * parts)
    second = turn % 2 == 1
    row = (turn // 2 - turn % 2) * unit + within % unit
    part = within // unit
    # The first turn of rounding and the last of magnitudes have no heads.
    if (row >= 0) & (row < rows):
        batch = row // heads
        dim = tl.arange(0, DIM)
        v_ptr += batch.to(tl.int64) * svb + (row % heads).to(tl.int64) * svh
        place = tl.arange(0, _V_ROWS)
        if second:
            # Place 4 t + 2 j + e of each 16 belongs to key 8 j + 2 t + e: see FP8Operands.
            key = (place & -16) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)
            slot = part * _V_ROWS + key
            live = _exists(slot, tokens, valid_ptr, batch * sval, BLOCK, VALID)
            # No words: what the compiler transposes is 16-bit, by its own instruction, and not bytes one at a time.
            values = _tokens(v_ptr, svs, slot, live, order_ptr, None, None, _V_ROWS, DIM, ORDER, False, False)
            while tl.atomic_add(done_ptr + row, 0, sem="acquire") < parts:
                pass
            amax = tl.load(amax_ptr + row * DIM + dim).to(tl.float32, bitcast=True)
            amax = tl.maximum(amax, _AMAX_MIN)
            if part == 0:
                tl.store(scale_ptr + row * DIM + dim, tl.div_rn(amax, _MAX))
            v8 = tl.trans(_cast(values.to(tl.float32), tl.div_rn(_MAX, amax)[None, :]))
            out = v8_ptr + (row.to(tl.int64) * DIM + dim)[:, None] * (parts * _V_ROWS)
            tl.store(out + (part * _V_ROWS + place)[None, :], v8)
        else:
            slot = part * _V_ROWS + place
            live = _exists(slot, tokens, valid_ptr, batch * sval, BLOCK, VALID)
            v = _tokens(v_ptr, svs, slot, live, order_ptr, None, None, _V_ROWS, DIM, ORDER, False, True)
            top = tl.max(tl.abs(_finite(v)), 0).to(tl.float32)
            # NaN if there is nothing else. Bits of positive numbers are ordered as they are, and a maximum does not
            # depend on who comes first.
            top = tl.where(top >= 0, top, 0.0).to(tl.int32, bitcast=True)
            tl.atomic_max(amax_ptr + row * DIM + dim, top, sem="relaxed")
            tl.debug_barrier()  # all threads' maxima before the count
            tl.atomic_add(done_ptr + row, 1, sem="release")


def _even(x: Tensor) -> Tensor:
    """x, or a copy if two channels are not a word."""
    odd = x.data_ptr() % 4 or any(stride % 2 for stride in x.stride()[:3])
    return x.clone(memory_format=torch.contiguous_format) if odd and x.dtype != torch.float32 else x


def quantize_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    k_valid: Tensor | None,
    block: int,
    groups: Tensor | None,
    smooth_k: bool,
    settings: Prologue | None = None,
    *,
    longest: int = 0,
    for_lse: bool = True,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As ``quantize_reference``; with the shipped settings if None. ``longest``: see ``quantize_qkv``, 0 if unknown.

    ``notes`` is for ``launch``; with smoothed keys or groups more than that is done.
    """
    q, k = _even(q), _even(k)
    batch, heads, tokens_q, dim = q.shape
    heads_k, tokens_k = k.shape[1:3]
    in_runs = groups is not None and 1 < longest <= _LONGEST
    facts = geometry(q, k, v, cos, sin, order, k_valid, groups)
    call = facts and number((facts, block, smooth_k, settings, in_runs, for_lse))
    if settings is None:
        plain = cos is None and not smooth_k
        grouped = GROUPED if cos is None else GROUPED_ROTATING
        settings = grouped if groups is not None else PROLOGUE if plain else ROTATING
    if order is not None:
        tokens_q = tokens_k = order.shape[0]
    keys = dict(DIM=dim, BLOCK=block, ORDER=order is not None)
    padded = k_valid is not None

    k_mean = q_dot_mean = None
    if smooth_k:
        step = mean_step(tokens_k)
        parts = triton.cdiv(triton.cdiv(tokens_k, MEAN_RUN), step)
        total = torch.empty((batch, heads_k, parts, dim), dtype=torch.float32, device=k.device)

        def sums(k, order, cos, sin, k_valid, total):
            args = (k, order, cos, sin, k_valid, total, *_bhs(k), *_strides(k_valid, (0,)), heads_k, tokens_k, step)
            named = dict(ROWS=MEAN_RUN, ROPE=cos is not None, VALID=padded, num_warps=8, **keys)
            return (heads_k, parts, batch), args, named

        launch(_sums_kernel, call, (k, order, cos, sin, k_valid, total), sums)
        count: int | torch.Tensor = tokens_k
        if k_valid is not None or step > 1:
            starts = torch.arange(0, tokens_k, block, device=k.device)
            exist = (tokens_k - starts).clamp(max=block)
            if k_valid is not None:
                exist = torch.minimum(k_valid, exist)
            count = (exist * (starts // MEAN_RUN % step == 0)).sum(-1, keepdim=True).clamp(min=1).view(-1, 1, 1)
        k_mean = total.sum(2) / count
        if for_lse:
            q_dot_mean = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q.device)

    # Padding slots hold no query either; without an order queries have slots of their own.
    q_valid = k_valid if order is not None else None
    blocks_q, blocks_k = -(-tokens_q // block), -(-tokens_k // block)
    q8 = torch.empty((batch, heads, tokens_q, dim), dtype=torch.float8_e4m3fn, device=q.device)
    k8 = torch.empty((batch, heads_k, tokens_k, dim), dtype=torch.float8_e4m3fn, device=k.device)
    q_scale = torch.empty((batch, heads, blocks_q), dtype=torch.float32, device=q.device)
    k_scale = torch.empty((batch, heads_k, blocks_k), dtype=torch.float32, device=k.device)
    all_rows = batch * heads_k
    amax = torch.empty(all_rows * (dim + 1) + 1, dtype=torch.int32, device=v.device)
    if notes is not None:
        for x in (q8, k8, q_scale, k_scale, amax):
            notes.made(x)
    if groups is not None:
        groups = groups.contiguous()

    def rows(step: str, q_factor: Tensor | None = None, k_factor: Tensor | None = None) -> None:
        def build(q, k, order, cos, sin, q_valid, k_valid, k_mean, q8, k8, q_scale, k_scale, q_factor, k_factor,
                  q_dot_mean, groups, amax):  # fmt: skip
            # As even as that many heads at most allow.
            chunk = 1 if cos is None else triton.cdiv(heads, triton.cdiv(heads, settings.heads))
            chunks_q, chunks_k = triton.cdiv(heads, chunk), triton.cdiv(heads_k, chunk)
            args = (
                q, k, order, cos, sin, q_valid, k_valid, k_mean, q8, k8, q_scale, k_scale, q_factor, k_factor,
                q_dot_mean, groups, amax,
                *_bhs(q), *_bhs(k), *_strides(q_valid, (0,)), *_strides(k_valid, (0,)), heads, heads_k, tokens_q,
                tokens_k, blocks_q, blocks_k, chunks_q, amax.shape[0],
            )  # fmt: skip
            named = dict(
                HEADS=chunk, ROWS=min(settings.rows, block), GROUP=heads // heads_k, ROPE=cos is not None,
                VALID_Q=q_valid is not None, VALID_K=padded, MEAN=smooth_k, DOT=smooth_k and for_lse, STEP=step,
                num_warps=settings.warps, maxnreg=settings.registers, **keys,
            )  # fmt: skip
            return (chunks_q + chunks_k, max(blocks_q, blocks_k), batch), args, named

        tensors = (
            q, k, order, cos, sin, q_valid, k_valid, k_mean, q8, k8, q_scale, k_scale, q_factor, k_factor, q_dot_mean,
            groups, amax,
        )  # fmt: skip
        launch(_rows_kernel, call and (call, step), tensors, build, notes)

    if groups is None or in_runs:
        rows("all" if groups is None else "run")
    else:
        rows("amax")
        (q_scale, q_factor), (k_scale, k_factor) = (scales(group_amax(x, groups)) for x in (q_scale, k_scale))
        rows("cast", q_factor, k_factor)

    parts = -(-tokens_k // V_PADDING)
    v8 = torch.empty((batch, heads_k, dim, parts * V_PADDING), dtype=torch.float8_e4m3fn, device=v.device)
    v_scale = torch.empty((batch, heads_k, dim), dtype=torch.float32, device=v.device)
    if notes is not None:
        notes.made(v8)
        notes.made(v_scale)

    def values(v, order, k_valid, amax, v8, v_scale):
        unit = min(all_rows, max(1, settings.reuse // (tokens_k * dim * v.element_size())))
        turns = 2 * triton.cdiv(all_rows, unit) + 2
        args = (
            v, order, k_valid, amax, v8, v_scale, *_bhs(v), *_strides(k_valid, (0,)), heads_k, tokens_k, all_rows,
            parts, unit,
        )  # fmt: skip
        named = dict(VALID=padded, num_warps=settings.values[0], maxnreg=settings.values[1], **keys)
        return (turns * unit * parts,), args, named

    tensors = (v, order, k_valid, amax, v8, v_scale)
    launch(_values_kernel, call, tensors, values, notes)
    return q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean


@triton.jit
def _dequantize_kernel(x8_ptr, scale_ptr, out_ptr, tokens, padded, BLOCK: tl.constexpr, DIM: tl.constexpr,
                       ROWS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """``ROWS`` tokens of one head. V is transposed, has its keys in another order, and rows of ``padded``."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, DIM)
    at = part * ROWS + tl.arange(0, ROWS)
    if VALUES:
        x = tl.trans(tl.load(x8_ptr + (row * DIM + dim)[:, None] * padded + at[None, :]).to(tl.float32))
        x *= tl.load(scale_ptr + row * DIM + dim)[None, :]
        # Place 4 t + 2 j + e of 16 holds key 8 j + 2 t + e.
        at = at // 16 * 16 + at % 4 // 2 * 8 + at % 16 // 4 * 2 + at % 2
        keep = (at < tokens)[:, None]
    else:
        keep = (at < tokens)[:, None]
        x = tl.load(x8_ptr + (row * tokens + at)[:, None] * DIM + dim[None, :], mask=keep, other=0.0).to(tl.float32)
        x *= tl.load(scale_ptr + row * tl.cdiv(tokens, BLOCK) + part * ROWS // BLOCK)
    tl.store(out_ptr + (row * tokens + at)[:, None] * DIM + dim[None, :], x.to(out_ptr.dtype.element_ty), mask=keep)


def dequantize_triton(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    block: int,
    dtype: torch.dtype,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``dequantize``, bit for bit. ``notes`` is for ``launch``."""
    dim = k8.shape[3]
    facts = geometry(q8, k8, v8, q_scale, k_scale, v_scale)
    q, k, v = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q8, k8, k8))
    if notes is not None:
        for x in (q, k, v):
            notes.made(x)
    for x8, scale, out, values in ((q8, q_scale, q, False), (k8, k_scale, k, False), (v8, v_scale, v, True)):

        def build(x8, scale, out, values=values):
            batch, heads, tokens = out.shape[:3]
            named = dict(BLOCK=block, DIM=dim, ROWS=64, VALUES=values, num_warps=4)
            return (triton.cdiv(tokens, 64), batch * heads), (x8, scale, out, tokens, v8.shape[3]), named

        launch(_dequantize_kernel, facts and (facts, block, dtype, values, x8.shape), (x8, scale, out), build, notes)
    return q, k, v
