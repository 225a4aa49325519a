"""Column sums in Triton: log-sum-exps of the rows from pieces of the keys, then the weights, tile by tile of keys.

Rows of all heads that read the same keys stand in one list, a row's heads side by side, so that a tile of it holds rows
from about one place of the text: of a causal map it reads what these see and no more, with a mask at the edge only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hone_kernels.checks import unit_last
from hone_kernels.launch import dependent, launches_overlap

__all__ = ["column_mass_triton"]

LOG2E = 1.4426950408889634
_PROGRAMS = 512
"""Into about so many programs each pass is cut: the first by pieces of the keys, the second by parts of the rows."""
_PIECES = 8
"""At most, of the keys; the second pass joins what they found."""
_PARTS = 2
"""At most, of the rows; whoever is last joins what they found."""
_NARROW = ((64, 64, 4, 3), (64, 128, 4, 2))
"""Of both passes: rows and keys of a tile, warps, stages. For 16-bit numbers."""
_WIDE = ((16, 32, 4, 3), (16, 32, 8, 2))
"""Products of three rounded parts, as of float32, take many registers."""


@triton.jit
def _list_rows(ROWS, b, j, num_rows, before, GROUP: tl.constexpr):
    """Rows of the entries j of the list, -1 beyond its end, and the last keys that they see."""
    row = tl.load(ROWS + b * num_rows + j // GROUP, mask=j < num_rows * GROUP, other=-1)
    return row, tl.where(row >= 0, row + before, -1)


@triton.jit
def _queries(Q, row, j, stride_qh, stride_qt, d, GROUP: tl.constexpr):
    at = (j % GROUP).to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qt
    return tl.load(Q + at[:, None] + d[None, :], mask=(row >= 0)[:, None], other=0.0)


@triton.jit
def _grown(q, keys, stride_kt, REAL, at, last, num_k, scale_log2, top, total, d, MASKED: tl.constexpr):
    """Log-sum-exps, as the largest logit and a sum, with those of one more tile of keys."""
    k = tl.load(
        keys + at.to(tl.int64)[None, :] * stride_kt + d[:, None],
        mask=(at < num_k)[None, :] if MASKED else None, other=0.0 if MASKED else None,
    )  # fmt: skip
    s = tl.dot(q, k, input_precision="tf32x3") * scale_log2
    if MASKED:
        live = at < num_k
        if REAL is not None:
            live = live & (tl.load(REAL + at, mask=live, other=0) != 0)
        s = tl.where(live[None, :] & (at[None, :] <= last[:, None]), s, -float("inf"))
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == -float("inf"), 0.0, new) if MASKED else new
    return new, total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)


@triton.jit
def _lse_kernel(
    Q, K, ROWS, REAL, PART, COUNTS,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    num_rows, num_k, before, piece, tiles, scale_log2,
    HK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """PART[b, key head, piece, entry]: log-sum-exp, base 2, of a row's logits in a piece of the keys."""
    if OVERLAP:
        gdc_launch_dependents()
    part = tl.program_id(0)
    bh = tl.program_id(2).to(tl.int64)
    b = bh // HK
    hk = bh % HK
    # The second pass counts its programs.
    if (tl.program_id(1) == 0) & (hk == 0):
        for tile in range(part, tiles, tl.num_programs(0)):
            tl.store(COUNTS + b * tiles + tile, 0)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    c = tl.arange(0, BN)
    row, last = _list_rows(ROWS, b, j, num_rows, before, GROUP)
    q = _queries(Q + b * stride_qb + hk * GROUP * stride_qh, row, j, stride_qh, stride_qt, d, GROUP)
    keys = K + b * stride_kb + hk * stride_kh
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    first = part * piece
    stop = tl.minimum(tl.minimum(first + piece, num_k), tl.max(last, 0) + 1)
    edge = first
    if REAL is None:
        seen = tl.min(tl.where(j < num_rows * GROUP, last, num_k), 0) + 1  # by all rows
        edge = first + tl.maximum(tl.minimum(seen, stop) - first, 0) // BN * BN
        for start in range(first, edge, BN):
            top, total = _grown(q, keys, stride_kt, None, start + c, last, num_k, scale_log2, top, total, d, False)
    else:
        REAL += b * num_k
    for start in range(edge, stop, BN):
        top, total = _grown(q, keys, stride_kt, REAL, start + c, last, num_k, scale_log2, top, total, d, True)
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    entries = num_rows * GROUP
    tl.store(PART + (bh * tl.num_programs(0) + part) * entries + j, lse, mask=j < entries)


@triton.jit
def _weights(
    Q, k, ROWS, PART, b, j, at, live, stride_qh, stride_qt, num_rows, before, scale_log2, d,
    GROUP: tl.constexpr, PIECES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of columns in the rows of the entries j."""
    entries = num_rows * GROUP
    row, last = _list_rows(ROWS, b, j, num_rows, before, GROUP)
    q = _queries(Q, row, j, stride_qh, stride_qt, d, GROUP)
    pieces = tl.arange(0, PIECES)
    parts = tl.load(
        PART + pieces[:, None] * entries + j[None, :], mask=(j < entries)[None, :], other=-float("inf"),
        cache_modifier=".cg",
    )  # fmt: skip
    top = tl.max(parts, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(parts - base[None, :]), 0)
    # A row that sees nothing has no weights.
    lse = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    weights = tl.exp2(tl.dot(q, k, input_precision="tf32x3") * scale_log2 - lse[:, None])
    if MASKED:
        weights = tl.where(live[None, :] & (at[None, :] <= last[:, None]), weights, 0.0)
    return weights


@triton.jit
def _mass_kernel(
    Q, K, ROWS, REAL, PART, SUMS, COUNTS, MASS, SEEN, RANK,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    num_rows, num_k, before, scale_log2,
    HK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PIECES: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of columns, summed over a part of the rows of a key head; whoever is last joins all sums."""
    if OVERLAP:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    hk = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    b = tl.program_id(2).to(tl.int64)
    start = tile * BN
    at = start + tl.arange(0, BN)
    d = tl.arange(0, D)
    m = tl.arange(0, BM)
    live = at < num_k
    k = tl.load(
        K + b * stride_kb + hk * stride_kh + at.to(tl.int64)[None, :] * stride_kt + d[:, None],
        mask=live[None, :], other=0.0,
    )  # fmt: skip
    # Rows before begin see none of the columns, rows from edge on all.
    begin = num_rows
    edge = 0
    seen = tl.zeros([BN], tl.int32)
    for first in range(0, num_rows, BR):
        r = first + tl.arange(0, BR)
        _, last = _list_rows(ROWS, b, r, num_rows, before, 1)
        begin = tl.minimum(begin, tl.min(tl.where(last >= start, r, num_rows), 0))
        edge = tl.maximum(edge, tl.max(tl.where((r < num_rows) & (last < start + BN - 1), r + 1, 0), 0))
        seen += tl.sum((at[None, :] <= last[:, None]).to(tl.int32), 0)
    entries = num_rows * GROUP
    begin = begin * GROUP // BM * BM
    edge = tl.cdiv(edge * GROUP, BM) * BM
    if REAL is not None:
        live = live & (tl.load(REAL + b * num_k + at, mask=live, other=0) != 0)
        edge = tl.cdiv(entries, BM) * BM
    # Of the rows that see something of the tile, this program's part.
    mine = tl.cdiv(tl.cdiv(tl.maximum(entries - begin, 0), PARTS), BM) * BM
    begin += part * mine
    stop = tl.minimum(begin + mine, entries)
    edge = tl.minimum(edge, stop)
    if OVERLAP:
        gdc_wait()
    Q += b * stride_qb + hk * GROUP * stride_qh
    PART += (b * HK + hk) * PIECES * entries
    sums = tl.zeros([BM, BN], tl.float32)
    for first in range(begin, edge, BM):
        sums += _weights(
            Q, k, ROWS, PART, b, first + m, at, live, stride_qh, stride_qt, num_rows, before, scale_log2, d,
            GROUP, PIECES, True,
        )  # fmt: skip
    for first in range(tl.maximum(begin, edge), stop, BM):
        sums += _weights(
            Q, k, ROWS, PART, b, first + m, at, live, stride_qh, stride_qt, num_rows, before, scale_log2, d,
            GROUP, PIECES, False,
        )  # fmt: skip
    mass = tl.sum(sums, 0)
    SUMS += b * HK * PARTS * num_k
    tl.store(SUMS + (hk * PARTS + part) * num_k + at, mass, mask=at < num_k)
    tl.debug_barrier()
    if tl.atomic_add(COUNTS + b * tl.num_programs(0) + tile, 1, sem="acq_rel") == HK * PARTS - 1:
        mass = tl.zeros([BN], tl.float32)
        for one in range(0, HK * PARTS):
            mass += tl.load(SUMS + one * num_k + at, mask=at < num_k, other=0.0, cache_modifier=".cg")
        mass = mass / (HK * GROUP)
        seen = tl.where(live, seen, 0)
        here = b * num_k + at
        tl.store(MASS + here, mass, mask=at < num_k)
        tl.store(SEEN + here, seen, mask=at < num_k)
        tl.store(RANK + here, mass / tl.maximum(seen, 1).to(tl.float32), mask=at < num_k)


def column_mass_triton(
    q: Tensor, k: Tensor, rows: Tensor, real: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``column_mass``."""
    q, k = unit_last(q), unit_last(k)
    rows = rows.to(torch.int32).contiguous()
    real = None if real is None else real.contiguous()
    batch, heads, _, dim = q.shape
    heads_k, num_k = k.shape[1:3]
    num_rows = rows.shape[1]
    entries = num_rows * heads // heads_k
    (rows_1, keys_1, warps_1, stages_1), (rows_2, keys_2, warps_2, stages_2) = (
        _NARROW if q.element_size() == 2 else _WIDE
    )
    # Few rows fill no tile; so many the tensor cores take at least.
    rows_1, rows_2 = (min(size, max(16, triton.next_power_of_2(entries))) for size in (rows_1, rows_2))
    lists = triton.cdiv(entries, rows_1)
    pieces = min(_PIECES, triton.next_power_of_2(triton.cdiv(_PROGRAMS, lists * batch * heads_k)))
    pieces = min(pieces, triton.next_power_of_2(triton.cdiv(num_k, 4 * keys_1)))
    piece = triton.cdiv(num_k, pieces * keys_1) * keys_1
    tiles = triton.cdiv(num_k, keys_2)
    parts = min(_PARTS, triton.next_power_of_2(triton.cdiv(_PROGRAMS, tiles * batch * heads_k)))
    parts = min(parts, triton.next_power_of_2(triton.cdiv(entries, rows_2)))
    device = q.device
    part = torch.empty((batch, heads_k, pieces, entries), dtype=torch.float32, device=device)
    sums = torch.empty((batch, heads_k * parts, num_k), dtype=torch.float32, device=device)
    counts = torch.empty((batch, tiles), dtype=torch.int32, device=device)
    mass, rank = (torch.empty((batch, num_k), dtype=torch.float32, device=device) for _ in range(2))
    seen = torch.empty((batch, num_k), dtype=torch.int32, device=device)
    strides = (*q.stride()[:3], *k.stride()[:3])
    before, overlap = num_k - q.shape[2], launches_overlap(device)
    sizes = {"HK": heads_k, "GROUP": heads // heads_k, "D": dim, "OVERLAP": overlap}
    _lse_kernel[(pieces, lists, batch * heads_k)](
        q, k, rows, real, part, counts, *strides, num_rows, num_k, before, piece, tiles, scale * LOG2E,
        BM=rows_1, BN=keys_1, num_warps=warps_1, num_stages=stages_1, **sizes,
    )  # fmt: skip
    _mass_kernel[(tiles, heads_k * parts, batch)](
        q, k, rows, real, part, sums, counts, mass, seen, rank, *strides, num_rows, num_k, before, scale * LOG2E,
        BM=rows_2, BN=keys_2, BR=128, PIECES=pieces, PARTS=parts, num_warps=warps_2, num_stages=stages_2, **sizes,
        **dependent(overlap),
    )  # fmt: skip
    return mass, seen, rank
