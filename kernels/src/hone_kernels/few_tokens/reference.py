"""The parts as their definition, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hone_kernels.decoding.reference import add_rms_norm_reference

__all__ = ["attend_slots_reference", "blocks_of_few_reference", "gated_of_few_reference"]


class Block(NamedTuple):
    """Weights of a block, each contiguous.

    Attributes:
        norm: ``[C]``, before attention.
        qkv: ``[3 C, C]``.
        out: ``[C, C]``.
        norm_gated: ``[C]``, before the gated layer.
        gate: ``[F, C]``.
        up: ``[F, C]``.
        down: ``[C, F]``.
    """

    norm: Tensor
    qkv: Tensor
    out: Tensor
    norm_gated: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


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


def blocks_of_few_reference(
    x: Tensor,
    blocks: Sequence[Block],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rope: tuple[Tensor, Tensor] | None,
    begin: int,
    eps: float,
    scale: float,
    words: Tensor | None,
) -> Tensor:
    """See ``BlocksOfFew``."""
    found = []
    for number, block in enumerate(blocks):
        qkv = F.linear(add_rms_norm_reference(x, None, block.norm, eps)[0], block.qkv)
        out = attend_slots_reference(qkv, rope, keys[number], values[number], begin, scale, words)
        normed, x = add_rms_norm_reference(F.linear(out, block.out), x, block.norm_gated, eps)
        x = x + F.linear(gated_of_few_reference(normed, block.gate, block.up), block.down)
        found.append(x)
    return torch.stack(found)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)
