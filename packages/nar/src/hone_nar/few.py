"""A pass over few tokens in five launches a block, where a block of torch takes some twenty: ``few_tokens``' products.

With a batch of one a pass is 2 to 32 tokens, its products are as long as their weights take to be read, and each launch
costs as much as some megabytes of them.
"""

from __future__ import annotations

from typing import Any

from hone_kernels.few_tokens import attend_slots, linear_of_few
from torch import Tensor, nn

from .transformer import HEAD_NAMES, NARTransformer, SlotCache, norm_name, output_name, rope_table

__all__ = ["head_of_few", "is_plain", "run_few"]


def is_plain(model: Any) -> bool:
    """Whether these launches compute what the model does: it is in eval mode, and no layer was replaced or hooked."""
    parts = [model.get_submodule(output_name(name)) for name in HEAD_NAMES[model.heads]]
    for block in model.layers:
        attention, forward = block.attention, block.feed_forward
        parts += [attention.wqkv, attention.wo, forward.w1, forward.w3, forward.w2]
    plain = all(type(x) is nn.Linear and not x._forward_hooks and not x._forward_pre_hooks for x in parts)
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
        Hidden states ``[R * n, C]`` that each head reads.
    """
    rows, tokens, _ = x.shape
    x, turns = model.place(x, begin)
    x, rope, found = x.flatten(0, 1), None, []
    if turns is not None:
        rope = rope_table(model.order, model.cls_token_num, model.head_dim, model.config.rope_base, x.device)
    for number, block in enumerate(model.layers):
        attention, forward = block.attention, block.feed_forward
        norm = block.attention_norm
        qkv = linear_of_few(x, attention.wqkv.weight, norm=norm.weight, eps=norm.eps).unflatten(0, (rows, tokens))
        scale = attention.dim**-0.5
        out = attend_slots(qkv, rope, cache.k[number], cache.v[number], begin, scale=scale, words=words)
        x = linear_of_few(out.flatten(0, 1), attention.wo.weight, residual=x)
        norm = block.ffn_norm
        gated = linear_of_few(x, forward.w1.weight, up=forward.w3.weight, norm=norm.weight, eps=norm.eps)
        x = linear_of_few(gated, forward.w2.weight, residual=x)
        if number >= model.n_layer - 1:
            found.append(x)
    return found


def head_of_few(model: Any, number: int, hidden: Tensor, rows: Tensor) -> Tensor:
    """Logits ``[T, vocabulary]`` of a head at some rows, int32 ``[T]``, of ``[R * n, C]``; in the model's dtype."""
    name = HEAD_NAMES[model.heads][number]
    norm, output = model.get_submodule(norm_name(name)), model.get_submodule(output_name(name))
    return linear_of_few(hidden, output.weight, norm=norm.weight, eps=norm.eps, rows=rows)
