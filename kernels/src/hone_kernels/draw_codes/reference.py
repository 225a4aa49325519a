"""Draws of codes as their definition, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hone_kernels.draws import draw_reference, weighted_reference

__all__ = ["draw_codes_reference"]


def draw_codes_reference(
    logits: Sequence[Tensor], weight: Tensor, uniform: Tensor, guidance: float, temperature: float, top_k: int
) -> Tensor:
    """See ``draw_codes``."""
    x = weighted_reference(logits, weight.T[..., None])
    if guidance != 1:
        conditional, unconditional = x.chunk(2)
        x = unconditional + guidance * (conditional - unconditional)
    vocabulary = x.shape[-1]
    return draw_reference(x - x.amax(-1, keepdim=True), uniform, min(top_k or vocabulary, vocabulary), temperature)
