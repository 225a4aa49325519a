"""The public op: checks, choice of backend, ``torch.library`` registration and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose

from .reference import DRAWN, TILE, VALUES, blend_tiles_reference

__all__ = ["DRAWN", "SUPPORT", "TILE", "VALUES", "Backend", "blend_tiles"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32), backward=True),
    "triton": Support(dtypes=(torch.float32,), language="triton", min_sm=80, backward=True),
}


def blend_tiles(
    values: Tensor, order: Tensor, counts: Tensor, rows: int, columns: int, *, backend: Backend = "auto"
) -> Tensor:
    """Blend the listed Gaussians of each tile front to back.

    With d the offset of a pixel's centre from a Gaussian's, alpha = opacity exp(-(a dx^2 + c dy^2) / 2 - b dx dy), at
    most 0.999 and nothing below 1/255. A Gaussian is drawn with alpha times the light that those before it leave; one
    after which less than 1e-4 would be left is not, nor what follows.

    Args:
        values: float ``[M, 10]`` of the Gaussians as a camera sees them: centre (x, y) in pixels, inverse covariance
            (a, b, c), opacity, colour (3), depth. Gradients flow to it.
        order: int64 ``[P]``: tile after tile, the rows of ``values`` from front to back.
        counts: int64 ``[T]``: entries of each tile; tiles are counted picture by picture, row by row.
        rows: Tiles down a picture.
        columns: Tiles across.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        ``[T, 16, 5]``: colour, covered share and summed depth of a tile's pixels, row by row.

    Raises:
        ValueError: If a shape, dtype, device or the backend does not fit.

    Source: 3D Gaussian Splatting (2023); constants as in gsplat 1.5.
    """
    if values.dim() != 2 or values.shape[1] != VALUES:
        raise ValueError(f"values must be [M, {VALUES}]; got {list(values.shape)}")
    if order.dim() != 1 or counts.dim() != 1 or {order.dtype, counts.dtype} != {torch.int64}:
        raise ValueError(
            f"order and counts must be int64 [P] and [T]; got {order.dtype} {list(order.shape)} and {counts.dtype} "
            f"{list(counts.shape)}"
        )
    if rows < 1 or columns < 1 or len(counts) % (rows * columns):
        raise ValueError(f"expected whole pictures of {rows} x {columns} tiles; got {len(counts)} tiles")
    if len({values.device, order.device, counts.device}) > 1:
        raise ValueError(f"values lie on {values.device}, order on {order.device}, counts on {counts.device}")
    backend = choose("blend_tiles", backend, SUPPORT, values.device, values.dtype)
    if backend == "reference":
        return blend_tiles_reference(values, order, counts, rows, columns)
    given = (values.contiguous(), order.contiguous(), counts.contiguous())
    return torch.ops.hone_kernels.blend_tiles(*given, rows, columns)


@torch.library.custom_op("hone_kernels::blend_tiles", mutates_args=())
def _blend(values: Tensor, order: Tensor, counts: Tensor, rows: int, columns: int) -> Tensor:
    from .triton import blend_tiles_forward  # needs Triton

    with torch.cuda.device_of(values):
        return blend_tiles_forward(values, order, counts, rows, columns)


@_blend.register_fake
def _(values: Tensor, order: Tensor, counts: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(counts.shape[0], TILE * TILE, DRAWN)


@torch.library.custom_op("hone_kernels::blend_tiles_backward", mutates_args=())
def _blend_backward(
    values: Tensor, order: Tensor, counts: Tensor, out: Tensor, grad: Tensor, rows: int, columns: int
) -> Tensor:
    from .triton import blend_tiles_backward

    with torch.cuda.device_of(values):
        return blend_tiles_backward(values, order, counts, out, grad, rows, columns)


@_blend_backward.register_fake
def _(values: Tensor, order: Tensor, counts: Tensor, out: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty_like(values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, order, counts, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(values, order, counts, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, order, counts, out = ctx.saved_tensors
    found = torch.ops.hone_kernels.blend_tiles_backward(
        values, order, counts, out, grad.contiguous(), ctx.rows, ctx.columns
    )
    return found, None, None, None, None


_blend.register_autograd(_backward, setup_context=_setup)
