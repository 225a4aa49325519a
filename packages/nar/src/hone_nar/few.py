"""A pass over few tokens in one launch, or in seven a block, where a block of torch takes some twenty.

With a batch of one a pass is 2 to 32 tokens, its products are as long as their weights take to be read, and each launch
costs as much as some megabytes of them. Between launches cuBLAS is the fastest for all products but the gated one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hone_kernels.decoding import add_rms_norm
from hone_kernels.few_tokens import Block, BlocksOfFew, attend_slots, gated_of_few
from hone_visual_ar.rope import Rope
from torch import Tensor, nn

from .transformer import Attention, FeedForward, NARTransformer, RMSNorm, SlotCache, TransformerBlock, rope_table

__all__ = ["is_plain", "run_few", "run_whole", "whole_of"]

PLAIN = (TransformerBlock, Attention, FeedForward, RMSNorm, nn.Linear, nn.Dropout)


def is_plain(model: Any) -> bool:
    """Whether these launches compute what the model does: it is in eval mode, and no part was replaced or hooked."""
    plain = all(
        type(part) in PLAIN
        and getattr(part, "bias", None) is None
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in vars(part)  # where accelerate and diffusers put their hooks
        for block in model.layers
        for part in block.modules()
    )
    return plain and type(model).run_blocks is NARTransformer.run_blocks and not model.training


def run_few(model: Any, x: Tensor, *, begin: int, cache: SlotCache, words: Tensor | None) -> list[Tensor]:
    """As the model's ``run_blocks``, of tokens that all see each other.

    Args:
        model: Of images or clips.
        x: ``[R, n, C]``, few rows and tokens.
        begin: Slot of the first token.
        cache: Read and written.
        words: ``[R, T]`` bool, words of a text; None for classes.

    Returns:
        Hidden states ``[R, n, C]`` that each head reads.
    """
    shape = x.shape
    x, turns = model.place(x, begin)
    rope, found = None, []
    if turns is not None:
        rope = _rope(model, x.device)
    # What a block adds is summed in the norm that comes next.
    total, change = None, x.flatten(0, 1).contiguous()
    for number, block in enumerate(model.layers):
        attention, forward = block.attention, block.feed_forward
        normed, total = add_rms_norm(change, total, block.attention_norm.weight, block.attention_norm.eps)
        qkv = F.linear(normed, attention.wqkv.weight).view(*shape[:2], -1)
        scale = attention.dim**-0.5
        out = attend_slots(qkv, rope, cache.k[number], cache.v[number], begin, scale=scale, words=words)
        change = F.linear(out.flatten(0, 1), attention.wo.weight)
        normed, total = add_rms_norm(change, total, block.ffn_norm.weight, block.ffn_norm.eps)
        change = F.linear(gated_of_few(normed, forward.w1.weight, forward.w3.weight), forward.w2.weight)
        if number >= model.n_layer - 1:
            found.append((total + change).view(shape))
    return found


def whole_of(model: Any, cache: SlotCache) -> BlocksOfFew | None:
    """All blocks of a plain model as one launch; None where its shapes or its dtype are none that this is made for."""
    attention, forward = model.layers[0].attention, model.layers[0].feed_forward
    narrow = cache.k[0].dtype in (torch.bfloat16, torch.float16) or cache.k[0].device.type == "cpu"
    shaped = attention.heads == attention.heads_k and attention.dim in (16, 32, 64, 128)
    if not narrow or not shaped or len(forward.w1.weight) % 8:
        return None
    rope = None
    if model.place(cache.k[0].new_zeros(1, 1, attention.heads * attention.dim), 0)[1] is not None:
        rope = _rope(model, cache.k[0].device)
    blocks = [
        Block(
            block.attention_norm.weight, block.attention.wqkv.weight, block.attention.wo.weight, block.ffn_norm.weight,
            block.feed_forward.w1.weight, block.feed_forward.w3.weight, block.feed_forward.w2.weight,
        )
        for block in model.layers
    ]  # fmt: skip
    eps, scale = model.layers[0].ffn_norm.eps, attention.dim**-0.5
    return BlocksOfFew(blocks, cache.k, cache.v, rope=rope, eps=eps, scale=scale)


def run_whole(model: Any, whole: BlocksOfFew, x: Tensor, *, begin: int, words: Tensor | None) -> list[Tensor]:
    """As ``run_few``, by what ``whole_of`` made."""
    x, _ = model.place(x, begin)
    return list(whole(x, begin, words)[model.n_layer - 1 :])


def _rope(model: Any, device: torch.device) -> Rope:
    return rope_table(model.order, model.cls_token_num, model.head_dim, model.config.rope_base, device)
