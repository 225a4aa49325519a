"""The grader: does each place of an image show what was asked for; and features to compare sets of images by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hone_visual_ar.quality import frechet
from torch import Tensor, nn

from .data import COLORS, SHAPES, TEXTURES

__all__ = ["Grader", "frechet", "grade", "grader_loss", "texture_energy"]


class Grader(nn.Module):
    """A small convolutional net that reads shape, colour and texture at each of four places.

    Args:
        channels: Width of the first layer.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths, previous = (channels, 2 * channels, 2 * channels, 3 * channels), 3
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            layers += [nn.Conv2d(previous, width, 3, stride=1 if index == 0 else 2, padding=1, bias=False)]
            layers += [nn.GroupNorm(8, width), nn.SiLU()]
            previous = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * previous, len(SHAPES) + len(COLORS) + len(TEXTURES))

    def features(self, images: Tensor) -> Tensor:
        """``[B, 4, 2 C]`` of each place: mean and maximum over it; of images ``[B, 3, 64, 64]`` in [0, 1]."""
        x = self.body(images * 2 - 1)
        pooled = torch.cat([F.adaptive_avg_pool2d(x, 2), F.adaptive_max_pool2d(x, 2)], 1)
        return pooled.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits ``[B, 4, n]`` of shape, colour and texture."""
        return self.head(self.features(images)).split([len(SHAPES), len(COLORS), len(TEXTURES)], -1)


def grader_loss(grader: Grader, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; colour and texture count where an object is."""
    shape, color, texture = grader(images)
    loss = F.cross_entropy(shape.flatten(0, 1), labels[..., 0].flatten())
    there = labels[..., 0] > 0
    for logits, target in ((color, labels[..., 1]), (texture, labels[..., 2])):
        loss = loss + F.cross_entropy(logits[there], target[there])
    return loss


@torch.no_grad()
def grade(grader: Grader, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per image ``[B]``: share of places with the right shape (or none), and of objects with colour and texture.

    ``objects`` is the share of objects of which all three are right.
    """
    shape, color, texture = (logits.argmax(-1) for logits in grader(images))
    there = labels[..., 0] > 0
    count = there.sum(1).clamp(min=1)
    right = shape == labels[..., 0]
    paint, pattern = (color == labels[..., 1]) & there, (texture == labels[..., 2]) & there
    return {
        "shape": right.float().mean(1),
        "color": paint.sum(1) / count,
        "texture": pattern.sum(1) / count,
        "objects": (right & paint & pattern).sum(1) / count,
    }


def texture_energy(images: Tensor) -> Tensor:
    """Mean squared Laplacian ``[B, H, W]`` of images ``[B, 3, H, W]``: high where there is texture or an edge."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device)
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3).square().mean(1)
