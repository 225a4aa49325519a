"""Signals of logits in Triton: pieces of a row in parallel, each read once, then one program per row joins them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hone_kernels.checks import check_programs
from hone_kernels.launch import dependent, launches_overlap

__all__ = ["PIECES", "read_logits_triton"]

PIECES = {2: {1024: (2048, 2)}, 4: {32: (1024, 1), 1024: (2048, 4)}}
"""Bytes of an entry -> most rows -> entries of a row that one program reads, and its warps; more rows take the last.
Chosen on an H200 among pieces of 512 to 8,192 entries at 1 to 8 warps, for 151,936 entries."""
OVERLAPPED = 128
"""Most rows whose second launch overlaps the first; beyond them its programs are in the way."""


LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))


@triton.jit
def _join_lanes(total, moment, total2, moment2):
    return total + total2, moment + moment2


@triton.jit
def _shift(top):
    # A piece without a token that can come has no largest logit; every weight is then 0.
    return tl.where(top == -float("inf"), 0.0, top) * LOG2E


@triton.jit
def _pieces_kernel(LOGITS, PARTS, row_stride, vocabulary, parts, PIECE: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
    # What is done to each entry is what bounds this kernel, before memory does: a comparison less is a tenth of it.
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = part * PIECE + tl.arange(0, PIECE)
    x = tl.load(LOGITS + row * row_stride + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    # In powers of two, with one multiplication and addition for an entry. All of them share the shift's rounding, of
    # which the entropy does not depend. An entry of minus infinity is one whose weight is far below the least number.
    below = tl.maximum(tl.fma(x, LOG2E, -_shift(top)), -1e30, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.exp2(below)
    total, moment = tl.reduce((weight, below * weight), 0, _join_lanes)
    allowed = 2.0
    if (total < 1.5) | (tl.abs(top) > 1e6):
        # Hardly a weight but the largest: one token is allowed, or none, or others that are too unlikely to count.
        allowed = tl.sum(tl.where(x == -float("inf"), 0.0, 1.0), 0)
    out = PARTS + (row * parts + part) * 4
    tl.store(out, top)
    tl.store(out + 1, total)
    tl.store(out + 2, moment)
    tl.store(out + 3, allowed)


@triton.jit
def _join_kernel(
    LOGITS, PARTS, THRESHOLD, ENTROPY, CONFIDENCE, TOKEN, FORCED, UNCERTAIN, row_stride, parts, vocabulary, log_size,
    PADDED: tl.constexpr, PIECE: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    real = part < parts
    at = PARTS + (row * parts + part) * 4
    tops = tl.load(at, mask=real, other=-float("inf"))
    totals = tl.load(at + 1, mask=real, other=0.0)
    moments = tl.load(at + 2, mask=real, other=0.0)
    allowed = tl.load(at + 3, mask=real, other=0.0)
    top = tl.max(tops, 0)
    # The first of the likeliest tokens lies in the first piece that has one, which is read once more.
    first = tl.min(tl.where(tops == top, part, parts - 1), 0)
    entry = first * PIECE + tl.arange(0, PIECE)
    x = tl.load(LOGITS + row * row_stride + entry, mask=entry < vocabulary, other=-float("inf")).to(tl.float32)
    token = tl.min(tl.where(x == top, entry, vocabulary - 1), 0)
    # Sums over pieces, as powers of two of the distance to the highest shift S: a piece with shift s has summed
    # 2^(x - s) and (x - s) 2^(x - s), and 2^(x - S) = 2^(s - S) 2^(x - s).
    shifts = _shift(tops)
    shift = _shift(top)
    move = tl.where(tops == -float("inf"), 0.0, shifts - shift)
    scale = tl.where(tops == -float("inf"), 0.0, tl.exp2(move))
    total = tl.sum(totals * scale, 0)
    moment = tl.sum((moments + move * totals) * scale, 0)
    entropy = (tl.log2(total) - moment / total) / log_size
    # As torch's clamp does, a NaN stays one.
    entropy = tl.where(entropy < 0.0, 0.0, tl.where(entropy > 1.0, 1.0, entropy))
    confidence = tl.exp2(tl.fma(top, LOG2E, -shift)) / total
    forced = tl.sum(allowed, 0) == 1.0
    tl.store(ENTROPY + row, entropy)
    tl.store(CONFIDENCE + row, confidence)
    tl.store(TOKEN + row, token.to(tl.int64))
    tl.store(FORCED + row, forced)
    if GATE == "entropy":
        uncertain = entropy > tl.load(THRESHOLD + row)
    elif GATE == "confidence":
        uncertain = confidence < tl.load(THRESHOLD + row)
    else:
        uncertain = entropy > 2.0
    tl.store(UNCERTAIN + row, uncertain & (forced == 0))


def read_logits_triton(
    logits: Tensor,
    size: int,
    threshold: Tensor | None,
    gate: str,
    *,
    piece: int | None = None,
    warps: int = 4,
    overlap: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``read_logits``.

    ``piece`` and ``warps`` are chosen by dtype and number of rows unless a piece is told. With ``overlap`` the second
    kernel is on its way while the first ends (programmatic dependent launch, from Hopper on); chosen if None.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    threshold = None if threshold is None else threshold.contiguous()
    rows, vocabulary = logits.shape
    check_programs("rows", rows)
    if piece is None:
        sizes = PIECES[logits.dtype.itemsize]
        piece, warps = next((tile for most, tile in sizes.items() if rows <= most), sizes[1024])
    if overlap is None:
        overlap = rows <= OVERLAPPED and launches_overlap(logits.device)
    count = triton.cdiv(vocabulary, piece)
    parts = torch.empty((rows, count, 4), dtype=torch.float32, device=logits.device)
    entropy, confidence = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    forced, uncertain = (torch.empty(rows, dtype=torch.bool, device=logits.device) for _ in range(2))
    _pieces_kernel[(count, rows)](
        logits, parts, logits.stride(0), vocabulary, count, PIECE=piece, OVERLAP=overlap, num_warps=warps
    )
    _join_kernel[(rows,)](
        logits, parts, threshold, entropy, confidence, token, forced, uncertain, logits.stride(0), count, vocabulary,
        math.log2(size), PADDED=triton.next_power_of_2(count), PIECE=piece,
        GATE="none" if threshold is None else gate, OVERLAP=overlap, num_warps=4, **dependent(overlap),
    )  # fmt: skip
    return entropy, confidence, token, forced, uncertain
