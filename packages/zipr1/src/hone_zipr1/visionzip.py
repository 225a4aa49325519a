"""VisionZip, for comparison: the vision tower's attention says which tokens go to the decoder, and others are merged.

Our re-implementation. ``merge_tokens`` does what the release does after a CLIP tower. The Qwen models' towers have no
class token whose attention could be looked at: as the paper says of such towers, what counts is the mean attention that
a token gets from all others. They fuse patches into a token of the decoder, whose attention and key are the means of
its patches'. Tokens keep their places and rotary positions; the release puts merged ones behind the others.

Source: Yang et al., VisionZip (CVPR 2025), sections 3.2 and 3.3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "CONTEXTUAL",
    "FAMILIES",
    "Zipped",
    "check_tower",
    "counts",
    "look",
    "merge_tokens",
    "received",
    "self_received",
    "zipped",
]

CONTEXTUAL = 10 / 64
"""Share of the kept tokens that others are merged into: of the release's 54 and 10."""
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Classes whose tower is understood."""
_PAIRS = 1 << 26
"""Attention weights that are held at a time."""


@dataclass
class Zipped:
    """What is known of visual tokens, in the order of the prompts.

    Attributes:
        received: per part (a picture, or a frame of a video) ``[tokens]``, attention that each token gets.
        metric: per part ``[tokens, dim]``, by which tokens are alike.
    """

    received: list[Tensor] = field(default_factory=list)
    metric: list[Tensor] = field(default_factory=list)

    def add(self, other: Zipped) -> None:
        """Go on with what another run of the tower said."""
        self.received += other.received
        self.metric += other.metric


def received(query: Float[Tensor, "heads tokens dim"], key: Float[Tensor, "heads tokens dim"], scale: float) -> Tensor:
    """``[tokens]``, attention that each token gets, mean over heads and over the tokens that attend; sums to 1."""
    heads, tokens, _ = query.shape
    total = torch.zeros(tokens, dtype=torch.float32, device=query.device)
    size = max(1, _PAIRS // (heads * tokens))
    for start in range(0, tokens, size):
        logits = query[:, start : start + size].float() @ key.float().transpose(-1, -2) * scale
        total += logits.softmax(-1).sum((0, 1))
    return total / (heads * tokens)


def self_received(features: Float[Tensor, "tokens dim"]) -> Tensor:
    """``received`` where a tower has no attention, as the tiny host's: the features' own likeness stands for it."""
    return received(features[None], features[None], features.shape[-1] ** -0.5)


def counts(tokens: int, share: float) -> tuple[int, int]:
    """How many tokens of a part stay as they are, and into how many the others are merged.

    Args:
        tokens: Of the part.
        share: Of them that is kept.
    """
    kept = min(tokens, max(1, round(share * tokens)))
    merged = int(CONTEXTUAL * kept)
    return kept - merged, merged


def merge_tokens(
    features: Float[Tensor, "batch tokens channels"],
    received: Float[Tensor, "batch tokens"],
    metric: Float[Tensor, "batch tokens dim"],
    dominant: int,
    contextual: int,
) -> tuple[Bool[Tensor, "batch tokens"], Float[Tensor, "batch tokens channels"]]:
    """Keep the tokens that get most attention, and merge each other one into the likest of a few at even distances.

    Args:
        features: What the decoder would be given.
        received: Attention that each token gets.
        metric: Keys, mean over heads.
        dominant: Tokens that are kept for their attention.
        contextual: Tokens among the others that the rest is merged into.

    Returns:
        Which tokens are kept, and the features, those of contextual tokens with the mean of what joined them added.
    """
    batch, tokens, channels = features.shape
    keep = torch.zeros(batch, tokens, dtype=torch.bool, device=features.device)
    keep = keep.scatter(1, received.topk(dominant, -1).indices, True)
    left = tokens - dominant
    if not contextual:
        return keep, features
    rest = (~keep).nonzero()[:, 1].view(batch, left)
    at = torch.arange(0, left, max(1, left // contextual), device=features.device)[:contextual]
    is_target = torch.zeros(left, dtype=torch.bool, device=features.device).index_fill(0, at, True)
    targets, others = rest[:, is_target], rest[:, ~is_target]
    unit = F.normalize(metric, dim=-1)
    likeness = _rows(unit, others) @ _rows(unit, targets).transpose(-1, -2)
    joins = F.one_hot(likeness.argmax(-1), contextual).to(features.dtype)  # [B, others, contextual]
    mean = joins.transpose(-1, -2) @ _rows(features, others) / joins.sum(1).clamp(min=1)[..., None]
    features = features.scatter_add(1, targets[..., None].expand(-1, -1, channels), mean)
    return keep.scatter(1, targets, True), features


def _rows(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def zipped(
    embeds: Float[Tensor, "batch tokens channels"],
    visual: Bool[Tensor, "batch tokens"],
    real: Bool[Tensor, "batch tokens"],
    ratio: float,
    known: Zipped | None,
) -> tuple[Bool[Tensor, "batch tokens"], Float[Tensor, "batch tokens channels"]]:
    """Which tokens of prompts are kept, all text among them, and the embeddings with merged tokens.

    Args:
        embeds: Of the prompts.
        visual: Which show something.
        real: Where tokens are.
        ratio: Share of each prompt that is kept, text counted; a part keeps a token at least.
        known: What the tower said. None: it has no attention, and each prompt is one part.

    Raises:
        ValueError: The tower spoke of other tokens.
    """
    keep, embeds = real & ~visual, embeds.clone()
    sizes = visual.sum(-1).tolist() if known is None else [len(part) for part in known.received]
    if sum(sizes) != int(visual.sum()):
        raise ValueError(f"the vision tower gave {sum(sizes)} tokens, and the prompts hold {int(visual.sum())}")
    wanted = (ratio * real.sum(-1)).ceil() - keep.sum(-1)
    shares = (wanted / visual.sum(-1).clamp(min=1)).clamp(0, 1).tolist()
    rows, places = visual.nonzero(as_tuple=True)
    first = 0
    for part, size in enumerate(sizes):
        if not size:
            continue
        row, at = int(rows[first]), places[first : first + size]
        mine = embeds[row, at]
        if known is None:
            gets, metric = self_received(mine), mine
        else:
            gets, metric = known.received[part], known.metric[part]
        found, mine = merge_tokens(mine[None], gets[None], metric[None], *counts(size, shares[row]))
        keep[row, at], embeds[row, at] = found[0], mine[0]
        first += size
    return keep, embeds


def look(tower: Any, attention: Any, states: Tensor, told: dict[str, Any], grid: Tensor, found: Zipped) -> None:
    """Add to ``found`` what the last attention of a Qwen tower looks at.

    Args:
        tower: The vision tower.
        attention: Of its last block.
        states: ``[patches, channels]``, what the attention is given.
        told: With ``cu_seqlens``, the ends of the pieces that attend apart, and ``position_embeddings``.
        grid: ``[pictures, 3]``, patches in time, height and width.
        found: To add to.
    """
    cos, sin = (table[:, None].float() for table in told["position_embeddings"])
    query, key, _ = attention.qkv(states).view(len(states), 3, attention.num_heads, -1).unbind(1)  # [patches, H, D]
    # As the release: keys before what places them.
    metric = key.float().mean(1)
    query, key = (_rotated(x.float(), cos, sin).transpose(0, 1) for x in (query, key))
    gets, ends = torch.zeros(len(states), device=states.device), told["cu_seqlens"].tolist()
    for start, stop in itertools.pairwise(ends):
        gets[start:stop] = received(query[:, start:stop], key[:, start:stop], attention.scaling)
    merge = tower.spatial_merge_size**2
    gets, metric = gets.view(-1, merge).mean(1), metric.view(len(gets) // merge, merge, -1).mean(1)
    if getattr(tower, "window_size", None):
        # A tower with windows has put the tokens in their order, and takes them back after its last block.
        from transformers.vision_utils import get_vision_window_index

        moved, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        order = moved.to(gets.device).argsort()
        gets, metric = gets[order], metric[order]
    sizes = [each for time, height, width in grid.tolist() for each in [height * width // merge] * time]
    found.received += gets.split(sizes)
    found.metric += metric.split(sizes)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def check_tower(model_type: str) -> None:
    """Refuse a class whose tower is not understood.

    Raises:
        ValueError: It is none of ``FAMILIES``.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"the policy visionzip knows the vision towers of {', '.join(FAMILIES)}; got {model_type}. Choose another "
            "policy"
        )
