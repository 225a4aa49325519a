"""Attention of others that may be installed: dense, and over the same lists of blocks. One place for every bench."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .flash import flash_attention, whole_lists
from .layout import BlockLayout

__all__ = ["DENSE_PEERS", "LISTED_PEERS", "Attend", "cudnn", "dense_fp8", "dense_peer", "flex", "listed_peer"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[B, H, S, D]`` each, and so the output."""

DENSE_PEERS: dict[str, list[tuple[str, str, bool]]] = {
    "flash-attn 4 dense": [("flash_attn.cute", "flash_attn_func", True)],
    "flash-attn 3 dense": [
        ("flash_attn_interface", "flash_attn_func", True),
        ("fa3_fwd_interface", "flash_attn_func", False),
    ],
    "flash-attn 2 dense": [("flash_attn", "flash_attn_func", True)],
    "sageattention dense": [("sageattention", "sageattn", False)],
}
"""Dense providers of 16-bit inputs: modules, the first of which is taken, their function, whether it has gradients."""

_BLOCK = 128


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _function(name: str, backward: bool = False) -> tuple[str, Callable[..., Any]] | str:
    """Module and function of a peer of ``DENSE_PEERS``, or why there is none."""
    reasons = []
    for module, function, has_gradients in DENSE_PEERS[name]:
        if backward and not has_gradients:
            reasons.append(f"{module} has no gradients")
            continue
        try:
            return module, getattr(importlib.import_module(module), function)
        except Exception as error:  # a shared library that does not load raises what it likes
            reasons.append(f"{type(error).__name__}: {error}")
    return "; ".join(reasons)


def dense_peer(name: str, backward: bool = False) -> Attend | str:
    """A peer of ``DENSE_PEERS``, or why there is none."""
    found = _function(name, backward)
    if isinstance(found, str):
        return found
    module, attend = found
    return functools.partial(attend, tensor_layout="HND") if module == "sageattention" else _heads_last(attend)


def _heads_last(attend: Callable[..., Any]) -> Attend:
    """A function of ``[B, S, H, D]``, as FlashAttention has it, on ``[B, H, S, D]``."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)))  # [B, S, H, D]
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return flash


def dense_fp8(q: Tensor, k: Tensor, v: Tensor) -> Attend | str:
    """FlashAttention 3 on these tensors rounded to E4M3, with a scale a head, or why there is none.

    They are rounded here, once: what is returned takes no notice of its arguments.
    """
    if q.shape[1] != k.shape[1]:
        return "its scales of queries are those of key heads"
    found = _function("flash-attn 3 dense")
    if isinstance(found, str):
        return found
    operands, scales = [], {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        x = x.detach().transpose(1, 2)  # [B, S, H, D]
        scale = x.abs().amax((1, 3)).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        operands.append((x / scale[:, None, :, None]).to(torch.float8_e4m3fn))
        scales[f"{name}_descale"] = scale
    return _heads_last(lambda *_: found[1](*operands, **scales))


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    # Of the op's overloads, the one that returns the output alone.
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False))


def flex(layout: BlockLayout) -> Attend:
    """FlexAttention over the same lists, compiled."""
    mask = layout.to_block_mask()
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _flash4(layout: BlockLayout, backward: bool) -> Attend:
    """FlashAttention 4 over the lists."""
    importlib.import_module("flash_attn.cute.block_sparsity")
    return lambda q, k, v: flash_attention(q, k, v, layout, q.shape[3] ** -0.5, return_lse=False)[0]


def _cudnn_lists(layout: BlockLayout, backward: bool) -> Attend:
    """The block-sparse op of nvidia-cudnn-frontend over the lists."""
    found = importlib.import_module("cudnn.block_sparse_attention")

    if layout.tokens_q % _BLOCK or layout.tokens_k % _BLOCK:
        raise ValueError("it takes whole blocks only")

    @functools.cache
    def options(batch: int, heads: int) -> dict[str, Any]:
        num, idx = whole_lists(layout, batch, heads)
        return {"q2k_block_index": idx, "q2k_block_nums": num, "sparse_block_size": _BLOCK, "layout": "bshd"}

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv)
            # A dictionary that gives its values in turn.
            out, lse = found.block_sparse_attention_forward(q, k, v, **options(*qkv[0].shape[:2]))
            ctx.save_for_backward(q, k, v, out, lse)
            return out.transpose(1, 2)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
            q, k, v, out, lse = ctx.saved_tensors
            some = options(q.shape[0], q.shape[2])
            dout = dout.transpose(1, 2).contiguous()
            dq, dk, dv = found.block_sparse_attention_backward(dout, q, k, v, out, lse, **some)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    if backward:
        return Function.apply
    return _heads_last(
        lambda q, k, v: found.block_sparse_attention_forward(q, k, v, **options(q.shape[0], q.shape[2]))[0]
    )


LISTED_PEERS: dict[str, Callable[[BlockLayout, bool], Attend]] = {
    "flash-attn 4": _flash4,
    "cudnn block-sparse": _cudnn_lists,
}
"""Providers that read the same lists, of 128 x 128 blocks."""


def listed_peer(name: str, layout: BlockLayout, backward: bool = False) -> Attend | str:
    """A peer of ``LISTED_PEERS`` over these lists, or why there is none."""
    if layout.k_valid is not None or (layout.block_q, layout.block_k) != (_BLOCK, _BLOCK):
        return f"it takes blocks of {_BLOCK} without k_valid"
    try:
        return LISTED_PEERS[name](layout, backward)
    except Exception as error:  # a shared library that does not load raises what it likes
        return f"{type(error).__name__}: {error}"
