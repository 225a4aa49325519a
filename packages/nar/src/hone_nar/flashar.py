"""FlashAR: a raster LlamaGen that learns to draw diagonals after its training.

The raster model's blocks and head stay and predict to the right. A branch of cloned blocks leaves them before the last
ones and predicts below, beside and not after what it was cloned from. A gate weighs both where both reach a token.

Source: arXiv 2605.09430; lxazjk/LlamaGen-FlashAR, ``autoregressive/models/gpt.py`` (names, gate and its start).
Differs: the paper's gate reads hidden states, its release logits; here as released. The auxiliary loss is the paper's,
    which the release leaves out unless told.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

# A saved pipeline is loaded by what stands in the module of each part's class.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from torch import Tensor, nn

from .method import diagonal_order
from .transformer import (
    LlamaGenForImageGeneration,
    NARTransformer,
    Pieces,
    SlotCache,
    Span,
    image_grid,
)

__all__ = ["FlashARForImageGeneration", "post_train_start"]


class FlashARForImageGeneration(NARTransformer):
    """LlamaGen's backbone with a branch that predicts below and a gate between both. Other arguments as LlamaGen's.

    Args:
        depth: Blocks of the branch, which leaves the backbone as many blocks before its end; the paper's best is 1.
        gate_dim: Hidden channels of the gate; None: a 512th of the codebook, at least 32.
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
        depth: int = 1,
        gate_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= depth <= n_layer:
            raise ValueError(f"depth must be 1 to the {n_layer} blocks; got {depth}")
        self.depth = depth
        self._build(order=diagonal_order(image_grid(grid)), heads=2, extra=depth)
        hidden = gate_dim or max(32, vocab_size // 512)
        first, last = nn.Linear(2 * vocab_size, hidden, bias=False), nn.Linear(hidden, 1)
        self.hv_gate_mlp = nn.Sequential(first, nn.SiLU(), last)
        self._start([""])
        # The gate begins at one half everywhere.
        nn.init.normal_(first.weight, std=1 / sqrt(2 * vocab_size))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

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
        """Of the backbone, and of the branch that leaves it ``depth`` blocks before its end."""
        x, rope = self.place(self.tok_dropout(x), begin)
        span, branch = Span(rope, mask, cache, begin, pieces or Pieces(), ends, words), x
        for number in range(self.n_layer):
            if number == self.n_layer - self.depth:
                branch = x
            x = self.run_block(number, x, span)
        for number in range(self.n_layer, self.n_layer + self.depth):
            branch = self.run_block(number, branch, span)
        return [x, branch]

    def mixed(self, logits: Sequence[Tensor], weight: Tensor) -> Tensor:
        """The right head's share by the gate where both reach a token."""
        right, below = logits
        share = weight[:, 0, None].expand(*right.shape[:-1], 1)
        share = torch.where((weight > 0).all(-1)[:, None], self.gate(right, below), share)
        return share * right + (1 - share) * below

    def gate(self, right: Tensor, below: Tensor) -> Tensor:
        """Share ``[..., 1]`` of the right head by both heads' logits ``[..., vocabulary]``, which it does not train."""
        found = torch.cat([right.detach(), below.detach()], -1)
        found = found - found.mean(-1, keepdim=True)
        found = found / found.square().mean(-1, keepdim=True).clamp(min=1e-6).sqrt()
        dtype = next(self.hv_gate_mlp.parameters()).dtype
        with torch.autocast(found.device.type, enabled=False):
            share: Tensor = self.hv_gate_mlp(found.clamp(-6, 6).to(dtype))
        return share.sigmoid().to(right.dtype)

    def new_names(self) -> list[str]:
        """Parameters that the raster model does not have: the branch, its norm and head, and the gate."""
        blocks = tuple(f"layers.{number}." for number in range(self.n_layer, self.n_layer + self.depth))
        begins = ("medusa_", "hv_gate_mlp.", *blocks)
        return [name for name, _ in self.named_parameters() if name.startswith(begins)]


def post_train_start(raster: LlamaGenForImageGeneration, *, depth: int = 1, seed: int = 0) -> FlashARForImageGeneration:
    """A FlashAR to post-train, of a raster model's weights: its last blocks, norm and head are cloned for the branch.

    Args:
        raster: LlamaGen in raster order.
        depth: Blocks of the branch.
        seed: Of the gate's first layer; the global generator stays.

    Raises:
        TypeError: It is no raster LlamaGen.
    """
    if not isinstance(raster, LlamaGenForImageGeneration) or not raster.order.raster:
        raise TypeError(f"expected a LlamaGenForImageGeneration in raster order; got {type(raster).__name__}")
    options: dict[str, Any] = {
        name: value for name, value in raster.config.items() if not name.startswith("_") and name != "diagonal"
    }
    with torch.device("meta"):
        model = FlashARForImageGeneration(**options, depth=depth)
    state = {name: value.clone() for name, value in raster.state_dict().items()}
    for number in range(raster.n_layer - depth, raster.n_layer):
        old, new = f"layers.{number}.", f"layers.{number + depth}."
        state |= {new + name.removeprefix(old): value.clone() for name, value in state.items() if name.startswith(old)}
    state |= {f"medusa_{name}": state[name].clone() for name in ("norm.weight", "output.weight")}
    first, last = model.hv_gate_mlp[0].weight, model.hv_gate_mlp[2]
    generator, like = torch.Generator().manual_seed(seed), raster.output.weight
    noise = torch.randn(first.shape, generator=generator) / sqrt(first.shape[1])
    state["hv_gate_mlp.0.weight"] = noise.to(like.device, like.dtype)
    state["hv_gate_mlp.2.weight"] = like.new_zeros(last.weight.shape)
    state["hv_gate_mlp.2.bias"] = like.new_zeros(last.bias.shape)
    model.load_state_dict(state, assign=True)
    return model
