"""What is correct: torch's ``grid_sample`` of every neighbour at every candidate, and the product with the view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LEAST_DEPTH", "sweep_planes_reference"]

LEAST_DEPTH = 1e-3
VALUES = 1 << 28
"""Warped feature values held at a time."""


def sweep_planes_reference(
    features: Tensor,
    others: Tensor,
    ray: Tensor,
    shift: Tensor,
    inverse_depth: Tensor,
    half: float,
    *,
    held: int | None = VALUES,
) -> Tensor:
    """See ``sweep_planes``; ``held`` warped feature values lie in memory at a time, all if None, and with gradients."""
    views, channels, height, width = features.shape
    count = others.shape[1]
    theirs = features[others].flatten(0, 1)
    pieces = []
    plane = views * count * channels * height * width
    step = inverse_depth.shape[1] if held is None else max(1, held // plane)
    for candidates in inverse_depth.split(step, dim=1):
        depth = 1 / candidates.flatten(2).expand(-1, -1, height * width)[:, None, :, None]  # [N, 1, D, 1, P]
        point = ray[:, :, None] * depth + shift[:, :, None]  # [N, m, D, 3, P]
        place = point[..., :2, :] / point[..., 2:, :].clamp(min=LEAST_DEPTH)
        sides = place.new_tensor([[width], [height]]) - (0 if half else 1)
        place = 2 * place / sides - 1
        grid = place.mT.reshape(views * count, -1, width, 2)
        warped = F.grid_sample(theirs, grid, mode="bilinear", padding_mode="zeros", align_corners=not half)
        warped = warped.view(views, count, channels, -1, height, width)
        pieces.append(torch.einsum("nchw,nmcdhw->ndhw", features, warped) / (count * channels**0.5))
    return torch.cat(pieces, 1)
