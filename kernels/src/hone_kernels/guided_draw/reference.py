"""The draw as its definition, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["draw_tokens_reference"]


@without_autocast
def draw_tokens_reference(
    logits: Tensor, weights: Sequence[float], uniform: Tensor, keep: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """See ``draw_tokens``."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    x = wide[0] * weights[0]
    for part, weight in zip(wide[1:], weights[1:], strict=True):
        x = x + part * weight
    x = x - x.amax(-1, keepdim=True)
    if temperature == 0:
        token = (x == 0).int().argmax(-1)  # the first of those that tie
    else:
        least = x.topk(keep, dim=-1).values[:, -1:]
        mass = torch.where(x >= least, (x / temperature).exp(), 0.0)
        below = mass.cumsum(-1)
        # Where rounding brings the draw to the end of all mass, the last token that has some.
        beyond = (below > uniform[:, None].to(x) * below[:, -1:]) & (mass > 0)
        last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(-1)
        token = torch.where(beyond.any(-1), beyond.int().argmax(-1), last)
    odds = x.exp()
    return token, odds.gather(-1, token[:, None])[:, 0] / odds.sum(-1)
