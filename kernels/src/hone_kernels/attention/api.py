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
from hone_kernels.launch import (
    Kept,
    Notes,
    Plans,
    Replay,
    eager,
    geometry,
    kept_beside,
    number,
    on_device_of,
    plannable,
)

from .flash import flash_attention
from .layout import BlockLayout
from .reference import attention_reference

__all__ = ["SUPPORT", "Backend", "PooledKV", "block_sparse_attention", "check_layout", "row_order"]


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
            device, ``"auto"`` for the first of these that can. ``"flash"`` is FlashAttention 4,
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
    kind = given = None
    if plannable() and type(layout) is BlockLayout:
        given, which = _given(q, k, v, layout, pooled)
        sizes = (layout.tokens_q, layout.tokens_k, layout.block_q, layout.block_k)
        kind = (sizes, which, scale, backend, deterministic, torch.is_grad_enabled())
        again = _plans.find(kind, given)
        if again is not None:
            call = again[0].call
            source = None if pooled is None else pooled.bias
            if call.differentiable:
                out, lse = _Attention.apply(q, k, v, *_pooled(pooled), layout, call, again, source, None)
            else:
                out, lse = _replay(again, layout, None if pooled is None else pooled.k, source)
            return (out, lse) if return_lse else out
    tensors = (q, k, v, *(() if pooled is None else (pooled.k, pooled.v, pooled.bias)))
    if eager(*tensors) and isinstance(layout, BlockLayout):
        facts, lists = geometry(*tensors), layout.geometry()
        looked_at = (facts, lists, scale, backend) if facts and lists else None
        found = _checked.get(looked_at) if looked_at else None
        if found is None:
            found = (*_check(q, k, v, layout, scale, pooled, backend), number(looked_at) if looked_at else None)
            if looked_at and found[1] != "reference":
                _checked.keep(looked_at, found)
    else:
        found = (*_check(q, k, v, layout, scale, pooled, backend), None)
    scale, backend, key = found
    if backend == "reference":
        further = () if pooled is None else (pooled.k, pooled.v, pooled.bias)
        out, lse = attention_reference(q, k, v, layout, scale, *further)
        return (out, lse) if return_lse else out
    if backend == "flash":
        with on_device_of(q):
            out, lse = flash_attention(unit_last(q), unit_last(k), unit_last(v), layout, scale)
        return (out, lse) if return_lse else out
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
    gradients = gradients_by(backend, q.dtype, layout.block_k, deterministic)
    if key is None:
        blocks = (layout.block_q, layout.block_k)
        out, lse = _attention_op(q, k, v, *layout.lists(), *_pooled(pooled), *blocks, scale, backend, gradients)
        return (out, lse) if return_lse else out
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    source = None if pooled is None else pooled.bias
    # A copy made on the way is none of the call's tensors.
    whole = given is not None and all(x is source or x.stride(-1) == 1 for x in given)
    call = _Call(key, q.shape[0], q.shape[1], layout.block_q, layout.block_k, scale, backend, gradients, differentiable)
    notes: list[Replay | None] | None = [] if whole else None
    args = (q, k, v, *_pooled(pooled), layout, call)
    out, lse = _Attention.apply(*args, None, source, notes) if differentiable else _forward(*args, source, notes)
    if notes and given is not None:
        _plans.add(kind, given, call=call, forward=notes[0])
    return (out, lse) if return_lse else out


_plans = Plans()
_schedules = Plans()
_backward_plans = Plans()


@dataclass(frozen=True)
class _Call:
    """What the launches of a call depend on.

    Attributes:
        key: Number of its geometry and options.
        batch: B.
        heads: H.
        block_q: Queries in a block.
        block_k: Keys in a block.
        scale: Factor on the logits.
        backend: Of the forward.
        gradients: As ``gradients_by`` has it.
        differentiable: Whether a gradient may be asked for.
    """

    key: Hashable
    batch: int
    heads: int
    block_q: int
    block_k: int
    scale: float
    backend: str
    gradients: str
    differentiable: bool

    @property
    def sizes(self) -> tuple[int, int, float, str]:
        """What the gradients depend on."""
        return self.block_q, self.block_k, self.scale, self.gradients


def _given(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, pooled: PooledKV | None) -> tuple[list[Tensor], int]:
    """A call's tensors, and which there are of those that need not be."""
    given, which = [q, k, v, layout.kv_num, layout.kv_idx], 0
    if layout.k_valid is not None:
        given.append(layout.k_valid)
        which = 1
    if pooled is not None:
        given += (pooled.k, pooled.v)
        which |= 2
        if pooled.bias is not None:
            given.append(pooled.bias)
            which |= 4
    return given, which


def _pooled(pooled: PooledKV | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pooled keys, values and their bias ``[B, HK, G]`` float32, as the kernels read them."""
    if pooled is None:
        return None, None, None
    k = unit_last(pooled.k)
    return k, unit_last(pooled.v), None if pooled.bias is None else pooled.bias.float().expand(k.shape[:3])


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
    sizes = dict(head_dim=q.shape[3], block_q=layout.block_q, block_k=layout.block_k)
    if backend == "flash" and (pooled is not None or layout.k_valid is not None):
        raise ValueError("backend 'flash' cannot run this call: it takes no pooled keys and no k_valid")
    options: dict[str, Any] = dict(kernels=("gluon", "triton"), named=("flash",), **sizes)
    return scale, choose("block_sparse_attention", backend, SUPPORT, q.device, q.dtype, **options)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    bias: Tensor | None,
    layout: BlockLayout,
    call: _Call,
    source: Tensor | None,
    replays: list[Replay | None] | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a kernel, with what is kept of the layout and of calls of this geometry.

    ``source`` is the bias as the caller has it, beside which the kernel's form of it may be kept. To ``replays`` goes
    what does it again for the tensors of ``_given``, behind which the kept ones stand.
    """
    lists = layout.lists()
    args = (q, k, v, *lists, pooled_k, pooled_v, bias, call.block_q, call.block_k, call.scale)
    given = [x for x in (q, k, v, *lists, pooled_k, pooled_v, source) if x is not None]
    options: dict[str, Any] = {}
    attention_forward: Callable[..., tuple[Tensor, Tensor]]
    with on_device_of(q):
        if call.backend == "gluon":
            from .gluon_sm90 import attention_forward

            options["table"] = row_order(layout, call.batch, call.heads)
            if pooled_k is not None and source is not None:
                options["bias"] = _padded(source, pooled_k, call)
            given += options.values()
        else:
            from .triton import attention_forward
        notes = None if replays is None else Notes(*given)
        if notes is not None:
            notes.same(bias, source)
        out, lse = attention_forward(*args, **options, key=call.key, notes=notes)
    if notes is not None and replays is not None:
        replays.append(notes.replay(out, lse))
    return out, lse


def row_order(layout: BlockLayout, batch: int, heads: int) -> Tensor:
    """``gluon_sm90.schedule`` of a layout, kept with it. A launch counts in it: it is this stream's alone."""
    return layout.kept(("rows", batch, heads), functools.partial(_schedule, layout, batch, heads))


def _schedule(layout: BlockLayout, batch: int, heads: int) -> Tensor:
    from .gluon_sm90 import schedule

    given = (layout.kv_num,)
    again = _schedules.find((batch, heads), given) if plannable() else None
    if again is not None:
        parts, addresses, stream = again
        return parts.rows(addresses, stream)[0]
    facts, num = geometry(*given), unit_last(layout.kv_num)
    notes = Notes(num)
    table = schedule(num, batch, heads, facts and number((facts, batch, heads)), notes)
    if num is layout.kv_num and plannable():
        _schedules.add((batch, heads), given, rows=notes.replay(table))
    return table


def _padded(source: Tensor, pooled_k: Tensor, call: _Call) -> Tensor:
    """The bias as the kernel reads it, kept beside the caller's."""
    from .gluon_sm90 import config_for, pad_bias

    shape, keys = pooled_k.shape[:3], config_for(pooled_k.shape[3], call.block_q).keys

    def make() -> Tensor:
        return pad_bias(source.detach().float().expand(shape), pooled_k, keys, call.key)

    return kept_beside(source, (shape, keys), make)


def _replay(
    again: tuple[Any, list[int], int], layout: BlockLayout, pooled_k: Tensor | None, source: Tensor | None
) -> list[Tensor]:
    """Output and log-sum-exp by a plan."""
    parts, addresses, stream = again
    held = []  # till the launches are out: of lists from inference mode nobody else keeps them
    if parts.call.backend == "gluon":
        held.append(row_order(layout, parts.call.batch, parts.call.heads))
        if pooled_k is not None and source is not None:
            held.append(_padded(source, pooled_k, parts.call))
    addresses += [x.data_ptr() for x in held]
    return parts.forward(addresses, stream)


class _Attention(torch.autograd.Function):
    """The op outside of ``torch.compile``, where the registered one would cost more than the launches."""

    @staticmethod
    def forward(ctx, q, k, v, pooled_k, pooled_v, bias, layout, call, again, source, replays):
        if again is None:
            out, lse = _forward(q, k, v, pooled_k, pooled_v, bias, layout, call, source, replays)
        else:
            out, lse = _replay(again, layout, pooled_k, source)
        ctx.set_materialize_grads(False)
        # Its lists as columns are large: they live as long as the caller's layout, not as long as the graph.
        ctx.layout, ctx.call = weakref.ref(layout), call
        ctx.save_for_backward(q, k, v, *layout.lists(), pooled_k, pooled_v, bias, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, kv_num, kv_idx, k_valid, pooled_k, pooled_v, bias, out, lse = saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: the operator refuses its derivative, which there is none of.
            dlse = torch.zeros_like(lse) if dlse is None else dlse
            return *_operator_gradients(dout, dlse, saved[:9], out, lse, ctx.call.sizes), *[None] * 5
        layout = ctx.layout()
        columns = None if layout is None else layout.kept("columns", layout.transpose)
        grads = _gradients(
            columns, dout, dlse, q, k, v, out, lse, kv_num, kv_idx, k_valid, pooled_k, pooled_v, bias, *ctx.call.sizes
        )
        return *grads, *[None] * 5


def _gradients(
    columns: BlockLayout | None,
    dout: Tensor,
    dlse: Tensor | None,
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
    if columns is None:
        columns = BlockLayout(kv_num, kv_idx, q.shape[2], k.shape[2], block_q, block_k, check=False).transpose()
    given = kind = None
    if plannable():
        some = (dlse, k_valid, pooled_k, pooled_v, pooled_bias)
        given = [dout, q, k, v, out, lse, kv_num, kv_idx, columns.kv_num, columns.kv_idx]
        given += [x for x in some if x is not None]
        kind = (block_q, block_k, scale, gradients, *[x is None for x in some])
        again = _backward_plans.find(kind, given)
        if again is not None:
            parts, addresses, stream = again
            return parts.backward(addresses, stream)
    if gradients == "triton":
        from .triton import attention_backward
    else:
        from .gluon_backward_sm90 import attention_backward as one_kernel

        attention_backward = functools.partial(one_kernel, fixed=gradients == "fixed point")
    notes = None if given is None else Notes(*given)
    with on_device_of(q):
        grads = attention_backward(
            in_memory(dout), None if dlse is None else dlse.contiguous(), q, k, v, out, lse, kv_num, kv_idx,
            columns.kv_num, columns.kv_idx, k_valid, pooled_k, pooled_v, pooled_bias, block_q, block_k, scale,
            notes=notes,
        )  # fmt: skip
    if notes is not None and given is not None:
        _backward_plans.add(kind, given, backward=notes.replay(*grads))
    return grads


def gradients_by(backend: str, dtype: torch.dtype, block_k: int, deterministic: bool) -> str:
    """The backward that goes with a forward: ``"triton"``, or Gluon's, ``"fixed point"`` or in ``"any order"``."""
    if backend != "gluon" or block_k != 128:
        return "triton"
    if not deterministic:
        return "any order"
    # What is infinite has no place in fixed point, and the gradient of a logit can be in float16 only.
    return "fixed point" if dtype == torch.bfloat16 else "triton"


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
