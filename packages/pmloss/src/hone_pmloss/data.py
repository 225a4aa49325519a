"""Context views of generated rooms with their exact depth, and targets between them and beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hone_splat.cameras import unproject
from hone_splat.rooms import Rooms
from hone_splat.views import Views
from torch import Tensor

__all__ = ["GRADED", "Scene", "frames_beyond", "graded_rooms", "training_batch"]

GRADED = 1_000_000
"""Seeds of rooms from here on are graded on, never trained on."""
CONTEXT = (18, 32)
"""Frames, of 50, that graded hosts are given."""
BEYOND = 10
"""Frames on either side of the contexts from which graded targets beyond them come."""


@dataclass(frozen=True)
class Scene:
    """Rooms with what is given and what is asked for.

    Attributes:
        context: Given.
        between: Asked for, between the context views.
        beyond: Asked for, outside them; None while training, which looks between alone, as the release does.
        distance: ``[B, V, H, W]``, true distance along the ray of the context views' pixels.
        beyond_distance: The same of the views beyond; None without them.
    """

    context: Views
    between: Views
    beyond: Views | None
    distance: Tensor
    beyond_distance: Tensor | None = None

    def __getitem__(self, rows: slice) -> Scene:
        """Some of the rooms."""
        context, between = (views.map(lambda part: part[rows]) for views in (self.context, self.between))
        beyond = None if self.beyond is None else self.beyond.map(lambda part: part[rows])
        beyond_distance = None if self.beyond_distance is None else self.beyond_distance[rows]
        return Scene(context, between, beyond, self.distance[rows], beyond_distance)

    def points(self) -> Tensor:
        """True points of the context views, ``[B, V, H, W, 3]``."""
        return self._points(self.distance)

    def taught(self, *, noise: float = 0.0, blur: int = 0, seed: int = 0) -> Tensor:
        """Points as a teacher of less than perfect depth has them, ``[B, V, H, W, 3]``.

        Args:
            noise: Standard deviation of its slow errors, as a share of the distance: one draw for each eighth of a
                picture's side, smooth in between.
            blur: Pixels to either side over which it takes the mean, so that points at edges lie between surfaces.
            seed: Of the errors.
        """
        distance = self.distance
        if blur:
            wide = F.pad(distance, (blur,) * 4, mode="replicate")
            distance = F.avg_pool2d(wide, 2 * blur + 1, stride=1)
        if noise:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(*distance.shape[:2], 8, 8, generator=generator).to(distance)
            field = F.interpolate(drawn, distance.shape[2:], mode="bilinear", align_corners=True)
            distance = distance * (1 + noise * field).clamp(min=0.1)
        return self._points(distance)

    def _points(self, distance: Tensor) -> Tensor:
        return unproject(distance, self.context.cam_to_world, self.context.intrinsics_norm, "distance")


def frames_beyond(targets: int) -> Tensor:
    """Frames ``[targets]`` of graded rooms, spread evenly over what lies beyond the context views."""
    first, last = CONTEXT
    return _spread(torch.cat([torch.arange(first - BEYOND, first), torch.arange(last + 1, last + 1 + BEYOND)]), targets)


def _spread(frames: Tensor, targets: int) -> Tensor:
    return frames[((torch.arange(targets) + 0.5) * len(frames) / targets).long()]


def graded_rooms(seeds: Sequence[int], targets: int, size: int, *, device: torch.device | str = "cpu") -> Scene:
    """Rooms as they are graded: two context views, targets spread evenly between them and over what lies beyond.

    Args:
        seeds: Counted from ``GRADED``.
        targets: Views of each kind.
        size: Side of the pictures.
        device: Where they go.

    Raises:
        ValueError: More targets are asked for than there are views between the contexts.

    Source: after the bound-aware split of the release, ours in its numbers.
    """
    rooms = Rooms.draw([GRADED + seed for seed in seeds], device=device)
    first, last = CONTEXT
    inside = torch.arange(first + 1, last)
    if not 1 <= targets <= len(inside):
        raise ValueError(f"expected 1 to {len(inside)} targets; got {targets}")

    def everywhere(frames: Tensor) -> Tensor:
        return frames.expand(len(rooms), -1).to(device)

    context, distance = rooms.views(everywhere(torch.tensor(CONTEXT)), size)
    between, _ = rooms.views(everywhere(_spread(inside, targets)), size)
    beyond, beyond_distance = rooms.views(everywhere(frames_beyond(targets)), size)
    return Scene(context, between, beyond, distance, beyond_distance)


def training_batch(
    seeds: Sequence[int], targets: int, gap: tuple[int, int], size: int, *, device: torch.device | str = "cpu"
) -> Scene:
    """Rooms with two context views each and targets between them.

    Args:
        seeds: Of the rooms; the first also decides where the contexts lie.
        targets: Views that are asked for.
        gap: Least and largest number of frames from one context view to the other.
        size: Side of the pictures.
        device: Where they go.
    """
    rooms = Rooms.draw(seeds)
    generator = torch.Generator().manual_seed(seeds[0])
    count, frames = len(rooms), rooms.cam_to_world.shape[1]
    spans = torch.randint(gap[0], gap[1] + 1, (count,), generator=generator)
    first = (torch.rand(count, generator=generator) * (frames - spans)).long()
    last = first + spans
    place = torch.rand(count, targets, generator=generator)
    asked = first[:, None] + 1 + (place * (spans[:, None] - 1)).long()
    views, distance = rooms.to(device).views(torch.cat([first[:, None], last[:, None], asked], 1).to(device), size)
    context, between = views.map(lambda part: part[:, :2]), views.map(lambda part: part[:, 2:])
    return Scene(context, between, None, distance[:, :2])
