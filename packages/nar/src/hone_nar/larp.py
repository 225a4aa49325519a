"""LARP's video tokenizer under its published names: a clip to a row of learned tokens and back.

A token is no place in the clip: 1024 learned queries read the whole of it, and NAR lays their row out as 4 x 16 x 16.

Source: hywang66/LARP, as the release of NAR carries it; arXiv 2410.21264.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["LARPTokenizer", "sincos"]


def sincos(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines ``[N, dim]`` of places ``[N]``, in float64."""
    frequency = 10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = places.double()[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], 1)


def _grid(frames: int, side: int, dim: int) -> Tensor:
    """``[1, frames * side * side, dim]``: column beside row, plus time."""
    steps = torch.arange(side)
    column = sincos(steps, dim // 2)[None, :, :].expand(side, -1, -1)
    row = sincos(steps, dim // 2)[:, None, :].expand(-1, side, -1)
    time = sincos(torch.arange(frames), dim)[:, None, None]
    return (torch.cat([column, row], -1)[None] + time).flatten(0, 2)[None].float()


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps), _Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), _MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Encoder(nn.Module):
    """Blocks over context and queries, of which the queries come out."""

    def __init__(self, dim: int, depth: int, heads: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, heads, eps) for _ in range(depth))

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        x = torch.cat([context, query], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, -query.shape[1] :]


class _Patches(nn.Module):
    def __init__(self, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Regularizer(nn.Module):
    def __init__(self, entries: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, channels)


class _Bottleneck(nn.Module):
    def __init__(self, dim: int, channels: int, entries: int) -> None:
        super().__init__()
        self.in_linear, self.out_linear = nn.Linear(dim, channels), nn.Linear(channels, dim)
        self.regularizer = _Regularizer(entries, channels)

    def entries(self) -> Tensor:
        return F.normalize(self.regularizer.embedding.weight.float(), dim=-1)


class _Final(nn.Module):
    def __init__(self, dim: int, pixels: int) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class LARPTokenizer(ModelMixin, ConfigMixin):
    """Clips to codes and back; defaults are LARP-L-long's.

    Args:
        frames: Of a clip.
        size: Side of a clip in pixels.
        patch: Frames, rows and columns of a patch.
        tokens: Codes of a clip.
        dim: Channels.
        depth: Blocks of encoder and decoder, each.
        heads: Of attention.
        codebook_size: Entries.
        bottleneck_dim: Channels of an entry; entries and latents are put on the unit sphere.
        norm_eps: Of the blocks' norms. The release takes what its timm has: 1e-5, and 1e-6 in those of 2025.
    """

    @register_to_config
    def __init__(
        self,
        frames: int = 16,
        size: int = 128,
        patch: Sequence[int] = (4, 8, 8),
        tokens: int = 1024,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        codebook_size: int = 8192,
        bottleneck_dim: int = 16,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        deep, tall, wide = patch
        self.patch, self.shape = (deep, tall, wide), (3, frames, size, size)
        if frames % deep or size % tall or tall != wide:
            raise ValueError(f"a clip of {frames} x {size} x {size} is no multiple of square patches {self.patch}")
        self.choices = codebook_size
        self.sides = (frames // deep, size // tall, size // wide)
        place = _grid(self.sides[0], self.sides[1], dim)
        self.x_embedder = _Patches(dim, self.patch)
        self.encoder, self.decoder = (_Encoder(dim, depth, heads, norm_eps) for _ in range(2))
        self.bottleneck = _Bottleneck(dim, bottleneck_dim, codebook_size)
        self.final_layer = _Final(dim, 3 * math.prod(patch))
        self.encoder_latent_query_embed = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.decoder_patch_query_token_type_embed = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("encoder_patch_pe", place)
        self.register_buffer("decoder_patch_query_embed", place.clone())
        self.register_buffer("decoder_latent_pe", sincos(torch.arange(tokens), dim)[None].float())

    def encode(self, clip_01: Tensor) -> Tensor:
        """Codes ``[B, tokens]`` of clips ``[B, 3, F, H, W]`` in [0, 1].

        Raises:
            ValueError: The clips are of another size.
            RuntimeError: Latents are not finite.
        """
        if tuple(clip_01.shape[1:]) != self.shape:
            raise ValueError(f"expected clips [B, {', '.join(map(str, self.shape))}]; got {list(clip_01.shape)}")
        x = self.x_embedder(clip_01.to(self.dtype)) + self.encoder_patch_pe
        query = self.encoder_latent_query_embed.expand(len(x), -1, -1)
        latent = self.bottleneck.in_linear(self.encoder(x, query)).float()
        if not bool(latent.isfinite().all()):
            raise RuntimeError(
                f"the tokenizer's latents are not finite in {self.dtype}; take float32, or look at weights and input"
            )
        return (F.normalize(latent, dim=-1) @ self.bottleneck.entries().T).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Clips ``[B, 3, F, H, W]`` in [0, 1], clamped, of codes ``[B, tokens]``.

        Raises:
            ValueError: The codes are of another number, or out of range.
        """
        if codes.ndim != 2 or codes.shape[1] != self.config.tokens:
            raise ValueError(f"expected codes [B, {self.config.tokens}]; got {list(codes.shape)}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.choices:
            raise ValueError(f"codes must lie in 0 to {self.choices - 1}; got {low} to {high}")
        latent = self.bottleneck.out_linear(F.embedding(codes, self.bottleneck.entries()).to(self.dtype))
        query = self.decoder_patch_query_embed + self.decoder_patch_query_token_type_embed
        x = self.final_layer(self.decoder(latent + self.decoder_latent_pe, query.expand(len(codes), -1, -1)))
        x = x.unflatten(1, self.sides).unflatten(-1, (*self.patch, 3))
        # [B, t, h, w, pt, p1, p2, c] to [B, c, t pt, h p1, w p2].
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(codes), *self.shape).clamp(0, 1)
