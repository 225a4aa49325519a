"""Multi-scale tokenizers: BSQ of Infinity and VQ of VAR, with the weights' published names.

Both write an image as a sum over scales of up-sampled codes. What differs is the code (bits on a sphere, or an entry of
a codebook) and the resampling, which a wrong mode would spoil in silence.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .autoencoder import Decoder, Encoder, straight_through
from .schedules import ScaleSchedule

__all__ = ["BSQVAE", "PIXELS", "VQVAE", "ScaleTokenizer", "bits_of", "codes_of"]

PIXELS = 1 << 22
"""Pixels that a decoder makes at a time: with twice as many, its widest tensor would have 2^31 elements."""


def bits_of(latent: Tensor) -> Tensor:
    """Bits of the nearest code: the signs, as int64 0 and 1; zero counts as negative."""
    return (latent > 0).long()


def codes_of(bits: Tensor, dim: int) -> Tensor:
    """Codes of bits, each +1 or -1 over ``sqrt(dim)``, so that a code lies on the unit sphere.

    Args:
        bits: Integers 0 and 1.
        dim: Bits of a code.
    """
    return (2.0 * bits - 1.0) / math.sqrt(dim)


class ScaleTokenizer(ModelMixin, ConfigMixin):
    """What both tokenizers do."""

    choices: int
    """Values that one choice can take: 2 for a bit, else the size of the codebook."""
    latent_dim: int
    """Channels of a code."""
    stride: int
    """Pixels per latent, along a side."""

    @abstractmethod
    def features(self, image_pm1: Tensor) -> Tensor:
        """Latents ``[B, d, H, W]`` before quantization, of images in [-1, 1]."""

    def decode(self, latent: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1], clamped, of a summed latent."""
        pixels = self.stride**2 * latent.shape[-2] * latent.shape[-1]
        parts = latent.to(self.dtype).split(max(1, PIXELS // pixels))
        return torch.cat([self._decode(part) for part in parts]).clamp(-1, 1)

    @abstractmethod
    def _decode(self, latent: Tensor) -> Tensor:
        """Images, not clamped, of a latent in the dtype of the weights."""

    @abstractmethod
    def nearest(self, latent: Tensor) -> Tensor:
        """Indices ``[B, groups, h, w]`` of the codes nearest to a latent ``[B, d, h, w]``."""

    @abstractmethod
    def embed(self, indices: Tensor) -> Tensor:
        """Codes ``[..., d]`` of indices ``[..., groups]``."""

    @abstractmethod
    def mean_code(self, probabilities: Tensor) -> Tensor:
        """Expected codes ``[..., d]`` of probabilities ``[..., groups, choices]``."""

    @abstractmethod
    def spread(self, codes: Tensor, size: tuple[int, int], *, scale: int, scales: int) -> Tensor:
        """What the codes ``[B, d, h, w]`` of a scale add to the latent of ``size``."""

    @abstractmethod
    def shrink(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """The summed latent at the size of the next scale, as the transformer reads it."""

    def encode(self, image_pm1: Tensor, schedule: ScaleSchedule, *, patch: int = 1) -> tuple[list[Tensor], Tensor]:
        """Indices of every scale, and the latent that they sum up to.

        Args:
            image_pm1: ``[B, 3, H, W]`` in [-1, 1].
            schedule: Grids of tokens.
            patch: Latents per token, along a side.

        Returns:
            ``[B, groups, h, w]`` of each scale (of latents), and ``[B, d, H', W']``.

        Raises:
            ValueError: The image is not of the schedule's size.
        """
        height, width = (patch * self.stride * side for side in schedule.last)
        if tuple(image_pm1.shape[1:]) != (3, height, width):
            raise ValueError(
                f"this schedule and tokenizer need images [B, 3, {height}, {width}]; got {list(image_pm1.shape)}"
            )
        return self.to_scales(self.features(image_pm1).float(), schedule, patch=patch)

    def to_scales(self, features: Tensor, schedule: ScaleSchedule, *, patch: int = 1) -> tuple[list[Tensor], Tensor]:
        """As ``encode``, from the latents before quantization; differentiable straight through."""
        size = (features.shape[-2], features.shape[-1])
        rest, total, indices = features, torch.zeros_like(features), []
        for scale, (height, width) in enumerate(schedule.grids):
            small = (height * patch, width * patch)
            there = rest if small == size else F.interpolate(rest, size=small, mode="area")
            found = self.nearest(there)
            indices.append(found)
            code = straight_through(self._normed(there), self.embed(found.movedim(1, -1)).movedim(-1, 1))
            added = self.spread(code, size, scale=scale, scales=len(schedule))
            total = total + added
            rest = rest - added.detach()
        return indices, total

    def _normed(self, latent: Tensor) -> Tensor:
        return latent


class BSQVAE(ScaleTokenizer):
    """Infinity's tokenizer: bits of a unit sphere, trilinear up, area down.

    Args:
        latent_dim: Bits of a code; 32 goes with the 2B model (``infinity_vae_d32reg.pth``), 14 with the 8B.
        channels: Width of the first level.
        multipliers: Width of each level over it.
        blocks: Residual blocks of a level in the encoder.

    Source: FoundationVision/Infinity, ``models/bsq_vae``; arXiv 2412.04431.
    """

    choices = 2

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 32,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4, 4),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.latent_dim, self.stride = latent_dim, 2 ** (len(multipliers) - 1)
        options: Any = {"nested": True, "attention": False}
        self.encoder = Encoder(channels, multipliers, blocks, latent_dim, **options)
        self.decoder = Decoder(channels, multipliers, blocks, latent_dim, **options)

    def features(self, image_pm1: Tensor) -> Tensor:
        """See the base class."""
        return self.encoder(image_pm1)

    def _decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent)

    def nearest(self, latent: Tensor) -> Tensor:
        """Bits ``[B, d, h, w]``."""
        return bits_of(latent)

    def embed(self, indices: Tensor) -> Tensor:
        """Codes of bits."""
        return codes_of(indices, self.latent_dim)

    def mean_code(self, probabilities: Tensor) -> Tensor:
        """Of two probabilities per bit: (2 p - 1) / sqrt(d)."""
        return codes_of(probabilities[..., 1], self.latent_dim)

    def spread(self, codes: Tensor, size: tuple[int, int], *, scale: int, scales: int) -> Tensor:
        """Trilinear, which is bilinear for one frame."""
        if tuple(codes.shape[-2:]) == tuple(size):
            return codes
        return F.interpolate(codes, size=size, mode="bilinear", align_corners=False)

    def shrink(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """Trilinear without antialiasing, in training and inference.

        Differs: the release's quantizer returns inputs shrunk by area, which nothing there trains on.
        """
        return F.interpolate(latent, size=size, mode="bilinear", align_corners=False)

    def _normed(self, latent: Tensor) -> Tensor:
        return F.normalize(latent, dim=1)


class _Phi(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * super().forward(x)


class _Phis(nn.Module):
    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_Phi(channels) for _ in range(count))

    def at(self, share: float) -> nn.Module:
        """The convolution whose tick lies nearest."""
        count = len(self.qresi_ls)
        ticks = np.linspace(1 / 3 / count, 1 - 1 / 3 / count, count)
        return self.qresi_ls[int(np.argmin(np.abs(ticks - share)))]


class _Codebook(nn.Module):
    def __init__(self, vocabulary: int, channels: int, scales: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, channels)
        self.quant_resi = _Phis(channels, 4)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(scales, vocabulary))


class VQVAE(ScaleTokenizer):
    """VAR's tokenizer: a codebook of 4096, bicubic up and one of four convolutions, area down.

    Args:
        vocabulary: Entries of the codebook.
        latent_dim: Channels of an entry.
        channels: Width of the first level.
        multipliers: Width of each level over it.
        blocks: Residual blocks of a level in the encoder.
        scales: Rows of the usage statistics that the published file holds.

    Source: FoundationVision/VAR, ``models/vqvae.py``, ``models/quant.py``; arXiv 2404.02905.
    """

    @register_to_config
    def __init__(
        self,
        vocabulary: int = 4096,
        latent_dim: int = 32,
        channels: int = 160,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        scales: int = 10,
    ) -> None:
        super().__init__()
        self.choices, self.latent_dim, self.stride = vocabulary, latent_dim, 2 ** (len(multipliers) - 1)
        options: Any = {"nested": False, "attention": True}
        self.encoder = Encoder(channels, multipliers, blocks, latent_dim, **options)
        self.decoder = Decoder(channels, multipliers, blocks, latent_dim, **options)
        self.quantize = _Codebook(vocabulary, latent_dim, scales)
        self.quant_conv = nn.Conv2d(latent_dim, latent_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 3, padding=1)

    def features(self, image_pm1: Tensor) -> Tensor:
        """See the base class."""
        return self.quant_conv(self.encoder(image_pm1))

    def _decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))

    def nearest(self, latent: Tensor) -> Tensor:
        """Indices ``[B, 1, h, w]`` of the nearest entries."""
        flat, entries = latent.movedim(1, -1).flatten(0, 2), self.quantize.embedding.weight.to(latent.dtype)
        distances = flat.square().sum(1, keepdim=True) + entries.square().sum(1) - 2 * flat @ entries.T
        return distances.argmin(1).view(latent.shape[0], 1, *latent.shape[-2:])

    def embed(self, indices: Tensor) -> Tensor:
        """Entries of the codebook."""
        return F.embedding(indices[..., 0], self.quantize.embedding.weight).float()

    def mean_code(self, probabilities: Tensor) -> Tensor:
        """Of probabilities over the codebook."""
        return probabilities[..., 0, :].float() @ self.quantize.embedding.weight.float()

    def spread(self, codes: Tensor, size: tuple[int, int], *, scale: int, scales: int) -> Tensor:
        """Bicubic, then the convolution of this place in the schedule; the last scale is not resampled."""
        if scale != scales - 1:
            codes = F.interpolate(codes, size=size, mode="bicubic", align_corners=False)
        phi = self.quantize.quant_resi.at(scale / max(1, scales - 1))
        return phi(codes.to(self.dtype)).float()

    def shrink(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """By area."""
        return F.interpolate(latent, size=size, mode="area")
