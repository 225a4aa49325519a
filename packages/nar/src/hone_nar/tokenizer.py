"""LlamaGen's VQ tokenizer under its published names, on the layers that the tokenizers of hone-visual-ar are made of.

Source: FoundationVision/LlamaGen, ``tokenizer/tokenizer_image/vq_model.py``; arXiv 2406.06525.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from hone_visual_ar.autoencoder import Down, Kit, ResBlock, Up, group_norm
from hone_visual_ar.tokenizers import PIXELS
from torch import Tensor, nn

__all__ = ["LlamaGenVQModel"]

_KIT = Kit(nested=False, attention=True)


def _res(inner: int, outer: int) -> ResBlock:
    return ResBlock(_KIT, inner, outer)


class _Attention(nn.Module):
    """Full attention of one head over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class _Level(nn.Module):
    def __init__(self, inner: int, outer: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(_res(inner if at == 0 else outer, outer) for at in range(blocks))
        self.attn = nn.ModuleList(_Attention(outer) for _ in range(blocks if attention else 0))
        self.downsample: Down | None = None
        self.upsample: Up | None = None

    def forward(self, x: Tensor) -> Tensor:
        for at, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[at](x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(_res(channels, channels), _Attention(channels), _res(channels, channels))


class _Encoder(nn.Module):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, latent: int) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.Sequential()
        for at, (inner, outer) in enumerate(zip([channels, *widths], widths, strict=False)):
            last = at == len(widths) - 1
            level = _Level(inner, outer, blocks, last)
            if not last:
                level.downsample = Down(_KIT, outer)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class _Decoder(nn.Module):
    """Its levels are numbered from the deepest on."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, latent: int) -> None:
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.Sequential()
        for at, (inner, outer) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = _Level(inner, outer, blocks + 1, at == 0)
            if at < len(widths) - 1:
                level.upsample = Up(_KIT, outer)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(x)))


class _Codebook(nn.Module):
    def __init__(self, entries: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, channels)


class LlamaGenVQModel(ModelMixin, ConfigMixin):
    """Images to codes and back: VQ-16, and VQ-8 with ``multipliers=(1, 2, 2, 4)``.

    Args:
        codebook_size: Entries.
        codebook_embed_dim: Channels of an entry; entries and latents are put on the unit sphere.
        z_channels: Between encoder and codebook.
        channels: Width of the first level.
        multipliers: Width of each level over it; each level but the last halves the resolution.
        blocks: Residual blocks of a level in the encoder.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        z_channels: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.stride, self.choices = 2 ** (len(multipliers) - 1), codebook_size
        self.encoder = _Encoder(channels, multipliers, blocks, z_channels)
        self.decoder = _Decoder(channels, multipliers, blocks, z_channels)
        self.quantize = _Codebook(codebook_size, codebook_embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, 1)

    def _entries(self) -> Tensor:
        return F.normalize(self.quantize.embedding.weight.float(), dim=-1)

    def encode(self, image_pm1: Tensor) -> Tensor:
        """Codes ``[B, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            ValueError: The sides are no multiples of the stride.
            RuntimeError: Latents are not finite.
        """
        if image_pm1.ndim != 4 or image_pm1.shape[1] != 3 or any(n % self.stride for n in image_pm1.shape[2:]):
            raise ValueError(
                f"expected images [B, 3, H, W] with sides that are multiples of {self.stride}; got "
                f"{list(image_pm1.shape)}"
            )
        latent = self.quant_conv(self.encoder(image_pm1.to(self.dtype))).float()
        if not bool(latent.isfinite().all()):
            raise RuntimeError(
                f"the tokenizer's latents are not finite in {self.dtype}; take float32, or look at weights and input"
            )
        # Nearest on the sphere is most alike.
        return (F.normalize(latent, dim=1).movedim(1, -1) @ self._entries().T).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1], clamped, of codes ``[B, h, w]``.

        Raises:
            ValueError: A code is out of range.
        """
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.choices:
            raise ValueError(f"codes must lie in 0 to {self.choices - 1}; got {low} to {high}")
        latent = F.embedding(codes, self._entries()).movedim(-1, 1).to(self.dtype)
        pixels = self.stride**2 * codes[0].numel()
        parts = latent.split(max(1, PIXELS // pixels))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts]).clamp(-1, 1)
