"""Draws of codes in Triton: one program for each image and token, which holds the whole row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.draws import row_warps
from hone_kernels.triton_draws import draw_row, weighted_row

__all__ = ["draw_codes_triton"]


@triton.jit
def _draw_kernel(
    FIRST, SECOND, THIRD, WEIGHT, UNIFORM, CODES, stride_row, stride_token, images, tokens, vocabulary, guidance,
    temperature, keep, HEADS: tl.constexpr, GUIDED: tl.constexpr, CUT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, PADDED)
    w0 = tl.load(WEIGHT + token * HEADS)
    w1 = 0.0
    w2 = 0.0
    if HEADS > 1:
        w1 = tl.load(WEIGHT + token * HEADS + 1)
    if HEADS > 2:
        w2 = tl.load(WEIGHT + token * HEADS + 2)
    place = image * stride_row + token * stride_token
    x = weighted_row(FIRST, SECOND, THIRD, place, at, vocabulary, w0, w1, w2, HEADS)
    if GUIDED:
        place += images * stride_row
        other = weighted_row(FIRST, SECOND, THIRD, place, at, vocabulary, w0, w1, w2, HEADS)
        x = other + guidance * (x - other)
    x = tl.where(at < vocabulary, x, -float("inf"))
    here = image * tokens + token
    code = draw_row(x - tl.max(x, 0), at, UNIFORM + here, keep, temperature, CUT, PADDED)
    tl.store(CODES + here, code.to(tl.int64))


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
        num_warps=row_warps(padded),
    )  # fmt: skip
    return codes
