"""A video cut into 3-D tiles, laid out in blocks that a kernel reads.

The sequence is tile by tile, tiles in (frame, height, width) order, raster order inside a tile, text behind the video.
Attention runs on slots: every tile starts a block of its own, and what is left of its last block is padding. A tile
that the border cuts short gets only as many blocks as its tokens need.

Source: tiles are those of the paper's section 3, laid out as in Sliding Tile Attention (arXiv 2502.04507).
Differs: neither says what happens to a grid that tiles do not divide. Padding each tile to its full size would multiply
    Wan's sequence by 1.22 at 720p and 1.31 at 480p; short tiles in fewer blocks make that 1.05 and 1.14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hone_video.orders import tile_order
from jaxtyping import Int
from torch import Tensor

from .config import BLOCKS, Size

__all__ = ["TEXT", "Tiling", "tile_counts"]

TEXT = -1
"""Stands for no tile, in ``Tiling.tile_of_block``: the block holds text."""


def tile_counts(grid: Size, tile: Size) -> Size:
    """Tiles along (frames, height, width), the last of which may be short.

    Raises:
        ValueError: A size is below one.
    """
    for name, size in (("grid", grid), ("tile", tile)):
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"{name} must be three positive token counts (frames, height, width); got {size}")
    frames, height, width = (-(-g // t) for g, t in zip(grid, tile, strict=True))
    return frames, height, width


@dataclass(frozen=True, eq=False)
class Tiling:
    """Where every token of a sequence of tiles stands. Made by ``Tiling.of``.

    Attributes:
        grid: Video tokens along (frames, height, width).
        tile: Tokens of a whole tile along each.
        block: Tokens of a block.
        text_tokens: Tokens behind the video.
        counts: Tiles along (frames, height, width).
        order: int64 ``[video]``, the raster index ``x + width * (y + height * frame)`` of each video token in tile
            order.
        sizes: int64 ``[tiles]``, tokens of each tile.
        valid: int32 ``[1, blocks]``, tokens at the head of each block; behind them are padding slots.
        tile_of_block: int64 ``[blocks]``, ``TEXT`` for text.
        slots: int64 ``[blocks * block]``, the place in the sequence (video in tile order, then text) that each slot
            takes its token from; padding repeats the token before it.
        places: int64 ``[video + text]``, the slot of each token of the sequence.
    """

    grid: Size
    tile: Size
    block: int
    text_tokens: int
    counts: Size
    order: Int[Tensor, " video"]
    sizes: Int[Tensor, " tiles"]
    valid: Int[Tensor, "1 blocks"]
    tile_of_block: Int[Tensor, " blocks"]
    slots: Int[Tensor, " slots"]
    places: Int[Tensor, " tokens"]

    @classmethod
    def of(
        cls,
        grid: Size,
        tile: Size,
        *,
        block: int = 128,
        text_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tiling:
        """Cut a grid.

        Args:
            grid: Video tokens along (frames, height, width).
            tile: Tokens of a tile along each.
            block: Tokens of a block, 64 or 128.
            text_tokens: Tokens behind the video, which get blocks of their own.
            device: Where to put the tensors.

        Raises:
            ValueError: A size is below one, or a block of another size.
        """
        counts = tile_counts(grid, tile)
        if block not in BLOCKS:
            raise ValueError(f"block must be 64 or 128 tokens, as the kernels have it; got {block}")
        if text_tokens < 0:
            raise ValueError(f"text_tokens must not be negative, 0 for none; got {text_tokens}")
        sizes = _outer(*(axis_sizes(g, t) for g, t in zip(grid, tile, strict=True))).flatten()
        blocks = -(-sizes // block)
        first_token, first_block = sizes.cumsum(0) - sizes, blocks.cumsum(0) - blocks
        tile_of_block = torch.repeat_interleave(blocks)
        within = (torch.arange(len(tile_of_block)) - first_block[tile_of_block]) * block
        valid = (sizes[tile_of_block] - within).clamp(max=block)
        start = first_token[tile_of_block] + within
        if text_tokens:
            tail = torch.arange(0, text_tokens, block)
            tile_of_block = torch.cat([tile_of_block, torch.full_like(tail, TEXT)])
            valid = torch.cat([valid, (text_tokens - tail).clamp(max=block)])
            start = torch.cat([start, math.prod(grid) + tail])
        offset = torch.arange(block)
        tensors = {
            "order": tile_order(*grid, tile),
            "sizes": sizes,
            "valid": valid[None].to(torch.int32),
            "tile_of_block": tile_of_block,
            "slots": (start[:, None] + torch.minimum(offset, valid[:, None] - 1)).flatten(),
            "places": (offset < valid[:, None]).flatten().nonzero().flatten(),
        }
        return cls(grid, tile, block, text_tokens, counts, **{name: x.to(device) for name, x in tensors.items()})

    @property
    def tokens(self) -> int:
        """Video and text tokens."""
        return math.prod(self.grid) + self.text_tokens

    @property
    def padding(self) -> float:
        """Slots over tokens: the factor on the sequence, whose square is that on a dense attention."""
        return len(self.slots) / self.tokens

    @property
    def full(self) -> bool:
        """Whether every slot holds a token."""
        return len(self.slots) == self.tokens

    def scale_groups(self, box: Size | None) -> Int[Tensor, " blocks"]:
        """Which blocks share a scale: a number for each block, text having one of its own.

        Args:
            box: Tokens along (frames, height, width) that share one, multiples of ``tile``; None: the whole video.

        Raises:
            ValueError: The box is not a multiple of the tile.
        """
        text = self.tile_of_block == TEXT
        if box is None:
            return text.long()
        if any(b % t for b, t in zip(box, self.tile, strict=True)):
            raise ValueError(f"box must be a multiple of tile {self.tile} along each axis; got {box}")
        factors = [b // t for b, t in zip(box, self.tile, strict=True)]
        _, height, width = self.counts
        high, wide = -(-height // factors[1]), -(-width // factors[2])
        at = self.tile_of_block
        f, y, x = at // (height * width), at // width % height, at % width
        group = (f // factors[0] * high + y // factors[1]) * wide + x // factors[2]
        return torch.where(text, -(-self.counts[0] // factors[0]) * high * wide, group)


def axis_sizes(tokens: int, tile: int) -> Int[Tensor, " tiles"]:
    """Tokens of each tile along one axis."""
    return (tokens - torch.arange(0, tokens, tile)).clamp(max=tile)


def _outer(f: Tensor, h: Tensor, w: Tensor) -> Tensor:
    return f[:, None, None] * h[:, None] * w
