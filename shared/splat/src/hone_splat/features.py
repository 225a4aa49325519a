"""Convolutional features of published hosts, and the sine position that they add inside each of four windows.

Source: UniMatch's backbone as MVSplat and DepthSplat use it. Instance normalisation has no parameters and no running
statistics.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["FeatureNet", "normalise", "upsample", "window_position"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(image_01: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Subtract ImageNet's mean and divide by its deviation."""
    mean, std = (image_01.new_tensor(value)[:, None, None] for value in (MEAN, STD))
    return (image_01 - mean) / std


def upsample(x: Tensor, factor: int = 2) -> Tensor:
    """Bilinear enlargement with aligned corners, which these hosts use everywhere outside their U-Nets."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


def _instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, eps=1e-5)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with instance normalisation, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = _instance_norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride), _instance_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv1(x)))
        y = F.relu(self.norm(self.conv2(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class FeatureNet(nn.Module):
    """Features at three resolutions, the first at half the picture's.

    Args:
        channels: Of the three.
        strides: Of the second and third against the one before.
    """

    def __init__(self, channels: tuple[int, int, int] = (64, 96, 128), strides: tuple[int, int] = (2, 1)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        self.norm1 = _instance_norm(channels[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(ResidualBlock(before, width, stride), ResidualBlock(width, width, 1))
            for before, width, stride in zip((channels[0], *channels), channels, (1, *strides), strict=False)
        )
        self.conv2 = nn.Conv2d(channels[2], channels[2], 1)

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> list[Tensor]:
        """Features of normalised pictures, from high to low resolution."""
        first = self.layer1(F.relu(self.norm1(self.conv1(x))))
        second = self.layer2(first)
        return [first, second, self.conv2(self.layer3(second))]


def window_position(x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
    """Add a sine position that starts anew in each of the 2 x 2 windows.

    Raises:
        ValueError: A side is odd.
    """
    channels, height, width = x.shape[1:]
    if height % 2 or width % 2:
        raise ValueError(f"feature maps must have even sides, for 2 x 2 windows; got {height} x {width}")
    half = channels // 2
    index = torch.arange(half, device=x.device)
    frequency = 10000 ** (2 * (index // 2) / half)

    def axis(count: int) -> Tensor:
        place = torch.arange(1, count + 1, device=x.device) / (count + 1e-6)
        angle = (2 * math.pi * place)[:, None] / frequency
        return torch.where(index % 2 == 0, angle.sin(), angle.cos())

    rows, columns = height // 2, width // 2
    position = torch.cat(
        [axis(rows)[:, None].expand(rows, columns, half), axis(columns)[None].expand(rows, columns, half)], -1
    )
    return x + position.permute(2, 0, 1).repeat(1, 2, 2).to(x.dtype)
