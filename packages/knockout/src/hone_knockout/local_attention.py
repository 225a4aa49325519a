"""Attention within a frame without a mask: VT-K that does less work.

Under VT-K a frame reads the text before the video and itself. Where frames are equally long and follow each other, that
is a batch of short causal attentions over (prefix, frame), which any fused kernel computes; no pair between frames is
touched, and no mask exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["RegularFrames", "frame_local_attention", "regular_frames"]


class RegularFrames(NamedTuple):
    """A sequence of prefix text, ``frames`` frames of ``tokens`` tokens, and any text after."""

    prefix: int
    frames: int
    tokens: int


def regular_frames(layouts: Any) -> RegularFrames | None:
    """The common regular layout of a batch of prompts, or None.

    Args:
        layouts: ``TokenLayout`` of each row.
    """
    found = set()
    for layout in layouts:
        counts = layout.tokens_per_frame
        start, stop = layout.spans["video"]
        if len(set(counts)) != 1 or stop - start != sum(counts) or not bool(layout.real.all()):
            return None
        found.add(RegularFrames(start, len(counts), counts[0]))
    return found.pop() if len(found) == 1 else None


def frame_local_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads_k tokens dim"],
    value: Float[Tensor, "batch heads_k tokens dim"],
    where: RegularFrames,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Causal attention in which no frame reads another: VT-K, exactly.

    Args:
        query: Of the whole prompt.
        key: ``heads`` is a multiple of ``heads_k``.
        value: Like ``key``.
        where: The frames.
        scale: Of the logits; ``dim ** -0.5`` if None.

    Returns:
        What masked attention over ``blocked_pairs("VT", frame)`` gives.

    Raises:
        ValueError: Keys or values are not those of the queries' positions, or the frames do not fit.
    """
    # This imports dynamo, which takes seconds.
    from torch.nn.attention.bias import causal_lower_right

    batch, heads, tokens, dim = query.shape
    heads_k = key.shape[1]
    prefix, frames, each = where
    end = prefix + frames * each
    if key.shape != (batch, heads_k, tokens, dim) or value.shape[:3] != key.shape[:3] or heads % heads_k:
        raise ValueError(
            "expected a key and a value per query, and heads that are a multiple of theirs; got query "
            f"{list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}. Cut a cache to the prompt first"
        )
    if end > tokens:
        raise ValueError(f"{frames} frames of {each} tokens after {prefix} end at {end}; there are {tokens} tokens")
    gqa: dict[str, Any] = {"enable_gqa": heads != heads_k}
    parts = []
    if prefix:
        before = slice(0, prefix)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, before], key[:, :, before], value[:, :, before], is_causal=True, scale=scale, **gqa
            )
        )

    def by_frame(x: Tensor) -> Tensor:
        """``[B, H, N * t, D]`` to ``[B * N, H, t, D]``."""
        x = x[:, :, prefix:end].unflatten(2, (frames, each)).transpose(1, 2)
        return x.reshape(batch * frames, x.shape[2], each, dim)

    def with_prefix(x: Tensor) -> Tensor:
        """Keys of each frame after those of the prefix, heads repeated for the queries: ``[B * N, H, P + t, D]``."""
        own = by_frame(x)
        if prefix:
            shared = x[:, None, :, :prefix].expand(batch, frames, heads_k, prefix, dim).flatten(0, 1)
            own = torch.cat([shared, own], 2)
        return own.repeat_interleave(heads // heads_k, 1)

    inside = F.scaled_dot_product_attention(
        by_frame(query),
        with_prefix(key),
        with_prefix(value),
        attn_mask=causal_lower_right(each, prefix + each),
        scale=scale,
    )
    inside = inside.unflatten(0, (batch, frames)).transpose(1, 2).reshape(batch, heads, frames * each, dim)
    parts.append(inside)
    if end < tokens:
        after = query[:, :, end:]
        groups = heads // heads_k
        parts.append(
            F.scaled_dot_product_attention(
                after,
                key.repeat_interleave(groups, 1),
                value.repeat_interleave(groups, 1),
                attn_mask=causal_lower_right(tokens - end, tokens),
                scale=scale,
            )
        )
    return torch.cat(parts, 2)
