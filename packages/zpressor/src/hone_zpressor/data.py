"""Context and target views of generated rooms, for training and for grading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hone_splat.rooms import FAR, NEAR, Rooms
from hone_splat.views import Views
from torch import Tensor

from .method import farthest_points

__all__ = ["GRADED", "Scene", "graded_rooms", "training_batch", "views_of"]

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


def views_of(rooms: Rooms, frames: Tensor, size: int) -> tuple[Views, Tensor]:
    """Views at frames ``[B, V]`` of each room's path, and their distances."""
    rows = torch.arange(len(rooms), device=frames.device)[:, None]
    poses = rooms.cam_to_world[rows, frames]
    image, distance = rooms.see(poses, (size, size))
    bounds = torch.ones(frames.shape, device=frames.device)
    inner = rooms.intrinsics_norm[:, None].expand(*frames.shape, 3, 3)
    return Views(image, poses, inner, NEAR * bounds, FAR * bounds), distance


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
    given, distance = views_of(rooms, chosen, size)
    return Scene(given, views_of(rooms, asked, size)[0], distance)


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
    rooms = Rooms(*(getattr(rooms, name).to(device) for name in rooms.__dataclass_fields__))
    given, distance = views_of(rooms, chosen.to(device), size)
    return Scene(given, views_of(rooms, asked.to(device), size)[0], distance)
