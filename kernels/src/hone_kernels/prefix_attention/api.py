"""The public op: checks, choice of backend, ``torch.library`` registration and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_heads

from .reference import prefix_attention_reference

__all__ = ["SUPPORT", "Backend", "prefix_attention"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    "triton": Support(dtypes=(torch.float32, torch.float16, torch.bfloat16), language="triton", min_sm=80),
}


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    *,
    words: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of each row to the keys before its end, with gradients of q, k and v; no mask is made.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, HK, S, D]``, H a multiple of HK.
        v: Likewise.
        ends: int32 ``[S]``, not falling, and above each row's own place: where the keys end that it reads.
        words: bool ``[B, T]``, T at most S: which of the first T keys may be read; a row always reads itself.
        scale: Of the logits; None is ``D ** -0.5``.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        ``[B, H, S, D]``.

    Raises:
        ValueError: A shape, dtype, device or backend does not fit. What ``ends`` holds is not looked at.
        TypeError: Dtypes differ.
    """
    check_heads(q, k, v)
    tokens = q.shape[2]
    if k.shape[2] != tokens or ends.shape != (tokens,) or ends.dtype != torch.int32:
        raise ValueError(
            f"expected as many keys as queries, and ends int32 [S]; got {tokens}, {k.shape[2]} and {ends.dtype} "
            f"{list(ends.shape)}"
        )
    if words is not None and (
        words.dim() != 2 or len(words) != len(q) or not words.shape[1] <= tokens or words.dtype != torch.bool
    ):
        raise ValueError(f"words must be bool [{len(q)}, T], T at most {tokens}; got {words.dtype} {list(words.shape)}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if choose("prefix_attention", backend, SUPPORT, q.device, q.dtype) == "reference":
        return prefix_attention_reference(q, k, v, ends, words, scale)
    return torch.ops.hone_kernels.prefix_attention(q, k, v, ends, words, scale)[0]


@torch.library.custom_op("hone_kernels::prefix_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, words: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    from .triton import prefix_forward  # needs Triton

    with torch.cuda.device_of(q):
        return prefix_forward(q, k, v, ends, words, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, words: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hone_kernels::prefix_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, words: Tensor | None, scale: float, out: Tensor, lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton import prefix_backward  # needs Triton

    with torch.cuda.device_of(q):
        return prefix_backward(q, k, v, ends, words, scale, out, lse, grad)


@_attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, words: Tensor | None, scale: float, out: Tensor, lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, words, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, ends, words, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, ends, words, out, lse = ctx.saved_tensors
    found = torch.ops.hone_kernels.prefix_attention_backward(q, k, v, ends, words, ctx.scale, out, lse, grad)
    return *found, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)
