"""The draw as its definition, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hone_kernels.draws import draw_reference, weighted_reference
from hone_kernels.precision import without_autocast

__all__ = ["draw_tokens_reference"]


@without_autocast
def draw_tokens_reference(
    logits: Tensor, weights: Sequence[float], uniform: Tensor, keep: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """See ``draw_tokens``."""
    x = weighted_reference(logits, weights)
    x = x - x.amax(-1, keepdim=True)
    token = draw_reference(x, uniform, keep, temperature)
    odds = x.exp()
    return token, odds.gather(-1, token[:, None])[:, 0] / odds.sum(-1)
