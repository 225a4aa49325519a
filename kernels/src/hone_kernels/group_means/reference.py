"""Means of groups of tokens as their definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["group_means_reference"]


@without_autocast
def group_means_reference(x: Tensor, n: int, tokens: int, last: int) -> Tensor:
    """See ``group_means``, of one tensor; ``last``: tokens that a short last group counts as, n or those it has."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole, rest = tokens // n, tokens % n
    means = x[:, :, : whole * n].unflatten(2, (whole, n)).mean(3, dtype=wide)
    if rest:
        tail = x[:, :, whole * n : tokens].to(wide)
        total = tail.sum(2, keepdim=True) + (last - rest) * tail[:, :, -1:]
        means = torch.cat([means, total / last], dim=2)
    return means.to(x.dtype)
