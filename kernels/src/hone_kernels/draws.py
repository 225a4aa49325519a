"""A draw from rows of logits as its definition, on any device; ``triton_draws`` holds what its kernels share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["draw_reference", "row_warps", "weighted_reference"]


def weighted_reference(logits: Sequence[Tensor] | Tensor, weights: Iterable[Tensor | float]) -> Tensor:
    """Sum of the logits times their weights, in float32 or float64."""
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    parts = [part.to(wide) * weight for part, weight in zip(logits, weights, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def draw_reference(x: Tensor, uniform: Tensor, keep: int, temperature: float) -> Tensor:
    """Tokens ``[...]`` at which the running sum of masses passes the uniform's share of it all.

    Args:
        x: ``[..., V]``, less their largest.
        uniform: ``[...]`` in [0, 1).
        keep: Tokens that may be drawn, the likeliest and all that tie with the last of them; V at most.
        temperature: 0 takes the likeliest, the first of those that tie.
    """
    if temperature == 0:
        return (x == 0).int().argmax(-1)
    mass = (x / temperature).exp()
    if keep < x.shape[-1]:
        mass = torch.where(x >= x.topk(keep, dim=-1).values[..., -1:], mass, 0.0)
    below = mass.cumsum(-1)
    # Where rounding brings the draw to the end of all mass, the last token that has some.
    beyond = (below > uniform[..., None].to(x) * below[..., -1:]) & (mass > 0)
    last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(-1)
    return torch.where(beyond.any(-1), beyond.int().argmax(-1), last)


def row_warps(entries: int) -> int:
    """Warps of a program that holds a row of so many entries, a power of two."""
    return min(16, max(1, entries // 512))
