"""The draw in Triton: a program holds a row, from the settings' logits to the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.draws import row_warps
from hone_kernels.triton_draws import draw_row, weighted_row

__all__ = ["draw_tokens_triton"]


@triton.jit
def _draw_kernel(
    FIRST, SECOND, THIRD, UNIFORM, TOKEN, CHANCE, weight0, weight1, weight2, temperature, keep, vocabulary,
    SETTINGS: tl.constexpr, PADDED: tl.constexpr, CUT: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    x = weighted_row(FIRST, SECOND, THIRD, row * vocabulary, at, vocabulary, weight0, weight1, weight2, SETTINGS)
    x = tl.where(at < vocabulary, x, -float("inf"))
    x -= tl.max(x, 0)
    if GREEDY:
        token = tl.min(tl.where(x == 0.0, at, PADDED), 0)
    else:
        token = draw_row(x, at, UNIFORM + row, keep, temperature, CUT, PADDED)
    weight = tl.exp(x)
    chance = tl.sum(tl.where(at == token, weight, 0.0), 0) / tl.sum(weight, 0)
    tl.store(TOKEN + row, token.to(tl.int64))
    tl.store(CHANCE + row, chance)


def draw_tokens_triton(
    logits: Tensor, weights: Sequence[float], uniform: Tensor, keep: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """See ``draw_tokens``."""
    logits, uniform = logits.contiguous(), uniform.contiguous()
    settings, rows, vocabulary = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    chance = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return token, chance
    padded = triton.next_power_of_2(vocabulary)
    numbers = [*map(float, weights), 0.0, 0.0]
    first, second, third = (*logits, *logits[-1:], *logits[-1:])[:3]
    _draw_kernel[(rows,)](
        first, second, third, uniform, token, chance, *numbers[:3], float(temperature or 1.0), keep, vocabulary,
        SETTINGS=settings, PADDED=padded, CUT=keep < vocabulary, GREEDY=temperature == 0, num_warps=row_warps(padded),
    )  # fmt: skip
    return token, chance
