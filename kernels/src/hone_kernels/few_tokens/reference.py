"""Both parts as their definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attend_slots_reference", "gated_of_few_reference"]


def gated_of_few_reference(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """See ``gated_of_few``."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def attend_slots_reference(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    begin: int,
    scale: float,
    words: Tensor | None,
) -> Tensor:
    """See ``attend_slots``."""
    tokens, end = qkv.shape[1], begin + qkv.shape[1]
    heads_k, dim = keys.shape[1], keys.shape[3]
    each = qkv.unflatten(-1, (-1, dim)).transpose(1, 2)
    q, k, v = each.split([each.shape[1] - 2 * heads_k, heads_k, heads_k], 1)
    if rope is not None:
        turn = [table[begin:end] for table in rope]
        q, k = (_turned(x, *turn).to(qkv.dtype) for x in (q, k))
    keys[:, :, begin:end], values[:, :, begin:end] = k, v
    wide = torch.promote_types(qkv.dtype, torch.float32)
    groups = q.shape[1] // heads_k
    k, v = (x[:, :, :end].to(wide).repeat_interleave(groups, 1) for x in (keys, values))
    logits = q.to(wide) @ k.mT * scale
    if words is not None:
        seen = F.pad(words, (0, end - words.shape[1]), value=True)
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        v = v.masked_fill(~seen[:, None, :, None], 0.0)
    return (logits.softmax(-1) @ v).to(qkv.dtype).transpose(1, 2).reshape(len(qkv), tokens, -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)
