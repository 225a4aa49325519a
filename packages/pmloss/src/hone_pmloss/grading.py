"""Grades of a host on rooms that it was not trained on: pictures between and beyond the given views, and geometry."""

from __future__ import annotations

from typing import Literal

import torch
from hone_splat.metrics import PSNR_CEILING, psnr, ssim
from hone_splat.mvsplat import MVSplat
from hone_splat.rendering import render
from torch import Tensor

from .data import Scene
from .geometry import boundary_band
from .method import nearest

__all__ = ["METRICS", "grade"]

METRICS: dict[str, tuple[str, Literal["higher", "lower", "none"]]] = {
    "psnr_between": ("dB", "higher"),
    "psnr_beyond": ("dB", "higher"),
    "psnr_beyond_at_edges": ("dB", "higher"),
    "ssim_between": ("", "higher"),
    "ssim_beyond": ("", "higher"),
    "depth_abs_rel": ("", "lower"),
    "depth_close": ("", "higher"),
    "depth_at_edges": ("", "lower"),
    "depth_scale": ("", "none"),
    "depth_shape": ("", "lower"),
    "flying": ("", "lower"),
    "accuracy": ("", "lower"),
    "completion": ("", "lower"),
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
        pixels of depth edges. ``depth_scale`` is the median of depth over true depth, and ``depth_shape`` the relative
        error once that is divided out, so that a scene that is merely too small has none. ``accuracy`` is the mean
        distance from a centre to the nearest true point, ``completion`` the other way, both over the true point's
        distance from its camera. ``psnr_beyond_at_edges`` looks at the bands of the views beyond alone.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    for scene in scenes:
        output = host(scene.context)
        assert scene.beyond is not None
        assert scene.beyond_distance is not None
        for name, targets in (("between", scene.between), ("beyond", scene.beyond)):
            drawn = render(output.gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size).image_01
            for metric, measure in (("psnr", psnr), ("ssim", ssim)):
                values = measure(drawn.flatten(0, 1), targets.image_01.flatten(0, 1))
                found[f"{metric}_{name}"].append(values.unflatten(0, (len(targets), -1)).mean(1))
            if targets is scene.beyond:
                band = _bands(scene.beyond_distance)
                error = (drawn.clamp(0, 1) - targets.image_01).double().square().mean(2)
                level = -10 * ((error * band).sum((2, 3)) / band.sum((2, 3))).log10()
                found["psnr_beyond_at_edges"].append(level.clamp(max=PSNR_CEILING).nanmean(1))
        true = scene.points().flatten(1, 3)
        ratio = (output.depth / scene.distance).flatten(1)
        found["depth_abs_rel"].append((ratio - 1).abs().mean(1))
        band = _bands(scene.distance).flatten(1)
        found["depth_at_edges"].append(((ratio - 1).abs() * band).sum(1) / band.sum(1))
        found["depth_close"].append((torch.maximum(ratio, 1 / ratio) < CLOSE).double().mean(1))
        scale = ratio.median(1).values
        found["depth_scale"].append(scale)
        found["depth_shape"].append((ratio / scale[:, None] - 1).abs().mean(1))
        for means, points, distance in zip(output.gaussians.means, true, scene.distance.flatten(1), strict=True):
            index, back = nearest(means, points), nearest(points, means)
            apart = ((means - points[index]).norm(dim=-1) / distance[index]).double()
            found["flying"].append((apart > FLYING).double().mean()[None])
            found["accuracy"].append(apart.mean()[None])
            found["completion"].append(((points - means[back]).norm(dim=-1) / distance).double().mean()[None])
    return {name: torch.cat(values).double().cpu() for name, values in found.items()}


def _bands(distance: Tensor) -> Tensor:
    """Where bands along depth edges lie, ``[B, V, H, W]``."""
    return torch.stack([boundary_band(true, width=BAND) for true in distance])
