"""Rotary embeddings of Infinity: two axes, addressed by position in the schedule and never by the cache's length.

Source: ``precompute_rope2d_freqs_grid`` and ``apply_rotary_emb`` of the release with ``rope2d_normalized_by_hw=2``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from hone_core.tensors import plain_tensors
from torch import Tensor

from .schedules import ScaleSchedule

__all__ = ["Rope", "coordinates", "rope_table", "rotate"]

BASE = 10_000.0


class Rope(NamedTuple):
    """Cosines and sines, ``[..., tokens, dim / 2]`` in float32, of adjacent pairs of channels."""

    cos: Tensor
    sin: Tensor

    def rows(self, index: Tensor | slice) -> Rope:
        """Those of some positions: a slice, or ``[R, n]`` with an axis for heads put in."""
        if isinstance(index, slice):
            return Rope(self.cos[index], self.sin[index])
        return Rope(self.cos[index][:, None], self.sin[index][:, None])


def coordinates(side: int, reference: int) -> Tensor:
    """Coordinate of each row (or column) of a scale on the reference grid, rounded half to even."""
    return (torch.arange(side) * (reference / side)).round().long()


def rope_table(schedule: ScaleSchedule, dim: int, device: torch.device | str) -> Rope:
    """Table of all scales one after another, ``[total, dim / 2]``: first the row's angles, then the column's.

    Args:
        schedule: Scales, and the grid whose coordinates count.
        dim: Of a head; a multiple of 4.
        device: Where. Kept for 16 schedules and devices; do not write into it.
    """
    return _table(schedule, dim, torch.device(device))


@lru_cache(maxsize=16)
def _table(schedule: ScaleSchedule, dim: int, device: torch.device) -> Rope:
    with plain_tensors():
        half = dim // 2
        frequency = 1.0 / (BASE ** (torch.arange(0, half, 2, dtype=torch.int64).float() / half))
        tall, wide = schedule.rope_grid or schedule.last
        parts = []
        for height, width in schedule.grids:
            y = torch.outer(coordinates(height, tall).float(), frequency)[:, None].expand(-1, width, -1)
            x = torch.outer(coordinates(width, wide).float(), frequency)[None].expand(height, -1, -1)
            parts.append(torch.cat([y, x], dim=-1).flatten(0, 1))
        angles = torch.cat(parts).to(device)
        return Rope(angles.cos(), angles.sin())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn adjacent pairs of channels, in float32 at least.

    Args:
        x: ``[R, H, tokens, dim]``.
        rope: Rows of these tokens.
    """
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([rope.cos * even - rope.sin * odd, rope.sin * even + rope.cos * odd], dim=-1)
    return turned.flatten(-2)
