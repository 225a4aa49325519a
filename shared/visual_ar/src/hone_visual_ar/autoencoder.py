"""The convolutional encoder and decoder that both tokenizers are made of, with the key names of either release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Decoder", "Down", "Encoder", "Kit", "ResBlock", "Up", "group_norm"]


class _Conv(nn.Module):
    """A convolution one level deeper, as the BSQ release names it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def group_norm(channels: int) -> nn.GroupNorm:
    """Norm of 32 groups, or of 24 where the channels are no multiple of 32.

    Raises:
        ValueError: They are neither's.
    """
    for groups in (32, 24):
        if channels % groups == 0:
            return nn.GroupNorm(groups, channels, eps=1e-6)
    raise ValueError(f"channels of a tokenizer must be a multiple of 32 or 24; got {channels}")


class Kit:
    """Which layers to build with."""

    def __init__(self, nested: bool, attention: bool) -> None:
        self.nested, self.attention = nested, attention

    def conv(self, *args: Any, **options: Any) -> nn.Module:
        """A convolution."""
        return _Conv(*args, **options) if self.nested else nn.Conv2d(*args, **options)

    def norm(self, channels: int) -> nn.Module:
        """A norm."""
        return _Norm(channels) if self.nested else group_norm(channels)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, kit: Kit, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1 = kit.norm(inner)
        self.conv1 = kit.conv(inner, outer, 3, padding=1)
        self.norm2 = kit.norm(outer)
        self.conv2 = kit.conv(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inner == outer else kit.conv(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[B, inner, H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    """Full attention of one head over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    """Halves the resolution, padded on the right and below."""

    def __init__(self, kit: Kit, channels: int) -> None:
        super().__init__()
        self.conv = kit.conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[B, C, H, W]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Doubles the resolution, nearest."""

    def __init__(self, kit: Kit, channels: int) -> None:
        super().__init__()
        self.conv = kit.conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[B, C, H, W]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution, with attention after each where asked."""

    def __init__(self, kit: Kit, inner: int, outer: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(kit, inner if i == 0 else outer, outer) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(outer) for _ in range(blocks if attention else 0))
        self.downsample: Down | None = None
        self.upsample: Up | None = None

    def forward(self, x: Tensor) -> Tensor:
        for at, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[at](x)
        return x


def _as_level(module: nn.Module) -> _Level:
    assert isinstance(module, _Level)
    return module


class _Middle(nn.Module):
    def __init__(self, kit: Kit, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(kit, channels, channels)
        self.attn_1 = _Attention(channels) if kit.attention else nn.Identity()
        self.block_2 = ResBlock(kit, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to latents.

    Args:
        channels: Width of the first level.
        multipliers: Width of each level over ``channels``; each level but the last halves the resolution.
        blocks: Residual blocks of a level.
        latent: Channels of the latent.
        nested: Key names of the BSQ release (``conv1.conv.weight``) in place of VAR's (``conv1.weight``).
        attention: Attention in the deepest level and the middle, as in VAR.
    """

    def __init__(
        self, channels: int, multipliers: Sequence[int], blocks: int, latent: int, *, nested: bool, attention: bool
    ) -> None:
        super().__init__()
        kit, widths = Kit(nested, attention), [channels * m for m in multipliers]
        self.conv_in = kit.conv(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for at, (inner, outer) in enumerate(zip([channels, *widths], widths, strict=False)):
            last = at == len(widths) - 1
            level = _Level(kit, inner, outer, blocks, attention and last)
            if not last:
                level.downsample = Down(kit, outer)
            self.down.append(level)
        self.mid = _Middle(kit, widths[-1])
        self.norm_out = kit.norm(widths[-1])
        self.conv_out = kit.conv(widths[-1], latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Latents ``[B, latent, H / s, W / s]`` of images ``[B, 3, H, W]``."""
        x = self.conv_in(x)
        for level in map(_as_level, self.down):
            x = level(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to images; the arguments are the encoder's, and a level has one block more."""

    def __init__(
        self, channels: int, multipliers: Sequence[int], blocks: int, latent: int, *, nested: bool, attention: bool
    ) -> None:
        super().__init__()
        kit, widths = Kit(nested, attention), [channels * m for m in multipliers]
        self.conv_in = kit.conv(latent, widths[-1], 3, padding=1)
        self.mid = _Middle(kit, widths[-1])
        self.up = nn.ModuleList()
        for at, outer in enumerate(widths):
            inner = widths[min(at + 1, len(widths) - 1)]
            level = _Level(kit, inner, outer, blocks + 1, attention and at == len(widths) - 1)
            if at > 0:
                level.upsample = Up(kit, outer)
            self.up.append(level)
        self.norm_out = kit.norm(channels * multipliers[0])
        self.conv_out = kit.conv(channels * multipliers[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, not clamped, of latents."""
        x = self.mid(self.conv_in(z))
        for level in map(_as_level, reversed(list(self.up))):
            x = level(x)
            if level.upsample is not None:
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` in the forward pass, the gradient of ``value`` in the backward."""
    return value + (rounded - value).detach() if torch.is_grad_enabled() else rounded
