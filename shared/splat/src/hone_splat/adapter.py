"""From a host's raw channels to Gaussians in the world.

Source: the Gaussian adapter of pixelSplat, MVSplat and DepthSplat.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .cameras import DepthConvention, exact_geometry, matrix_to_quat, quat_multiply, unproject
from .gaussians import Gaussians
from .harmonics import C0, MAX_DEGREE, ShRotation, rotate_sh

__all__ = ["raw_channels", "to_gaussians"]


def raw_channels(sh_degree: int) -> int:
    """Channels per pixel: offset 2, scale 3, rotation 4, and the colour's."""
    return 9 + 3 * (sh_degree + 1) ** 2


@exact_geometry
def to_gaussians(
    offset_px: Float[Tensor, "batch view 2 height width"],
    scales: Float[Tensor, "batch view 3 height width"],
    quat_xyzw: Float[Tensor, "batch view 4 height width"],
    colour: Float[Tensor, "batch view coefficients height width"],
    opacity: Float[Tensor, "batch view height width"],
    depth: Float[Tensor, "batch view height width"],
    cam_to_world: Float[Tensor, "batch view 4 4"],
    intrinsics_norm: Float[Tensor, "batch view 3 3"],
    *,
    convention: DepthConvention,
    sh_rotation: ShRotation,
    image_01: Float[Tensor, "batch view 3 height width"] | None = None,
) -> Gaussians:
    """One Gaussian per pixel, those of a scene in the order view, row, column.

    Args:
        offset_px: Of each ray.
        scales: In scene units.
        quat_xyzw: In the camera's frame, of any length.
        colour: SH coefficients, colour-major; above degree 3, which no renderer of these hosts reads, they are dropped.
        opacity: In [0, 1].
        depth: See ``convention``.
        cam_to_world: Poses.
        intrinsics_norm: Intrinsics.
        convention: What ``depth`` holds.
        sh_rotation: From camera to world.
        image_01: Where given, the pixel's colour is added to the constant coefficient.
    """
    means = unproject(depth, cam_to_world, intrinsics_norm, convention, offset_px.movedim(2, -1))
    turn = cam_to_world[..., :3, :3]
    local = quat_xyzw / (quat_xyzw.norm(dim=2, keepdim=True) + 1e-8)
    local = local[:, :, [3, 0, 1, 2]].flatten(3).mT  # [B, V, P, 4]
    quats = quat_multiply(matrix_to_quat(turn)[:, :, None].expand_as(local), local)
    sh = colour.flatten(3).mT.unflatten(-1, (3, -1))
    degree = min(round(sh.shape[-1] ** 0.5) - 1, MAX_DEGREE)
    sh = sh[..., : (degree + 1) ** 2] * _damping(degree, sh)
    if image_01 is not None:
        base = (image_01.flatten(3).mT - 0.5) / C0
        sh = torch.cat([sh[..., :1] + base[..., None], sh[..., 1:]], -1)
    sh = rotate_sh(sh, turn, sh_rotation)
    return Gaussians(
        means.flatten(1, 3),
        scales.flatten(3).mT.flatten(1, 2),
        quats.flatten(1, 2),
        opacity.flatten(1),
        sh.flatten(1, 2),
    )


def _damping(degree: int, like: Tensor) -> Tensor:
    """Factor of each coefficient, which keeps higher degrees small at the start of training."""
    values = [1.0 if l == 0 else 0.1 * 0.25**l for l in range(degree + 1) for _ in range(2 * l + 1)]
    return like.new_tensor(values)
