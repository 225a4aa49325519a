"""Exact nearest neighbours in Triton: both clouds along a curve through space, in blocks with boxes.

Boxes that lie further away than what was found already are passed over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ALL_PAIRS", "PRUNED", "along_curve", "nearest_points_triton"]

PRUNED = {"BLOCK_Q": 8, "BLOCK_K": 128, "num_warps": 1}
"""Points of a block of queries and of the cloud, and warps, where boxes are passed over: few fit a small box."""
ALL_PAIRS = {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4}
"""The same where all pairs are compared."""
BOXES = 128
"""Boxes that are looked at at a time."""
BITS = 21
"""Of each coordinate along the curve."""


@triton.jit
def _squared(CLOUD, block, size, qx, qy, qz, BLOCK_K: tl.constexpr):
    """Squared distances to one block of the cloud, infinite beyond the last point, and its rows."""
    at = block * BLOCK_K + tl.arange(0, BLOCK_K)
    real = at < size
    dx = qx[:, None] - tl.load(CLOUD + at * 3, mask=real, other=float("inf"))[None, :]
    dy = qy[:, None] - tl.load(CLOUD + at * 3 + 1, mask=real, other=0.0)[None, :]
    dz = qz[:, None] - tl.load(CLOUD + at * 3 + 2, mask=real, other=0.0)[None, :]
    return dx * dx + dy * dy + dz * dz, at


@triton.jit
def _look(CLOUD, block, size, qx, qy, qz, best, index, BLOCK_K: tl.constexpr):
    """The least of them, where it is below what was found already."""
    squared, _ = _squared(CLOUD, block, size, qx, qy, qz, BLOCK_K)
    least, place = tl.min(squared, 1, return_indices=True)
    closer = least < best
    return tl.where(closer, least, best), tl.where(closer, block * BLOCK_K + place, index)


@triton.jit
def _gap(BOX, box, blocks, low_x, low_y, low_z, high_x, high_y, high_z):
    """Squared distance from a box to each of others, infinite beyond the last."""
    real = box < blocks
    row = BOX + box * 6
    x = tl.maximum(tl.load(row, mask=real, other=0.0) - high_x, low_x - tl.load(row + 3, mask=real, other=0.0))
    y = tl.maximum(tl.load(row + 1, mask=real, other=0.0) - high_y, low_y - tl.load(row + 4, mask=real, other=0.0))
    z = tl.maximum(tl.load(row + 2, mask=real, other=0.0) - high_z, low_z - tl.load(row + 5, mask=real, other=0.0))
    x, y, z = tl.maximum(x, 0.0), tl.maximum(y, 0.0), tl.maximum(z, 0.0)
    # Rounding must not put a box further away than a point in it.
    return tl.where(real, (x * x + y * y + z * z) * 0.999999, float("inf"))


@triton.jit
def _nearest_kernel(
    POINTS, CLOUD, BOX, INDEX, SQUARED, LOOKS, count, size, blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOXES: tl.constexpr, PRUNE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # Past the end the last point is asked for again.
    row = tl.minimum(at, count - 1) * 3
    qx, qy, qz = tl.load(POINTS + row), tl.load(POINTS + row + 1), tl.load(POINTS + row + 2)
    best = tl.full([BLOCK_Q], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_Q], tl.int32)
    looks = 0
    if PRUNE:
        low_x, low_y, low_z = tl.min(qx, 0), tl.min(qy, 0), tl.min(qz, 0)
        high_x, high_y, high_z = tl.max(qx, 0), tl.max(qy, 0), tl.max(qz, 0)
        # First the block whose middle is nearest, which bounds what the others can give.
        nearest = float("inf")
        first = 0
        for begin in range(0, blocks, BOXES):
            box = begin + tl.arange(0, BOXES)
            real = box < blocks
            edge = BOX + box * 6
            x = tl.load(edge, mask=real, other=0.0) + tl.load(edge + 3, mask=real, other=0.0) - low_x - high_x
            y = tl.load(edge + 1, mask=real, other=0.0) + tl.load(edge + 4, mask=real, other=0.0) - low_y - high_y
            z = tl.load(edge + 2, mask=real, other=0.0) + tl.load(edge + 5, mask=real, other=0.0) - low_z - high_z
            middle = tl.where(real, x * x + y * y + z * z, float("inf"))
            least = tl.min(middle, 0)
            first = tl.where(least < nearest, begin + tl.argmin(middle, 0), first)
            nearest = tl.minimum(nearest, least)
        best, index = _look(CLOUD, first, size, qx, qy, qz, best, index, BLOCK_K)
        looks += 1
        for begin in range(0, blocks, BOXES):
            box = begin + tl.arange(0, BOXES)
            gap = _gap(BOX, box, blocks, low_x, low_y, low_z, high_x, high_y, high_z)
            gap = tl.where(box == first, float("inf"), gap)
            while tl.min(gap, 0) < tl.max(best, 0):
                place = tl.argmin(gap, 0)
                best, index = _look(CLOUD, begin + place, size, qx, qy, qz, best, index, BLOCK_K)
                gap = tl.where(box == begin + place, float("inf"), gap)
                looks += 1
    else:
        # A least value in each column, so that columns are compared once, at the end.
        wide = tl.full([BLOCK_Q, BLOCK_K], float("inf"), tl.float32)
        place = tl.zeros([BLOCK_Q, BLOCK_K], tl.int32)
        for block in range(0, blocks):
            squared, spot = _squared(CLOUD, block, size, qx, qy, qz, BLOCK_K)
            closer = squared < wide
            wide, place = tl.where(closer, squared, wide), tl.where(closer, spot[None, :], place)
        best = tl.min(wide, 1)
        index = tl.min(tl.where(wide == best[:, None], place, size), 1)
        looks += blocks
    tl.store(INDEX + at, index.to(tl.int64), mask=at < count)
    tl.store(SQUARED + at, best, mask=at < count)
    tl.store(LOOKS + tl.program_id(0), looks)


def along_curve(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Order of points ``[N, 3]`` along Morton's curve through the box from ``low`` to ``high``."""
    extent = (high - low).clamp(min=torch.finfo(points.dtype).tiny)
    cell = ((points - low) / extent * (2**BITS - 1)).long().clamp(0, 2**BITS - 1)
    for shift, mask in (
        (32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F), (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):  # fmt: skip
        cell = (cell | (cell << shift)) & mask
    return (cell[:, 0] | (cell[:, 1] << 1) | (cell[:, 2] << 2)).argsort()


def _boxes(cloud: Tensor, size: int) -> Tensor:
    """Least and largest coordinates of blocks of ``size``, ``[blocks, 6]``; its last point fills up the last."""
    missing = -len(cloud) % size
    whole = torch.cat([cloud, cloud[-1:].expand(missing, 3)]).unflatten(0, (-1, size))
    return torch.cat([whole.amin(1), whole.amax(1)], 1)


def nearest_points_triton(points: Tensor, cloud: Tensor, *, prune: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """See ``nearest_points``.

    Args:
        points: As there.
        cloud: As there.
        prune: Pass over boxes; without, all pairs are compared.

    Returns:
        Index, squared distance, and blocks of the cloud that each block of points was compared with.
    """
    count, device = len(points), points.device
    index = torch.empty(count, dtype=torch.long, device=device)
    squared = torch.empty(count, dtype=torch.float32, device=device)
    launch = PRUNED if prune else ALL_PAIRS
    looks = torch.empty(triton.cdiv(count, launch["BLOCK_Q"]), dtype=torch.int32, device=device)
    if not count:
        return index, squared, looks
    points, cloud = points.contiguous(), cloud.contiguous()
    if prune:
        low = torch.minimum(points.amin(0), cloud.amin(0))
        high = torch.maximum(points.amax(0), cloud.amax(0))
        order, cloud_order = along_curve(points, low, high), along_curve(cloud, low, high)
        points, cloud = points[order], cloud[cloud_order]
    boxes = _boxes(cloud, launch["BLOCK_K"])
    _nearest_kernel[(len(looks),)](
        points, cloud, boxes, index, squared, looks, count, len(cloud), len(boxes), BOXES=BOXES, PRUNE=prune, **launch
    )
    if prune:
        index = torch.empty_like(index).index_copy(0, order, cloud_order[index])
        squared = torch.empty_like(squared).index_copy(0, order, squared)
    return index, squared, looks
