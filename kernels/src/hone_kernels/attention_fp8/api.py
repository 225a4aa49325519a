"""FP8 block-sparse attention: quantised operands, the forward on them, and training through both.

With operands rounded to E4M3 (``x8 = round(x / scale)``) and ``s_ij = scale * q_scale_i * k_scale_j * (q8_i . k8_j)``:

    p_ij  = exp(s_ij - max_i)                                        in (0, 1]
    l_i   = sum over listed j of p_ij                                from p as it is
    out_i = v_scale / (448 * l_i) * sum of round(448 * p_ij) v8_j    from p rounded to E4M3
    lse_i = max_i + log(l_i) + scale * q_i . k_mean                  the last term where K was smoothed

``max_i`` is the largest logit met so far: what was accumulated is rescaled when it grows, as in any online softmax.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from hone_kernels.attention.api import SUPPORT as EXACT_SUPPORT
from hone_kernels.attention.api import check_layout, gradients_by, row_order
from hone_kernels.attention.layout import BlockLayout
from hone_kernels.attention.reference import attention_reference
from hone_kernels.backends import Backend, choose
from hone_kernels.checks import check_heads, check_scale, in_memory, unit_last
from hone_kernels.launch import Kept, Notes, Plans, eager, geometry, on_device_of, plannable

from .quantize import SUPPORT, FP8Operands, check_groups, fake_fields, quantize_fields, quantize_qkv
from .reference import absent_keys, attention_fp8_reference, dequantize, put_rows

__all__ = ["Delta", "quantized_attention", "straight_through_attention"]

Delta = Literal["exact", "forward"]


@overload
def quantized_attention(
    operands: FP8Operands,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    out_dtype: torch.dtype | None = ...,
    out: Tensor | None = ...,
    order: Tensor | None = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def quantized_attention(
    operands: FP8Operands,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    out_dtype: torch.dtype | None = ...,
    out: Tensor | None = ...,
    order: Tensor | None = ...,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def quantized_attention(
    operands: FP8Operands,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    order: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over listed key blocks on E4M3 operands; the formulas are at the head of this module.

    No gradient, and no call waits for the device.

    Args:
        operands: From ``quantize_qkv``; with padded keys, of the same ``k_valid`` as the layout.
        layout: Which key blocks each query block of each head reads.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        return_lse: Whether to return the log-sum-exp too.
        out_dtype: Of the output, bfloat16 if None; that of ``out`` where one is given. The reference computes in
            float64 for float64, else in float32.
        out: ``[B, H, S, D]``, D contiguous: where to write the output. It may be the memory of the queries that were
            rounded.
        order: ``[TQ]`` int32 or int64, with ``out``: the place in it of each query's output, as ``quantize_qkv`` took
            it from there. Slots behind ``layout.k_valid`` hold no token and are written nowhere; what no slot stands
            for stays as it is.
        backend: As for ``quantize_qkv``.

    Returns:
        ``out``, or a new one ``[B, H, TQ, D]``, in memory ``[B, TQ, H, D]``, as the projection behind it wants it; with
        ``return_lse`` also ``lse [B, H, TQ]`` float32 (float64), natural log, of the keys before smoothing. A query
        without any key gets ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: If operands, layout and backend do not fit together.
        TypeError: If the layout is not a ``BlockLayout``.

    Source: FPSAttention (arXiv 2506.04648), section 3.
    """
    if not isinstance(operands, FP8Operands):
        raise TypeError(f"operands must be FP8Operands, from quantize_qkv; got {type(operands).__name__}")
    x = operands
    operand = (x.q8, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale)
    tensors = (*operand, out, order)
    key = found = notes = None
    if plannable() and type(layout) is BlockLayout:
        further = (layout.k_valid, out, order)
        given = [*operand, layout.kv_num, layout.kv_idx, *(t for t in further if t is not None)]
        sizes = (x.block, layout.tokens_q, layout.tokens_k, layout.block_q, layout.block_k)
        absent = tuple([t is None for t in (*further, x.k_mean, x.q_dot_mean)])
        kind = (sizes, absent, scale, return_lse, out_dtype, backend)
        again = _plans.find(kind, given)
        if again is not None:
            parts, addresses, stream = again
            lse, made = parts.forward(addresses, stream)
            if out is None:
                out = made
            else:
                torch.autograd.graph.increment_version(out)
            if not return_lse:
                return out
            return out, lse if x.q_dot_mean is None else lse + parts.scale * x.q_dot_mean
        if not any(t.requires_grad for t in given):
            notes = Notes(*given)
    plain = eager(*tensors) and isinstance(layout, BlockLayout)
    if plain:
        facts, lists = geometry(*tensors), layout.geometry()
        if facts and lists:
            smooth = (x.k_mean is None, x.q_dot_mean is None)
            key = (facts, lists, x.block, smooth, scale, return_lse, out_dtype, backend)
            found = _checked.get(key)
    if found is None:
        found = _check(operands, layout, scale, return_lse, out_dtype, out, order, backend)
        if key and found[2] != "reference":
            _checked.keep(key, found)
    scale, out_dtype, backend = found
    if backend == "reference":
        dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
        rows, lse = attention_fp8_reference(*operands.dequantize(dtype), layout, scale)
        if out is None:
            out = rows.to(out_dtype).transpose(1, 2).contiguous().transpose(1, 2)
        else:
            put_rows(out, rows, order, layout.k_valid, layout.block_k)
    else:
        args = (*operand, *layout.lists(), x.block, layout.block_q, layout.block_k, scale)
        if plain and not any(t is not None and t.requires_grad for t in tensors):
            into = out
            out, lse = _forward(*args, out_dtype, out, order, notes)
            if into is not None:
                torch.autograd.graph.increment_version(into)
            if notes is not None:
                _plans.add(kind, given, forward=notes.replay(lse, out if into is None else None), scale=scale)
        elif out is None:
            out, lse = _forward_op(*args, out_dtype)
        else:
            lse = _forward_into_op(out, order, *args)
    if not return_lse:
        return out
    return out, lse if operands.q_dot_mean is None else lse + scale * operands.q_dot_mean


_plans = Plans()

_checked = Kept()
"""Scale, output dtype and backend of calls that passed the checks, by all that the checks look at."""


def _check(
    operands: FP8Operands, layout: BlockLayout, scale: float | None, return_lse: bool, out_dtype: torch.dtype | None,
    out: Tensor | None, order: Tensor | None, backend: Backend,
) -> tuple[float, torch.dtype, Backend]:  # fmt: skip
    """The factor on the logits, the output's dtype and the backend of a call."""
    check_heads(operands.q8, operands.k8)
    check_layout(operands.q8, operands.k8, layout)
    scale = check_scale(scale, operands.q8.shape[3])
    out_dtype = _check_output(operands, layout, out_dtype, out, order)
    if return_lse and operands.k_mean is not None and operands.q_dot_mean is None:
        raise ValueError("return_lse needs operands that were made for it; call quantize_qkv with for_lse=True")
    if not out_dtype.is_floating_point or out_dtype.itemsize == 1:
        raise TypeError(f"out_dtype must be float64, float32, bfloat16 or float16; got {out_dtype}")
    q8 = operands.q8
    blocks: dict[str, Any] = dict(block_q=layout.block_q, block_k=layout.block_k)
    backend = choose("quantized_attention", backend, SUPPORT, q8.device, None, head_dim=q8.shape[3], **blocks)
    return scale, out_dtype, backend


def _check_output(
    operands: FP8Operands, layout: BlockLayout, dtype: torch.dtype | None, out: Tensor | None, order: Tensor | None
) -> torch.dtype:
    """The output's dtype."""
    if out is None:
        if order is not None:
            raise ValueError("order says where in out each row goes; pass out")
        return torch.bfloat16 if dtype is None else dtype
    batch, heads, tokens, dim = operands.q8.shape
    want = (batch, heads, tokens if order is None else out.shape[2], dim)
    if tuple(out.shape) != want or out.device != operands.q8.device or out.stride(3) != 1:
        raise ValueError(
            f"out must be {list(want)} on {operands.q8.device} with its channels side by side; got {list(out.shape)} "
            f"on {out.device}, strides {out.stride()}"
        )
    if any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out must have memory for each element; got strides {out.stride()} for {list(out.shape)}")
    if dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype is that of out, {out.dtype}; got {dtype}. Leave it out")
    if order is not None:
        if order.shape != (tokens,) or order.dtype not in (torch.int32, torch.int64) or order.device != out.device:
            raise ValueError(
                f"order must be [{tokens}], a place for each query, int32 or int64 on {out.device}; got {order.dtype} "
                f"{list(order.shape)} on {order.device}"
            )
        if layout.k_valid is not None and operands.k8.shape[2] != tokens:
            raise ValueError(
                f"order with k_valid is for slots that queries and keys share; got {tokens} queries and "
                f"{operands.k8.shape[2]} keys"
            )
    return out.dtype


@overload
def straight_through_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    smooth_k: bool = ...,
    group: int | Tensor = ...,
    delta: Delta = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def straight_through_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = ...,
    smooth_k: bool = ...,
    group: int | Tensor = ...,
    delta: Delta = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def straight_through_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    smooth_k: bool = False,
    group: int | Tensor = 1,
    delta: Delta = "exact",
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``block_sparse_attention`` with operands and P rounded to E4M3, differentiable straight through the rounding.

    The gradient is that of exact attention at the rounded q, k and v (each rounding passes its gradient on unchanged:
    ``x + (round(x) - x).detach()``), so it is computed by the 16-bit backward on them.

    Args:
        q: ``[B, H, TQ, D]``, any strides with D contiguous.
        k: ``[B, HK, TK, D]``, H a multiple of HK.
        v: ``[B, HK, TK, D]``.
        layout: Which key blocks each query block of each head reads.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        smooth_k: See ``quantize_qkv``.
        group: See ``quantize_qkv``; of blocks of 128 tokens, or where the layout has ``k_valid`` of its ``block_k``.
        delta: What the softmax gradient subtracts, ``sum(dout * out)`` per query, takes ``out`` from: ``"exact"``, the
            output with P unrounded, which the backward computes again, at the cost of a 16-bit forward; ``"forward"``,
            the rounded output that is there already. Only with the first do the gradients of a query's logits sum to
            zero; with the second the rounding of P leaks into dq and dk as an error common to all keys of a query.
        return_lse: Whether to return the log-sum-exp too.
        backend: As for ``quantize_qkv``. It names the FP8 kernels; the 16-bit forward of ``delta="exact"`` is Gluon's
            where that can run.

    Returns:
        As ``quantized_attention``, in q's dtype.

    Raises:
        ValueError: If shapes, layout, options and backend do not fit together.
        TypeError: If dtypes differ or the layout is not a ``BlockLayout``.

    Source: ``"exact"`` as Attn-QAT (FastVideo), ``"forward"`` as SLA2 (arXiv 2602.12675).
    Differs: dV takes P unrounded, where Attn-QAT rounds it there too.
    """
    check_heads(q, k, v)
    check_layout(q, k, layout)
    if delta not in get_args(Delta):
        raise ValueError(f"delta must be one of {get_args(Delta)}; got {delta!r}")
    block = 128 if layout.k_valid is None else layout.block_k
    groups = check_groups(block, group, q.shape[2], k.shape[2], q.device)
    scale = check_scale(scale, q.shape[3])
    blocks: dict[str, Any] = dict(block_q=layout.block_q, block_k=layout.block_k)
    backend = choose("straight_through_attention", backend, SUPPORT, q.device, q.dtype, head_dim=q.shape[3], **blocks)
    if backend == "reference":
        out, lse = _straight_through_reference(q, k, v, layout, scale, smooth_k, group, delta, block)
        return (out, lse) if return_lse else out
    q, k, v = (unit_last(x) for x in (q, k, v))
    if eager(q, k, v) and type(layout) is BlockLayout:
        sizes = (block, *blocks.values(), scale)
        out, lse, q_dot_mean = _StraightThrough.apply(q, k, v, layout, sizes, groups, smooth_k, delta)
    else:
        out, lse, *_, q_dot_mean = _straight_through_op(
            q, k, v, *layout.lists(), block, *blocks.values(), scale, groups, smooth_k, delta
        )
    if not return_lse:
        return out
    return out, lse + scale * q_dot_mean if smooth_k else lse


def _straight_through_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, smooth_k: bool, group: int | Tensor,
    delta: Delta, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op and its gradient in plain torch."""
    given = q.dtype
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    operands = quantize_qkv(
        q, k, v, block=block, group=group, smooth_k=smooth_k, k_valid=layout.k_valid, backend="reference"
    )
    rounded = operands.dequantize(dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if layout.k_valid is not None:
        # Keys that do not exist were rounded to zero whatever they hold, and NaN minus NaN is none.
        absent = absent_keys(layout.k_valid, layout.tokens_k, block)
        k, v = k.masked_fill(absent, 0), v.masked_fill(absent, 0)
    q8, k8, v8 = (x + (r - x).detach() for x, r in zip((q, k, v), rounded, strict=True))
    out, lse = attention_reference(q8, k8, v8, layout, scale)
    lossy, lossy_lse = attention_fp8_reference(*rounded, layout, scale)
    error = (lossy - out).detach()
    if delta == "forward":
        # The same value; its gradient to each logit is what sum(dout * error) in delta makes of it.
        error = error * (1 - (lse - lse.detach()).nan_to_num()).unsqueeze(-1)
    lse = lse + (lossy_lse - lse).nan_to_num().detach()
    if operands.k_mean is not None:
        lse = lse + scale * (q * _per_query_head(operands.k_mean, q)).sum(-1)
    return (out + error).to(given), lse


def _per_query_head(k_mean: Tensor, q: Tensor) -> Tensor:
    """``[B, H, 1, D]`` in q's dtype."""
    return k_mean.to(q.dtype).repeat_interleave(q.shape[1] // k_mean.shape[1], dim=1).unsqueeze(2)


def _forward(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    order: Tensor | None = None,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor]:
    from .triton import attention_fp8_forward

    order = None if order is None else unit_last(order)
    with on_device_of(q8):
        return attention_fp8_forward(
            q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, out_dtype,
            out=out, order=order, notes=notes,
        )  # fmt: skip


@torch.library.custom_op("hone_kernels::quantized_attention", mutates_args=())
def _forward_op(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _forward(
        q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, out_dtype
    )


@_forward_op.register_fake
def _(q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, out_dtype):
    return _fake_output(q8, out_dtype)


@torch.library.custom_op("hone_kernels::quantized_attention_into", mutates_args=("out",))
def _forward_into_op(
    out: Tensor,
    order: Tensor | None,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    return _forward(
        q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, out.dtype, out,
        order,
    )[1]  # fmt: skip


@_forward_into_op.register_fake
def _(out, order, q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale):
    return q8.new_empty(q8.shape[:3], dtype=torch.float32)


def _fake_output(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    out = q.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)
    return out, q.new_empty((batch, heads, tokens), dtype=torch.float32)


class _StraightThrough(torch.autograd.Function):
    """The op outside of ``torch.compile``, where the registered one would cost more than the launches."""

    @staticmethod
    def forward(ctx, q, k, v, layout, sizes, groups, smooth_k, delta):
        args = (q, k, v, *layout.lists(), *sizes, groups, smooth_k)
        out, lse, *fields = _straight_through(*args)
        *operands, k_mean, q_dot_mean = fields
        ctx.set_materialize_grads(False)
        # What is made of its lists lives as long as the caller's layout, not as long as the graph.
        ctx.layout, ctx.sizes, ctx.delta, ctx.smooth_k = weakref.ref(layout), sizes, delta, smooth_k
        ctx.save_for_backward(out, lse, *operands, k_mean, *layout.lists())
        return out, lse, q_dot_mean

    @staticmethod
    def backward(ctx, dout, dlse, d_dot_mean):
        out, lse, *operands, k_mean, kv_num, kv_idx, k_valid = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        args = (out, lse, *operands, kv_num, kv_idx, k_valid, *ctx.sizes, ctx.delta)
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: the operator refuses its derivative, which there is none of.
            dlse = torch.zeros_like(lse) if dlse is None else dlse
            dq, dk, dv = torch.ops.hone_kernels.straight_through_attention_backward(dout, dlse, *args)
        else:
            dq, dk, dv = _straight_through_gradients(ctx.layout(), dout, dlse, *args)
        return _with_mean(dq, d_dot_mean if ctx.smooth_k else None, k_mean), dk, dv, *[None] * 5


def _with_mean(dq: Tensor, d_dot_mean: Tensor | None, k_mean: Tensor) -> Tensor:
    """The gradient of q with what comes through ``q . k_mean``."""
    if d_dot_mean is None:
        return dq
    return dq + d_dot_mean.unsqueeze(-1).to(dq.dtype) * _per_query_head(k_mean, dq)


@torch.library.custom_op("hone_kernels::straight_through_attention", mutates_args=())
def _straight_through_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    groups: Tensor | None,
    smooth_k: bool,
    delta: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp of the smoothed keys, and the operands, kept for the backward instead of q, k and v."""
    return _straight_through(q, k, v, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, groups, smooth_k)


def _straight_through(q, k, v, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, groups, smooth_k):
    from .triton import attention_fp8_forward

    fields = quantize_fields(q, k, v, None, None, None, k_valid, block, groups, smooth_k, 0, smooth_k)
    with on_device_of(q):
        out, lse = attention_fp8_forward(*fields[:6], kv_num, kv_idx, k_valid, block, block_q, block_k, scale, q.dtype)
    return out, lse, *fields


@_straight_through_op.register_fake
def _(q, k, v, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, groups, smooth_k, delta):
    return *_fake_output(q, q.dtype), *fake_fields(q, k, None, block, smooth_k, smooth_k)


@torch.library.custom_op("hone_kernels::straight_through_attention_backward", mutates_args=())
def _straight_through_backward_op(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    delta: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _straight_through_gradients(
        None, dout, dlse, out, lse, q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q,
        block_k, scale, delta,
    )  # fmt: skip


_gradient_plans = Plans()


def _straight_through_gradients(
    layout: BlockLayout | None,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    delta: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. ``layout`` is the caller's, if it still lives, with which columns and order are kept."""
    attention_forward: Callable[..., tuple[Tensor, Tensor]]
    attention_backward: Callable[..., tuple[Any, ...]]
    from hone_kernels.attention.triton import attention_backward, attention_forward

    from .triton import has_e4m3

    whole = layout
    if whole is None:
        whole = BlockLayout(kv_num, kv_idx, q8.shape[2], k8.shape[2], block_q, block_k, check=False)
    columns = whole.transpose() if layout is None else layout.kept("columns", layout.transpose)
    sizes: dict[str, Any] = dict(head_dim=q8.shape[3], block_q=block_q, block_k=block_k)
    gluon = EXACT_SUPPORT["gluon"].reason(q8.device, dout.dtype, **sizes) is None
    operands = (q8, k8, v8, q_scale, k_scale, v_scale)
    with on_device_of(q8):
        table = None
        if gluon and delta == "exact":
            table = row_order(whole, q8.shape[0], q8.shape[1])
        further = (dlse, k_valid, table, *((out, lse) if delta == "forward" else ()))
        given = (
            dout,
            *operands,
            kv_num,
            kv_idx,
            columns.kv_num,
            columns.kv_idx,
            *[x for x in further if x is not None],
        )
        kind = (block, block_q, block_k, scale, delta, *[x is None for x in further])
        again = _gradient_plans.find(kind, given) if plannable() else None
        if again is not None:
            parts, addresses, stream = again
            return parts.backward(addresses, stream)
        notes = Notes(*given)
        if has_e4m3(q8):
            from .triton_quantize import dequantize_triton

            q, k, v = dequantize_triton(*operands, block, dout.dtype, notes)
        else:
            q, k, v = dequantize(*operands, block, dout.dtype)
        options: dict[str, Any] = dict(notes=notes)
        if gluon:
            from hone_kernels.attention.gluon_sm90 import attention_forward

            options["table"] = table
            if gradients_by("gluon", q.dtype, block_k, deterministic=True) != "triton":
                from hone_kernels.attention.gluon_backward_sm90 import attention_backward as one_kernel

                # The log-sum-exp of rounded operands is not quite that of what they stand for in 16 bits.
                attention_backward = functools.partial(one_kernel, weight=1.125 if delta == "exact" else 2.0)
        no_pooled = (None, None, None)
        if delta == "exact":
            out, lse = attention_forward(
                q, k, v, kv_num, kv_idx, k_valid, *no_pooled, block_q, block_k, scale, **options
            )
        dq, dk, dv, *_ = attention_backward(
            in_memory(dout), None if dlse is None else dlse.contiguous(), q, k, v, out, lse, kv_num, kv_idx,
            columns.kv_num, columns.kv_idx, k_valid, *no_pooled, block_q, block_k, scale, notes=notes,
        )  # fmt: skip
    if plannable():
        _gradient_plans.add(kind, given, backward=notes.replay(dq, dk, dv))
    return dq, dk, dv


@_straight_through_backward_op.register_fake
def _(dout, dlse, out, lse, q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k,
      scale, delta):  # fmt: skip
    return tuple(x.new_empty(x.shape, dtype=dout.dtype) for x in (q8, k8, k8))


def _save(ctx, inputs, output):
    _, _, _, kv_num, kv_idx, k_valid, *ctx.sizes, ctx.scale, _, ctx.smooth_k, ctx.delta = inputs
    out, lse, *fields = output
    # The operands are outputs that carry no gradient: without this they would each get one of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *fields[:7], kv_num, kv_idx, k_valid)


def _backward(ctx, dout, dlse, *rest):
    out, lse, *fields, k_mean, kv_num, kv_idx, k_valid = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = torch.ops.hone_kernels.straight_through_attention_backward(
        dout, torch.zeros_like(lse) if dlse is None else dlse, out, lse, *fields, kv_num, kv_idx, k_valid, *ctx.sizes,
        ctx.scale, ctx.delta,
    )  # fmt: skip
    return _with_mean(dq, rest[-1] if ctx.smooth_k else None, k_mean), dk, dv, *[None] * 10


_straight_through_op.register_autograd(_backward, setup_context=_save)
