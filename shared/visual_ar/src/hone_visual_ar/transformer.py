"""What Infinity and VAR have in common: scales in, logits out, and the condition that a prompt or class becomes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .layers import AttentionContext, ScaleKVCache
from .rope import Rope
from .schedules import ScaleSchedule

if TYPE_CHECKING:
    from .generation import Policy

__all__ = ["Condition", "NextScaleTransformer", "Observe", "scale_mask"]

Observe = Callable[[int, Tensor, Tensor], None]
"""Called after each block with its number and its tokens ``[R, n, C]`` before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What the transformer knows of prompts or classes, once per image and not per scale.

    Attributes:
        vector: ``[R, C]``; R is the images, twice that under guidance, conditional rows first.
        modulation: ``[R, 1, 6, C]`` of a shared AdaLN; None where each block makes its own.
        keys: Cross-attention's keys and values ``[R, H, T, D]`` of each block; empty without text.
        mask: ``[R, 1, 1, T]`` bool, True at words; None where no row is padded.
        images: Of the batch.
    """

    vector: Tensor
    modulation: Tensor | None = None
    keys: tuple[tuple[Tensor, Tensor], ...] = ()
    mask: Tensor | None = None
    images: int

    @property
    def rows(self) -> int:
        """Rows that the transformer runs."""
        return self.vector.shape[0]

    @property
    def guided(self) -> bool:
        """Whether each image has an unconditional row too."""
        return self.rows == 2 * self.images

    def conditional(self) -> Condition:
        """Without the unconditional rows."""
        n = self.images
        return replace(
            self,
            vector=self.vector[:n],
            modulation=None if self.modulation is None else self.modulation[:n],
            keys=tuple((k[:n], v[:n]) for k, v in self.keys),
            mask=None if self.mask is None else self.mask[:n],
        )


class NextScaleTransformer(ModelMixin, ConfigMixin):
    """A transformer that predicts one scale of an image after the other.

    Attributes:
        policy: What runs of each scale, set by a method's ``attach``; None: everything.
    """

    policy: Policy | None = None
    patch = 1
    """Latents per token, along a side."""
    groups: int
    """Choices of a token: bits, or 1."""
    choices: int
    token_dim: int
    """Channels of a token's code."""

    @property
    @abstractmethod
    def layers(self) -> list[Any]:
        """Blocks, from first to last."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Of self-attention."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a token."""

    @abstractmethod
    def begin(self, condition: Condition, schedule: ScaleSchedule) -> Tensor:
        """Tokens ``[R, L_0, C]`` of the first scale, float32."""

    @abstractmethod
    def embed(self, codes: Tensor, scale: int, schedule: ScaleSchedule) -> Tensor:
        """Tokens ``[B, L, C]`` of a later scale from the latent's tokens ``[B, L, d]``, float32."""

    @abstractmethod
    def guide(self, conditional: Tensor, unconditional: Tensor, strength: float, share: float) -> Tensor:
        """Logits under guidance; ``share`` is the scale's place in the schedule, in [0, 1]."""

    def rope(self, schedule: ScaleSchedule) -> Rope | None:
        """Rotary table of a schedule; None where positions are added."""
        return None

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """Refuse a schedule that the weights are not for.

        Raises:
            ValueError: It is one.
        """

    @property
    def body_dtype(self) -> torch.dtype:
        """Dtype of the blocks; the rest of the model is float32."""
        return next(self.layers[0].parameters()).dtype

    def to_body_dtype(self, dtype: torch.dtype) -> NextScaleTransformer:
        """Put the blocks into a dtype; embeddings, modulation and head stay float32, as in the releases."""
        for block in self.layers:
            block.to(dtype)
        return self

    def new_cache(self, condition: Condition, schedule: ScaleSchedule, *, capacity: int | None = None) -> ScaleKVCache:
        """An empty cache for all scales but the last, which nothing reads again."""
        size = schedule.start(len(schedule) - 1) if capacity is None else capacity
        device, dim = condition.vector.device, self.width // self.heads
        return ScaleKVCache(
            len(self.layers), condition.rows, self.heads, size, dim, device=device, dtype=self.body_dtype
        )

    def run_blocks(
        self, x: Tensor, condition: Condition, context: AttentionContext, *, observe: Observe | None = None
    ) -> Tensor:
        """All blocks on tokens ``[R, n, C]``."""
        for number, block in enumerate(self.layers):
            after = block(x, condition, context, number)
            if observe is not None:
                observe(number, x, after)
            x = after
        return x

    @abstractmethod
    def logits(self, hidden: Tensor, condition: Condition) -> Tensor:
        """Logits ``[R, n, groups, choices]`` of the blocks' output, float32."""

    def forward(
        self,
        condition: Condition,
        inputs: Tensor,
        schedule: ScaleSchedule,
        *,
        mask: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Teacher-forced: logits of all scales at once, each scale seeing itself and those before.

        Args:
            condition: Of the rows.
            inputs: ``[R, total - L_0, d]``, the summed latent at each scale but the first.
            schedule: Scales.
            mask: ``[..., total, total]`` bool of pairs that are read besides; for reference only.
            observe: See ``Observe``.

        Returns:
            ``[R, total, groups, choices]``.
        """
        self.check_schedule(schedule)
        parts = [self.begin(condition, schedule)]
        for scale in range(1, len(schedule)):
            begin = schedule.start(scale) - schedule.tokens(0)
            parts.append(self.embed(inputs[:, begin : begin + schedule.tokens(scale)], scale, schedule))
        x = torch.cat(parts, dim=1)
        if mask is None:
            ends = tuple(schedule.start(scale + 1) for scale in range(len(schedule)))
            context = AttentionContext(rope=self.rope(schedule), ends=ends)
        else:
            context = AttentionContext(rope=self.rope(schedule), mask=scale_mask(schedule, x.device) & mask)
        return self.logits(self.run_blocks(x, condition, context, observe=observe), condition)


def scale_mask(schedule: ScaleSchedule, device: torch.device | str) -> Tensor:
    """``[total, total]`` bool: a token reads its own scale and those before."""
    counts = torch.tensor([schedule.tokens(k) for k in range(len(schedule))])
    level = torch.repeat_interleave(torch.arange(len(schedule)), counts).to(device)
    return level[:, None] >= level[None, :]


def init_linears(model: nn.Module, std: float) -> None:
    """Start weights of linear layers and embeddings: truncated normal, biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def start_small(blocks: list[Any], head: nn.Linear) -> None:
    """Start each residual branch near zero and the logits near even."""
    with torch.no_grad():
        for block in blocks:
            attention = block.sa if hasattr(block, "sa") else block.attn
            for layer in (attention.proj, block.ffn.fc2):
                layer.weight.div_((2 * len(blocks)) ** 0.5)
        head.weight.mul_(0.02)
