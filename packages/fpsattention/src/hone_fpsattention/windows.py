"""Sliding-tile windows: which tiles a tile of queries reads, and what share of the work that is.

A window of w tiles reaches ``w // 2`` tiles to each side. With ``border="shift"`` its centre keeps that far from the
border, so that it never sticks out; with ``"cut"`` it stays on the tile of the queries and loses what sticks out. An
axis too short for the shifted window (fewer than ``2 * (w // 2) + 1`` tiles) is read whole.

Source: the paper's equation 2 is ``"cut"``, read in tiles; the kernels it cites, of Sliding Tile Attention (arXiv
    2502.04507), are ``"shift"``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hone_kernels.attention import BlockLayout
from jaxtyping import Bool, Int
from torch import Tensor

from .config import Border, Size
from .tiles import TEXT, Tiling, axis_sizes, tile_counts

__all__ = ["Density", "axis_window", "covers", "density", "tile_mask", "window_layout"]


def axis_window(count: int, window: int, border: Border) -> Bool[Tensor, "count count"]:
    """Along one axis, which tiles (columns) each tile (row) reads."""
    at, reach = torch.arange(count), window // 2
    if 2 * reach + 1 > count and border == "shift":
        return torch.ones((count, count), dtype=torch.bool)
    centre = at.clamp(reach, count - 1 - reach) if border == "shift" else at
    return (centre[:, None] - at).abs() <= reach


def _axis_windows(counts: Size, window: Size | None, border: Border) -> list[Bool[Tensor, "count count"]]:
    if window is None:
        return [torch.ones((count, count), dtype=torch.bool) for count in counts]
    return [axis_window(count, size, border) for count, size in zip(counts, window, strict=True)]


def tile_mask(counts: Size, window: Size | None, border: Border = "shift") -> Bool[Tensor, "tiles tiles"]:
    """Which tiles each tile reads, tiles in (frame, height, width) order."""
    f, h, w = _axis_windows(counts, window, border)
    mask = f[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    tiles = math.prod(counts)
    return mask.reshape(tiles, tiles)


def covers(grid: Size, tile: Size, window: Size | None, border: Border = "shift") -> bool:
    """Whether every tile of the grid reads every tile, so that the window drops nothing."""
    return all(bool(axis.all()) for axis in _axis_windows(tile_counts(grid, tile), window, border))


def window_layout(tiling: Tiling, window: Size | None, border: Border = "shift") -> BlockLayout:
    """The window as lists of key blocks: of video tiles those it holds, of text all, and for text everything.

    Source: text as in Sliding Tile Attention's mask for models with joint text.
    """
    owner = tiling.tile_of_block
    mask = tile_mask(tiling.counts, window, border).to(owner.device)[owner[:, None], owner]
    text = owner == TEXT
    mask = mask | text[:, None] | text
    return BlockLayout.from_mask(
        mask[None, None],
        len(tiling.slots),
        len(tiling.slots),
        block_q=tiling.block,
        block_k=tiling.block,
        # Kernels that round take a block to be 128 tokens where nothing says how many there are.
        k_valid=None if tiling.full and tiling.block == 128 else tiling.valid,
        width=int(mask.sum(-1).max()),
    )


class Density(NamedTuple):
    """What share of dense attention a window computes.

    Attributes:
        tiles: Pairs of tiles read over all pairs of tiles, the figure that papers give.
        tokens: Pairs of tokens over all pairs of tokens, text among them: what the output depends on.
        slots: Pairs of slots computed, padding among them, over all pairs of tokens: what a kernel's time follows. A
            dense kernel without tiles has 1.
    """

    tiles: float
    tokens: float
    slots: float


def density(
    grid: Size,
    tile: Size,
    window: Size | None,
    *,
    border: Border = "shift",
    text_tokens: int = 0,
    block: int = 128,
) -> Density:
    """The density of a window at a grid, exact: counted in whole numbers, each figure divided once.

    Args:
        grid: Video tokens along (frames, height, width).
        tile: Tokens of a tile along each.
        window: Tiles along each, or None for all.
        border: What a window does at the border.
        text_tokens: Tokens behind the video, which read and are read by everything.
        block: Tokens of a block.
    """
    counts = tile_counts(grid, tile)
    axes = [axis.long() for axis in _axis_windows(counts, window, border)]
    sizes = [axis_sizes(g, t) for g, t in zip(grid, tile, strict=True)]
    video, text = math.prod(grid), text_tokens

    def pairs(weight: Int[Tensor, "frames height width"]) -> int:
        """Sum over the tile pairs that are read, weighted on both sides."""
        return int((weight * torch.einsum("fg,hi,wx,gix->fhw", *axes, weight)).sum())

    tokens = sizes[0][:, None, None] * sizes[1][:, None] * sizes[2]
    blocks = -(-tokens // block)
    text_blocks = -(-text // block)
    slots = pairs(blocks) + text_blocks * (2 * int(blocks.sum()) + text_blocks)
    everything = (video + text) ** 2
    return Density(
        tiles=pairs(torch.ones(counts, dtype=torch.int64)) / math.prod(counts) ** 2,
        tokens=(pairs(tokens) + 2 * video * text + text**2) / everything,
        slots=slots * block**2 / everything,
    )
