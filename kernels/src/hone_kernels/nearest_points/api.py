"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose

from .reference import nearest_points_reference

__all__ = ["SUPPORT", "Backend", "nearest_points"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32)),
    "triton": Support(dtypes=(torch.float32,), language="triton", min_sm=80),
}


def nearest_points(points: Tensor, cloud: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Row of ``cloud`` that is nearest to each point, and its squared distance; exact, without gradients.

    Args:
        points: float ``[N, 3]``, finite.
        cloud: float ``[M, 3]`` of the same dtype, finite, at least one.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        int64 ``[N]``, any of them where several are nearest, the same in every run; and ``[N]``.

    Raises:
        ValueError: If a shape, dtype, device or the backend does not fit.
    """
    for name, part in (("points", points), ("cloud", cloud)):
        if part.dim() != 2 or part.shape[1] != 3:
            raise ValueError(f"{name} must be [N, 3]; got {list(part.shape)}")
    if not len(cloud):
        raise ValueError("there is no point to be near to: expected at least one")
    if points.dtype != cloud.dtype or points.device != cloud.device:
        raise ValueError(
            f"expected one dtype and device; got {points.dtype} on {points.device}, {cloud.dtype} on {cloud.device}"
        )
    backend = choose("nearest_points", backend, SUPPORT, points.device, points.dtype)
    return torch.ops.hone_kernels.nearest_points(points.detach(), cloud.detach(), backend)


@torch.library.custom_op("hone_kernels::nearest_points", mutates_args=())
def _nearest_points(points: Tensor, cloud: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return nearest_points_reference(points, cloud)
    from .triton import nearest_points_triton  # needs Triton

    with torch.cuda.device_of(points):
        return nearest_points_triton(points, cloud)[:2]


@_nearest_points.register_fake
def _(points: Tensor, cloud: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return points.new_empty(points.shape[0], dtype=torch.int64), points.new_empty(points.shape[0])
