"""How good an arm's pictures are: rooms, views and anchors to PSNR and SSIM per room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hone_splat.metrics import psnr, ssim
from hone_splat.rendering import Picture, render
from torch import Tensor

from .config import ZPressorConfig
from .data import Scene
from .host import TinyHost

__all__ = ["Grades", "draw_targets", "grade", "with_settings"]


@dataclass(frozen=True)
class Grades:
    """Of a set of rooms.

    Attributes:
        psnr: ``[rooms]`` in dB, mean over a room's targets.
        ssim: ``[rooms]``.
        gaussians: Per room.
    """

    psnr: Tensor
    ssim: Tensor
    gaussians: int


def with_settings(tiny: TinyHost, **changes: Any) -> TinyHost:
    """Give an arm's compressor other settings, such as ``anchors``; returns the same arm."""
    assert tiny.handle is not None, "the arm host has no compressor"
    settings: ZPressorConfig = replace(tiny.handle.config, **changes)
    tiny.handle.compressor.config = tiny.handle.config = settings
    return tiny


@torch.inference_mode()
def draw_targets(tiny: TinyHost, scene: Scene) -> tuple[Picture, int]:
    """Pictures at the targets of each room, and how many Gaussians made them."""
    output = tiny.host(scene.context)
    targets = scene.targets
    picture = render(output.gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size)
    return picture, len(output.gaussians)


def grade(tiny: TinyHost, scenes: list[Scene]) -> Grades:
    """Grade an arm room by room.

    Args:
        tiny: The arm.
        scenes: Of any number of rooms each.
    """
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    count = 0
    for scene in scenes:
        picture, count = draw_targets(tiny, scene)
        drawn, true = (image.flatten(0, 1) for image in (picture.image_01, scene.targets.image_01))
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            found[name].append(metric(drawn, true).unflatten(0, (len(scene.targets), -1)).mean(1).cpu())
    return Grades(torch.cat(found["psnr"]), torch.cat(found["ssim"]), count)
