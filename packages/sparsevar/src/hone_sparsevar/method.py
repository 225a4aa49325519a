"""SparseVAR: which tokens of a scale run, and what stands at the others.

Maps and scores are ``[B, h, w]`` or ``[B, L]`` in raster order; ``idx`` holds kept positions in ascending order.

Source: arXiv 2507.20454, its abstract and method figure. Neither equations nor code could be read: what is not in those
two is ours, and says so.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from hone_core.tensors import plain_tensors
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "anchor_of",
    "by_slot",
    "change_map",
    "interpolate_kept",
    "kept_count",
    "num_anchors",
    "resize_map",
    "select",
    "select_above",
    "slots",
    "update_map",
]

Grid = tuple[int, int]


def change_map(
    before: Float[Tensor, "batch tokens channels"],
    after: Float[Tensor, "batch tokens channels"],
    metric: Literal["abs", "rel"] = "abs",
) -> Float[Tensor, "batch tokens"]:
    """Mean squared change of a token's features in one block: small where the image is flat.

    Source: the method figure, "MSE" between the features around block s.

    Args:
        before: Entering the block.
        after: Leaving it.
        metric: ``rel`` divides by the mean square of ``before`` (ours).
    """
    change = (after.float() - before.float()).square().mean(-1)
    return change / before.float().square().mean(-1) if metric == "rel" else change


def resize_map(values: Float[Tensor, "batch h w"], grid: Grid) -> Float[Tensor, "batch height width"]:
    """A map at the grid of the next scale, bilinear.

    Source: the method figure, "interpolate"; the mode is ours.
    """
    return F.interpolate(values[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]


def _ends(side: int, window: int) -> Tensor:
    """Anchor of each window along one side: the middle, moved into a ragged last window."""
    starts = torch.arange(0, side, window)
    return (starts + (window - 1) // 2).clamp(max=side - 1)


@lru_cache(maxsize=256)
def _anchor_of(grid: Grid, window: int, device: torch.device) -> Tensor:
    height, width = grid
    with plain_tensors():
        rows = _ends(height, window)[torch.arange(height) // window]
        columns = _ends(width, window)[torch.arange(width) // window]
        return (rows[:, None] * width + columns[None, :]).flatten().to(device)


def anchor_of(grid: Grid, window: int, device: torch.device | str = "cpu") -> Int[Tensor, " tokens"]:
    """Position of the anchor of each position's window; an anchor's is its own.

    Source: the abstract, "uniformly sampled anchor tokens"; one in each window of 4 x 4 by the release's folder names.
        Where in the window is ours.

    Args:
        grid: Height and width; a side need not be a multiple of the window.
        window: Side of a window.
        device: Where. The tensor is shared: do not write into it.
    """
    return _anchor_of(grid, window, torch.device(device))


def num_anchors(grid: Grid, window: int | None) -> int:
    """Windows of a grid; 0 without anchors."""
    return 0 if window is None else math.ceil(grid[0] / window) * math.ceil(grid[1] / window)


def kept_count(grid: Grid, window: int | None, ratio: float) -> int:
    """Tokens that run: all but ``floor(ratio * (tokens - anchors))``, the same for every image."""
    tokens = grid[0] * grid[1]
    # 0.29 * 100 is a little under 29.
    return tokens - math.floor(ratio * (tokens - num_anchors(grid, window)) + 1e-9)


def select(
    score: Float[Tensor, "batch tokens"], count: int, anchors: Int[Tensor, " tokens"] | None
) -> Int[Tensor, "batch kept"]:
    """The anchors, and of the rest those of the highest score; of equal scores the first.

    Args:
        score: High is kept.
        count: Tokens to keep, at least the anchors.
        anchors: As ``anchor_of`` gives them; None: there are none.
    """
    if anchors is not None:
        own = anchors == torch.arange(len(anchors), device=anchors.device)
        score = score.masked_fill(own, torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def select_above(
    score: Float[Tensor, "batch tokens"], threshold: float, bucket: int, anchors: Int[Tensor, " tokens"] | None
) -> Int[Tensor, "batch kept"]:
    """The anchors, and what lies at or above ``threshold`` times the mean score.

    As many are kept of every image as of the one that keeps most, rounded up to ``bucket``; the room is filled with the
    next highest scores, since a repeated token would count twice as a key. How many waits for the device.
    """
    keep = score >= threshold * score.mean(-1, keepdim=True)
    if anchors is not None:
        keep = keep | (anchors == torch.arange(len(anchors), device=anchors.device))
    count = int(keep.sum(-1).max())
    count = min(score.shape[-1], max(bucket, math.ceil(count / bucket) * bucket))
    return select(score, count, anchors)


def update_map(
    old: Float[Tensor, "batch h w"], idx: Int[Tensor, "batch kept"], measured: Float[Tensor, "batch kept"]
) -> Float[Tensor, "batch h w"]:
    """The map after a sparse scale: measured where tokens ran, as it was elsewhere (ours)."""
    return old.flatten(1).scatter(1, idx, measured).view(old.shape)


def slots(
    idx: Int[Tensor, "batch kept"], tokens: int, anchors: Int[Tensor, " tokens"] | None
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Which kept token stands at each position (itself, or its window's anchor; 0 without), and which run."""
    batch, kept = idx.shape
    ranks = torch.arange(kept, device=idx.device).expand(batch, -1)
    rank = torch.zeros(batch, tokens, dtype=torch.int64, device=idx.device).scatter(1, idx, ranks)
    runs = torch.zeros(batch, tokens, dtype=torch.bool, device=idx.device).scatter(1, idx, True)
    stand_in = torch.zeros_like(rank) if anchors is None else rank[:, anchors]
    return torch.where(runs, rank, stand_in), runs


def by_slot(values: Tensor, slot: Int[Tensor, "batch tokens"]) -> Tensor:
    """Values ``[B, kept, ...]`` at every position: ``[B, tokens, ...]``."""
    index = slot.view(*slot.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def interpolate_kept(
    values: Float[Tensor, "batch kept *rest"], idx: Int[Tensor, "batch kept"], grid: Grid, window: int
) -> Float[Tensor, "batch tokens *rest"]:
    """Kept values where they are, and elsewhere their mean under a tent as wide as two windows (ours).

    Each position lies less than a window from its anchor, so the tent always reaches one.
    """
    batch, kept = idx.shape
    flat = values.reshape(batch, kept, -1).float()
    full = flat.new_zeros(batch, grid[0] * grid[1], flat.shape[-1] + 1)
    full.scatter_(
        1, idx[..., None].expand(-1, -1, full.shape[-1]), torch.cat([flat, torch.ones_like(flat[..., :1])], -1)
    )
    there = full[..., -1:] > 0
    side = 1 - torch.arange(1 - window, window, device=idx.device).abs() / window
    image = full.transpose(1, 2).reshape(-1, 1, *grid)
    image = F.conv2d(image, side.view(1, 1, -1, 1), padding=(window - 1, 0))
    image = F.conv2d(image, side.view(1, 1, 1, -1), padding=(0, window - 1))
    smooth = image.view(batch, -1, grid[0] * grid[1]).transpose(1, 2)
    out = torch.where(there, full[..., :-1], smooth[..., :-1] / smooth[..., -1:].clamp(min=1e-12))
    return out.view(batch, -1, *values.shape[2:])
