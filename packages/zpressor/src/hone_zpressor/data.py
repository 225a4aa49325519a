"""Context and target views of generated rooms, for training and for grading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hone_splat.rooms import Rooms
from hone_splat.views import Views
from torch import Tensor

from .anchors import farthest_points

__all__ = ["GRADED", "Scene", "graded_rooms", "training_batch"]

GRADED = 1_000_000
"""Seeds of rooms from here on are graded on, never trained on."""


@dataclass(frozen=True)
class Scene:
    """Rooms with what is given and what is asked for.

    Attributes:
        context: Given.
        targets: Asked for; none of them a context view.
        distance: ``[B, V, H, W]``, true distance of the context views' pixels.
    """

    context: Views
    targets: Views
    distance: Tensor

    def __getitem__(self, rows: slice) -> Scene:
        """Some of the rooms."""
        return Scene(
            self.context.map(lambda part: part[rows]), self.targets.map(lambda part: part[rows]), self.distance[rows]
        )


def graded_rooms(
    seeds: Sequence[int], context: int, targets: int, size: int, *, device: torch.device | str = "cpu"
) -> Scene:
    """Rooms as they are graded: contexts are the farthest cameras of the whole path, targets spread over the rest.

    Args:
        seeds: Counted from ``GRADED``.
        context: Views that are given.
        targets: Views that are asked for.
        size: Side of the pictures.
        device: Where they go.

    Raises:
        ValueError: A path has fewer frames than are asked for.

    Source: generate_evaluation_index.py of the release, with n = 50.
    """
    rooms = Rooms.draw([GRADED + seed for seed in seeds], device=device)
    frames = rooms.cam_to_world.shape[1]
    if context + targets > frames:
        raise ValueError(f"a path has {frames} frames; got {context} context and {targets} target views")
    chosen = farthest_points(rooms.cam_to_world[..., :3, 3], context).sort(1).values
    free = torch.ones(len(rooms), frames, dtype=torch.bool, device=chosen.device)
    free.scatter_(1, chosen, False)
    rest = free.nonzero()[:, 1].view(len(rooms), -1)
    width = rest.shape[1] // targets
    asked = rest[:, : width * targets : width]
    return _scene(rooms, chosen, asked, size)


def training_batch(
    seeds: Sequence[int],
    context: int,
    targets: int,
    gap: tuple[int, int],
    size: int,
    *,
    device: torch.device | str = "cpu",
) -> Scene:
    """Rooms of which each gives views from a part of its path.

    Args:
        seeds: Of the rooms; the first also decides where the parts begin.
        context: Views that are given: the farthest cameras of the part.
        targets: Views that are asked for: any others of the part.
        gap: Least and largest number of frames of a part.
        size: Side of the pictures.
        device: Where they go.
    """
    rooms = Rooms.draw(seeds)
    generator = torch.Generator().manual_seed(seeds[0])
    frames = rooms.cam_to_world.shape[1]
    spans = torch.randint(max(gap[0], context + targets), gap[1] + 1, (len(rooms),), generator=generator)
    first = (torch.rand(len(rooms), generator=generator) * (frames - spans + 1)).long()
    index = torch.arange(frames)
    inside = (index >= first[:, None]) & (index < (first + spans)[:, None])
    chosen = farthest_points(rooms.cam_to_world[..., :3, 3], context, inside)
    inside.scatter_(1, chosen, False)
    order = torch.rand(inside.shape, generator=generator).masked_fill(~inside, 2.0)
    asked = order.argsort(1)[:, :targets]
    return _scene(rooms.to(device), chosen.to(device), asked.to(device), size)


def _scene(rooms: Rooms, given: Tensor, asked: Tensor, size: int) -> Scene:
    views, distance = rooms.views(torch.cat([given, asked], 1), size)
    count = given.shape[1]
    context, targets = views.map(lambda part: part[:, :count]), views.map(lambda part: part[:, count:])
    return Scene(context, targets, distance[:, :count])
