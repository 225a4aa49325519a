"""VAR: a class-to-image transformer over scales of codebook entries, with the published names of its weights.

Source: FoundationVision/VAR, ``models/var.py``, ``models/basic_var.py``; arXiv 2404.02905.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where pipelines look how to load the class
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .layers import FFN, AttentionContext, HeadNorm, SelfAttention, modulate
from .schedules import VAR_256, VAR_512, ScaleSchedule
from .transformer import Condition, NextScaleTransformer, init_linears, start_small

__all__ = ["VAR", "VAR_SIZES", "VARBlock"]

VAR_SIZES: dict[str, dict[str, Any]] = {
    **{f"var_d{depth}": {"depth": depth} for depth in (16, 20, 24, 30)},
    "var_d36": {"depth": 36, "shared_aln": True, "patch_nums": tuple(h for h, _ in VAR_512.grids)},
}
"""Published sizes; d16 to d30 draw 256 px, d36 512 px."""


class VARBlock(nn.Module):
    """Self-attention and feed-forward, modulated by the class."""

    def __init__(self, width: int, heads: int, *, shared: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ffn = FFN(width, 4 * width)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    @property
    def dtype(self) -> torch.dtype:
        """What linear layers are given; that of their weights may be another, where they are quantised."""
        return self.attn.q_bias.dtype

    def modulation(self, condition: Condition) -> tuple[Tensor, ...]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2; each ``[R, 1, C]`` float32."""
        if condition.modulation is not None:
            return (self.ada_gss.float() + condition.modulation).unbind(2)
        vector = condition.vector.to(self.dtype)
        return self.ada_lin(vector).float().view(-1, 1, 6, self.attn.proj.out_features).unbind(2)

    def self_attend(self, x: Tensor, parts: tuple[Tensor, ...], context: AttentionContext, number: int) -> Tensor:
        """What self-attention adds, float32."""
        gamma1, _, scale1, _, shift1, _ = parts
        h = modulate(x, scale1, shift1).to(self.dtype)
        return gamma1 * self.attn(h, context, number).float()

    def feed_forward(self, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """What the feed-forward adds, float32."""
        _, gamma2, _, scale2, _, shift2 = parts
        h = modulate(x, scale2, shift2).to(self.dtype)
        return gamma2 * self.ffn(h).float()

    def forward(self, x: Tensor, condition: Condition, context: AttentionContext, number: int) -> Tensor:
        """Tokens ``[R, n, C]`` in and out, float32."""
        parts = self.modulation(condition)
        x = x + self.self_attend(x, parts, context, number)
        return x + self.feed_forward(x, parts)


class VAR(NextScaleTransformer):
    """The transformer; its width is 64 times its depth, and a head has 64 channels.

    Args:
        depth: Blocks, and heads.
        patch_nums: Side of each scale; positions are learned for these.
        shared_aln: One modulation for all blocks, as in d36.
        vocabulary: Entries of the codebook.
        code_dim: Channels of an entry.
        num_classes: Classes; the next number is the unconditional one.
        head_dim: Channels of a head.
    """

    groups = 1
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "pos_start", "pos_1LC", "word_embed", "class_emb", "lvl_embed", "shared_ada_lin", "head_nm", "head"
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        depth: int = 16,
        patch_nums: Sequence[int] = tuple(h for h, _ in VAR_256.grids),
        shared_aln: bool = False,
        vocabulary: int = 4096,
        code_dim: int = 32,
        num_classes: int = 1000,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        width = head_dim * depth
        self.choices, self.token_dim = vocabulary, code_dim
        self.schedule = ScaleSchedule(tuple((side, side) for side in patch_nums))
        self.pos_start = nn.Parameter(torch.empty(1, self.schedule.tokens(0), width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.schedule.total, width))
        self.word_embed = nn.Linear(code_dim, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.lvl_embed = nn.Embedding(len(self.schedule), width)
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(VARBlock(width, depth, shared=shared_aln) for _ in range(depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, vocabulary)
        std = (1 / width / 3) ** 0.5
        init_linears(self, std)
        start_small(self.layers, self.head)
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.trunc_normal_(self.pos_1LC, std=std)
        self._start(width)

    def _start(self, width: int) -> None:
        shared: list[Any] = [self.shared_ada_lin[1]] if self.config.shared_aln else []
        head: Any = self.head_nm.ada_lin[1]
        with torch.no_grad():
            for layer in shared or [block.ada_lin[1] for block in self.layers]:
                layer.weight[2 * width :].mul_(0.5)
                layer.weight[: 2 * width].mul_(1e-5)
            head.weight.mul_(0.5)
            for block in self.layers if shared else ():
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(1e-5)

    @property
    def layers(self) -> list[Any]:
        """See the base class."""
        return list(self.blocks)

    @property
    def heads(self) -> int:
        """See the base class."""
        return self.config.depth

    @property
    def width(self) -> int:
        """See the base class."""
        return self.config.depth * self.config.head_dim

    @property
    def derived(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the published files that follow from the schedule: level of each token, mask of training."""
        total = self.schedule.total
        return {"lvl_1L": (1, total), "attn_bias_for_masking": (1, 1, total, total)}

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """See the base class.

        Raises:
            ValueError: It is another than that of the weights.
        """
        if schedule.grids != self.schedule.grids:
            sides = ", ".join(str(height) for height, _ in self.schedule.grids)
            raise ValueError(f"this VAR has learned positions of the scales {sides}; got {list(schedule.grids)}")

    @apply_forward_hook
    def condition(self, classes: Tensor, *, guided: bool = True) -> Condition:
        """Read classes.

        Args:
            classes: ``[B]`` int64, at most the unconditional one.
            guided: Add an unconditional row for each.

        Raises:
            ValueError: There is no such class.
        """
        last = self.config.num_classes
        if classes.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"classes must be whole numbers, int64 or int32; got {classes.dtype}")
        if classes.ndim != 1 or bool(((classes < 0) | (classes > last)).any()):
            raise ValueError(f"classes must be [B] of 0 to {last} ({last} is unconditional); got {classes.tolist()}")
        images = len(classes)
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, last)])
        vector = self.class_emb(classes.to(self.class_emb.weight.device)).float()
        modulation = self.shared_ada_lin(vector).unflatten(-1, (1, 6, -1)) if self.config.shared_aln else None
        return Condition(vector=vector, modulation=modulation, images=images)

    def _positions(self, scale: int) -> Tensor:
        begin = self.schedule.start(scale)
        return self.lvl_embed.weight[scale] + self.pos_1LC[:, begin : begin + self.schedule.tokens(scale)]

    def begin(self, condition: Condition, schedule: ScaleSchedule) -> Tensor:
        """See the base class."""
        return condition.vector[:, None] + self.pos_start + self._positions(0)

    def embed(self, codes: Tensor, scale: int, schedule: ScaleSchedule) -> Tensor:
        """See the base class."""
        return self.word_embed(codes.float()) + self._positions(scale)

    def logits(self, hidden: Tensor, condition: Condition) -> Tensor:
        """See the base class."""
        return self.head(self.head_nm(hidden, condition.vector[: hidden.shape[0]]))[:, :, None]

    def guide(self, conditional: Tensor, unconditional: Tensor, strength: float, share: float) -> Tensor:
        """Strength grows along the schedule from 0; ``1 + t`` and ``-t`` weigh the rows."""
        t = strength * share
        return (1 + t) * conditional - t * unconditional
