"""Generated rooms: boxes and spheres with sharp textures, ray-cast exactly, seen from a smooth path of cameras.

A scene is drawn from its seed on the CPU, so that it is the same on every device. Units are about metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Generic, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import look_at, pixel_centres, rays
from .views import Views

__all__ = ["FAR", "NEAR", "RoomStream", "Rooms"]

NEAR, FAR = 0.4, 12.0
"""Depth range that holds for every camera of every room, in scene units."""
FRAMES = 50
OBJECTS = 8
"""Per room: half boxes, half spheres."""


class Sliced(Protocol):
    """A batch of which a slice of its scenes is one again."""

    def __getitem__(self, rows: slice) -> Self: ...


S = TypeVar("S", bound=Sliced)


class RoomStream(Generic[S]):
    """Rooms of each training step, drawn for four steps at once: small batches would leave a GPU waiting.

    Args:
        draw: Seeds to a batch with one scene for each.
        first: Number of the first step among all that must not share rooms.
        scenes: Per step.
    """

    STEPS = 4
    SEEDS = 900_000
    """Seeds below are trained on."""

    def __init__(self, draw: Callable[[range], S], first: int, scenes: int) -> None:
        self.draw, self.first, self.scenes = draw, first, scenes
        self._held: tuple[int, S] | None = None

    def at(self, step: int) -> S:
        """Batch of a step, the same whichever came before."""
        group, place = divmod(step, self.STEPS)
        if self._held is None or self._held[0] != group:
            first = (self.first + group * self.STEPS) * self.scenes % self.SEEDS
            self._held = group, self.draw(range(first, first + self.STEPS * self.scenes))
        return self._held[1][slice(place * self.scenes, (place + 1) * self.scenes)]


@dataclass(frozen=True)
class Rooms:
    """A batch of rooms.

    Attributes:
        walls: ``[B, 3]``, half extents of the room.
        centres: ``[B, O, 3]`` of the objects.
        sizes: ``[B, O, 3]``, half extents of a box; the first is the radius of a sphere.
        turns: ``[B, O]``, angle of a box about the vertical axis.
        colours: ``[B, O + 1, 2, 3]``, two of each texture; the last is the walls'.
        waves: ``[B, O + 1, 3, 4]``: three plane waves (direction times frequency, phase) of each texture.
        cam_to_world: ``[B, F, 4, 4]``, the path.
        intrinsics_norm: ``[B, 3, 3]``, one camera per room.
    """

    walls: Tensor
    centres: Tensor
    sizes: Tensor
    turns: Tensor
    colours: Tensor
    waves: Tensor
    cam_to_world: Tensor
    intrinsics_norm: Tensor

    @classmethod
    def draw(cls, seeds: Sequence[int], *, frames: int = FRAMES, device: torch.device | str = "cpu") -> Self:
        """Draw one room per seed.

        Args:
            seeds: Of the rooms.
            frames: Cameras on the path.
            device: Where the rooms go.
        """
        drawn = [cls._one(seed, frames) for seed in seeds]
        return cls(*(torch.stack(parts).to(device) for parts in zip(*drawn, strict=True)))

    @staticmethod
    def _one(seed: int, frames: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator)

        walls = torch.stack([uniform(low=2.6, high=4.0), uniform(low=1.4, high=2.0), uniform(low=2.6, high=4.0)])
        # Objects stand within 0.8 of the middle, cameras outside 1.7.
        angle, radius = uniform(OBJECTS, high=2 * math.pi), 0.8 * uniform(OBJECTS).sqrt()
        centres = torch.stack([radius * angle.cos(), uniform(OBJECTS, low=-0.6, high=1.0), radius * angle.sin()], -1)
        sizes = uniform(OBJECTS, 3, low=0.12, high=0.42)
        turns = uniform(OBJECTS, high=math.pi)
        colours = uniform(OBJECTS + 1, 2, 3, low=0.05, high=0.95)
        direction = F.normalize(torch.randn(OBJECTS + 1, 3, 3, generator=generator), dim=-1)
        frequency = torch.cat([uniform(OBJECTS, 3, low=6.0, high=16.0), uniform(1, 3, low=2.0, high=5.0)])
        phase = uniform(OBJECTS + 1, 3, 1, high=2 * math.pi)
        waves = torch.cat([direction * frequency[..., None], phase], -1)
        time = torch.linspace(0, 1, frames)
        start, sweep = uniform(high=2 * math.pi), uniform(low=0.35, high=1.0) * math.pi
        sweep = sweep if uniform() < 0.5 else -sweep
        around = start + sweep * time
        distance = uniform(low=1.75, high=2.3) + 0.15 * torch.sin(2 * math.pi * (uniform() + time * uniform(high=2.0)))
        rise = uniform(low=-0.8, high=0.2) + 0.25 * torch.sin(2 * math.pi * (uniform() + time * uniform(high=1.5)))
        position = torch.stack([distance * around.cos(), rise, distance * around.sin()], -1)
        target = uniform(3, low=-0.3, high=0.3) + 0.15 * torch.sin(
            2 * math.pi * (uniform(3) + time[:, None] * uniform(3, high=1.5))
        )
        poses = look_at(position, target, torch.tensor([0.0, 1.0, 0.0]))
        focal = 0.5 / math.tan(0.5 * math.radians(float(uniform(low=55.0, high=70.0))))
        inner = torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])
        return walls, centres, sizes, turns, colours, waves, poses, inner

    def __len__(self) -> int:
        return len(self.walls)

    def __getitem__(self, index: slice) -> Rooms:
        return Rooms(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Rooms:
        """The same rooms on another device."""
        return Rooms(*(getattr(self, field.name).to(device) for field in fields(self)))

    def views(self, frames: Tensor, size: int) -> tuple[Views, Tensor]:
        """Square views at frames ``[B, V]`` of each room's path, and their distances ``[B, V, H, W]``."""
        rows = torch.arange(len(self), device=frames.device)[:, None]
        poses = self.cam_to_world[rows, frames]
        image, distance = self.see(poses, (size, size))
        bounds = torch.ones(frames.shape, device=frames.device)
        inner = self.intrinsics_norm[:, None].expand(*frames.shape, 3, 3)
        return Views(image, poses, inner, NEAR * bounds, FAR * bounds), distance

    @torch.no_grad()
    def see(self, cam_to_world: Tensor, size: tuple[int, int], *, samples: int = 2) -> tuple[Tensor, Tensor]:
        """What cameras see.

        Args:
            cam_to_world: ``[B, V, 4, 4]``.
            size: Height and width; pixels are square for square pictures.
            samples: Colour samples per pixel and axis.

        Returns:
            ``image_01`` ``[B, V, 3, H, W]`` and ``distance`` ``[B, V, H, W]`` along the ray of each pixel's centre.
        """
        height, width = size
        device = cam_to_world.device
        inner = self.intrinsics_norm[:, None].expand(*cam_to_world.shape[:2], 3, 3)
        fine = pixel_centres(height * samples, width * samples, device=device).flatten(0, 1)
        middle = pixel_centres(height, width, device=device).flatten(0, 1)

        def cast(points: Tensor) -> tuple[Tensor, Tensor]:
            local = rays(points.expand(*cam_to_world.shape[:2], -1, 2), inner, "distance")
            direction = local @ cam_to_world[..., :3, :3].mT
            origin = cam_to_world[:, :, None, :3, 3].expand_as(direction)
            colour, distance = self._cast(origin.flatten(1, 2), direction.flatten(1, 2))
            return colour.view(*direction.shape), distance.view(direction.shape[:-1])

        colour, _ = cast(fine)
        colour = colour.view(*cam_to_world.shape[:2], height, samples, width, samples, 3).mean((3, 5))
        distance = cast(middle)[1].view(*cam_to_world.shape[:2], height, width)
        return colour.movedim(-1, 2).contiguous(), distance

    def _cast(self, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Colour ``[B, R, 3]`` and distance ``[B, R]`` of the first surface on each ray."""
        boxes = OBJECTS // 2
        # Boxes, in their own frames: [B, R, O, 3].
        cosine, sine = self.turns[:, None, :boxes].cos(), self.turns[:, None, :boxes].sin()

        def into(vector: Tensor) -> Tensor:
            x, y, z = vector.unbind(-1)
            return torch.stack([cosine * x + sine * z, y, cosine * z - sine * x], -1)

        def back(vector: Tensor) -> Tensor:
            x, y, z = vector.unbind(-1)
            return torch.stack([cosine * x - sine * z, y, cosine * z + sine * x], -1)

        start = into(origin[:, :, None] - self.centres[:, None, :boxes])
        along = into(direction[:, :, None].expand_as(start))
        reach = self.sizes[:, None, :boxes]
        box_distance, box_normal = _slabs(start, along, reach, enter=True)
        box_normal = back(box_normal)
        # Spheres.
        start = origin[:, :, None] - self.centres[:, None, boxes:]
        radius = self.sizes[:, None, boxes:, 0]
        half = (start * direction[:, :, None]).sum(-1)
        under = half**2 - (start.square().sum(-1) - radius**2)
        ball_distance = -half - under.clamp(min=0).sqrt()
        hit = (under > 0) & (ball_distance > 0)
        ball_distance = torch.where(hit, ball_distance, torch.full_like(ball_distance, torch.inf))
        ball_normal = start + direction[:, :, None] * torch.where(hit, ball_distance, 0.0)[..., None]
        ball_normal = ball_normal / radius[..., None]
        # Walls, from within.
        wall_distance, wall_normal = _slabs(
            origin[:, :, None], direction[:, :, None], self.walls[:, None, None], enter=False
        )
        distances = torch.cat([box_distance, ball_distance, wall_distance], -1)
        normals = torch.cat([box_normal, ball_normal, wall_normal], -2)
        distance, which = distances.min(-1)
        normal = normals.gather(2, which[..., None, None].expand(*which.shape, 1, 3))[:, :, 0]
        point = origin + direction * distance[..., None]
        return self._shade(point, normal, which), distance

    def _shade(self, point: Tensor, normal: Tensor, which: Tensor) -> Tensor:
        rows = torch.arange(len(self), device=point.device)[:, None]
        waves = self.waves[rows, which]  # [B, R, 3, 4]
        value = torch.sin((waves[..., :3] * point[:, :, None]).sum(-1) + waves[..., 3])
        # Two waves cut the surface into sharp patches, the third varies them softly.
        patch = ((value[..., 0] * value[..., 1]) > 0).to(point)
        mix = (0.85 * patch + 0.15 * (0.5 + 0.5 * value[..., 2]))[..., None]
        pair = self.colours[rows, which]
        colour = pair[..., 0, :] * (1 - mix) + pair[..., 1, :] * mix
        light = F.normalize(point.new_tensor([0.4, -1.0, 0.3]), dim=0)
        return (colour * (0.75 + 0.25 * (normal * light).sum(-1, keepdim=True))).clamp(0, 1)


def _slabs(start: Tensor, along: Tensor, reach: Tensor, *, enter: bool) -> tuple[Tensor, Tensor]:
    """Distance to an axis-aligned box around the origin and the normal there; infinite where it is missed.

    Args:
        start: Origin of each ray, in the box's frame.
        along: Its direction.
        reach: Half extents.
        enter: From outside; False for the far side seen from within.
    """
    step = torch.where(along.abs() < 1e-9, torch.full_like(along, 1e-9), along)
    first, second = (-reach - start) / step, (reach - start) / step
    close, leave = torch.minimum(first, second), torch.maximum(first, second)
    entry, exit = close.max(-1), leave.min(-1)
    found = entry if enter else exit
    distance = found.values
    if enter:
        hit = (entry.values < exit.values) & (entry.values > 0)
        distance = torch.where(hit, distance, torch.full_like(distance, torch.inf))
    normal = F.one_hot(found.indices, 3).to(along) * -along.sign()
    return distance, normal
