"""Motion Anything: masks chosen by attention, and the two transformers that adapt to the condition. Pure torch.

Tokens stand on a grid of time and parts of the body, ``[B, T, P]``. Where the paper is silent, the choice is an
option of ``TransformerConfig`` or ``MotionAnythingConfig`` and called ours.

Source: Motion Anything (arXiv 2503.06955), algorithms 1 to 3 and the architecture figure of its page.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .conditions import Condition, check_tokens, check_weights
from .config import TransformerConfig

__all__ = [
    "Attention",
    "Condition",
    "MotionTransformer",
    "SpatialAligningTransformer",
    "TemporalAdaptiveTransformer",
    "attention_mask",
    "random_mask",
    "select",
]


# Algorithm 1: attention-based masking ------------------------------------------------------------------------------


def select(
    scores: Float[Tensor, "*rows n"], valid: Bool[Tensor, "*rows n"], ratio: float, lowest: bool = False
) -> Bool[Tensor, "*rows n"]:
    """The top ``ceil(ratio * valid)`` of each row; ties go to the first.

    Args:
        scores: Of each place.
        valid: Places that may be chosen.
        ratio: Share, in [0, 1].
        lowest: Choose the smallest in place of the largest.
    """
    count = torch.ceil(ratio * valid.sum(-1, keepdim=True) - 1e-4)
    ordered = scores if lowest else -scores
    rank = ordered.masked_fill(~valid, math.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < count) & valid


def attention_mask(
    temporal: Float[Tensor, "batch time"],
    spatial: Float[Tensor, "batch time parts"],
    valid: Bool[Tensor, "batch time"],
    alpha_time: float,
    alpha_parts: float,
) -> Bool[Tensor, "batch time parts"]:
    """Algorithm 1: the frames that attend most, whole, and in every other the parts that do.

    Source: Algorithm 1; the union of both masks is how its two steps follow each other in algorithms 2 and 3.
    """
    frames = select(temporal, valid, alpha_time)
    if spatial.shape[-1] == 1:  # whole frames have no parts to choose from
        return frames[..., None]
    parts = select(spatial, valid[..., None].expand_as(spatial), alpha_parts)
    return frames[..., None] | parts


def random_mask(
    valid: Bool[Tensor, "batch time"], parts: int, alpha_time: float, alpha_parts: float, generator: torch.Generator
) -> Bool[Tensor, "batch time parts"]:
    """As many frames and parts as ``attention_mask`` takes, at random: the ablation's first row."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=valid.device)

    return attention_mask(draw(*valid.shape), draw(*valid.shape, parts), valid, alpha_time, alpha_parts)


# The two transformers ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with a norm before, and a feed-forward layer after it; both add to the query.

    Args:
        width: Channels.
        heads: Of attention.
        hidden: Channels of the feed-forward layer.
        dropout: Of both.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width; got {heads} and {width}")
        self.heads, self.dropout = heads, dropout
        self.norm_q, self.norm_k = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
        """``[B, Q, D]`` and ``[B, K, D]``, keys where ``valid`` ``[B, K]``, to ``[B, Q, D]``."""
        normed = self.norm_k(key)
        mask = None if valid is None else valid[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            self._split(self.q(self.norm_q(query))),
            self._split(self.k(normed)),
            self._split(self.v(normed)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        query = query + self.out(mixed.transpose(-3, -2).flatten(-2))
        return query + self.feed(self.norm(query))

    def weights(self, query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attention ``[B, Q, K]``, the mean over heads."""
        q, k = self._split(self.q(self.norm_q(query))), self._split(self.k(self.norm_k(key)))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None, :], -math.inf)
        return logits.softmax(-1).mean(1)


def _told(condition: Tensor, valid: Tensor, music: bool) -> Tensor:
    """Rows of the condition ``[B, C]`` that are a motion's: the music up to its end, and the text."""
    heard = valid if music else valid[:, :0]
    return torch.cat([heard, valid.new_ones(len(valid), condition.shape[1] - heard.shape[1])], 1)


class TemporalAdaptiveTransformer(nn.Module):
    """Algorithm 2. Text: self-attention over condition and motion. Music, or both: motion asks the condition.

    With the paper's ``music_keys="condition"`` a motion's time steps do not see each other; ours,
    ``"condition_and_motion"``, lets them.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.music_keys = cfg.music_keys
        self.attention = Attention(cfg.width, cfg.heads, cfg.hidden, cfg.dropout)

    def forward(self, motion: Tensor, condition: Tensor, valid: Tensor, music: bool) -> Tensor:
        """Args are ``[B, T, P, D]``, ``[B, C, D]``, ``[B, T]`` and whether the condition holds music."""
        batch, _, parts, _ = motion.shape
        column = motion.transpose(1, 2).flatten(0, 1)
        given = condition.repeat_interleave(parts, 0)
        keys = column if not music else column[:, :0]
        if music and self.music_keys == "condition_and_motion":
            keys = column
        both = torch.cat([given, keys], 1)
        seen = torch.cat([_told(condition, valid, music), valid[:, : keys.shape[1]]], 1)
        seen = seen.repeat_interleave(parts, 0)
        # The rows of the condition are not needed further: only the motion goes on.
        out = self.attention(column, both, seen)
        return out.view(batch, parts, *column.shape[1:]).transpose(1, 2)

    def scores(self, motion: Tensor, condition: Tensor, valid: Tensor, music: bool, rows: str) -> Tensor:
        """How much each time step ``[B, T]`` is attended to. Algorithm 1: text Q = K = V = (C, M), else Q = C."""
        batch, time, parts, _ = motion.shape
        column = motion.transpose(1, 2).flatten(0, 1)
        given = condition.repeat_interleave(parts, 0)
        seen = valid.repeat_interleave(parts, 0)
        if music:
            asked = _told(condition, valid, music).repeat_interleave(parts, 0)[..., None]
            found = (self.attention.weights(given, column, seen) * asked).sum(1) / asked.sum(1)
        else:
            both = torch.cat([given, column], 1)
            all_seen = torch.cat([seen.new_ones(len(seen), given.shape[1]), seen], 1)
            weights = self.attention.weights(given if rows == "condition" else both, both, all_seen)
            if rows == "all":
                weights = weights * all_seen[..., None]
            found = weights[..., given.shape[1] :].mean(1)
        return found.view(batch, parts, time).mean(1)


class SpatialAligningTransformer(nn.Module):
    """Algorithm 3: within each time step, parts of the motion ask the condition.

    The condition of one time step is a text vector and, with music, that step's vector. One key would make the softmax
    constant, so it is turned into P keys: by P learned maps (``projected``), or by cutting its channels
    (``split_channels``). Ours, ``self_plus_condition``, adds the parts themselves to the keys.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.kind, self.parts = cfg.sat_condition, cfg.parts
        self.attention = Attention(cfg.width, cfg.heads, cfg.hidden, cfg.dropout)
        if self.kind == "split_channels":
            if cfg.width % cfg.parts:
                raise ValueError(f"split_channels needs a width that parts divide; got {cfg.width} and {cfg.parts}")
            self.keys = nn.Linear(cfg.width // cfg.parts, cfg.width)
        else:
            self.keys = nn.Linear(cfg.width, cfg.parts * cfg.width)

    def condition_keys(self, condition: Tensor) -> Tensor:
        """``[N, C, D]`` to ``[N, C P, D]``."""
        if self.kind == "split_channels":
            return self.keys(condition.unflatten(-1, (self.parts, -1))).flatten(1, 2)
        return self.keys(condition).unflatten(-1, (self.parts, -1)).flatten(1, 2)

    def forward(self, motion: Tensor, condition: Tensor) -> Tensor:
        """``[B, T, P, D]`` and ``[B, T, C, D]`` to ``[B, T, P, D]``."""
        row = motion.flatten(0, 1)
        keys = self.condition_keys(condition.flatten(0, 1))
        if self.kind == "self_plus_condition":
            keys = torch.cat([row, keys], 1)
        return self.attention(row, keys).view(motion.shape)

    def scores(self, motion: Tensor, condition: Tensor) -> Tensor:
        """How much the condition attends to each part ``[B, T, P]``. Algorithm 1, spatial: Q = C, K = V = M."""
        keys = self.condition_keys(condition.flatten(0, 1))
        return self.attention.weights(keys, motion.flatten(0, 1)).mean(1).view(motion.shape[:-1])


class Block(nn.Module):
    """TAT, then SAT, and the gate of the figure: the result times a linear map of the block's input.

    The linear map begins at one, since a product of small numbers would vanish (ours).
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.gate_kind = cfg.gate
        self.temporal, self.spatial = TemporalAdaptiveTransformer(cfg), SpatialAligningTransformer(cfg)
        if cfg.gate == "product":
            self.gate = nn.Linear(cfg.width, cfg.width)
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def forward(self, x: Tensor, condition: Tensor, by_frame: Tensor, valid: Tensor, music: bool) -> Tensor:
        """``[B, T, P, D]`` in and out."""
        out = self.spatial(self.temporal(x, condition, valid, music), by_frame)
        if self.gate_kind == "product":
            return out * self.gate(x)
        return x + out if self.gate_kind == "residual" else out


class MotionTransformer(nn.Module):
    """Masked-token model on a grid of time and parts: layers of TAT and SAT, one classifier for each part.

    Args:
        cfg: Sizes and options.

    Attributes:
        masking: What chooses the tokens to hide in training; None for MoMask's cosine ratio. ``attach`` sets it.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        # Two further ids of each part: masked, and padding.
        self.token_emb = nn.Embedding(cfg.parts * (cfg.codes + 2), cfg.width)
        self.time_emb = nn.Parameter(0.02 * torch.randn(cfg.max_tokens, 1, cfg.width))
        self.part_emb = nn.Parameter(0.02 * torch.randn(cfg.parts, cfg.width))
        self.text_in = nn.Linear(cfg.text_width, cfg.width)
        self.music_in = nn.Linear(cfg.music_width, cfg.width)
        self.no_text = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.no_music = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers // 2))
        self.norm = nn.LayerNorm(cfg.width)
        self.heads = nn.Parameter(torch.randn(cfg.parts, cfg.width, cfg.codes) / math.sqrt(cfg.width))
        self.masking: Any = None
        self.shift: Tensor
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.register_buffer("shift", torch.arange(cfg.parts) * (cfg.codes + 2), persistent=False)

    @property
    def mask_id(self) -> int:
        """Of a hidden token."""
        return self.cfg.codes

    @property
    def pad_id(self) -> int:
        """Of a token past the end."""
        return self.cfg.codes + 1

    def check(self, ids: Tensor, condition: Condition, valid: Tensor) -> None:
        """See that tokens, condition and time steps fit the model and each other; no call waits for the device.

        Raises:
            TypeError: A dtype is another.
            ValueError: A shape or a device is another.
        """
        cfg = self.cfg
        if ids.dim() != 3 or ids.shape[2] != cfg.parts or ids.shape[1] > cfg.max_tokens:
            raise ValueError(
                f"ids must be [batch, time, {cfg.parts}] of at most {cfg.max_tokens} time steps; got {list(ids.shape)}"
            )
        check_tokens(ids, valid)
        condition.check(len(ids), ids.device, cfg.text_width, cfg.music_width)

    def embed(self, ids: Int[Tensor, "batch time parts"]) -> Float[Tensor, "batch time parts width"]:
        """Tokens with the places of their time step and part."""
        return self.token_emb(ids + self.shift) + self.time_emb[: ids.shape[1]] + self.part_emb

    def given(self, condition: Condition, time: int) -> tuple[Tensor, Tensor, bool]:
        """The condition over time ``[B, C, D]``, at each step ``[B, T, c, D]``, and whether music is in it.

        Raises:
            ValueError: The music is shorter than the motion.
        """
        rows, by_frame = [], []
        if condition.music is not None:
            if condition.music.shape[1] < time:
                raise ValueError(
                    f"the music is shorter than the motion: {condition.music.shape[1]} of {time} time steps"
                )
            heard = self.music_in(condition.music[:, :time].to(self.no_music.dtype))
            if condition.no_music is not None:
                heard = torch.where(condition.no_music[:, None, None], self.no_music, heard)
            heard = heard + self.time_emb[:time, 0]
            rows.append(heard)
            by_frame.append(heard[:, :, None])
        if condition.text is not None:
            said = self.text_in(condition.text.to(self.no_text.dtype))
            if condition.no_text is not None:
                said = torch.where(condition.no_text[:, None], self.no_text, said)
            rows.append(said[:, None])
            by_frame.append(said[:, None, None].expand(-1, time, -1, -1))
        return torch.cat(rows, 1), torch.cat(by_frame, 2), condition.music is not None

    def forward(
        self, ids: Int[Tensor, "batch time parts"], condition: Condition, valid: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time parts codes"]:
        """Logits of every token; the condition is taken in the model's dtype."""
        self.check(ids, condition, valid)
        x = self.embed(ids)
        rows, by_frame, music = self.given(condition, ids.shape[1])
        for block in self.blocks:
            x = block(x, rows, by_frame, valid, music)
        return torch.einsum("btpd,pdc->btpc", self.norm(x), self.heads)

    @torch.no_grad()
    def scores(
        self,
        ids: Int[Tensor, "batch time parts"],
        condition: Condition,
        valid: Bool[Tensor, "batch time"],
        rows: str = "condition",
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time parts"]]:
        """Attention of the first block with the condition, on unmasked tokens, without a gradient (ours).

        ``rows`` says whose: the ``condition``'s, or of a text ``all`` queries'.
        """
        self.check(ids, condition, valid)
        check_weights(self.time_emb, ids.device)
        x = self.embed(ids)
        given, by_frame, music = self.given(condition, ids.shape[1])
        first = self.blocks[0]
        assert isinstance(first, Block)
        temporal = first.temporal.scores(x, given, valid, music, rows)
        return temporal, first.spatial.scores(x, by_frame)
