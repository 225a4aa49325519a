"""The DINOv2 vision transformer inside DepthSplat, with the keys of its first release.

Source: DINOv2 (arXiv 2304.07193). Position is interpolated by the release's scale factor, with 0.1 added to each side,
which gives slightly other features than interpolation to a size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["VITS", "ViT", "ViTConfig"]

PATCH = 14
GRID = 37
EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Architecture."""

    width: int
    """Channels of a token."""
    heads: int
    """Of the attention."""
    blocks: int = 12
    """Layers."""
    taps: tuple[int, ...] = (2, 5, 8, 11)
    """Layers whose tokens are given out."""


VITS = {
    "vits": ViTConfig(width=384, heads=6),
    "vitb": ViTConfig(width=768, heads=12),
    "vitl": ViTConfig(width=1024, heads=16, blocks=24, taps=(4, 11, 17, 23)),
}


class PatchEmbed(nn.Module):
    """One token per 14 x 14 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)


class Attention(nn.Module):
    """Of all tokens of a picture."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each after a norm and scaled."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, EPS), Attention(width, heads), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, EPS), Mlp(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Features of a picture at several depths."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.taps = cfg.taps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + GRID**2, cfg.width))
        self.patch_embed = PatchEmbed(cfg.width)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.blocks))
        self.norm = nn.LayerNorm(cfg.width, EPS)

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> list[Tensor]:
        """Maps ``[n, width, height / 14, width / 14]`` of normalised pictures, one per tap, each normed."""
        patches = self.patch_embed.proj(x)
        height, width = patches.shape[-2:]
        place = self.pos_embed[:, 1:].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        if (height, width) != (GRID, GRID):
            factors = ((height + 0.1) / GRID, (width + 0.1) / GRID)
            place = F.interpolate(place, scale_factor=factors, mode="bicubic")
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = torch.cat([first, (patches + place).flatten(2).mT], 1)
        blocks: Any = self.blocks
        out = []
        for number, block in enumerate(blocks):
            tokens = block(tokens)
            if number in self.taps:
                out.append(self.norm(tokens)[:, 1:].mT.unflatten(-1, (height, width)))
        return out
