"""The functions as their definitions, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add_change_reference",
    "draw_bits_reference",
    "gather_modulate_reference",
    "pack_tokens_reference",
    "spread_tokens_reference",
    "take_tokens_reference",
    "unpack_tokens_reference",
]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gather_modulate_reference(
    x: Tensor, idx: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor]:
    """See ``gather_modulate``."""
    kept = x.gather(1, idx[..., None].expand(-1, -1, x.shape[-1]))
    wide = _wide(kept)
    out = F.layer_norm(wide, wide.shape[-1:], eps=eps) * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]
    return kept, out.to(dtype)


def add_change_reference(
    x: Tensor, update: Tensor, gamma: Tensor, before: Tensor, images: int, relative: bool
) -> tuple[Tensor, Tensor]:
    """See ``add_change``."""
    after = x + (_wide(gamma)[:, None] * _wide(update)).to(x.dtype)
    change = (_wide(after[:images]) - _wide(before[:images])).square().mean(-1)
    return after, change / _wide(before[:images]).square().mean(-1) if relative else change


def draw_bits_reference(
    logits: Tensor, uniform: Tensor, slot: Tensor | None, guidance: float, temperature: float, top_p: float
) -> Tensor:
    """See ``draw_bits``."""
    images = len(uniform)
    wide = _wide(logits) / temperature
    if len(logits) > images:
        wide = guidance * wide[:images] + (1 - guidance) * wide[images:]
    if slot is not None:
        wide = wide.gather(1, slot[:, :, None, None].expand(-1, -1, *wide.shape[2:]))
    first, second = wide.softmax(-1).unbind(-1)
    drawn = first <= uniform * (first + second)
    if top_p > 0:
        sure = torch.minimum(first, second) <= 1 - top_p
        drawn = torch.where(sure, second > first, drawn)
    return drawn.long()


def take_tokens_reference(states: Sequence[Tensor], idx: Tensor) -> tuple[Tensor, ...]:
    """See ``take_tokens``."""
    return tuple(x.gather(2, idx[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in states)


def spread_tokens_reference(x: Tensor, keep: Tensor) -> Tensor:
    """See ``spread_tokens``."""
    slot = (keep.cumsum(-1) - 1).clamp(min=0)[:, None, :, None]
    return x.gather(2, slot.expand(-1, x.shape[1], -1, x.shape[3])) * keep[:, None, :, None]


def pack_tokens_reference(
    states: Sequence[Tensor], idx: Tensor, num: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """See ``pack_tokens``."""
    batch, tokens = idx.shape
    ends = F.pad(num.cumsum(0), (1, 0)).int()
    slot = torch.arange(tokens, device=idx.device)
    there = slot < num[:, None]
    # What is not kept goes to a spare last row, and a spare last token.
    row = torch.where(there, ends[:-1, None] + slot, batch * tokens)
    at = torch.where(there, idx, tokens).long()
    rows = torch.zeros(batch, tokens + 1, dtype=torch.int32, device=idx.device).scatter_(1, at, row.int())
    packed = []
    for taken in take_tokens_reference(states, idx.long()):
        moved = taken.transpose(1, 2).flatten(0, 1)
        packed.append(moved.new_zeros(batch * tokens + 1, *moved.shape[1:]).index_copy(0, row.flatten().long(), moved))
    return tuple(x[:-1] for x in packed), ends, rows[:, :-1]


def unpack_tokens_reference(x: Tensor, keep: Tensor, row: Tensor) -> Tensor:
    """See ``unpack_tokens``."""
    at = row.masked_fill(~keep, 0).long()
    return torch.where(keep[..., None, None], x[at], 0.0).transpose(1, 2)
