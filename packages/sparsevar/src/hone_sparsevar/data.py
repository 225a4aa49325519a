"""Generated scenes of 64 px whose textured parts are known: what the tiny host draws.

Each of four places holds nothing or one object: a shape, a colour, a texture. The background is the same in all, smooth
between a tint at each corner, so that a token can see where it lies: rotary embeddings alone say it to a small host
only after many steps. A prompt leaves an object's size open and little else: bits of a token are drawn one by one, so
that a small host would draw the mean of what it cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "COLORS",
    "IMAGE_PX",
    "PLACES",
    "SHAPES",
    "TEXTURES",
    "Scenes",
    "caption",
    "random_labels",
    "render",
    "words",
]

IMAGE_PX = 64
TEXT_CHANNELS = 128
MAX_WORDS = 16
PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("none", "circle", "square", "triangle")
COLORS = {
    "red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.85, 0.1),
    "magenta": (0.85, 0.15, 0.8), "cyan": (0.1, 0.85, 0.85),
}  # fmt: skip
TEXTURES = ("plain", "striped", "checkered")
_CORNERS = ((0.75, 0.6, 0.45), (0.45, 0.6, 0.75), (0.5, 0.3, 0.3), (0.25, 0.35, 0.3))


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes.

    Attributes:
        images: ``[B, 3, 64, 64]`` in [0, 1].
        textured: ``[B, 64, 64]`` bool: textures, and edges of shapes.
    """

    images: Tensor
    textured: Tensor


def random_labels(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Labels ``[count, 4, 3]`` int64: of each place the shape (0 is none), colour and texture; one to three objects."""
    options = {"generator": generator, "device": device}
    order = torch.rand(count, 4, **options).argsort(1)  # type: ignore[call-overload]
    present = order < torch.randint(1, 4, (count, 1), **options)  # type: ignore[call-overload]
    sizes = (len(SHAPES) - 1, len(COLORS), len(TEXTURES))
    shape, color, texture = (torch.randint(n, (count, 4), **options) for n in sizes)  # type: ignore[call-overload]
    return torch.stack([torch.where(present, shape + 1, 0), color, texture], -1)


def caption(label: Tensor) -> str:
    """What a scene's labels ``[4, 3]`` ask for, in words."""
    colors = tuple(COLORS)
    parts = [
        f"{TEXTURES[texture]} {colors[color]} {SHAPES[shape]} {place}"
        for place, (shape, color, texture) in zip(PLACES, label.tolist(), strict=True)
        if shape
    ]
    return ", ".join(parts)


def words(labels: Tensor, table: Tensor) -> tuple[Tensor, list[int]]:
    """Prompts as a text encoder would give them: each word is bound to the place that it speaks of.

    A place turns the signs of a word's vector, so that what was said of which place survives a sum over the words.

    Args:
        labels: ``[B, 4, 3]``.
        table: ``[vocabulary, channels]``: begin, places, shapes, colours, textures.

    Returns:
        ``[B, T, channels]``, zero behind each length, and the lengths: one word and three more per object.
    """
    batch, device = len(labels), labels.device
    offset = 1 + len(PLACES)
    first = torch.tensor([offset, offset + len(SHAPES), offset + len(SHAPES) + len(COLORS)], device=device)
    place = table[1 : 1 + len(PLACES)][None, :, None]
    said = (table[labels + first] * place.sign() + place).flatten(1, 2)  # [B, 12, channels]
    present = (labels[..., :1] > 0).expand(-1, -1, 3).flatten(1)
    order = (~present).sort(dim=1, stable=True).indices
    said = (said * present[..., None]).gather(1, order[..., None].expand_as(said))
    lengths = [1 + int(n) for n in present.sum(1).tolist()]
    text = torch.cat([table[:1].expand(batch, 1, -1), said], 1)
    return text[:, : max(lengths)], lengths


def word_table(generator: torch.Generator) -> Tensor:
    """Random directions for the words."""
    count = 1 + len(PLACES) + len(SHAPES) + len(COLORS) + len(TEXTURES)
    return torch.randn(count, TEXT_CHANNELS, generator=generator)


def render(labels: Tensor, generator: torch.Generator) -> Scenes:
    """Draw scenes of labels ``[B, 4, 3]``, on their device, whose generator this must be."""
    device, batch = labels.device, len(labels)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    axis = torch.arange(IMAGE_PX, device=device) + 0.5
    y, x = axis[:, None], axis[None, :]
    corners = torch.tensor(_CORNERS, device=device)[..., None, None]
    top, bottom = corners[0].lerp(corners[1], x / IMAGE_PX), corners[2].lerp(corners[3], x / IMAGE_PX)
    image = top.lerp(bottom, y / IMAGE_PX).expand(batch, 3, IMAGE_PX, IMAGE_PX)
    textured = torch.zeros(batch, IMAGE_PX, IMAGE_PX, dtype=torch.bool, device=device)
    palette = torch.tensor(list(COLORS.values()), device=device)
    for place in range(4):
        shape, color, texture = labels[:, place].unbind(1)
        cx, cy = 16 + 32 * (place % 2), 16 + 32 * (place // 2)
        radius = 10.5 + uniform(batch, 1, 1)
        dx, dy = x - cx, y - cy
        circle = (dx**2 + dy**2).sqrt() - radius
        square = torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius
        triangle = torch.maximum(dy - 0.6 * radius, 0.866 * dx.abs() - 0.5 * dy - 0.55 * radius)
        distance = torch.stack([circle, circle, square, triangle], 1)
        distance = distance.gather(1, shape.view(-1, 1, 1, 1).expand(-1, 1, IMAGE_PX, IMAGE_PX))[:, 0]
        there = (shape > 0).view(-1, 1, 1)
        alpha = (0.5 - distance).clamp(0, 1) * there
        stripes = ((y / 6).remainder(1) < 0.5).expand(batch, IMAGE_PX, IMAGE_PX)
        checker = ((x / 4).floor() + (y / 4).floor()).remainder(2).expand_as(stripes) == 0
        dark = torch.stack([torch.zeros_like(stripes), stripes, checker], 1)
        dark = dark.gather(1, texture.view(-1, 1, 1, 1).expand(-1, 1, IMAGE_PX, IMAGE_PX))
        paint = palette[color][:, :, None, None] * torch.where(dark, 0.3, 1.0)
        image = image * (1 - alpha[:, None]) + paint * alpha[:, None]
        inside = (distance < 0) & (texture > 0).view(-1, 1, 1)
        textured |= (inside | (distance.abs() < 1.5)) & there
    return Scenes(image, textured)
