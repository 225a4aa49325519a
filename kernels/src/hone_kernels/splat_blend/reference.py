"""What is correct: every list of a tile against every pixel of it, in plain torch and with autograd's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DARK", "DRAWN", "LEAST_ALPHA", "LEAST_LIGHT", "MAX_ALPHA", "TILE", "VALUES", "blend_tiles_reference"]

TILE = 4
"""Side of a tile in pixels: few Gaussians of a per-pixel cloud reach more than four of them."""
VALUES, DRAWN = 10, 5
MAX_ALPHA = 0.999
LEAST_ALPHA = 1 / 255
LEAST_LIGHT = 1e-4
DARK = 20.0
CHUNK = 1 << 26
"""Tile x Gaussian x pixel values composed at a time, which bounds the memory of one step of the loop."""


def blend_tiles_reference(values: Tensor, order: Tensor, counts: Tensor, rows: int, columns: int) -> Tensor:
    """See ``blend_tiles``; it waits for the device to know the counts."""
    # Tiles of like counts are composed together, so that little is padded.
    starts = counts.cumsum(0) - counts
    by_count = counts.argsort(descending=True)
    sizes = counts[by_count].tolist()
    pieces, places, at = [], [], 0
    while at < len(sizes) and sizes[at]:
        longest = sizes[at]
        group = by_count[at : at + max(1, CHUNK // (longest * TILE * TILE))]
        group = group[: _similar(sizes[at : at + len(group)])]
        pieces.append(_compose(values, order, starts[group], counts[group], longest, group, rows, columns))
        places.append(group)
        at += len(group)
    canvas = values.new_zeros(len(counts), TILE * TILE, DRAWN)
    return canvas.index_copy(0, torch.cat(places), torch.cat(pieces)) if pieces else canvas


def _similar(sizes: list[int]) -> int:
    """How many of the sizes, which fall, are at least half of the first."""
    for index, value in enumerate(sizes):
        if 2 * value < sizes[0]:
            return index
    return len(sizes)


def _compose(
    values: Tensor, order: Tensor, starts: Tensor, counts: Tensor, longest: int, tiles: Tensor, rows: int, columns: int
) -> Tensor:
    """Blend each tile's list front to back, ``[tiles, pixels, 5]``."""
    slot = torch.arange(longest, device=values.device)
    used = slot < counts[:, None]
    member = order[(starts[:, None] + slot).clamp(max=len(order) - 1)]
    value = values[member]  # [tiles, longest, 10]
    within = tiles % (rows * columns)
    y, x = torch.meshgrid(*(torch.arange(TILE, device=values.device) + 0.5,) * 2, indexing="ij")
    pixel_x = (within % columns * TILE)[:, None] + x.flatten()
    pixel_y = (within // columns * TILE)[:, None] + y.flatten()
    dx = pixel_x[:, None] - value[..., 0, None]  # [tiles, longest, pixels]
    dy = pixel_y[:, None] - value[..., 1, None]
    power = 0.5 * (value[..., 2, None] * dx * dx + value[..., 4, None] * dy * dy) + value[..., 3, None] * dx * dy
    # Exponents end where nothing is drawn any more: values beyond would be denormal, which a CPU is slow at.
    alpha = (value[..., 5, None] * torch.exp(-power.clamp(max=DARK))).clamp(max=MAX_ALPHA)
    alpha = torch.where((alpha >= LEAST_ALPHA) & (power >= 0) & used[..., None], alpha, torch.zeros_like(alpha))
    log_light = torch.log1p(-alpha)
    after = log_light.cumsum(1).clamp(min=-DARK)
    # What lies where less than 1e-4 of the light would be left is not drawn, the Gaussian that crosses it included.
    weight = torch.where(after.exp() > LEAST_LIGHT, alpha * (after - log_light).exp(), torch.zeros_like(alpha))
    drawn = torch.cat([value[..., 6:9], torch.ones_like(value[..., :1]), value[..., 9:]], -1)
    return weight.mT @ drawn
