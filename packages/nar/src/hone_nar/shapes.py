"""Generated clips of a moving shape as grids of tokens, without a tokenizer: a grey level is a token.

A clip of 4 frames of 8 x 8 pixels and 8 levels shows one of four shapes that moves in one of four directions; what it
shows is its class. Size, speed, start and brightness are random, positions sub-pixel. Since tokens are places, it can
be asked whether the order of drawing has to follow the clip, which LARP's learned tokens cannot answer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from hone_core.tensors import plain_tensors
from torch import Tensor

from .data import Digits

__all__ = ["CLASSES", "DIRECTIONS", "GRID", "LEVELS", "SHAPES", "read_shapes", "render", "shapes"]

GRID = (4, 8, 8)
LEVELS = 8
SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))
"""To the right, left, down, up: x and y."""
CLASSES = len(SHAPES) * len(DIRECTIONS)
TRAINED, HELD_OUT = 4000, 300
_FINE = 4
_RADII = (1.6, 2.4)
_SPEEDS = (0.5, 1.0)
_BRIGHTNESS = (4, LEVELS - 1)
_LEAST_MOVE = 0.5


def _inside(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Whether points ``[N, ...]`` lie in shapes ``[N, 1, ...]`` around the origin, all about as large."""
    disc = x.square() + y.square() < radius.square()
    square = torch.maximum(x.abs(), y.abs()) < 0.88 * radius
    # Its corners lie at (0, -1.5 r) and (+-1.3 r, 0.75 r): the origin is its centre of mass.
    triangle = (y < 0.75 * radius) & (x.abs() < (y + 1.5 * radius) * (1.3 / 2.25))
    cross = (torch.minimum(x.abs(), y.abs()) < 0.42 * radius) & (torch.maximum(x.abs(), y.abs()) < 1.25 * radius)
    found = torch.stack([disc, square, triangle, cross])
    return found.gather(0, shape.expand_as(x)[None])[0]


def render(shape: Tensor, centers: Tensor, radius: Tensor) -> Tensor:
    """Coverage ``[N, F, 8, 8]`` in [0, 1], of 4 x 4 points a pixel.

    Args:
        shape: ``[N]`` number in ``SHAPES``.
        centers: ``[N, F, 2]`` x and y in pixels; pixel 0 is around 0.5.
        radius: ``[N]`` in pixels.
    """
    side = GRID[1]
    fine = (torch.arange(side * _FINE, dtype=centers.dtype) + 0.5) / _FINE
    x = fine[None, None, None, :] - centers[:, :, 0, None, None]
    y = fine[None, None, :, None] - centers[:, :, 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    inside = _inside(shape[:, None, None, None], x, y, radius[:, None, None, None])
    return inside.to(centers.dtype).unflatten(-1, (side, _FINE)).unflatten(-3, (side, _FINE)).mean((-3, -1))


@lru_cache(maxsize=1)
def _all() -> Digits:
    generator, count = torch.Generator().manual_seed(0), TRAINED + HELD_OUT

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    with plain_tensors():
        labels = torch.randint(CLASSES, (count,), generator=generator)
        shape, direction = labels // len(DIRECTIONS), labels % len(DIRECTIONS)
        radius, speed = uniform(*_RADII, count), uniform(*_SPEEDS, count)
        frames = torch.arange(GRID[0]) - (GRID[0] - 1) / 2
        path = torch.tensor(DIRECTIONS).float()[direction][:, None] * (speed[:, None] * frames)[..., None]
        middle = GRID[1] / 2 + uniform(-1.0, 1.0, count, 2)
        coverage = render(shape, middle[:, None] + path, radius)
        bright = torch.randint(_BRIGHTNESS[0], _BRIGHTNESS[1] + 1, (count,), generator=generator)
        tokens = (coverage * bright[:, None, None, None]).round().long().flatten(1)
        return Digits(tokens, labels)


def shapes(split: str) -> Digits:
    """Clips that are trained on, or held-out ones; ``tokens`` ``[N, 256]`` in raster order.

    Args:
        split: ``train`` or ``test``.

    Raises:
        ValueError: It is neither.
    """
    return _all().split(split, TRAINED)


def read_shapes(tokens: Tensor) -> Tensor:
    """Class ``[N]`` that clips ``[N, 256]`` show; -1 where nothing is there or nothing moves.

    The direction is that of the centre of mass; the shape is the one that looks most alike, of all radii, drawn around
    the centres that were found.
    """
    clips = tokens.cpu().float().unflatten(1, GRID)
    mass = clips.sum((2, 3))
    place = torch.arange(GRID[1]) + 0.5
    x, y = ((clips.sum(axis) * place).sum(-1) / mass.clamp(min=1e-6) for axis in (2, 3))
    centers = torch.stack([x, y], -1)
    move = centers[:, -1] - centers[:, 0]
    along = move @ torch.tensor(DIRECTIONS).float().T
    direction = along.argmax(1)
    looks = clips / clips.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    errors = []
    for shape in range(len(SHAPES)):
        of_shape = torch.full((len(clips),), shape)
        each = [
            (render(of_shape, centers, torch.full((len(clips),), float(radius))) - looks).square().sum((1, 2, 3))
            for radius in torch.linspace(*_RADII, 5)
        ]
        errors.append(torch.stack(each).amin(0))
    found = torch.stack(errors).argmin(0) * len(DIRECTIONS) + direction
    nothing = (mass.amin(1) <= 0) | (along.amax(1) < _LEAST_MOVE)
    return found.where(~nothing, -1)
