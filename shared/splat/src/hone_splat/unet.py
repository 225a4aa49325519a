"""The small U-Net inside published hosts, whose attention sees all views of a scene at once.

Source: latent diffusion's U-Net without time steps, as MVSplat (normalisation after each convolution) and DepthSplat
(before it) use it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["UNet"]

HEAD = 32
Norm = Literal["pre", "post"]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8 if channels % 8 == 0 else 4, channels)


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, norm: Norm) -> None:
        super().__init__()
        first, second = nn.Conv2d(channels_in, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        if norm == "pre":
            self.in_layers = nn.Sequential(_group_norm(channels_in), nn.SiLU(), first)
            self.out_layers = nn.Sequential(_group_norm(channels), nn.SiLU(), nn.Identity(), _zero(second))
        else:
            self.in_layers = nn.Sequential(first, _group_norm(channels), nn.SiLU())
            self.out_layers = nn.Sequential(second, _zero(_group_norm(channels)), nn.SiLU())
        same = channels_in == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, views: int) -> Tensor:
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


class CrossViewAttention(nn.Module):
    """Attention over the pixels of all views of a scene, heads of 32 channels."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        if channels % HEAD:
            raise ValueError(f"attention needs a multiple of {HEAD} channels; got {channels}")
        self.after = norm == "post"
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, views: int) -> Tensor:
        count, channels, height, width = x.shape
        tokens = x.flatten(2)
        qkv = self.qkv(tokens if self.after else self.norm(tokens))
        # Channels are [head, q|k|v, 32]; tokens of all views of a scene stand in one row.
        qkv = qkv.view(count // views, views, channels // HEAD, 3, HEAD, height * width)
        query, key, value = qkv.permute(3, 0, 2, 1, 5, 4).flatten(3, 4).unbind(0)
        found = F.scaled_dot_product_attention(query, key, value)  # [scene, heads, V * P, 32]
        found = found.unflatten(2, (views, -1)).permute(0, 2, 1, 4, 3).reshape(count, channels, -1)
        found = self.proj_out(found)
        return (tokens + (self.norm(found) if self.after else found)).view_as(x)


class Downsample(nn.Module):
    """Halve both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor, views: int) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor, views: int) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """U-Net with one block per level down and two up.

    Args:
        channels: At the first level.
        mults: Channels of each level over those of the first.
        attention: Downsampling factors at which attention joins the views.
        norm: Before or after each convolution.
    """

    def __init__(self, channels: int, mults: tuple[int, ...], attention: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        self.factor = 2 ** (len(mults) - 1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, channels, 3, 1, 1)])])
        widths, width, scale = [channels], channels, 1
        for level, mult in enumerate(mults):
            block: list[nn.Module] = [ResBlock(width, mult * channels, norm)]
            width = mult * channels
            if scale in attention:
                block.append(CrossViewAttention(width, norm))
            self.input_blocks.append(nn.ModuleList(block))
            widths.append(width)
            if level < len(mults) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                widths.append(width)
                scale *= 2
        self.middle_block = nn.ModuleList([ResBlock(width, width, norm), nn.Identity(), ResBlock(width, width, norm)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for turn in range(2):
                block = [ResBlock(width + widths.pop(), mult * channels, norm)]
                width = mult * channels
                if scale in attention:
                    block.append(CrossViewAttention(width, norm))
                if level and turn == 1:
                    block.append(Upsample(width))
                    scale //= 2
                self.output_blocks.append(nn.ModuleList(block))
        last = nn.Conv2d(width, channels, 3, 1, 1)
        if norm == "pre":
            self.out = nn.Sequential(_group_norm(width), nn.SiLU(), _zero(last))
        else:
            self.out = nn.Sequential(last, _group_norm(channels), nn.SiLU())

    def forward(self, x: Float[Tensor, "n channels height width"], views: int) -> Tensor:
        """Filter maps.

        Args:
            x: ``[B * V, C, H, W]``, the views of a scene side by side.
            views: V.

        Raises:
            ValueError: A side is no multiple of what the levels divide it by.
        """
        if any(side % self.factor for side in x.shape[-2:]):
            raise ValueError(f"sides must be multiples of {self.factor}; got {list(x.shape[-2:])}")
        inputs: Any = self.input_blocks
        outputs: Any = self.output_blocks
        x = inputs[0][0](x)
        skips = [x]
        for block in inputs[1:]:
            for part in block:
                x = part(x, views)
            skips.append(x)
        x = self.middle_block[2](self.middle_block[0](x, views), views)
        for block in outputs:
            x = torch.cat([x, skips.pop()], 1)
            for part in block:
                x = part(x, views)
        return self.out(x)
