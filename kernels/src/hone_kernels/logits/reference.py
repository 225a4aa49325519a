"""Signals of next-token logits as their definition, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["read_logits_reference"]


@without_autocast
def read_logits_reference(
    logits: Tensor, size: int, threshold: Tensor | None, gate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``read_logits``."""
    x = logits.float() if logits.dtype.itemsize == 2 else logits
    top = x.amax(-1)
    token = (x == top[:, None]).int().argmax(-1)  # the first of those that tie
    x = x - top[:, None]
    weight = x.exp()
    total = weight.sum(-1)
    moment = (x.masked_fill(logits == -torch.inf, 0.0) * weight).sum(-1)
    entropy = ((total.log() - moment / total) / math.log(size)).clamp(0.0, 1.0)
    confidence = 1 / total
    forced = (logits != -torch.inf).sum(-1) == 1
    if threshold is None:
        uncertain = torch.zeros_like(forced)
    else:
        uncertain = (entropy > threshold if gate == "entropy" else confidence < threshold) & ~forced
    return entropy, confidence, token, forced, uncertain
