"""What exit and window save by counting, the bound that a clock is compared with.

One multiply-accumulate is two operations. Norms, softmax and rotary embedding are not counted; the vision tower is not
part of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["WORKLOADS", "DecoderShape", "Flops", "Workload", "prefill_flops"]

Convention = Literal["causal", "square"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Sizes that decide the cost of a layer."""

    layers: int
    width: int
    intermediate: int
    heads: int
    heads_k: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Shape of a transformers text config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            heads_k=config.num_key_value_heads,
            head_dim=head_dim,
        )

    @property
    def per_token(self) -> int:
        """Operations of a layer's matrices on one token (gated MLP)."""
        projections = self.width * self.head_dim * (2 * self.heads + 2 * self.heads_k)
        return 2 * (projections + 3 * self.width * self.intermediate)

    @property
    def per_pair(self) -> int:
        """Operations of attention on one query-key pair: the logit, and the weighted value."""
        return 4 * self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Operations of a prefill."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.linear + self.attention


def prefill_flops(
    shape: DecoderShape,
    *,
    prefix: int,
    frames: int,
    tokens_per_frame: int,
    suffix: int,
    exit: int | None = None,
    window: int = 0,
    convention: Convention = "causal",
) -> Flops:
    """Operations of a prefill of prefix text, frames, suffix text.

    Args:
        shape: Of the decoder.
        prefix: Text tokens before the video.
        frames: Frames that the decoder sees.
        tokens_per_frame: Visual tokens of each.
        suffix: Text tokens after the video.
        exit: Layer from which on visual tokens are gone; None is never.
        window: First layers in which a frame reads only itself and the prefix.
        convention: ``causal`` counts causal pairs exactly. ``square`` counts a frame as a full square against the
            causal half of the whole and the text as nothing; the paper's 37.5 % is this.
    """
    visual, text = frames * tokens_per_frame, prefix + suffix
    tokens = visual + text

    def causal(count: int) -> float:
        return count * (count + 1) / 2

    if convention == "causal":
        full = causal(tokens)
        local = full - tokens_per_frame**2 * frames * (frames - 1) / 2
        left = causal(text)
    else:
        full, local, left = visual**2 / 2, float(frames * tokens_per_frame**2), 0.0
    last = shape.layers if exit is None else exit
    pairs = min(window, last) * local + max(0, last - window) * full + (shape.layers - last) * left
    rows = last * tokens + (shape.layers - last) * text
    return Flops(linear=float(rows * shape.per_token), attention=float(pairs * shape.per_pair))


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A decoder shape and its prompt.

    Attributes:
        shape: of the decoder.
        vocabulary: of its head.
        source_frames: frames of the video behind one frame of the decoder.
        tokens_per_frame: of the decoder's frame.
        prefix: text before the video.
        suffix: text after it, separators included.
        exit: layer at which visual tokens leave, the paper's 18 of 28.
        window: first layers in which frames read only themselves.
        newline: whether the suffix begins with a separator that has the id of a video token.
    """

    shape: DecoderShape
    vocabulary: int
    source_frames: int
    tokens_per_frame: int
    prefix: int
    suffix: int
    exit: int
    window: int
    newline: bool = True


_QWEN2_7B = DecoderShape(layers=28, width=3584, intermediate=18944, heads=28, heads_k=4, head_dim=128)
WORKLOADS: dict[str, Workload] = {
    # 384 px: 27 x 27 patches pooled to 14 x 14, one newline at the end.
    "llava-onevision-7b": Workload(
        shape=_QWEN2_7B,
        vocabulary=152000,
        source_frames=1,
        tokens_per_frame=196,
        prefix=14,
        suffix=47,
        exit=18,
        window=8,
    ),
    # 392 x 392 px: 28 x 28 patches merged to 14 x 14, two frames of the video fused.
    "qwen2.5-vl-7b": Workload(
        shape=_QWEN2_7B,
        vocabulary=152064,
        source_frames=2,
        tokens_per_frame=196,
        prefix=15,
        suffix=46,
        exit=18,
        window=8,
        newline=False,
    ),
    "tiny": Workload(
        shape=DecoderShape(layers=8, width=128, intermediate=256, heads=4, heads_k=2, head_dim=32),
        vocabulary=512,
        source_frames=1,
        tokens_per_frame=32,
        prefix=4,
        suffix=12,
        exit=5,
        window=2,
    ),
}
