"""Signals of logits in Triton: pieces of a row in parallel, each read once, then one program per row joins them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["PIECES", "read_logits_triton"]

PIECES = {1: (2048, 4), 128: (1024, 1), 512: (2048, 1)}
"""Most rows -> entries of a row that one program reads, and its warps; more rows take the last. Chosen on an H100 among
pieces of 1,024 to 16,384 entries at 1 to 16 warps, for bfloat16 and 151,936 entries."""


@triton.jit
def _join_lanes(total, moment, allowed, first, total2, moment2, allowed2, first2):
    return total + total2, moment + moment2, allowed + allowed2, tl.minimum(first, first2)


@triton.jit
def _pieces_kernel(LOGITS, PARTS, TOKENS, row_stride, vocabulary, parts, PIECE: tl.constexpr):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = part * PIECE + tl.arange(0, PIECE)
    x = tl.load(LOGITS + row * row_stride + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
    top = tl.max(x, 0)
    # A piece without a token that can come has no largest logit; every weight is then 0.
    shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp(x - shift)
    moments = tl.where(x == -float("inf"), 0.0, x - shift) * weight
    firsts = tl.where(x == top, at, vocabulary - 1)
    total, moment, allowed, first = tl.reduce(
        (weight, moments, tl.where(x == -float("inf"), 0.0, 1.0), firsts), 0, _join_lanes
    )
    out = PARTS + (row * parts + part) * 4
    tl.store(out, top)
    tl.store(out + 1, total)
    tl.store(out + 2, moment)
    tl.store(out + 3, allowed)
    tl.store(TOKENS + row * parts + part, first)


@triton.jit
def _join_kernel(
    PARTS, TOKENS, THRESHOLD, ENTROPY, CONFIDENCE, TOKEN, FORCED, UNCERTAIN, parts, vocabulary, log_size,
    PADDED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    real = part < parts
    at = PARTS + (row * parts + part) * 4
    tops = tl.load(at, mask=real, other=-float("inf"))
    totals = tl.load(at + 1, mask=real, other=0.0)
    moments = tl.load(at + 2, mask=real, other=0.0)
    allowed = tl.load(at + 3, mask=real, other=0.0)
    firsts = tl.load(TOKENS + row * parts + part, mask=real, other=vocabulary - 1)
    top = tl.max(tops, 0)
    # sum (x - top) exp(x - top) = exp(t - top) (sum (x - t) exp(x - t) + (t - top) sum exp(x - t)), piece by piece.
    move = tl.where(tops == -float("inf"), 0.0, tops - top)
    scale = tl.where(tops == -float("inf"), 0.0, tl.exp(move))
    total = tl.sum(totals * scale, 0)
    moment = tl.sum((moments + move * totals) * scale, 0)
    entropy = (tl.log(total) - moment / total) / log_size
    # As torch's clamp does, a NaN stays one.
    entropy = tl.where(entropy < 0.0, 0.0, tl.where(entropy > 1.0, 1.0, entropy))
    confidence = 1.0 / total
    forced = tl.sum(allowed, 0) == 1.0
    tl.store(ENTROPY + row, entropy)
    tl.store(CONFIDENCE + row, confidence)
    tl.store(TOKEN + row, tl.min(tl.where(tops == top, firsts, vocabulary - 1), 0).to(tl.int64))
    tl.store(FORCED + row, forced)
    if GATE == "entropy":
        uncertain = entropy > tl.load(THRESHOLD + row)
    elif GATE == "confidence":
        uncertain = confidence < tl.load(THRESHOLD + row)
    else:
        uncertain = entropy > 2.0
    tl.store(UNCERTAIN + row, uncertain & (forced == 0))


def read_logits_triton(
    logits: Tensor, size: int, threshold: Tensor | None, gate: str, *, piece: int | None = None, warps: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``read_logits``; ``piece`` and ``warps`` are chosen by the number of rows unless a piece is told."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocabulary = logits.shape
    if piece is None:
        piece, warps = next((tile for most, tile in PIECES.items() if rows <= most), PIECES[512])
    count = triton.cdiv(vocabulary, piece)
    parts = torch.empty((rows, count, 4), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, count), dtype=torch.int32, device=logits.device)
    entropy, confidence = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    forced, uncertain = (torch.empty(rows, dtype=torch.bool, device=logits.device) for _ in range(2))
    _pieces_kernel[(count, rows)](
        logits, parts, tokens, logits.stride(0), vocabulary, count, PIECE=piece, num_warps=warps
    )
    _join_kernel[(rows,)](
        parts, tokens, threshold, entropy, confidence, token, forced, uncertain, count, vocabulary, math.log(size),
        PADDED=triton.next_power_of_2(count), GATE="none" if threshold is None else gate, num_warps=1,
    )  # fmt: skip
    return entropy, confidence, token, forced, uncertain
