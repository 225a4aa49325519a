"""What host networks give, and what may stand between their features and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .gaussians import Gaussians
from .views import Views

__all__ = ["Compressor", "HostOutput", "check_views"]


@dataclass(frozen=True)
class HostOutput:
    """Splat of each scene, and what it was made of.

    Attributes:
        gaussians: ``[B, N * H * W]``, in the order view, row, column.
        depth: ``[B, N, H, W]``, as the host's convention says.
        views: The views that have Gaussians.
        anchors: ``[B, N]``, their numbers among the given views; None where no compressor chose.
        features: ``[B, N, C, H, W]``, full-resolution features of the Gaussian branch, for losses.
    """

    gaussians: Gaussians
    depth: Tensor
    views: Views
    anchors: Tensor | None
    features: Tensor


class Compressor(Protocol):
    """A module that replaces the features of many views by those of a few."""

    def __call__(
        self, features: Float[Tensor, "batch view channels height width"], views: Views
    ) -> tuple[Tensor, Tensor] | None:
        """Features ``[B, N, C, h, w]`` and the anchors' numbers ``[B, N]``; None to leave the host as it is."""


def check_views(views: Views, multiple: int, *, compressed: bool, dtype: torch.dtype = torch.float32) -> None:
    """Refuse what the host cannot take.

    Args:
        views: Given to the host.
        multiple: Of which both sides must be.
        compressed: Whether something compresses them.
        dtype: Of the host's weights.

    Raises:
        ValueError: Sides are no multiples, or scenes have different numbers of views and nothing compresses them.
        TypeError: The weights are in half precision, or pictures and weights differ.
    """
    if dtype in (torch.bfloat16, torch.float16) or views.image_01.dtype != dtype:
        raise TypeError(
            f"the host's weights are {dtype} and the pictures {views.image_01.dtype}: keep both in float32, and run "
            f"the host under torch.autocast for half precision; cameras need all their bits"
        )
    height, width = views.size
    if height % multiple or width % multiple:
        raise ValueError(
            f"pictures of {height} x {width} do not fit: both sides must be multiples of {multiple}. Crop them first."
        )
    if views.present is not None and not compressed and not bool(views.present.all()):
        raise ValueError("scenes with different numbers of views need a compressor; without one, pass them one by one")
