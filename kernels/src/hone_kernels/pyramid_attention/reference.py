"""Attention over a pyramid of keys as its definition, in float32 or float64, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["FACTORS", "pyramid_reference"]

FACTORS = (1, 2, 4, 8)
"""Keys that are read as one, level by level."""

# Logits held at a time.
_CHUNK_ELEMENTS = 1 << 21


@without_autocast
def pyramid_reference(
    q: Tensor, k: Tensor, v: Tensor, factors: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: one softmax over all levels, in float32, or in float64 for float64 inputs.

    Differentiable (twice, too) through plain torch operations. Arguments and results as ``pyramid_attention``'s; means
    are not rounded to k's dtype.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    whole = k.shape[2] // block
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logs, closed = [], []
    for factor in FACTORS:
        pair = [x.to(dtype) for x in (k, v)]
        if factor > 1:
            pair = [x[:, :, : whole * block].unflatten(2, (-1, factor)).mean(3) for x in pair]
        column = torch.arange(pair[0].shape[2], device=q.device) * factor // block
        read = factors == factor
        # No weight times NaN is NaN: what nobody reads must not be multiplied.
        unread = ~read.any(2)[..., column].unsqueeze(-1)
        for x, parts in zip(pair, (keys, values), strict=True):
            parts.append(x.repeat_interleave(group, dim=1).masked_fill(unread, 0))
        logs.append(torch.full((len(column),), math.log(factor), dtype=dtype, device=q.device))
        closed.append(~read[..., column])  # [B, H, blocks of q, keys]
    all_keys, all_values, bias, mask = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(logs), torch.cat(closed, 3)

    step = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * all_keys.shape[2] * block))
    outs, lses = [], []
    for first in range(0, mask.shape[2], step):
        query = q[:, :, first * block : (first + step) * block].to(dtype) * scale
        row = first + torch.arange(query.shape[2], device=q.device) // block
        logits = (query @ all_keys.transpose(-1, -2) + bias).masked_fill(mask[:, :, row], -torch.inf)
        top = logits.detach().amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)
        weights = (logits - top).exp()
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        safe = torch.where(empty, 1, total)
        outs.append((weights @ all_values / safe).to(q.dtype))
        lses.append(torch.where(empty, -torch.inf, top + safe.log()).squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
