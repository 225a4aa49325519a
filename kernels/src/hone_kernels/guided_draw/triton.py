"""The draw in Triton: a program holds a row, from the settings' logits to the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["draw_tokens_triton"]


@triton.jit
def _draw_kernel(
    LOGITS, UNIFORM, TOKEN, CHANCE, weight0, weight1, weight2, temperature, keep, vocabulary, setting_stride,
    SETTINGS: tl.constexpr, PADDED: tl.constexpr, SORTED: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    inside = at < vocabulary
    source = LOGITS + row * vocabulary + at
    x = tl.load(source, mask=inside, other=-float("inf")).to(tl.float32) * weight0
    if SETTINGS > 1:
        x += tl.load(source + setting_stride, mask=inside, other=0.0).to(tl.float32) * weight1
    if SETTINGS > 2:
        x += tl.load(source + 2 * setting_stride, mask=inside, other=0.0).to(tl.float32) * weight2
    # A weight below zero turns the padding over.
    x = tl.where(inside, x, -float("inf"))
    x -= tl.max(x, 0)
    if GREEDY:
        token = tl.min(tl.where(x == 0.0, at, PADDED), 0)
    else:
        allowed = inside
        if SORTED:
            # Floats as integers of the same order (x is never above zero), of which the largest is found that `keep`
            # entries reach, bit by bit.
            bits = x.to(tl.int32, bitcast=True)
            order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            least = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= keep, 0, -2147483648)
            for step in tl.static_range(31):
                higher = least + (1 << (30 - step))
                least = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= keep, higher, least)
            allowed = inside & (order >= least)
        mass = tl.where(allowed, tl.exp(x / temperature), 0.0)
        below = tl.cumsum(mass, 0)
        goal = tl.load(UNIFORM + row) * tl.max(below, 0)
        some = mass > 0.0
        token = tl.min(tl.where(some & (below > goal), at, PADDED), 0)
        token = tl.where(token == PADDED, tl.max(tl.where(some, at, 0), 0), token)
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
    _draw_kernel[(rows,)](
        logits, uniform, token, chance, *numbers[:3], float(temperature or 1.0), keep, vocabulary, rows * vocabulary,
        SETTINGS=settings, PADDED=padded, SORTED=keep < vocabulary, GREEDY=temperature == 0,
        num_warps=min(8, max(1, padded // 512)),
    )  # fmt: skip
    return token, chance
