"""Dense prediction head of DepthSplat: maps of a vision transformer, of a CNN and of matching, to full resolution.

Source: DPT (arXiv 2103.13413) as DepthSplat changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .features import upsample

__all__ = ["DPT", "resize"]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with aligned corners."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x)))) + x


class Fusion(nn.Module):
    """Joins a level to the coarser ones; the coarsest has nothing to join."""

    def __init__(self, width: int, *, coarsest: bool) -> None:
        super().__init__()
        self.resConfUnit1 = None if coarsest else ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)
        self.out_conv = nn.Conv2d(width, width, 1)


class Scratch(nn.Module):
    """The part at one width."""

    def __init__(self, channels: Sequence[int], width: int, *, output: bool) -> None:
        super().__init__()
        for level, before in enumerate(channels, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(before, width, 3, 1, 1, bias=False))
        for level in range(1, 5):
            self.add_module(f"refinenet{level}", Fusion(width, coarsest=level == 4))
        if output:
            last = nn.Conv2d(16, 1, 1)
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
            self.output_conv = nn.Sequential(
                nn.Conv2d(width, width // 2, 3, 1, 1, padding_mode="replicate"),
                nn.GELU(),
                nn.Conv2d(width // 2, 16, 3, 1, 1, padding_mode="replicate"),
                nn.GELU(),
                last,
            )


class DPT(nn.Module):
    """Four maps of the transformer, three of the CNN, and one or two of matching, to one at full resolution.

    Args:
        mono: Channels of the transformer's maps.
        channels: Of the four levels, at a half to a sixteenth.
        width: Of the fused ones.
        features: Channels of the CNN's maps, from high to low resolution.
        matched: Channels of matching's maps, from high to low.
        factor: From the highest map of matching to full resolution.
        depth: The inverse depth is an input, and its change the output; otherwise features are.
    """

    def __init__(
        self,
        mono: int,
        channels: Sequence[int],
        width: int,
        features: Sequence[int],
        matched: Sequence[int],
        factor: int,
        *,
        depth: bool,
    ) -> None:
        super().__init__()
        self.layout = _layout(factor, len(matched))
        self.depth = depth
        self.projects = nn.ModuleList(nn.Conv2d(mono, count, 1) for count in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, 4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, 2, 1),
            ]
        )
        size = {f"c{i}": count for i, count in enumerate(features)} | {
            f"l{i}": count for i, count in enumerate(channels)
        }
        size |= {f"m{i}": count for i, count in enumerate(matched)} | {"d": int(depth)}
        self.concat_projects = nn.ModuleList(
            nn.Conv2d(sum(size[name] for name in names), channels[level], 1) for level, names in enumerate(self.layout)
        )
        self.scratch = Scratch(channels, width, output=depth)

    def forward(
        self,
        mono: Sequence[Float[Tensor, "n mono rows columns"]],
        features: Sequence[Tensor],
        matched: Sequence[Tensor],
        inverse_depth: Float[Tensor, "n 1 h w"] | None,
    ) -> Float[Tensor, "n out height width"]:
        """Change of the inverse depth, or features."""
        parts: Any = self.projects, self.resize_layers, self.concat_projects, self.scratch
        projects, resizers, joins, scratch = parts
        levels = [grow(project(x)) for x, project, grow in zip(mono, projects, resizers, strict=True)]
        named = {f"c{i}": x for i, x in enumerate(features)} | {f"l{i}": x for i, x in enumerate(levels)}
        named |= {f"m{i}": x for i, x in enumerate(matched)}
        if self.depth:
            assert inverse_depth is not None
            named["d"] = inverse_depth
        for level, (names, join) in enumerate(zip(self.layout, joins, strict=True)):
            levels[level] = join(torch.cat([named[name] for name in names if name in named], 1))
        levels = [getattr(scratch, f"layer{level}_rn")(x) for level, x in enumerate(levels, 1)]
        x = levels[3]
        for level in (4, 3, 2, 1):
            fuse = getattr(scratch, f"refinenet{level}")
            if fuse.resConfUnit1 is not None:
                x = x + fuse.resConfUnit1(levels[level - 1])
            x = fuse.resConfUnit2(x)
            x = fuse.out_conv(resize(x, levels[level - 2].shape[-2:]) if level > 1 else upsample(x))
        return scratch.output_conv(x) if self.depth else x


def _layout(factor: int, scales: int) -> tuple[tuple[str, ...], ...]:
    """What the first three levels join: maps c of the CNN, l of the transformer, m of matching, and the depth d."""
    if (factor, scales) == (4, 1):
        return ("c0", "c1", "l0"), ("c2", "l1", "m0", "d"), ("l2",)
    if (factor, scales) == (2, 2):
        return ("c0", "c1", "m0", "d", "l0"), ("c2", "l1", "m1"), ("l2",)
    if (factor, scales) == (4, 2):
        return ("c0", "l0"), ("c1", "l1", "m0", "d"), ("c2", "l2", "m1")
    if (factor, scales) == (8, 1):
        return ("c0", "l0"), ("c1", "l1"), ("c2", "l2", "m0", "d")
    raise ValueError(f"no published head enlarges {scales} scales by {factor}")
