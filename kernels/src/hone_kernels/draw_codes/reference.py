"""Draws of codes as their definition, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_codes_reference"]


def draw_codes_reference(
    logits: Sequence[Tensor], weight: Tensor, uniform: Tensor, guidance: float, temperature: float, top_k: int
) -> Tensor:
    """See ``draw_codes``."""
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    total = logits[0].to(wide) * weight[:, 0, None]
    for head in range(1, len(logits)):
        total = total + logits[head].to(wide) * weight[:, head, None]
    if guidance != 1:
        conditional, unconditional = total.chunk(2)
        total = unconditional + guidance * (conditional - unconditional)
    total = total / temperature
    if 0 < top_k < total.shape[-1]:
        least = total.topk(top_k, dim=-1).values[..., -1:]
        total = total.masked_fill(total < least, -torch.inf)
    mass = total.softmax(-1)
    reached = mass.cumsum(-1)
    # The first code whose running sum passes the uniform's share, among those that have a mass at all.
    past = (reached > uniform[..., None] * reached[..., -1:]) & (mass > 0)
    found = past.int().argmax(-1)
    return torch.where(past.any(-1), found, total.argmax(-1))
