"""Static masks of equal density, to tell what content-adaptive selection is worth: a 3-D window, and random blocks."""

from __future__ import annotations

import torch
from hone_video.orders import token_order
from jaxtyping import Float
from torch import Tensor

from .config import BladeConfig
from .prober import hash_numbers

__all__ = ["random_scores", "static_scores", "window_scores"]


def static_scores(
    cfg: BladeConfig,
    tokens: int,
    text_tokens: int,
    *,
    grid: tuple[int, int, int] | None,
    heads: int,
    layer: int | Tensor,
    device: torch.device,
) -> Float[Tensor, "1 heads_or_1 blocks blocks"]:
    """Scores that stand in for the prober's where ``cfg.mask`` is ``"window"`` or ``"random"``.

    Raises:
        ValueError: If a window is asked for without a grid, or with one that is not the sequence's.
    """
    if cfg.mask == "random":
        return random_scores(-(-tokens // cfg.block), heads, seed=cfg.seed, layer=layer, device=device)
    if grid is None:
        raise ValueError("mask='window' needs grid=(frames, height, width), the video tokens along each axis")
    if grid[0] * grid[1] * grid[2] != tokens - text_tokens:
        raise ValueError(
            f"grid {grid} has {grid[0] * grid[1] * grid[2]} tokens, but the sequence {tokens - text_tokens} of video"
        )
    return window_scores(cfg, grid, text_tokens, device=device)


def window_scores(
    cfg: BladeConfig, grid: tuple[int, int, int], text_tokens: int = 0, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "1 1 blocks blocks"]:
    """Nearness of blocks in the video: kept by rank, it makes a box around each block, shifted inwards at the border.

    The distance of two blocks is that of their centres, each axis in units of the grid, along the worst axis; the
    straight-line distance breaks ties. With ``order="tile"`` and a grid that tiles divide, this is a 3-D tile window.

    Args:
        cfg: ``order`` and ``block``.
        grid: Video tokens along (frames, height, width).
        text_tokens: Tokens behind the video; blocks of text alone score 0.
        device: Where the result is wanted.
    """
    frames, height, width = grid
    order = token_order(cfg.order, frames, height, width, device=device, tile=cfg.tile)
    place = torch.stack(
        [order // (height * width) / frames, order // width % height / height, order % width / width], dim=-1
    )  # [tokens, 3]
    block = torch.arange(len(order), device=order.device) // cfg.block
    num = -(-(len(order) + text_tokens) // cfg.block)
    total = torch.zeros((num, 3), device=order.device).index_add(0, block, place)
    count = torch.zeros(num, device=order.device).index_add(0, block, torch.ones_like(place[:, 0]))
    centre = total / count.clamp(min=1).unsqueeze(-1)
    apart = (centre[:, None] - centre).abs()
    distance = apart.amax(-1) + 1e-3 * apart.square().sum(-1).sqrt()
    video = (count > 0).float()
    return (video[:, None] * video / (1 + distance))[None, None]


def random_scores(
    blocks: int, heads: int, *, seed: int = 0, layer: int | Tensor = 0, device: torch.device | str = "cpu"
) -> Float[Tensor, "1 heads blocks blocks"]:
    """Uniform random scores in [0, 1), the same for the same seed, layer and head on every device."""
    at = torch.arange(heads * blocks * blocks, device=device).view(1, heads, blocks, blocks)
    return (hash_numbers(at, seed, layer) >> 39).float() / (1 << 24)
