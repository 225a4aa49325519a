"""Draws of codes in Triton: one program for each image and token, which holds the whole row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["draw_codes_triton"]

LEAST: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def _mixed(FIRST, SECOND, THIRD, row, token, at, stride_row, stride_token, vocabulary, w0, w1, w2, HEADS: tl.constexpr):
    """The heads' average of one row; a head of weight 0 is not read."""
    place = row * stride_row + token * stride_token + at
    x = w0 * tl.load(FIRST + place, mask=at < tl.where(w0 > 0.0, vocabulary, 0), other=0.0).to(tl.float32)
    if HEADS > 1:
        x += w1 * tl.load(SECOND + place, mask=at < tl.where(w1 > 0.0, vocabulary, 0), other=0.0).to(tl.float32)
    if HEADS > 2:
        x += w2 * tl.load(THIRD + place, mask=at < tl.where(w2 > 0.0, vocabulary, 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def _draw_kernel(
    FIRST, SECOND, THIRD, WEIGHT, UNIFORM, CODES, stride_row, stride_token, images, tokens, vocabulary, guidance,
    temperature, kept, HEADS: tl.constexpr, GUIDED: tl.constexpr, CUT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, PADDED)
    there = at < vocabulary
    w0 = tl.load(WEIGHT + token * HEADS)
    w1 = 0.0
    w2 = 0.0
    if HEADS > 1:
        w1 = tl.load(WEIGHT + token * HEADS + 1)
    if HEADS > 2:
        w2 = tl.load(WEIGHT + token * HEADS + 2)
    x = _mixed(FIRST, SECOND, THIRD, image, token, at, stride_row, stride_token, vocabulary, w0, w1, w2, HEADS)
    if GUIDED:
        row = image + images
        other = _mixed(FIRST, SECOND, THIRD, row, token, at, stride_row, stride_token, vocabulary, w0, w1, w2, HEADS)
        x = other + guidance * (x - other)
    # A zero added drops the sign of a zero.
    x = tl.where(there, x / temperature + 0.0, -float("inf"))
    if CUT:
        # Bits of floats as integers that compare alike; the kept-th largest by bisection on them.
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)
        cut = tl.full((), LEAST, tl.int64)
        for bit in range(32):
            trial = cut + (tl.full((), 1, tl.int64) << (31 - bit))
            count = tl.sum((key >= trial.to(tl.int32)).to(tl.int32), 0)
            cut = tl.where(count >= kept, trial, cut)
        x = tl.where(key >= cut.to(tl.int32), x, -float("inf"))
    top = tl.max(x, 0)
    mass = tl.exp(x - top)
    reached = tl.cumsum(mass, 0)
    total = tl.max(reached, 0)
    share = tl.load(UNIFORM + image * tokens + token) * total
    # A running sum that was added up in parallel may fall by a rounding, so that a code has to have a mass of its own.
    code = tl.min(tl.where((reached > share) & (mass > 0.0) & there, at, PADDED), 0)
    likeliest = tl.min(tl.where((x == top) & there, at, PADDED - 1), 0)
    tl.store(CODES + image * tokens + token, tl.where(code < PADDED, code, likeliest).to(tl.int64))


def draw_codes_triton(
    logits: Sequence[Tensor], weight: Tensor, uniform: Tensor, guidance: float, temperature: float, top_k: int
) -> Tensor:
    """See ``draw_codes``."""
    heads = [each if each.stride() == logits[0].stride() and each.stride(2) == 1 else None for each in logits]
    given = [each.contiguous() for each in logits] if None in heads else list(logits)
    rows, tokens, vocabulary = given[0].shape
    images = uniform.shape[0]
    codes = torch.empty(uniform.shape, dtype=torch.int64, device=uniform.device)
    weight, uniform = weight.float().contiguous(), uniform.float().contiguous()
    padded = triton.next_power_of_2(vocabulary)
    first, second, third = (given * 3)[:3] if len(given) == 1 else (*given, given[-1])[:3]
    _draw_kernel[(tokens, images)](
        first, second, third, weight, uniform, codes, first.stride(0), first.stride(1), images, tokens, vocabulary,
        guidance, temperature, top_k,
        HEADS=len(given), GUIDED=rows != images, CUT=0 < top_k < vocabulary, PADDED=padded,
        num_warps=min(32, max(4, padded // 512)),
    )  # fmt: skip
    return codes
