"""Grades of a host on rooms that it was not trained on: pictures between and beyond the given views, and geometry."""

from __future__ import annotations

from typing import Literal

import torch
from hone_splat.metrics import psnr
from hone_splat.mvsplat import MVSplat
from hone_splat.rendering import render
from torch import Tensor

from .data import Scene
from .geometry import boundary_band
from .method import nearest

__all__ = ["METRICS", "grade"]

METRICS: dict[str, tuple[str, Literal["higher", "lower"]]] = {
    "psnr_between": ("dB", "higher"),
    "psnr_beyond": ("dB", "higher"),
    "depth_abs_rel": ("", "lower"),
    "depth_close": ("", "higher"),
    "depth_at_edges": ("", "lower"),
    "flying": ("", "lower"),
}
"""Name to unit and better direction."""
BAND = 2
"""Pixels from a depth edge that belong to its band."""
FLYING = 0.05
"""Share of the true distance from which a centre counts as flying; at 64 x 64 the true points lie 0.014 of it apart."""
CLOSE = 1.25
"""Factor within which a depth counts as close, the first threshold of depth benchmarks."""


@torch.inference_mode()
def grade(host: MVSplat, scenes: list[Scene]) -> dict[str, Tensor]:
    """Grade a host room by room.

    Args:
        host: In evaluation mode.
        scenes: Of any number of rooms each.

    Returns:
        Values ``[rooms]`` of each of ``METRICS``. A centre flies when the nearest true point of the context views lies
        further away than ``FLYING`` of its distance from its camera; ``depth_close`` is the share of pixels whose
        depth lies within a factor ``CLOSE`` of the true one, ``depth_at_edges`` the relative error within ``BAND``
        pixels of depth edges.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    for scene in scenes:
        output = host(scene.context)
        for name, targets in (("psnr_between", scene.between), ("psnr_beyond", scene.beyond)):
            assert targets is not None
            picture = render(output.gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size)
            values = psnr(picture.image_01.flatten(0, 1), targets.image_01.flatten(0, 1))
            found[name].append(values.unflatten(0, (len(targets), -1)).mean(1))
        true = scene.points().flatten(1, 3)
        ratio = (output.depth / scene.distance).flatten(1)
        found["depth_abs_rel"].append((ratio - 1).abs().mean(1))
        band = torch.stack([boundary_band(true, width=BAND) for true in scene.distance]).flatten(1)
        found["depth_at_edges"].append(((ratio - 1).abs() * band).sum(1) / band.sum(1))
        found["depth_close"].append((torch.maximum(ratio, 1 / ratio) < CLOSE).double().mean(1))
        share = []
        for means, points, distance in zip(output.gaussians.means, true, scene.distance.flatten(1), strict=True):
            index = nearest(means, points)
            share.append(((means - points[index]).norm(dim=-1) > FLYING * distance[index]).double().mean())
        found["flying"].append(torch.stack(share))
    return {name: torch.cat(values).double().cpu() for name, values in found.items()}
