"""Attention over a pyramid of keys: every pair of blocks is read as it is, coarsely, or not at all, in one softmax.

Of pairs with factor r = 2, 4 or 8 the queries read means of r consecutive keys and values, which weigh as r by ``ln r``
on their logits. Pooling is part of the op: gradients are those of k and v.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_heads, check_scale, check_tensor, in_memory, unit_last
from hone_kernels.launch import on_device_of

from .reference import pyramid_reference

__all__ = ["SUPPORT", "pyramid_attention"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16), backward=True),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        language="triton",
        head_dims=(32, 64, 96, 128),
        blocks=(32, 64, 128, 256),
        min_sm=80,
        backward=True,
    ),
    # Of bfloat16, level 0's gradients come from the lists' Gluon kernel; all others from Triton's.
    "gluon": Support(
        dtypes=(torch.bfloat16, torch.float16),
        language="gluon",
        head_dims=(64, 128),
        blocks=(128,),
        min_sm=90,
        backward=True,
        max_sm=99,
    ),
}


@overload
def pyramid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor,
    *,
    block: int = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
    check: bool = ...,
) -> Tensor: ...


@overload
def pyramid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor,
    *,
    block: int = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
    check: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def pyramid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor,
    *,
    block: int = 128,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every pair of blocks is read at its factor.

    Gradients reach q, k and v, from the output and from the log-sum-exp; they are exact and, run to run, bit-identical.

    Args:
        q: ``[B, H, TQ, D]``, any strides with D contiguous.
        k: ``[B, HK, TK, D]``, H a multiple of HK: query head h reads key head ``h // (H // HK)``.
        v: ``[B, HK, TK, D]``.
        factors: int32 ``[B, H, ceil(TQ / block), ceil(TK / block)]``: 1 reads the keys of the block as they are, r = 2,
            4 or 8 the means of r consecutive ones, 0 skips the pair. A short last block of keys is not pooled: 0 or 1.
        block: Tokens in a block, of queries as of keys; a multiple of 8.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        return_lse: Whether to return the log-sum-exp too.
        backend: As for ``block_sparse_attention``, without ``"flash"``. The kernels' means are rounded to k's dtype.
        check: Look at the values of ``factors``, which waits for the device. False where an op made them: then those
            that are not as above give wrong results in silence.

    Returns:
        ``out [B, H, TQ, D]`` in q's dtype; with ``return_lse`` also ``lse [B, H, TQ]``, natural log, float32 (float64
        for float64 inputs). A query without any key gets ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: If shapes, factors and backend do not fit together.
        TypeError: If dtypes differ.

    Source: Pyramid Sparse Attention (arXiv 2512.04025).
    Differs: the release fills a short last block with copies that count, and merges pooled blocks of less than half of
        its tile wrongly. Here every block is exact.
    """
    check_heads(q, k, v)
    if block < 8 or block % 8:
        raise ValueError(f"block must be a positive multiple of 8, the coarsest factor; got {block}")
    blocks = (-(-q.shape[2] // block), -(-k.shape[2] // block))
    check_tensor("factors", factors, (q.shape[0], q.shape[1], *blocks), q.device, torch.int32)
    if check:
        _check_values(factors, k.shape[2] % block != 0)
    scale = check_scale(scale, q.shape[3])
    backend = choose(
        "pyramid_attention", backend, SUPPORT, q.device, q.dtype, kernels=("gluon", "triton"),
        head_dim=q.shape[3], block=block,
    )  # fmt: skip
    if backend == "reference":
        out, lse = pyramid_reference(q, k, v, factors, block, scale)
    else:
        q, k, v = unit_last(q), unit_last(k), unit_last(v)
        out, lse = _pyramid_op(q, k, v, factors, block, scale, backend)
    return (out, lse) if return_lse else out


def _check_values(factors: Tensor, ragged: bool) -> None:
    wrong = (factors != 0) & (factors != 1) & (factors != 2) & (factors != 4) & (factors != 8)
    if bool(wrong.any()):
        raise ValueError(f"factors must be 0, 1, 2, 4 or 8; got {int(factors[wrong][0])}")
    if ragged and bool((factors[..., -1] > 1).any()):
        raise ValueError(
            f"the last block of keys is short, so its factors must be 0 or 1; got {int(factors[..., -1].max())}"
        )


@torch.library.custom_op("hone_kernels::pyramid_attention", mutates_args=())
def _pyramid_op(
    q: Tensor, k: Tensor, v: Tensor, factors: Tensor, block: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    from .triton import attention_forward, lists, pool

    with on_device_of(q):
        num, tiles, idx = lists(factors, k.shape[2] // block)
        pooled_k, pooled_v = pool(k, v, block)
        if backend == "gluon":
            from .gluon_sm90 import attention_forward as gluon_forward

            return gluon_forward(q, k, v, pooled_k, pooled_v, num, idx, tiles[1], scale)
        return attention_forward(q, k, v, pooled_k, pooled_v, num, idx, block, scale)


@_pyramid_op.register_fake
def _(q, k, v, factors, block, scale, backend):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hone_kernels::pyramid_attention_backward", mutates_args=())
def _pyramid_backward_op(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor,
    out: Tensor,
    lse: Tensor,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import attention_backward, lists, pool

    dout, dlse = in_memory(dout), dlse.contiguous()
    listed = None
    with on_device_of(q):
        whole = k.shape[2] // block
        num, tiles, idx = lists(factors, whole)
        q_num, q_tiles, q_idx = lists(factors, whole, columns=True)
        # In fixed point, which is for bfloat16.
        if backend == "gluon" and q.dtype == torch.bfloat16:
            from hone_kernels.attention.gluon_backward_sm90 import attention_backward as gluon_backward

            listed = gluon_backward(
                dout, dlse, q, k, v, out, lse, tiles[0], idx, q_tiles[0], q_idx, None, None, None, None, block, block,
                scale,
            )[:3]  # fmt: skip
        # Means again: to keep them would take as much memory as k and v.
        pooled_k, pooled_v = pool(k, v, block)
        return attention_backward(
            dout, dlse, q, k, v, pooled_k, pooled_v, out, lse, num, idx, q_num, q_idx, block, scale, listed,
        )  # fmt: skip


@_pyramid_backward_op.register_fake
def _(dout, dlse, q, k, v, factors, out, lse, block, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, factors, *sizes = inputs
    ctx.sizes = sizes
    ctx.save_for_backward(q, k, v, factors, *output)


def _backward(ctx, dout, dlse):
    q, k, v, factors, out, lse = ctx.saved_tensors
    grads = torch.ops.hone_kernels.pyramid_attention_backward(dout, dlse, q, k, v, factors, out, lse, *ctx.sizes)
    return *grads, *[None] * 4


_pyramid_op.register_autograd(_backward, setup_context=_save)
