"""The public op: checks, choice of backend, autograd and ``torch.library`` registration."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_heads, check_scale, in_memory, unit_last
from hone_kernels.launch import Kept, eager, geometry, kept_beside, number, on_device_of

from .flash import flash_attention
from .layout import BlockLayout
from .reference import attention_reference

__all__ = ["SUPPORT", "Backend", "PooledKV", "block_sparse_attention", "check_layout"]


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
    # Of float16, and of blocks of 64 keys, the gradients come from the Triton kernels.
    "gluon": Support(
        dtypes=(torch.bfloat16, torch.float16),
        language="gluon",
        head_dims=(64, 128),
        blocks=(64, 128),
        min_sm=90,
        backward=True,
        max_sm=99,
    ),
    # Of others: only where it is named, until a committed bench shows it ahead.
    "flash": Support(
        dtypes=(torch.bfloat16, torch.float16),
        language="flash",
        head_dims=(64, 128),
        blocks=(128,),
        min_sm=90,
        backward=True,
        max_sm=99,
    ),
}


@dataclass(frozen=True, eq=False)
class PooledKV:
    """Further keys and values that every query reads, such as mean-pooled ones.

    Attributes:
        k: ``[B, HK, G, D]``.
        v: ``[B, HK, G, D]``.
        bias: Floating point, broadcastable to ``[B, HK, G]``, in natural-log units, added to the scaled logits:
            ``log(n)`` makes one key weigh as n. None: no bias. One that asks for no gradient is read again where torch
            counts a change: who writes past it (``.data``, a kernel of their own) gives a new tensor.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None


def check_layout(q: Tensor, k: Tensor, layout: BlockLayout) -> None:
    """Check that a layout is one, and made for ``q [B, H, TQ, D]`` and ``k [B, HK, TK, D]``.

    Raises:
        ValueError: If lengths, devices or axes differ.
        TypeError: If it is not a ``BlockLayout``.
    """
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout must be a BlockLayout (BlockLayout.dense, .from_mask, ...); got {type(layout).__name__}"
        )
    if (layout.tokens_q, layout.tokens_k) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"layout is for {layout.tokens_q} queries and {layout.tokens_k} keys, but q has {q.shape[2]} and k has "
            f"{k.shape[2]} tokens; build the layout for these lengths"
        )
    if layout.device != q.device:
        raise ValueError(f"layout is on {layout.device} but q is on {q.device}; build it with device=q.device")
    for axis, name, size in ((0, "batch", q.shape[0]), (1, "heads", q.shape[1])):
        if layout.kv_num.shape[axis] not in (1, size):
            raise ValueError(
                f"layout's {name} axis must be 1 or {size}, as in q; got {layout.kv_num.shape[axis]} "
                f"(kv_num is {list(layout.kv_num.shape)})"
            )
    if layout.k_valid is not None and layout.k_valid.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"k_valid's batch axis must be 1 or {q.shape[0]}, as in q; got {list(layout.k_valid.shape)}")


def _check_pooled(pooled: PooledKV, k: Tensor) -> None:
    batch, heads, _, dim = k.shape
    for name, x in (("pooled.k", pooled.k), ("pooled.v", pooled.v)):
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, dim) or x.shape[2] == 0:
            raise ValueError(f"{name} must be {[batch, heads, 'G', dim]} with G >= 1, as in k; got {list(x.shape)}")
        if x.dtype != k.dtype or x.device != k.device:
            raise TypeError(f"{name} must be {k.dtype} on {k.device}, like k; got {x.dtype} on {x.device}")
    if pooled.k.shape != pooled.v.shape:
        raise ValueError(
            f"pooled.k and pooled.v must have the same shape; got {list(pooled.k.shape)} and {list(pooled.v.shape)}"
        )
    if pooled.bias is not None:
        if not pooled.bias.is_floating_point() or pooled.bias.device != k.device:
            raise TypeError(
                f"pooled.bias must be floating point on {k.device}; got {pooled.bias.dtype} on {pooled.bias.device}"
            )
        want = pooled.k.shape[:3]
        try:
            fits = torch.broadcast_shapes(pooled.bias.shape, want) == want
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"pooled.bias must broadcast to [B, HK, G] = {list(want)}; got {list(pooled.bias.shape)}")


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    pooled: PooledKV | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
    deterministic: bool = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    pooled: PooledKV | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
    deterministic: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    pooled: PooledKV | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over listed key blocks and, in the same softmax, over pooled keys.

    Gradients reach q, k, v, the pooled keys, values and bias, from the output and from the log-sum-exp; they are exact
    and, run to run, bit-identical. No call waits for the device, so CUDA graphs can capture it.

    Args:
        q: ``[B, H, TQ, D]``, any strides with D contiguous.
        k: ``[B, HK, TK, D]``, H a multiple of HK: query head h reads key head ``h // (H // HK)``.
        v: ``[B, HK, TK, D]``.
        layout: Which key blocks each query block of each head reads.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        pooled: Further keys that every query reads.
        return_lse: Whether to return the log-sum-exp too.
        backend: ``"gluon"`` for Hopper GPUs, ``"triton"`` for any (or Triton's interpreter), ``"reference"`` for any
            device, ``"auto"`` for the first of these that can (see ``preference``). ``"flash"`` is FlashAttention 4,
            where it is installed: Hopper, without pooled keys and ``k_valid``, outside of ``torch.compile``; its
            gradients are not bit-identical. A named backend never gives way to another.
        deterministic: Whether gradients must be the same bits from run to run. Those of ``"gluon"`` come, for blocks
            of 128 keys, from its own kernel, which adds q's up in any order, in a buffer of 4 bytes for each value of
            q: in float32, if not; in fixed point, where the order does not matter, if so, for bfloat16 only. That is
            coarser in all rows of a head where a value or a channel of its keys is far above the others (README). Every
            other backward stays what it is.

    Returns:
        ``out [B, H, TQ, D]`` in q's dtype; with ``return_lse`` also ``lse [B, H, TQ]``, natural log, float32 (float64
        for float64 inputs). A query without any key gets ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: If shapes, layout and backend do not fit together.
        TypeError: If dtypes differ or the layout is not a ``BlockLayout``.
    """
    tensors = (q, k, v, *(() if pooled is None else (pooled.k, pooled.v, pooled.bias)))
    if eager(*tensors) and isinstance(layout, BlockLayout):
        facts, lists = geometry(*tensors), layout.geometry()
        call = (facts, lists, scale, backend) if facts and lists else None
        found = _checked.get(call) if call else None
        if found is None:
            found = (*_check(q, k, v, layout, scale, pooled, backend), number(call) if call else None)
            if call and found[1] != "reference":
                _checked.keep(call, found)
    else:
        found = (*_check(q, k, v, layout, scale, pooled, backend), None)
    scale, backend, key = found
    pooled_k, pooled_v, bias = (None, None, None) if pooled is None else (pooled.k, pooled.v, pooled.bias)
    source = bias
    if backend == "reference":
        out, lse = attention_reference(q, k, v, layout, scale, pooled_k, pooled_v, bias)
        return (out, lse) if return_lse else out
    if backend == "flash":
        with on_device_of(q):
            out, lse = flash_attention(unit_last(q), unit_last(k), unit_last(v), layout, scale)
        return (out, lse) if return_lse else out
    if pooled_k is not None and pooled_v is not None:
        pooled_k, pooled_v = unit_last(pooled_k), unit_last(pooled_v)
        if bias is not None:
            bias = bias.float().expand(pooled_k.shape[:3])
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    gradients = gradients_by(backend, q.dtype, layout.block_k, deterministic)
    if key is None:
        blocks = (layout.block_q, layout.block_k)
        out, lse = _attention_op(q, k, v, *layout.lists(), pooled_k, pooled_v, bias, *blocks, scale, backend, gradients)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, lse = _Attention.apply(q, k, v, pooled_k, pooled_v, bias, layout, scale, backend, gradients, key, source)
    else:
        out, lse = _forward(q, k, v, pooled_k, pooled_v, bias, layout, scale, backend, key, source)
    return (out, lse) if return_lse else out


_checked = Kept()
"""Scale, backend and number of calls that passed the checks, by all that the checks look at."""


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float | None,
    pooled: PooledKV | None,
    backend: Backend,
) -> tuple[float, Backend]:
    """The factor on the logits and the backend of a call."""
    check_heads(q, k, v)
    check_layout(q, k, layout)
    if pooled is not None:
        _check_pooled(pooled, k)
    scale = check_scale(scale, q.shape[3])
    kernels = preference(q.shape[3], pooled is not None)
    sizes = dict(head_dim=q.shape[3], block_q=layout.block_q, block_k=layout.block_k)
    if backend == "flash" and (pooled is not None or layout.k_valid is not None):
        raise ValueError("backend 'flash' cannot run this call: it takes no pooled keys and no k_valid")
    options: dict[str, Any] = dict(kernels=kernels, named=("flash",), **sizes)
    return scale, choose("block_sparse_attention", backend, SUPPORT, q.device, q.dtype, **options)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    bias: Tensor | None,
    layout: BlockLayout,
    scale: float,
    backend: Backend,
    key: Hashable,
    source: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a kernel, with what is kept of the layout and of calls of this geometry.

    ``source`` is the bias as the caller has it, beside which the kernel's form of it may be kept.
    """
    args = (q, k, v, *layout.lists(), pooled_k, pooled_v, bias, layout.block_q, layout.block_k, scale)
    with on_device_of(q):
        if backend == "gluon":
            from .gluon_sm90 import attention_forward, config_for, pad_bias, schedule

            batch, heads = q.shape[:2]
            # The launch counts in it: it is this stream's alone.
            table = layout.kept(("rows", batch, heads), lambda: schedule(layout.lists()[0], batch, heads, key))
            if pooled_k is None or source is None:
                return attention_forward(*args, table=table, key=key)
            keys = config_for(q.shape[3], layout.block_q).keys
            what = (pooled_k.shape[:3], keys)
            padded = kept_beside(source, what, lambda: pad_bias(bias, pooled_k, keys, key))
            return attention_forward(*args, table=table, bias=padded, key=key)
        from .triton import attention_forward as portable

        return portable(*args, key=key)


class _Attention(torch.autograd.Function):
    """The op outside of ``torch.compile``, where the registered one would cost more than the launches."""

    @staticmethod
    def forward(ctx, q, k, v, pooled_k, pooled_v, bias, layout, scale, backend, gradients, key, source):
        out, lse = _forward(q, k, v, pooled_k, pooled_v, bias, layout, scale, backend, key, source)
        # Its lists as columns are large: they live as long as the caller's layout, not as long as the graph.
        ctx.layout, ctx.sizes = weakref.ref(layout), (layout.block_q, layout.block_k, scale, gradients)
        ctx.save_for_backward(q, k, v, *layout.lists(), pooled_k, pooled_v, bias, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: the operator refuses its derivative, which there is none of.
            *tensors, out, lse = ctx.saved_tensors
            return *_operator_gradients(dout, dlse, tensors, out, lse, ctx.sizes), *[None] * 6
        q, k, v, kv_num, kv_idx, k_valid, pooled_k, pooled_v, bias, out, lse = ctx.saved_tensors
        layout = ctx.layout()
        columns = None if layout is None else layout.kept("columns", layout.transpose)
        grads = _gradients(
            columns, dout, dlse, q, k, v, out, lse, kv_num, kv_idx, k_valid, pooled_k, pooled_v, bias, *ctx.sizes
        )
        return *grads, *[None] * 6


def _gradients(
    columns: BlockLayout | None,
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    pooled_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    gradients: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, pooled k, pooled v and the bias.

    ``columns`` is the transposed layout, if it is there; ``gradients`` names the kernel, as ``gradients_by`` does.
    """
    attention_backward: Callable[..., tuple[Tensor | None, ...]]
    if gradients == "triton":
        from .triton import attention_backward
    else:
        from .gluon_backward_sm90 import attention_backward as one_kernel

        attention_backward = functools.partial(one_kernel, fixed=gradients == "fixed point")

    if columns is None:
        columns = BlockLayout(kv_num, kv_idx, q.shape[2], k.shape[2], block_q, block_k, check=False).transpose()
    with on_device_of(q):
        return attention_backward(
            in_memory(dout), dlse.contiguous(), q, k, v, out, lse, kv_num, kv_idx, columns.kv_num, columns.kv_idx,
            k_valid, pooled_k, pooled_v, pooled_bias, block_q, block_k, scale,
        )  # fmt: skip


def gradients_by(backend: str, dtype: torch.dtype, block_k: int, deterministic: bool) -> str:
    """The backward that goes with a forward: ``"triton"``, or Gluon's, ``"fixed point"`` or in ``"any order"``."""
    if backend != "gluon" or block_k != 128:
        return "triton"
    if not deterministic:
        return "any order"
    # What is infinite has no place in fixed point, and the gradient of a logit can be in float16 only.
    return "fixed point" if dtype == torch.bfloat16 else "triton"


def preference(dim: int, pooled: bool) -> tuple[Backend, Backend]:
    """Kernels in the order in which ``backend="auto"`` asks them.

    Steps of pooled keys need their biases in registers. At head size 64 Gluon then takes 0 to 6 % longer than Triton on
    whole blocks of 128, and from 2 % less to 4 % more on ragged ends (results/kernels/attention_h200.json).
    """
    return ("triton", "gluon") if pooled and dim == 64 else ("gluon", "triton")


@torch.library.custom_op("hone_kernels::block_sparse_attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    pooled_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    backend: str,
    gradients: str = "triton",
) -> tuple[Tensor, Tensor]:
    attention_forward: Callable[..., tuple[Tensor, Tensor]]
    if backend == "gluon":
        from .gluon_sm90 import attention_forward
    else:
        from .triton import attention_forward

    with on_device_of(q):
        return attention_forward(
            q, k, v, kv_num, kv_idx, k_valid, pooled_k, pooled_v, pooled_bias, block_q, block_k, scale
        )


@_attention_op.register_fake
def _(
    q,
    k,
    v,
    kv_num,
    kv_idx,
    k_valid,
    pooled_k,
    pooled_v,
    pooled_bias,
    block_q,
    block_k,
    scale,
    backend,
    gradients="triton",
):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hone_kernels::block_sparse_attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    pooled_bias: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    gradients: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _gradients(
        None, dout, dlse, q, k, v, out, lse, kv_num, kv_idx, k_valid, pooled_k, pooled_v, pooled_bias,
        block_q, block_k, scale, gradients,
    )  # fmt: skip
    # A custom op returns tensors only: an absent gradient is an empty one.
    dq, dk, dv, dpk, dpv, dbias = (q.new_empty(0) if g is None else g for g in grads)
    return dq, dk, dv, dpk, dpv, dbias


@_attention_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, kv_num, kv_idx, k_valid, pooled_k, pooled_v, pooled_bias, block_q, block_k, scale,
      gradients="triton"):  # fmt: skip
    absent = q.new_empty(0)
    pooled = (absent, absent) if pooled_k is None else (torch.empty_like(pooled_k), torch.empty_like(pooled_v))
    bias = absent if pooled_bias is None else q.new_empty(pooled_bias.shape, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *pooled, bias


def _save(ctx, inputs, output):
    *tensors, block_q, block_k, scale, _, gradients = inputs
    ctx.sizes = (block_q, block_k, scale, gradients)
    ctx.save_for_backward(*tensors, *output)


def _operator_gradients(dout, dlse, tensors, out, lse, sizes) -> list[Tensor | None]:
    """Gradients of q, k, v, pooled k, pooled v and the bias by the registered operator."""
    q, k, v, *rest = tensors
    op = torch.ops.hone_kernels.block_sparse_attention_backward
    return [g if g.numel() else None for g in op(dout, dlse, q, k, v, out, lse, *rest, *sizes)]


def _backward(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    dq, dk, dv, dpk, dpv, dbias = _operator_gradients(dout, dlse, tensors, out, lse, ctx.sizes)
    return dq, dk, dv, None, None, None, dpk, dpv, dbias, *[None] * 5


_attention_op.register_autograd(_backward, setup_context=_save)
