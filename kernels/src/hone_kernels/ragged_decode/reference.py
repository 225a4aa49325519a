"""Attention of one token to the valid entries of its cache as its definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["decode_attention_reference"]


@without_autocast
def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float) -> Tensor:
    """See ``decode_attention``."""
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(exact).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q.to(exact) @ keys.transpose(-1, -2) * scale).masked_fill(~valid[:, None, None], -torch.inf)
    # What is not valid may hold anything; the softmax of a cache without an entry is no number.
    weights = logits.softmax(-1).masked_fill(~valid[:, None, None], 0.0)
    return (weights @ values.masked_fill(~valid[:, None, :, None], 0.0)).to(q.dtype)
