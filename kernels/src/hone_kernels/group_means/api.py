"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import unit_last
from hone_kernels.launch import Notes, Plans, Replay, eager, geometry, number, on_device_of, plannable

from .reference import group_means_reference

__all__ = ["SUPPORT", "Backend", "group_means"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16), backward=True),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", min_sm=80, backward=True
    ),
}


def _check(k: Tensor, v: Tensor, n: int, tokens: int) -> None:
    if k.dim() != 4 or (not torch.compiler.is_compiling() and 0 in k.shape):
        raise ValueError(f"k must be [B, HK, S, D] with an entry along every axis; got {list(k.shape)}")
    if (v.shape, v.device) != (k.shape, k.device):
        raise ValueError(
            f"k and v must share shape and device; got {list(k.shape)} on {k.device} and {list(v.shape)} on {v.device}"
        )
    if v.dtype != k.dtype:
        raise TypeError(f"k and v must share a dtype; got {k.dtype} and {v.dtype}")
    if n < 1:
        raise ValueError(f"n, the tokens of a group, must be at least 1; got {n}")
    if not 1 <= tokens <= k.shape[2]:
        raise ValueError(f"tokens, those that are averaged, must be 1 to {k.shape[2]}; got {tokens}")


def group_means(
    k: Tensor, v: Tensor, n: int, *, tokens: int | None = None, exact: bool = True, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Means of n consecutive keys, and of their values, as BLADE's global tokens are.

    Sums are float32 (float64 for float64), under autocast too. Gradients are exact and, run to run, the same bits.

    Args:
        k: ``[B, HK, S, D]``, any strides.
        v: Likewise.
        n: Tokens in a group.
        tokens: How many of the first are averaged; S if None.
        exact: Whether a short last group is the mean of its own; if not, copies of its last token fill it up.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        Two of ``[B, HK, ceil(tokens / n), D]`` in the dtype of k.

    Raises:
        ValueError: Shapes, n, tokens or backend do not fit.
        TypeError: k and v differ in dtype.
    """
    given, options = (k, v), (n, tokens, exact, backend, torch.is_grad_enabled())
    planned = plannable()
    again = _plans.find(options, given) if planned else None
    if again is not None:
        parts, addresses, stream = again
        if parts.differentiable:
            return _Means.apply(k, v, parts.sizes, again, None)
        pk, pv = parts.means(addresses, stream)
        return pk, pv
    tokens = k.shape[2] if tokens is None and k.dim() == 4 else tokens
    _check(k, v, n, tokens or 0)
    assert tokens is not None
    backend = choose("group_means", backend, SUPPORT, k.device, k.dtype)
    sizes = _Sizes(n, tokens, tokens % n if exact and tokens % n else n)
    if backend == "reference":
        return group_means_reference(k, *sizes), group_means_reference(v, *sizes)
    plain = eager(k, v)
    k, v = unit_last(k), unit_last(v)
    if not plain:
        return torch.ops.hone_kernels.group_means(k, v, *sizes)
    differentiable = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    # A copy made on the way is none of the call's tensors.
    replays: list[Replay | None] | None = [] if planned and k is given[0] and v is given[1] else None
    pk, pv = _Means.apply(k, v, sizes, None, replays) if differentiable else _run(k, v, sizes, replays)
    if replays:
        _plans.add(options, given, means=replays[0], sizes=sizes, differentiable=differentiable)
    return pk, pv


_plans = Plans()


class _Sizes(NamedTuple):
    """Tokens of a group, tokens in all, and what a short last group counts as."""

    n: int
    tokens: int
    last: int


def _run(k: Tensor, v: Tensor, sizes: _Sizes, replays: list[Replay | None] | None = None) -> tuple[Tensor, Tensor]:
    """By the kernel; to ``replays`` goes what does it again."""
    from .triton import group_means_triton  # needs Triton

    facts, notes = geometry(k, v), None if replays is None else Notes(k, v)
    with on_device_of(k):
        pk, pv = group_means_triton(k, v, *sizes, key=facts and number((facts, sizes)), notes=notes)
    if notes is not None and replays is not None:
        replays.append(notes.replay(pk, pv))
    return pk, pv


def _gradients(dpk: Tensor, dpv: Tensor, k: Tensor, v: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    from .triton import group_means_backward_triton

    dpk, dpv = unit_last(dpk), unit_last(dpv)
    facts = geometry(dpk, dpv, k, v)
    with on_device_of(k):
        return group_means_backward_triton(dpk, dpv, k, v, *sizes, key=facts and number((facts, sizes)))


class _Means(torch.autograd.Function):
    """The op outside of ``torch.compile``, where the registered one would cost more than the launch."""

    @staticmethod
    def forward(ctx, k, v, sizes, again, replays):
        ctx.sizes = sizes
        ctx.save_for_backward(k, v)
        if again is None:
            return _run(k, v, sizes, replays)
        parts, addresses, stream = again
        return tuple(parts.means(addresses, stream))

    @staticmethod
    def backward(ctx, dpk, dpv):
        # Where a graph of the gradient is wanted, the operator refuses its derivative, which there is none of.
        run = torch.ops.hone_kernels.group_means_backward if torch.is_grad_enabled() else _by_sizes
        return *run(dpk, dpv, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _by_sizes(dpk: Tensor, dpv: Tensor, k: Tensor, v: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    return _gradients(dpk, dpv, k, v, _Sizes(*sizes))


@torch.library.custom_op("hone_kernels::group_means", mutates_args=())
def _means_op(k: Tensor, v: Tensor, n: int, tokens: int, last: int) -> tuple[Tensor, Tensor]:
    return _run(k, v, _Sizes(n, tokens, last))


@_means_op.register_fake
def _(k, v, n, tokens, last):
    shape = (k.shape[0], k.shape[1], -(-tokens // n), k.shape[3])
    return k.new_empty(shape), v.new_empty(shape)


@torch.library.custom_op("hone_kernels::group_means_backward", mutates_args=())
def _means_backward_op(
    dpk: Tensor, dpv: Tensor, k: Tensor, v: Tensor, n: int, tokens: int, last: int
) -> tuple[Tensor, Tensor]:
    return _by_sizes(dpk, dpv, k, v, n, tokens, last)


@_means_backward_op.register_fake
def _(dpk, dpv, k, v, n, tokens, last):
    return torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    k, v, *ctx.sizes = inputs
    ctx.save_for_backward(k, v)


def _backward(ctx, dpk, dpv):
    return *torch.ops.hone_kernels.group_means_backward(dpk, dpv, *ctx.saved_tensors, *ctx.sizes), None, None, None


_means_op.register_autograd(_backward, setup_context=_save)
