"""Attention over prefixes as its definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["prefix_attention_reference", "seen_of"]


def seen_of(ends: Tensor, words: Tensor | None) -> Tensor:
    """Which keys each row reads, bool ``[S, S]``, or ``[B, 1, S, S]`` with words."""
    at = torch.arange(len(ends), device=ends.device)
    seen = at < ends[:, None]
    if words is None:
        return seen
    there = torch.ones(len(words), len(ends), dtype=torch.bool, device=ends.device)
    there[:, : words.shape[1]] = words
    return (seen & there[:, None] | (at == at[:, None]))[:, None]


def prefix_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, words: Tensor | None, scale: float
) -> Tensor:
    """See ``prefix_attention``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q.to(wide) @ k.mT * scale).masked_fill(~seen_of(ends, words), -torch.inf)
    return (logits.softmax(-1) @ v).to(q.dtype)
