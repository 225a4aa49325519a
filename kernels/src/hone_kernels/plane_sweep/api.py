"""The public op: checks, choice of backend, ``torch.library`` registration and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose

from .reference import sweep_planes_reference

__all__ = ["SUPPORT", "Backend", "sweep_planes"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32), backward=True),
    "triton": Support(dtypes=(torch.float32,), language="triton", min_sm=80, backward=True),
}


def sweep_planes(
    features: Tensor,
    others: Tensor,
    ray: Tensor,
    shift: Tensor,
    inverse_depth: Tensor,
    *,
    half: float,
    backend: Backend = "auto",
) -> Tensor:
    """Likeness of each view to others where its pixels fall at candidate depths, the mean over the others.

    A pixel at inverse depth s lies in another view's camera at ``ray / s + shift``; divided by its last entry, at least
    0.001, it is a place in pixels, whose pixel centres lie at ``half`` beyond integers. There the other's features are
    taken bilinearly, zero outside, and multiplied with the view's own, over the root of the channels.

    Args:
        features: float ``[N, C, H, W]``. Gradients flow to it.
        others: int64 ``[N, m]``, views that each is compared with.
        ray: ``[N, m, 3, H * W]``.
        shift: ``[N, m, 3, 1]``.
        inverse_depth: ``[N, D, H, W]``, or ``[N, D, 1, 1]`` for candidates that all pixels share.
        half: 0 or 0.5.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.
            Triton keeps no warped features, and gives no gradient to the geometry.

    Returns:
        ``[N, D, H, W]``.

    Raises:
        ValueError: If a shape, dtype, device or the backend does not fit, or the geometry needs a gradient that the
            backend does not give.
    """
    views, _, height, width = features.shape
    count = others.shape[1]
    shapes = {
        "others": (others, (views, count)),
        "ray": (ray, (views, count, 3, height * width)),
        "shift": (shift, (views, count, 3, 1)),
    }
    for name, (part, shape) in shapes.items():
        if part.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(part.shape)}")
    if inverse_depth.shape[0] != views or tuple(inverse_depth.shape[2:]) not in ((height, width), (1, 1)):
        raise ValueError(
            f"inverse_depth must be [{views}, D, {height}, {width}] or [{views}, D, 1, 1]; got "
            f"{list(inverse_depth.shape)}"
        )
    if half not in (0.0, 0.5) or others.dtype != torch.int64:
        raise ValueError(f"expected half 0 or 0.5 and others of int64; got {half} and {others.dtype}")
    geometry = any(part.requires_grad for part in (ray, shift, inverse_depth)) and torch.is_grad_enabled()
    if geometry and backend != "reference":
        if backend != "auto":
            raise ValueError(
                f"backend {backend!r} gives rays and depths no gradient; use the reference, or detach them"
            )
        backend = "reference"
    backend = choose("sweep_planes", backend, SUPPORT, features.device, features.dtype)
    if backend == "reference":
        return sweep_planes_reference(features, others, ray, shift, inverse_depth, half)
    return torch.ops.hone_kernels.sweep_planes(features, others, ray, shift, inverse_depth, half)


@torch.library.custom_op("hone_kernels::sweep_planes", mutates_args=())
def _sweep(features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float) -> Tensor:
    from .triton import sweep_planes_forward  # needs Triton

    with torch.cuda.device_of(features):
        return sweep_planes_forward(features, others, ray, shift, inverse_depth, half)


@_sweep.register_fake
def _(features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float) -> Tensor:
    return features.new_empty(features.shape[0], inverse_depth.shape[1], *features.shape[2:])


@torch.library.custom_op("hone_kernels::sweep_planes_backward", mutates_args=())
def _sweep_backward(
    features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float, grad: Tensor
) -> Tensor:
    from .triton import sweep_planes_backward

    with torch.cuda.device_of(features):
        return sweep_planes_backward(features, others, ray, shift, inverse_depth, half, grad)


@_sweep_backward.register_fake
def _(
    features: Tensor, others: Tensor, ray: Tensor, shift: Tensor, inverse_depth: Tensor, half: float, grad: Tensor
) -> Tensor:
    return features.new_empty(features.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.half = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.hone_kernels.sweep_planes_backward(*ctx.saved_tensors, ctx.half, grad)
    return found, None, None, None, None, None


_sweep.register_autograd(_backward, setup_context=_setup)
