"""Cameras: OpenCV ``cam_to_world`` and normalised intrinsics, rays, unprojection, conversions, paths.

A pose maps camera to world, axes +x right, +y down, +z forward. ``intrinsics_norm`` is K with its first row divided by
the width and its second by the height, so that it holds at any resolution. Pixel centres lie at half-integers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "DepthConvention",
    "check_cameras",
    "exact_geometry",
    "fly_through",
    "intrinsics_px",
    "look_at",
    "matrix_to_quat",
    "opengl_to_opencv",
    "pixel_centres",
    "quat_multiply",
    "quat_to_matrix",
    "rays",
    "unproject",
]

DepthConvention = Literal["distance", "depth_z"]
"""What a depth map holds: distance along the ray, or depth along the optical axis."""
RIGID = 1e-3
P = ParamSpec("P")
R = TypeVar("R")


def exact_geometry(function: Callable[P, R]) -> Callable[P, R]:
    """Outside of autocast, with half-precision tensors widened: a ray in bfloat16 misses by whole pixels."""

    def wide(part: Any) -> Any:
        return part.float() if isinstance(part, Tensor) and part.dtype in (torch.bfloat16, torch.float16) else part

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(part.device.type for part in (*args, *kwargs.values()) if isinstance(part, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*map(wide, args), **{name: wide(part) for name, part in kwargs.items()})

    return run


def check_cameras(cam_to_world: Tensor, intrinsics_norm: Tensor, names: list[str] | None = None) -> None:
    """Refuse poses and intrinsics that no camera has, naming the first that is wrong.

    Args:
        cam_to_world: ``[V, 4, 4]``.
        intrinsics_norm: ``[V, 3, 3]``.
        names: What the views are called; their numbers if None.

    Raises:
        ValueError: A value is not finite, a rotation is no rotation or left-handed, a focal length is not positive.
    """
    if cam_to_world.shape[1:] != (4, 4) or intrinsics_norm.shape != (len(cam_to_world), 3, 3):
        raise ValueError(
            f"expected poses [V, 4, 4] and intrinsics [V, 3, 3]; got {list(cam_to_world.shape)} and "
            f"{list(intrinsics_norm.shape)}"
        )

    def refuse(bad: Tensor, why: str) -> None:
        if bool(bad.any()):
            index = int(bad.nonzero()[0, 0])
            raise ValueError(f"view {names[index] if names else index}: {why}")

    poses, inner = cam_to_world.double(), intrinsics_norm.double()
    refuse(~poses.isfinite().flatten(1).all(1), "the pose is not finite. Remove the view or estimate its pose again.")
    refuse(~inner.isfinite().flatten(1).all(1), "the intrinsics are not finite.")
    rotation = poses[:, :3, :3]
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=poses.dtype, device=poses.device)
    refuse((poses[:, 3] - last).abs().amax(1) > RIGID, "the last row of the pose must be 0 0 0 1.")
    gram = rotation @ rotation.mT - torch.eye(3, dtype=poses.dtype, device=poses.device)
    refuse(gram.abs().flatten(1).amax(1) > RIGID, "the pose holds no rotation: its axes are not orthonormal.")
    refuse(
        torch.linalg.det(rotation) < 0,
        "the pose is left-handed (determinant -1). Expected OpenCV axes: +x right, +y down, +z forward.",
    )
    refuse((inner[:, 0, 0] <= 0) | (inner[:, 1, 1] <= 0), "a focal length must be positive.")


def pixel_centres(
    height: int, width: int, *, device: torch.device | str | None = None
) -> Float[Tensor, "height width 2"]:
    """Normalised (x, y) of every pixel's centre, in (0, 1)."""
    y, x = torch.meshgrid(
        (torch.arange(height, device=device) + 0.5) / height,
        (torch.arange(width, device=device) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack([x, y], -1)


def rays(
    points: Float[Tensor, "*batch point 2"],
    intrinsics_norm: Float[Tensor, "*batch 3 3"],
    convention: DepthConvention,
) -> Float[Tensor, "*batch point 3"]:
    """Camera-frame direction through each normalised image point, scaled so that a depth multiplies it.

    Args:
        points: Normalised image coordinates, (x, y) in [0, 1].
        intrinsics_norm: Of each camera.
        convention: ``distance`` gives unit length, ``depth_z`` gives z = 1.
    """
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], -1)
    direction = homogeneous @ torch.linalg.inv(intrinsics_norm).mT
    if convention == "distance":
        return F.normalize(direction, dim=-1)
    return direction / direction[..., 2:]


def unproject(
    depth: Float[Tensor, "*batch height width"],
    cam_to_world: Float[Tensor, "*batch 4 4"],
    intrinsics_norm: Float[Tensor, "*batch 3 3"],
    convention: DepthConvention,
    offset_px: Float[Tensor, "*batch height width 2"] | None = None,
) -> Float[Tensor, "*batch height width 3"]:
    """World point of every pixel.

    Args:
        depth: Of each pixel's centre, in scene units.
        cam_to_world: Poses.
        intrinsics_norm: Intrinsics.
        convention: What ``depth`` holds.
        offset_px: Shift (x, y) of each pixel's ray, in pixels.
    """
    height, width = depth.shape[-2:]
    points = pixel_centres(height, width, device=depth.device).to(depth.dtype)
    if offset_px is not None:
        points = points + offset_px / offset_px.new_tensor([width, height])
    points = points.expand(*depth.shape, 2).flatten(-3, -2)
    directions = rays(points, intrinsics_norm, convention) @ cam_to_world[..., :3, :3].mT
    world = cam_to_world[..., None, :3, 3] + directions * depth.flatten(-2)[..., None]
    return world.unflatten(-2, (height, width))


def intrinsics_px(intrinsics_norm: Float[Tensor, "*batch 3 3"], height: int, width: int) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics in pixels."""
    return intrinsics_norm * intrinsics_norm.new_tensor([[width], [height], [1.0]])


def opengl_to_opencv(cam_to_world: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Poses of OpenGL, Blender and nerfstudio (+y up, +z back) in OpenCV axes; its own inverse."""
    return cam_to_world * cam_to_world.new_tensor([1.0, -1.0, -1.0, 1.0])


def look_at(
    position: Float[Tensor, "*batch 3"], target: Float[Tensor, "*batch 3"], down: Float[Tensor, " 3"]
) -> Float[Tensor, "*batch 4 4"]:
    """Pose at a position that looks at a target, with the picture's lower edge towards ``down``."""
    forward = F.normalize(target - position, dim=-1)
    right = F.normalize(torch.linalg.cross(down.expand_as(forward), forward, dim=-1), dim=-1)
    lower = torch.linalg.cross(forward, right, dim=-1)
    pose = torch.zeros(*position.shape[:-1], 4, 4, dtype=position.dtype, device=position.device)
    pose[..., :3, :3] = torch.stack([right, lower, forward], -1)
    pose[..., :3, 3] = position
    pose[..., 3, 3] = 1
    return pose


def quat_to_matrix(quat_wxyz: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation of a quaternion (w, x, y, z) of any length."""
    w, x, y, z = F.normalize(quat_wxyz, dim=-1).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quat(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Quaternion (w, x, y, z) of a rotation, w >= 0: the eigenvector of Bar-Itzhack's symmetric matrix."""
    m = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
    rows = [
        [m[0][0] + m[1][1] + m[2][2], m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]],
        [m[2][1] - m[1][2], m[0][0] - m[1][1] - m[2][2], m[0][1] + m[1][0], m[0][2] + m[2][0]],
        [m[0][2] - m[2][0], m[0][1] + m[1][0], m[1][1] - m[0][0] - m[2][2], m[1][2] + m[2][1]],
        [m[1][0] - m[0][1], m[0][2] + m[2][0], m[1][2] + m[2][1], m[2][2] - m[0][0] - m[1][1]],
    ]
    # This is 4 q q^T: each row is a multiple of q, and that of the largest diagonal is long.
    outer = torch.stack([torch.stack(row, -1) for row in rows], -2) + torch.eye(
        4, dtype=matrix.dtype, device=matrix.device
    )
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    quat = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    quat = F.normalize(quat, dim=-1)
    return torch.where(quat[..., :1] < 0, -quat, quat)


def quat_multiply(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Quaternion (w, x, y, z) that rotates by ``b``, then by ``a``."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def fly_through(cam_to_world: Float[Tensor, "view 4 4"], frames: int) -> Float[Tensor, "frames 4 4"]:
    """Poses along a smooth curve through given ones: Catmull-Rom positions, spherical interpolation of rotations.

    Args:
        cam_to_world: At least two poses, in the order in which they are passed.
        frames: Poses wanted, the first and last of which are the given ends.

    Raises:
        ValueError: There are fewer than two poses or frames.
    """
    count = len(cam_to_world)
    if count < 2 or frames < 2:
        raise ValueError(f"a path needs at least two poses and two frames; got {count} and {frames}")
    time = torch.linspace(0, count - 1, frames, dtype=torch.float64)
    index = time.long().clamp(max=count - 2)
    t = (time - index)[:, None]
    centre = cam_to_world[:, :3, 3].double().cpu()
    p0, p1, p2, p3 = (centre[(index + shift).clamp(0, count - 1)] for shift in (-1, 0, 1, 2))
    position = 0.5 * (
        2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    )
    quat = matrix_to_quat(cam_to_world[:, :3, :3].double().cpu())
    a, b = quat[index], quat[index + 1]
    cosine = (a * b).sum(-1, keepdim=True)
    b = torch.where(cosine < 0, -b, b)
    angle = cosine.abs().clamp(max=1).acos()
    near = angle < 1e-4
    safe = torch.where(near, torch.ones_like(angle), angle)
    spherical = (((1 - t) * safe).sin() * a + (t * safe).sin() * b) / safe.sin()
    rotation = quat_to_matrix(torch.where(near, (1 - t) * a + t * b, spherical))
    pose = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = rotation, position
    return pose.to(cam_to_world)
