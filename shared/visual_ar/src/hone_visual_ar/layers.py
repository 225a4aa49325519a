"""Layers of the transformers, with the published names of their weights, and what one forward hands to attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import Rope, rotate

__all__ = [
    "FFN",
    "AttentionContext",
    "CrossAttention",
    "HeadNorm",
    "ScaleKVCache",
    "SelfAttention",
    "attend",
]

MAX_LOG_SCALE = math.log(100)


class ScaleKVCache:
    """Keys and values of the scales so far: one pair of buffers per layer, filled by slices.

    Args:
        layers: Blocks of the model.
        rows: Of the batch, both halves of guidance.
        heads: Of attention.
        capacity: Positions that are ever read again; the last scale's are not.
        dim: Of a head.
        device: Where.
        dtype: Of keys and values.

    Attributes:
        lengths: Positions that are filled, of each layer: methods may run other tokens in each.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, capacity: int, dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (rows, heads, capacity, dim)
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.capacity, self.lengths = capacity, [0] * layers

    def extend(self, layer: int, k: Tensor, v: Tensor, *, write: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with these behind them.

        Args:
            layer: Number of the block.
            k: ``[R, H, n, D]``; R may be less than the cache's rows, of which the first are then used.
            v: Likewise.
            write: Keep them. Without, they are put behind a copy that lives as long as this layer's attention.

        Raises:
            RuntimeError: They do not fit.
        """
        rows, begin = k.shape[0], self.lengths[layer]
        end = begin + k.shape[2]
        old_k, old_v = self.k[layer][:rows], self.v[layer][:rows]
        if not write:
            if begin == 0:
                return k, v
            return torch.cat([old_k[:, :, :begin], k], dim=2), torch.cat([old_v[:, :, :begin], v], dim=2)
        if end > self.capacity:
            raise RuntimeError(f"the cache holds {self.capacity} positions and cannot take {end}")
        old_k[:, :, begin:end] = k
        old_v[:, :, begin:end] = v
        self.lengths[layer] = end
        return old_k[:, :, :end], old_v[:, :, :end]

    @property
    def bytes(self) -> int:
        """Size of the buffers."""
        return sum(x.numel() * x.element_size() for x in (*self.k, *self.v))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionContext:
    """What the self-attention of every block of one forward is given.

    Attributes:
        rope: Rows of the tokens, None for a model with absolute positions.
        cache: Of the scales before; None where all scales run at once.
        write: Keep this scale's keys and values.
        mask: ``[..., tokens, keys]`` bool, True where a query reads a key; None: everything is read.
        ends: Where each scale ends, if all run at once: a scale reads itself and those before, which takes no mask.
        spread: ``[R, tokens of the scale]``, which token stands in for each position of the scale as key and value;
            None: positions that do not run are not read.
        rope_k: Rows of the positions under ``spread``.
    """

    rope: Rope | None = None
    cache: ScaleKVCache | None = None
    write: bool = True
    mask: Tensor | None = None
    ends: tuple[int, ...] = ()
    spread: Tensor | None = None
    rope_k: Rope | None = None


class SelfAttention(nn.Module):
    """Attention with normalised queries and keys and a learned temperature per head."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width must be heads times a multiple of 4; got width {width}, heads {heads}")
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def project(
        self, x: Tensor, rope: Rope | None, spread: Tensor | None, rope_k: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[R, H, n, D]`` of tokens ``[R, n, C]`` in the dtype of the weights.

        The other arguments are those of ``AttentionContext``.
        """
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = biased(self.mat_qkv, x, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q.float(), dim=-1) * self.scale_mul_1H11.float().clamp(max=MAX_LOG_SCALE).exp()
        k = F.normalize(k.float(), dim=-1)
        if spread is None:
            rope_k = rope
        else:
            index = spread[:, None, :, None].expand(-1, self.heads, -1, k.shape[-1])
            k, v = k.gather(2, index), v.gather(2, index)
        if rope is not None and rope_k is not None:
            q, k = rotate(q, rope), rotate(k, rope_k)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Attend; ``[R, n, C]`` to the same shape.

        Args:
            x: In the dtype of the weights.
            context: Of this forward.
            layer: Number of the block in the cache.
        """
        q, k, v = self.project(x, context.rope, context.spread, context.rope_k)
        return self.join(attend(q, k, v, context, layer))

    def join(self, out: Tensor) -> Tensor:
        """Tokens ``[R, n, C]`` of the heads' ``[R, H, n, D]``."""
        return self.proj(out.transpose(1, 2).flatten(2))


def biased(layer: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and a bias that it lacks; what took the layer's place, such as a LoRA, is called."""
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight, bias)
    return layer(x) + bias


def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layer: int) -> Tensor:
    """Self-attention ``[R, H, n, D]`` of one scale over the cache, or of all scales at once.

    Args:
        q: ``[R, H, n, D]``.
        k: Of this forward's tokens.
        v: Likewise.
        context: Of this forward.
        layer: Number of the block in the cache.
    """
    if context.cache is not None:
        k, v = context.cache.extend(layer, k, v, write=context.write)
    if not context.ends:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=1.0)
    parts = [
        F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=1.0)
        for begin, end in pairwise((0, *context.ends))
    ]
    return torch.cat(parts, dim=2)


class CrossAttention(nn.Module):
    """Attention to the text; with ``pool``, of one learned query, which makes a vector of it."""

    zero_k_bias: Tensor
    mat_q: Any

    def __init__(self, width: int, text: int, heads: int, *, pool: bool = False) -> None:
        super().__init__()
        self.heads = heads
        if pool:
            self.mat_q = nn.Parameter(torch.empty(1, heads, width // heads))
        else:
            self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(text, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[R, H, T, D]`` of a text, the same for every scale.

        Differs: the release computes them again at each scale.
        """
        bias = torch.cat([self.zero_k_bias, self.v_bias])
        kv = biased(self.mat_kv, text.to(self.v_bias.dtype), bias)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def query(self, x: Tensor) -> Tensor:
        """Queries ``[R, H, n, D]`` of tokens ``[R, n, C]``."""
        return self.mat_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, out: Tensor) -> Tensor:
        """Tokens ``[R, n, C]`` of the heads' ``[R, H, n, D]``."""
        return self.proj(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attend with queries ``[R, H, n, D]``."""
        return self.join(F.scaled_dot_product_attention(q, *keys, attn_mask=mask))


class FFN(nn.Module):
    """Two linear layers around a GELU by tanh."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens in and out."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class HeadNorm(nn.Module):
    """Modulated norm before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Tokens ``[R, n, C]`` by the rows' vectors, float32."""
        scale, shift = self.ada_lin(vector).view(-1, 1, 2, x.shape[-1]).unbind(2)
        return modulate(x, scale, shift)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A norm without weights in float32, times 1 + scale, plus shift."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (scale.float() + 1) + shift.float()
