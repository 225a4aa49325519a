"""LlamaGen's transformer, with as many heads as the grid has axes (NAR) or one (raster), under the published names.

A sequence is the condition (one class token, or a padded text) and then the grid's tokens in the order in which they
are drawn. What is specific to a call (positions, masks, the cache) travels with it.

Source: FoundationVision/LlamaGen, ``autoregressive/models/gpt.py``; ThisisBillhe/NAR, ``NAR-images`` and
    ``NAR-videos``; arXiv 2406.06525, 2503.10696.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from hone_core.handles import CallState
from hone_core.tensors import plain_tensors
from hone_kernels.prefix_attention import prefix_attention
from hone_visual_ar.rope import Rope, rotate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import Mix
from .method import Order, Plan, diagonal_order, ends_of, mask_of, mix, plan_of, raster_order, separate_loss

__all__ = [
    "Attached",
    "Condition",
    "LlamaGenForImageGeneration",
    "NARForImageGeneration",
    "NARForVideoGeneration",
    "NAROutput",
    "NARTransformer",
    "Pieces",
    "SlotCache",
    "Span",
    "compiled_pieces",
    "image_grid",
    "output_name",
    "rope_table",
    "slot_ids",
]

Loss = Literal["mixture", "separate", "flashar"]
AUXILIARY = 0.05
"""Weight of the heads' own losses beside the mixture's in FlashAR's training."""
HEAD_NAMES = {1: ("",), 2: ("", "medusa_"), 3: ("R", "D", "B")}
"""Published names of the heads by the axes of the grid: last axis first."""


class Condition(NamedTuple):
    """What a model knows of classes or texts.

    Attributes:
        embedding: ``[R, T, C]``; R is the images, twice that under guidance, conditional rows first.
        words: ``[R, T]`` bool, True at words of a text; None for classes.
        images: Of the batch.
    """

    embedding: Tensor
    words: Tensor | None
    images: int


@dataclass
class NAROutput:
    """What a teacher-forced forward gives.

    Attributes:
        logits: ``[B, tokens, vocabulary]`` in raster order, float32 at least.
        loss: Mean cross-entropy in nats, if it was asked for.
    """

    logits: Tensor
    loss: Tensor | None = None


class SlotCache:
    """Keys and values of condition and slots: one pair of buffers per layer; steps write slices and read prefixes.

    Args:
        layers: Blocks.
        shape: ``(rows, heads, positions, dim)``.
        device: Where.
        dtype: Of keys and values.
    """

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]


Before = Callable[["TransformerBlock", Tensor, Rope | None], tuple[Tensor, Tensor, Tensor]]
After = Callable[["TransformerBlock", Tensor, Tensor], Tensor]


def _before(block: TransformerBlock, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    return block.attention.project(block.attention_norm(x), rope)


def _after(block: TransformerBlock, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.attention.resid_dropout(block.attention.wo(attended))
    return x + block.feed_forward(block.ffn_norm(x))


class Pieces(NamedTuple):
    """A block's work before and after attention, neither of which depends on how much is in the cache.

    Attributes:
        before: Norm, projection, rotation.
        after: Output projection, norm, feed-forward.
    """

    before: Before = _before
    after: After = _after


@lru_cache(maxsize=4)
def compiled_pieces(backend: str = "inductor") -> Pieces:
    """The same, compiled once for all blocks and numbers of tokens; kept for 4 backends of torch.compile."""
    return Pieces(*(torch.compile(piece, dynamic=True, backend=backend) for piece in Pieces()))


class Span(NamedTuple):
    """What attention is given by one forward.

    Attributes:
        rope: Rows of these positions; None where positions are added.
        mask: ``[..., n, K]`` bool, True may be read; None: everything.
        cache: Where earlier positions are; None in a teacher-forced forward.
        begin: First position of these tokens in the cache.
        pieces: What a block does besides.
        ends: int32 ``[n]``, where the prefix ends that each token reads, in place of the mask.
        words: ``[R, T]`` bool, words of a text, beside ``ends``.
    """

    rope: Rope | None
    mask: Tensor | None
    cache: SlotCache | None = None
    begin: int = 0
    pieces: Pieces = Pieces()
    ends: Tensor | None = None
    words: Tensor | None = None


@dataclass
class Attached:
    """How a model mixes its heads while a handle is on it.

    Attributes:
        kind: Of mixing.
        state: Whether this thread has disabled it.
    """

    kind: Mix
    state: CallState[None]


class RMSNorm(nn.Module):
    """Statistics in float32, cast back, then the weight, as the release rounds."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[..., C]``."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


class Attention(nn.Module):
    """Self-attention; rows of ``wqkv`` are q, then k, then v."""

    def __init__(self, dim: int, heads: int, heads_k: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.heads_k, self.dim = heads, heads_k, dim // heads
        self.wqkv = nn.Linear(dim, (heads + 2 * heads_k) * self.dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[R, heads, n, dim]`` of tokens ``[R, n, C]``."""
        qkv = self.wqkv(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.heads_k, self.heads_k], dim=1)
        if rope is not None:
            q, k = rotate(q, rope).to(x.dtype), rotate(k, rope).to(x.dtype)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span, layer: int) -> Tensor:
        """Attention ``[R, n, C]`` of tokens on themselves and what the cache holds."""
        if span.cache is not None:
            end = span.begin + q.shape[2]
            keys, values = span.cache.k[layer], span.cache.v[layer]
            keys[:, :, span.begin : end] = k
            values[:, :, span.begin : end] = v
            k, v = keys[:, :, :end], values[:, :, :end]
        if span.ends is not None:
            out = prefix_attention(q.to(v.dtype), k.to(v.dtype), v, span.ends, words=span.words)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, enable_gqa=self.heads != self.heads_k)
        return out.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU, its width rounded up to a multiple of 256."""

    def __init__(self, dim: int, multiple_of: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[..., C]``."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int, heads: int, heads_k: int, multiple_of: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, heads_k, dropout)
        self.feed_forward = FeedForward(dim, multiple_of, dropout)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, span: Span, layer: int) -> Tensor:
        """Tokens ``[R, n, C]``."""
        before, after = span.pieces
        q, k, v = before(self, x, span.rope)
        return after(self, x, self.attention.attend(q, k, v, span, layer))


class LabelEmbedder(nn.Module):
    """A vector for each class, and one for none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)


class _MLP(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Features of a text to tokens; what stands for no text is a buffer, as published."""

    def __init__(self, channels: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.cap_proj = _MLP(channels, dim)
        self.register_buffer("uncond_embedding", torch.randn(tokens, channels) / channels**0.5)


class NARTransformer(ModelMixin, ConfigMixin):
    """What all of these models share; none by itself."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]
    gradient_checkpointing = False

    grid: tuple[int, ...]
    order: Order
    heads: int
    vocab_size: int
    num_classes: int | None
    cls_token_num: int
    n_layer: int
    layers: Any
    cls_embedding: Any
    attached: Attached | None = None
    """What ``attach`` put on the model."""

    def _build(self, *, order: Order, heads: int, extra: int | None = None) -> None:
        cfg: Any = self.config
        if cfg.dim % cfg.n_head or cfg.n_head % (cfg.n_kv_head or cfg.n_head):
            raise ValueError(
                f"dim must be a multiple of n_head, and n_head of n_kv_head; got {cfg.dim}, {cfg.n_head} and "
                f"{cfg.n_kv_head}"
            )
        self.order, self.grid, self.heads = order, order.grid, heads
        self.vocab_size, self.n_layer, self.num_classes = cfg.vocab_size, cfg.n_layer, cfg.num_classes
        if cfg.num_classes is not None:
            self.cls_token_num = 1
            self.cls_embedding = LabelEmbedder(cfg.num_classes, cfg.dim)
        else:
            self.cls_token_num = cfg.cls_token_num
            self.cls_embedding = CaptionEmbedder(cfg.caption_dim, cfg.dim, cfg.cls_token_num)
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.tok_dropout = nn.Dropout(cfg.dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(
                cfg.dim, cfg.n_head, cfg.n_kv_head or cfg.n_head, cfg.multiple_of, cfg.norm_eps, cfg.dropout
            )
            for _ in range(cfg.n_layer + (heads - 1 if extra is None else extra))
        )
        for name in HEAD_NAMES[heads]:
            self.add_module(norm_name(name), RMSNorm(cfg.dim, cfg.norm_eps))
            self.add_module(output_name(name), nn.Linear(cfg.dim, cfg.vocab_size, bias=False))

    def _start(self, zeroed: Sequence[str]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name in zeroed:
            nn.init.zeros_(self.get_submodule(output_name(name)).weight)

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return prod(self.grid)

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.layers[0].attention.dim

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse codes that are none of this model's.

        Raises:
            TypeError: They are no whole numbers.
            ValueError: The shape is not ``[B, tokens]`` of its grid, or a code is out of range.
        """
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"codes must be int64 or int32, the numbers of entries; got {tokens.dtype}")
        if tokens.ndim != 2 or tokens.shape[1] != self.tokens:
            raise ValueError(
                f"this model draws grids of {' x '.join(map(str, self.grid))}, so codes must be [B, {self.tokens}] in "
                f"raster order; got {list(tokens.shape)}"
            )
        if tokens.is_meta or not tokens.numel():
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"codes must lie in 0 to {self.vocab_size - 1}; got {low} to {high}")

    def condition(
        self,
        labels: Tensor | None = None,
        *,
        text: Tensor | None = None,
        words: Tensor | None = None,
        guided: bool = False,
        drop: Tensor | None = None,
    ) -> Condition:
        """The condition of classes or texts.

        Args:
            labels: ``[B]`` classes.
            text: ``[B, T, caption_dim]`` features, padded on the left, as ``hone_nar.texts.pad_left`` does it.
            words: ``[B, T]`` bool, True at words.
            guided: Add an unconditional row of each; that of a text sees as many places as the text.
            drop: ``[B]`` bool: rows whose condition is dropped, in training.

        Raises:
            ValueError: The model takes the other kind, a class does not exist, or the text has another shape or is
                padded on the right.
        """
        if self.num_classes is not None:
            if labels is None or text is not None:
                raise ValueError("this model draws classes; give labels and no text")
            _check_labels(labels, self.num_classes)
            _check_drop(drop, len(labels))
            if drop is not None:
                labels = labels.where(~drop, self.num_classes)
            if guided:
                labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
            found = self.cls_embedding.embedding_table(labels)[:, None]
            return Condition(found, None, len(labels) // (1 + guided))
        if text is None or words is None or labels is not None:
            raise ValueError("this model draws texts; give text and words, and no labels")
        shape = (self.cls_token_num, self.config.caption_dim)
        if tuple(text.shape[1:]) != shape or words.shape != text.shape[:2]:
            raise ValueError(
                f"text must be [B, {shape[0]}, {shape[1]}] and words [B, {shape[0]}]; got {list(text.shape)} and "
                f"{list(words.shape)}"
            )
        _check_drop(drop, len(text))
        words = words.bool()
        if not bool(words.any(1).all()):
            raise ValueError("each text needs a word; one row is all padding")
        if not bool((words[:, 1:] >= words[:, :-1]).all()):
            raise ValueError(
                "a text's words must stand at its end, as the model was trained on; got padding behind a word. Move "
                "them with hone_nar.texts.pad_left(text, words)"
            )
        empty = self.cls_embedding.uncond_embedding.to(text.dtype)
        if drop is not None:
            text = torch.where(drop[:, None, None], empty, text)
        images = len(text)
        if guided:
            text, words = torch.cat([text, empty.expand_as(text)]), torch.cat([words, words])
        return Condition(self.cls_embedding.cap_proj(text), words, images)

    def place(self, x: Tensor, begin: int) -> tuple[Tensor, Rope | None]:
        """Tokens ``[R, n, C]`` of positions from ``begin`` on, with what says where they are."""
        rows = slice(begin, begin + x.shape[1])
        table = rope_table(self.order, self.cls_token_num, self.head_dim, self.config.rope_base, x.device)
        return x, table.rows(rows)

    def run_blocks(
        self,
        x: Tensor,
        *,
        begin: int = 0,
        mask: Tensor | None = None,
        cache: SlotCache | None = None,
        pieces: Pieces | None = None,
        ends: Tensor | None = None,
        words: Tensor | None = None,
    ) -> list[Tensor]:
        """Hidden states ``[R, n, C]`` that each head reads, of tokens at positions from ``begin`` on."""
        x, rope = self.place(self.tok_dropout(x), begin)
        span, found = Span(rope, mask, cache, begin, pieces or Pieces(), ends, words), []
        for number in range(len(self.layers)):
            x = self.run_block(number, x, span)
            if number >= self.n_layer - 1:
                found.append(x)
        return found

    def run_block(self, number: int, x: Tensor, span: Span) -> Tensor:
        """Tokens ``[R, n, C]`` through one block, which is computed again in the backward pass where that is on."""
        block = self.layers[number]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, span, number, use_reentrant=False)
        return block(x, span, number)

    def mixed(self, logits: Sequence[Tensor], weight: Tensor) -> Tensor:
        """One distribution ``[R, n, vocabulary]`` of the heads' logits at the sources of n tokens.

        Args:
            logits: Of each head ``[R, n, vocabulary]``.
            weight: ``[n, heads]`` of the plan.
        """
        return mix(logits, weight)

    def head(self, number: int, hidden: Tensor, *, wide: bool = True) -> Tensor:
        """Logits ``[..., vocabulary]`` of a head; float32 at least if ``wide``."""
        name = HEAD_NAMES[self.heads][number]
        logits = self.get_submodule(output_name(name))(self.get_submodule(norm_name(name))(hidden))
        if not wide:
            return logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        text: Tensor | None = None,
        words: Tensor | None = None,
        drop: Tensor | None = None,
        kind: Mix | None = None,
        loss: Loss | None = None,
        prefixes: bool = False,
    ) -> NAROutput:
        """Teacher-forced logits of all tokens at once.

        Args:
            tokens: ``[B, tokens]`` codes in raster order.
            labels: See ``condition``, as the next three.
            text: Likewise.
            words: Likewise.
            drop: Likewise.
            kind: How heads are mixed; None: as ``attach`` says, or their average.
            loss: Which loss to return beside: cross-entropy of the mixture, as NAR is trained; of each head; or of the
                mixture and, with a small weight, of each head, as FlashAR is.
            prefixes: Attend by ``hone_kernels.prefix_attention``, where each row reads its prefix, and make no mask.

        Raises:
            TypeError: As ``check_tokens``.
            ValueError: As ``check_tokens`` and ``condition``; or there are more or fewer codes than conditions, or no
                such loss.
        """
        self.check_tokens(tokens)
        if loss is not None and loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}; got {loss!r}")
        condition = self.condition(labels, text=text, words=words, drop=drop)
        if condition.images != len(tokens):
            raise ValueError(f"expected a class or text for each of {len(tokens)} rows; got {condition.images}")
        ids = slot_ids(self.order, tokens.device)
        drawn = tokens[:, ids].long()
        embedded = self.tok_embeddings(drawn)
        x = torch.cat([condition.embedding.to(embedded.dtype), embedded], 1)
        if prefixes:
            ends = ends_of(self.order, self.cls_token_num, x.device)
            hidden = self.run_blocks(x, ends=ends, words=condition.words)
        else:
            mask = mask_of(self.order, self.cls_token_num, x.device, condition.words)
            hidden = self.run_blocks(x, mask=mask[:, None] if mask.ndim == 3 else mask)
        plan = self.plan(kind, x.device)
        each = [self.head(head, state[:, plan.source[:, head]]) for head, state in enumerate(hidden)]
        logits = self.mixed(each, plan.weight)
        value = None
        if loss is not None:
            value = separate_loss(each, plan.weight, drawn) if loss != "mixture" else None
            if loss != "separate":
                own = F.cross_entropy(logits.flatten(0, 1), drawn.flatten())
                value = own if value is None else own + AUXILIARY * len(each) * value
        return NAROutput(logits[:, ids.argsort()], value)

    def plan(self, kind: Mix | None, device: torch.device | str) -> Plan:
        """How heads are mixed, on a device; ``kind`` as of ``forward``.

        Raises:
            ValueError: The model has no such head.
        """
        return plan_of(self.order, self.cls_token_num, self.heads, self.mixing(kind)).to(device)

    def mixing(self, kind: Mix | None = None) -> Mix:
        """How heads are mixed: as given, as ``attach`` says, or their average."""
        if kind is not None:
            return kind
        return "average" if self.attached is None or self.attached.state.disabled else self.attached.kind

    def nll(self, tokens: Tensor, labels: Tensor | None = None, *, kind: Mix | None = None, **condition: Any) -> Tensor:
        """Negative log-likelihood in nats of each token ``[B, tokens]``, in raster order.

        A step's tokens are independent given those before, so that their sum is the image's exact one.
        """
        logits = self(tokens, labels, kind=kind, **condition).logits
        return F.cross_entropy(logits.transpose(1, 2), tokens.long(), reduction="none")

    def new_cache(self, rows: int) -> SlotCache:
        """An empty cache of condition and grid."""
        weight = self.tok_embeddings.weight
        heads = self.layers[0].attention.heads_k
        shape = (rows, heads, self.cls_token_num + self.tokens, self.head_dim)
        return SlotCache(len(self.layers), shape, device=weight.device, dtype=weight.dtype)


def norm_name(head: str) -> str:
    """Published name of the norm before a head of ``HEAD_NAMES``."""
    return f"norm_{head}" if head in ("R", "D", "B") else f"{head}norm"


def output_name(head: str) -> str:
    """Published name of a head of ``HEAD_NAMES``."""
    return f"output_{head}" if head in ("R", "D", "B") else f"{head}output"


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.ndim != 1 or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be integers [B]; got {labels.dtype} {list(labels.shape)}")
    if labels.is_meta or not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"classes are 0 to {classes - 1}; got {low if low < 0 else high}")


def _check_drop(drop: Tensor | None, rows: int) -> None:
    if drop is not None and (drop.dtype != torch.bool or drop.shape != (rows,)):
        raise ValueError(f"drop must be bool [{rows}], of each row; got {drop.dtype} {list(drop.shape)}")


class LlamaGenForImageGeneration(NARTransformer):
    """LlamaGen: one token after the other in raster order, from classes or texts.

    Args:
        dim: Channels.
        n_layer: Blocks.
        n_head: Attention heads.
        n_kv_head: Of keys; as many if None.
        vocab_size: Entries of the codebook.
        grid: Rows and columns of tokens.
        num_classes: Of a model of classes; None for one of texts.
        cls_token_num: Tokens of a text.
        caption_dim: Channels of a text's features.
        multiple_of: That the feed-forward's width is rounded up to.
        rope_base: Of the rotary angles.
        norm_eps: Of the norms.
        dropout: Of tokens, residual branches and feed-forward, in training.
        diagonal: Draw by diagonals with the one head, from the neighbour above: the ablation of Table 4.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_kv_head: int | None = None,
        vocab_size: int = 16384,
        grid: Sequence[int] = (16, 16),
        num_classes: int | None = 1000,
        cls_token_num: int = 120,
        caption_dim: int = 2048,
        multiple_of: int = 256,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
        diagonal: bool = False,
    ) -> None:
        super().__init__()
        grid = image_grid(grid)
        self._build(order=diagonal_order(grid) if diagonal else raster_order(grid), heads=1)
        self._start([""])


class NARForImageGeneration(NARTransformer):
    """NAR: whole anti-diagonals, by a right and a below head; the latter has a block more. Arguments as LlamaGen's."""

    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_kv_head: int | None = None,
        vocab_size: int = 16384,
        grid: Sequence[int] = (16, 16),
        num_classes: int | None = 1000,
        cls_token_num: int = 120,
        caption_dim: int = 2048,
        multiple_of: int = 256,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self._build(order=diagonal_order(image_grid(grid)), heads=2)
        # As the release: the below head starts random.
        self._start([""])


class NARForVideoGeneration(NARTransformer):
    """NAR of clips: planes of equal distance, by three heads, with learned positions in place of rotary ones.

    Args as of images, with a grid of frames, rows and columns. With LARP's tokens the grid is an index pattern and no
    place in the clip.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 1024,
        n_layer: int = 24,
        n_head: int = 16,
        n_kv_head: int | None = None,
        vocab_size: int = 8192,
        grid: Sequence[int] = (4, 16, 16),
        num_classes: int | None = 101,
        multiple_of: int = 256,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        grid = tuple(grid)
        if len(grid) != 3 or num_classes is None:
            raise ValueError(f"a clip's grid has frames, rows and columns, and it has classes; got {grid}")
        self._build(order=diagonal_order(grid), heads=3)
        self.abs_pe = nn.Parameter(0.02 * torch.randn(1, 1 + self.tokens, dim))
        self._start(HEAD_NAMES[3])

    def place(self, x: Tensor, begin: int) -> tuple[Tensor, Rope | None]:
        """Learned positions, stored in raster order."""
        rows = F.pad(1 + slot_ids(self.order, x.device), (1, 0))
        return x + self.abs_pe[:, rows[begin : begin + x.shape[1]]].to(x.dtype), None


def image_grid(grid: Sequence[int]) -> tuple[int, ...]:
    """Rows and columns of tokens.

    Raises:
        ValueError: There are not two of them.
    """
    if len(grid) != 2:
        raise ValueError(f"an image's grid has rows and columns; got {tuple(grid)}")
    return tuple(grid)


def slot_ids(order: Order, device: torch.device | str) -> Tensor:
    """Raster id of each slot ``[tokens]``; kept for 16 orders and devices, do not write into it."""
    return _slot_ids(order, torch.device(device))


@lru_cache(maxsize=16)
def _slot_ids(order: Order, device: torch.device) -> Tensor:
    with plain_tensors():
        return torch.tensor(order.ids).to(device)


def rope_table(order: Order, condition: int, dim: int, base: float, device: torch.device | str) -> Rope:
    """Table ``[condition + tokens, dim / 2]`` of positions: half the pairs turn by the row, half by the column.

    Rows of the condition are zero, cosine and sine alike, so that its queries and keys vanish: published weights are
    trained so.

    Args:
        order: Of the tokens; of two axes.
        condition: Tokens that stand before the grid's.
        dim: Of a head; a multiple of 4.
        base: Of the angles.
        device: Where. Kept for 16 tables; do not write into one.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"rotary positions of a grid need heads of a multiple of 4 channels; got {dim}")
    return _rope_table(order, condition, dim, base, torch.device(device))


@lru_cache(maxsize=16)
def _rope_table(order: Order, condition: int, dim: int, base: float, device: torch.device) -> Rope:
    with plain_tensors():
        half = dim // 2
        frequency = 1.0 / (base ** (torch.arange(0, half, 2).float() / half))
        ids = torch.tensor(order.ids)
        places = (ids // order.grid[1], ids % order.grid[1])
        angles = torch.cat([torch.outer(place.float(), frequency) for place in places], -1)
        before = torch.zeros(condition, half)
        cos, sin = torch.cat([before, angles.cos()]), torch.cat([before, angles.sin()])
        return Rope(cos.to(device), sin.to(device))
