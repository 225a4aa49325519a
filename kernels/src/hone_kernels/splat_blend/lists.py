"""Which Gaussians each tile of a picture draws, front to back."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import TILE

__all__ = ["tile_lists"]


@torch.no_grad()
def tile_lists(depth: Tensor, low: Tensor, high: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Every (tile, Gaussian) pair, by tile and front to back: ``order`` and ``counts`` of ``blend_tiles``.

    Args:
        depth: ``[..., G]``, one picture for each of the leading places.
        low: ``[..., G, 2]``, where the box around a Gaussian begins, in pixels, (x, y).
        high: Where it ends; at most 0 for what is not seen.
        rows: Tiles down a picture.
        columns: Tiles across.

    Returns:
        Flat index of each pair's Gaussian, int64 ``[P]``, and the number of pairs of each tile, int64 ``[T]``.
    """
    first = (low / TILE).long().flatten(0, -2)
    seen = (high[..., 0] > 0).flatten()
    last = ((high / TILE).ceil().long() - 1).flatten(0, -2)
    limit = torch.tensor([columns - 1, rows - 1], device=first.device)
    spans = (torch.minimum(last, limit) - first + 1).clamp(min=0) * seen[:, None]
    per = spans.prod(-1)
    index = torch.arange(len(per), device=per.device).repeat_interleave(per)
    inside = torch.arange(len(index), device=per.device) - (per.cumsum(0) - per)[index]
    column = first[index, 0] + inside % spans[index, 0]
    row = first[index, 1] + inside // spans[index, 0]
    gaussians = depth.shape[-1]
    tile = (index // gaussians) * (rows * columns) + row * columns + column
    by_depth = depth.flatten()[index].argsort(dim=0, stable=True)
    by_tile = tile[by_depth].argsort(dim=0, stable=True)
    counts = torch.bincount(tile, minlength=depth[..., 0].numel() * rows * columns)
    return index[by_depth[by_tile]], counts
