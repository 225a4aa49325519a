"""Infinity: a text-to-image transformer over scales of bits, with the published names of its weights.

Source: FoundationVision/Infinity, ``models/infinity.py``, ``models/basic.py``; arXiv 2412.04431.
Differs: text keys are made once per image; rows of unequal length are padded and masked in place of packed; the
    residual stream is float32 throughout where the release's becomes so after the first block's cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where pipelines look how to load the class
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .layers import FFN, AttentionContext, CrossAttention, HeadNorm, SelfAttention, attend, modulate
from .rope import Rope, rope_table
from .schedules import ScaleSchedule
from .transformer import Condition, NextScaleTransformer, init_linears, start_small

__all__ = ["INFINITY_SIZES", "Infinity", "InfinityBlock"]

MAX_LEVELS = 15

INFINITY_SIZES: dict[str, dict[str, Any]] = {
    "infinity_layer12": {"depth": 12, "width": 768, "num_heads": 8, "chunks": 4, "code_dim": 16},
    "infinity_layer16": {"depth": 16, "width": 1152, "num_heads": 12, "chunks": 4, "code_dim": 32},
    "infinity_layer24": {"depth": 24, "width": 1536, "num_heads": 16, "chunks": 4, "code_dim": 32},
    "infinity_layer32": {"depth": 32, "width": 2080, "num_heads": 20, "chunks": 4, "code_dim": 32},
    "infinity_layer40": {"depth": 40, "width": 2688, "num_heads": 24, "chunks": 4, "code_dim": 32},
    "infinity_layer48": {"depth": 48, "width": 3360, "num_heads": 28, "chunks": 4, "code_dim": 32},
    "infinity_2b": {"depth": 32, "width": 2048, "num_heads": 16, "chunks": 8, "code_dim": 32},
    "infinity_8b": {
        "depth": 40, "width": 3584, "num_heads": 28, "chunks": 8, "code_dim": 14, "patchify": True
    },
}  # fmt: skip
"""The release's model types. Weights are public of the 2B, the 8B and layer12 (the 125M)."""


class InfinityBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated by the text's vector."""

    COMPILED = ("before", "project", "between", "after", "almost")
    """What ``compile_around`` compiles."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.sa = SelfAttention(width, heads)
        self.ca = CrossAttention(width, width, heads)
        self.ffn = FFN(width, hidden)
        self.ca_norm = nn.LayerNorm(width, eps=1e-6)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    @property
    def dtype(self) -> torch.dtype:
        """What linear layers are given; that of their weights may be another, where they are quantised."""
        return self.ada_gss.dtype

    def modulation(self, condition: Condition) -> tuple[Tensor, ...]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2; each ``[R, 1, C]`` float32."""
        assert condition.modulation is not None
        return (self.ada_gss.float() + condition.modulation).unbind(2)

    def self_attend(self, x: Tensor, parts: tuple[Tensor, ...], context: AttentionContext, number: int) -> Tensor:
        """What self-attention adds, float32."""
        gamma1, _, scale1, _, shift1, _ = parts
        h = modulate(x, scale1, shift1).to(self.dtype)
        return gamma1 * self.sa(h, context, number).float()

    def cross_attend(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """What cross-attention adds, float32; keys and mask are the condition's."""
        return self.ca.attend(self._ask(x), keys, mask).float()

    def _ask(self, x: Tensor) -> Tensor:
        """Queries ``[R, H, n, D]`` to the text."""
        norm = self.ca_norm
        h = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        return self.ca.query(h.to(self.dtype))

    def feed_forward(self, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """What the feed-forward adds, float32."""
        _, gamma2, _, scale2, _, shift2 = parts
        h = modulate(x, scale2, shift2).to(self.dtype)
        return gamma2 * self.ffn(h).float()

    def before(
        self, x: Tensor, modulation: Tensor, rope: Rope | None, spread: Tensor | None, rope_k: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What lies before self-attention: its queries, keys and values of tokens ``[R, n, C]``."""
        _, _, scale1, _, shift1, _ = (self.ada_gss.float() + modulation).unbind(2)
        h = modulate(x, scale1, shift1).to(self.dtype)
        return self.sa.project(h, rope, spread, rope_k)

    def project(
        self, h: Tensor, rope: Rope | None, spread: Tensor | None, rope_k: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part of ``before`` behind its norm: of modulated tokens, in the dtype of the weights."""
        return self.sa.project(h, rope, spread, rope_k)

    def between(self, x: Tensor, out: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """What lies between the attentions, the first giving ``[R, H, n, D]``: tokens, and queries to the text."""
        gamma1 = (self.ada_gss.float() + modulation)[:, :, 0]
        x = x + gamma1 * self.sa.join(out).float()
        return x, self._ask(x)

    def after(self, x: Tensor, out: Tensor, modulation: Tensor) -> Tensor:
        """What lies after cross-attention, whose heads gave ``[R, H, n, D]``: tokens ``[R, n, C]``, float32."""
        x = x + self.ca.join(out).float()
        return x + self.feed_forward(x, (self.ada_gss.float() + modulation).unbind(2))

    def almost(self, x: Tensor, out: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """``after`` without its last sum: tokens, and what the feed-forward gives before its gate, gamma2."""
        x = x + self.ca.join(out).float()
        _, _, _, scale2, _, shift2 = (self.ada_gss.float() + modulation).unbind(2)
        return x, self.ffn(modulate(x, scale2, shift2).to(self.dtype))

    def forward(self, x: Tensor, condition: Condition, context: AttentionContext, number: int) -> Tensor:
        """Tokens ``[R, n, C]`` in and out, float32."""
        assert condition.modulation is not None
        q, k, v = self.before(x, condition.modulation, context.rope, context.spread, context.rope_k)
        x, q = self.between(x, attend(q, k, v, context, number), condition.modulation)
        out = F.scaled_dot_product_attention(q, *condition.keys[number], attn_mask=condition.mask)
        return self.after(x, out, condition.modulation)

    def compile_around(self, **options: Any) -> None:
        """Compile what lies around the two attentions; blocks of one shape share the code.

        Cache and attention stay outside, so that neither a block's number nor the cache's length makes new code.

        Args:
            options: Of ``torch.compile``.
        """
        for name in self.COMPILED:
            setattr(self, name, torch.compile(getattr(self, name), **options))

    def as_written(self) -> None:
        """Take ``compile_around`` back."""
        for name in self.COMPILED:
            delattr(self, name)


class _Chunk(nn.Module):
    def __init__(self, blocks: list[InfinityBlock]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class _TextPool(nn.Module):
    """One vector of a text."""

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        dim = 64 if width > 4096 else 128
        if text % dim:
            raise ValueError(f"text_channels must be a multiple of {dim}; got {text}")
        self.ca = CrossAttention(width, text, text // dim, pool=True)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        query = self.ca.mat_q[:, :, None].expand(text.shape[0], -1, -1, -1)
        return self.ca.attend(query, self.ca.keys(text), mask)[:, 0]


class Infinity(NextScaleTransformer):
    """The transformer.

    Args:
        depth: Blocks.
        width: Channels.
        num_heads: Of self- and cross-attention.
        chunks: Groups that the weights' names put blocks into; 1: none.
        code_dim: Bits of the tokenizer's code.
        patchify: A token is 2 x 2 codes, as in the 8B model.
        text_channels: Of the text encoder; 2048 for Flan-T5-XL.
        text_maxlen: Words that a prompt may have.
        mlp_ratio: Width of the feed-forward over ``width``, rounded to a multiple of 256.
    """

    choices = 2
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "cfg_uncond", "text_norm", "text_proj_for_sos", "text_proj_for_ca", "pos_start", "lvl_embed", "word_embed",
        "shared_ada_lin", "head_nm", "head",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        depth: int = 32,
        width: int = 2048,
        num_heads: int = 16,
        chunks: int = 8,
        code_dim: int = 32,
        patchify: bool = False,
        text_channels: int = 2048,
        text_maxlen: int = 512,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if depth % chunks:
            raise ValueError(f"depth must be a multiple of chunks; got {depth} and {chunks}")
        self.patch = 2 if patchify else 1
        self.groups = self.token_dim = code_dim * self.patch**2
        self.cfg_uncond = nn.Parameter(torch.empty(text_maxlen, text_channels))
        self.text_norm = nn.RMSNorm(text_channels, eps=1e-6)
        self.text_proj_for_sos = _TextPool(text_channels, width)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(text_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.lvl_embed = nn.Embedding(MAX_LEVELS, width)
        self.word_embed = nn.Linear(self.token_dim, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        hidden = max(256, round(width * mlp_ratio / 256) * 256)
        blocks = [InfinityBlock(width, num_heads, hidden) for _ in range(depth)]
        if chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            size = depth // chunks
            self.block_chunks = nn.ModuleList(_Chunk(blocks[at : at + size]) for at in range(0, depth, size))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, 2 * self.groups)
        self._start()

    def _start(self) -> None:
        width = self.config.width
        modulation: Any = self.shared_ada_lin[1]
        head: Any = self.head_nm.ada_lin[1]
        std = (1 / width / 3) ** 0.5
        init_linears(self, std)
        start_small(self.layers, self.head)
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.trunc_normal_(self.text_proj_for_sos.ca.mat_q, std=std)
        nn.init.trunc_normal_(self.cfg_uncond, std=1.2)
        with torch.no_grad():
            self.cfg_uncond.div_(self.config.text_channels**0.5)
            modulation.weight[2 * width :].mul_(0.5)
            modulation.weight[: 2 * width].mul_(1e-5)
            head.weight.mul_(0.5)
            for block in self.layers:
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(1e-5)

    @property
    def layers(self) -> list[Any]:
        """See the base class."""
        if self.config.chunks == 1:
            return list(self.blocks)
        chunks: Any = self.block_chunks
        return [block for chunk in chunks for block in chunk.module]

    @property
    def heads(self) -> int:
        """See the base class."""
        return self.config.num_heads

    @property
    def width(self) -> int:
        """See the base class."""
        return self.config.width

    def rope(self, schedule: ScaleSchedule) -> Rope:
        """See the base class."""
        return rope_table(schedule, self.width // self.heads, self.pos_start.device)

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """See the base class.

        Raises:
            ValueError: It has too many scales, or a first one of more than a token.
        """
        if len(schedule) > MAX_LEVELS:
            raise ValueError(f"Infinity has embeddings of {MAX_LEVELS} scales; got {len(schedule)}")
        if schedule.tokens(0) != 1:
            raise ValueError(f"the first scale must be one token; got {schedule.grids[0]}")

    @apply_forward_hook
    def condition(
        self,
        text: Tensor,
        lengths: Sequence[int],
        *,
        guided: bool = True,
        negative: tuple[Tensor, Sequence[int]] | None = None,
        drop: Tensor | None = None,
    ) -> Condition:
        """Read prompts.

        Args:
            text: ``[B, T, text_channels]``, what the text encoder made of them, on any device; behind a length it is
                not read.
            lengths: Words of each.
            guided: Add an unconditional row for each.
            negative: Text and lengths of the unconditional rows; the learned ones, as long as the prompts, if None.
            drop: ``[B]`` bool of prompts to replace by the learned unconditional one, in training.

        Raises:
            ValueError: A prompt is empty or too long, or shapes do not fit.
        """
        self._check_text(text, lengths)
        device = self.pos_start.device
        text = text.to(device)
        images, tokens = text.shape[:2]
        uncond = self.cfg_uncond[:tokens].expand(images, -1, -1)
        if drop is not None:
            text = torch.where(drop[:, None, None], uncond, text)
        counts = list(lengths)
        if guided:
            other, others = (uncond, counts) if negative is None else (negative[0].to(device), list(negative[1]))
            if negative is not None:
                self._check_text(other, others)
                if len(other) != images:
                    raise ValueError(f"negative prompts must be as many as prompts; got {len(other)} and {images}")
                longest = max(tokens, other.shape[1])
                text, other = (F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (text, other))
            text, counts = torch.cat([text.float(), other.float()]), counts + others
        mask = None
        if min(counts) < text.shape[1]:
            inside = (torch.arange(text.shape[1]) < torch.tensor(counts)[:, None]).to(device)
            mask = inside[:, None, None]
            # A mask does not keep out what is not finite.
            text = torch.where(inside[..., None], text, 0.0)
        text = self.text_norm(text.float())
        vector = self.text_proj_for_sos(text, mask).float()
        memory = self.text_proj_for_ca(text)
        return Condition(
            vector=vector,
            modulation=self.shared_ada_lin(vector).unflatten(-1, (1, 6, -1)),
            keys=tuple(block.ca.keys(memory) for block in self.layers),
            mask=mask,
            images=images,
        )

    def _check_text(self, text: Tensor, lengths: Sequence[int]) -> None:
        channels, longest = self.config.text_channels, self.config.text_maxlen
        if text.ndim != 3 or text.shape[-1] != channels or len(lengths) != len(text):
            raise ValueError(
                f"text must be [B, T, {channels}] with a length for each; got {list(text.shape)} and {len(lengths)}"
            )
        if min(lengths) < 1 or max(lengths) > text.shape[1]:
            raise ValueError(f"lengths must lie in 1 to {text.shape[1]}, the text's size; got {list(lengths)}")
        if text.shape[1] > longest:
            raise ValueError(f"this model reads at most {longest} words; got {text.shape[1]}. Shorten the prompt.")

    def begin(self, condition: Condition, schedule: ScaleSchedule) -> Tensor:
        """See the base class."""
        return condition.vector[:, None] + self.pos_start + self.lvl_embed.weight[0]

    def embed(self, codes: Tensor, scale: int, schedule: ScaleSchedule) -> Tensor:
        """See the base class."""
        return self.word_embed(codes.float()) + self.lvl_embed.weight[scale]

    def logits(self, hidden: Tensor, condition: Condition) -> Tensor:
        """See the base class."""
        rows = hidden.shape[0]
        return self.head(self.head_nm(hidden, condition.vector[:rows])).unflatten(-1, (self.groups, 2))

    def guide(self, conditional: Tensor, unconditional: Tensor, strength: float, share: float) -> Tensor:
        """The same strength at every scale."""
        return strength * conditional + (1 - strength) * unconditional
