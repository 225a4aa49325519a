"""Posed pictures of one scene or of several: what host networks take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cameras import check_cameras

__all__ = ["Views"]


@dataclass(frozen=True)
class Views:
    """Views of a batch of scenes.

    Attributes:
        image_01: ``[B, V, 3, H, W]`` in [0, 1].
        cam_to_world: ``[B, V, 4, 4]``, OpenCV axes.
        intrinsics_norm: ``[B, V, 3, 3]``.
        near: ``[B, V]``, least depth that a host looks for.
        far: ``[B, V]``, largest.
        present: ``[B, V]``, False for padding of scenes that have fewer views; None if all have as many.
    """

    image_01: Tensor
    cam_to_world: Tensor
    intrinsics_norm: Tensor
    near: Tensor
    far: Tensor
    present: Tensor | None = None

    def __post_init__(self) -> None:
        lead = self.image_01.shape[:2]
        if self.image_01.ndim != 5 or self.image_01.shape[2] != 3:
            raise ValueError(f"image_01 must be [B, V, 3, H, W]; got {list(self.image_01.shape)}")
        shapes = {
            "cam_to_world": (*lead, 4, 4),
            "intrinsics_norm": (*lead, 3, 3),
            "near": lead,
            "far": lead,
        } | ({} if self.present is None else {"present": lead})
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {list(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return self.image_01.shape[0]

    @property
    def count(self) -> int:
        """Views per scene."""
        return self.image_01.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image_01.shape[3], self.image_01.shape[4]

    def map(self, function: Callable[[Tensor], Tensor]) -> Views:
        """Apply a function, such as ``to``, to every tensor."""
        present = None if self.present is None else function(self.present)
        image, poses, inner = function(self.image_01), function(self.cam_to_world), function(self.intrinsics_norm)
        return Views(image, poses, inner, function(self.near), function(self.far), present)

    def take(self, index: Tensor) -> Views:
        """The views at ``index`` ``[B, N]`` of each scene; they are present."""
        rows = torch.arange(len(self), device=index.device)[:, None]
        return replace(self, present=None).map(lambda part: part[rows, index])

    def check(self) -> None:
        """Refuse what no host can use, before any work.

        Raises:
            ValueError: A camera is impossible, a picture is not finite, or near is not in (0, far).
        """
        keep = torch.ones_like(self.near, dtype=torch.bool) if self.present is None else self.present
        check_cameras(self.cam_to_world[keep], self.intrinsics_norm[keep])
        if not bool(self.image_01[keep].isfinite().all()):
            raise ValueError("a picture holds values that are not finite")
        near, far = self.near[keep], self.far[keep]
        wrong = ~((near > 0) & (near < far))
        if bool(wrong.any()):
            raise ValueError(f"expected 0 < near < far; got near {near[wrong][0]:g} and far {far[wrong][0]:g}")
