"""A pass over few tokens in seven launches a block, where a block of torch takes some twenty.

With a batch of one a pass is 2 to 32 tokens, its products are as long as their weights take to be read, and each launch
costs as much as some megabytes of them. cuBLAS is the fastest for all products but the gated one.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from hone_kernels.decoding import add_rms_norm
from hone_kernels.few_tokens import attend_slots, gated_of_few
from torch import Tensor, nn

from .transformer import Attention, FeedForward, NARTransformer, RMSNorm, SlotCache, TransformerBlock, rope_table

__all__ = ["is_plain", "run_few"]

PLAIN = (TransformerBlock, Attention, FeedForward, RMSNorm, nn.Linear, nn.Dropout)


def is_plain(model: Any) -> bool:
    """Whether these launches compute what the model does in eval mode: no part was replaced or hooked."""
    plain = all(
        type(part) in PLAIN
        and getattr(part, "bias", None) is None
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in vars(part)  # where accelerate and diffusers put their hooks
        for block in model.layers
        for part in block.modules()
    )
    return plain and type(model).run_blocks is NARTransformer.run_blocks


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
        rope = rope_table(model.order, model.cls_token_num, model.head_dim, model.config.rope_base, x.device)
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
