"""Pictures of Gaussians: tile-based splatting on any device and with gradients, by torch and hone-kernels or by gsplat.

The rules are those of the 3DGS rasteriser: perspective projection of each covariance, 0.3 pixels^2 of dilation, front
to back within each tile, alpha at most 0.999, nothing below 1/255, and an end where 1e-4 of the light is left.

Source: EWA splatting as in "3D Gaussian Splatting" (2023); constants as in gsplat 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from hone_core.errors import MissingExtraError
from hone_kernels.splat_blend import TILE, blend_tiles, tile_lists
from jaxtyping import Float
from torch import Tensor

from .cameras import exact_geometry, intrinsics_px
from .gaussians import Gaussians
from .harmonics import evaluate_sh

__all__ = ["Picture", "render"]

DILATION = 0.3
LEAST_ALPHA = 1 / 255


@dataclass(frozen=True)
class Picture:
    """What the cameras see.

    Attributes:
        image_01: ``[B, V, 3, H, W]``, at least 0; bright Gaussians give values above 1.
        alpha: ``[B, V, H, W]``, covered share of each pixel.
        depth_z: ``[B, V, H, W]``, mean depth of what covers it, 0 where nothing does.
    """

    image_01: Tensor
    alpha: Tensor
    depth_z: Tensor


@exact_geometry
def render(
    gaussians: Gaussians,
    cam_to_world: Float[Tensor, "batch view 4 4"],
    intrinsics_norm: Float[Tensor, "batch view 3 3"],
    size: tuple[int, int],
    *,
    near: float = 0.2,
    background: Float[Tensor, " 3"] | None = None,
    backend: Literal["torch", "gsplat"] = "torch",
) -> Picture:
    """Render each scene from each of its cameras.

    Args:
        gaussians: With a batch axis; 16 bits are taken to float32. Where there are none, the background is seen.
        cam_to_world: Poses, OpenCV axes.
        intrinsics_norm: Normalised; the principal point counts.
        size: Height and width in pixels.
        near: Least depth of a Gaussian's centre.
        background: Colour behind everything; black if None.
        backend: ``gsplat`` needs the extra ``gpu`` and a CUDA device.

    Raises:
        ValueError: Shapes do not fit, or there is no such backend.
        MissingExtraError: gsplat is not installed.
    """
    batch, views = cam_to_world.shape[:2]
    if gaussians.means.ndim != 3 or len(gaussians.means) != batch or intrinsics_norm.shape[:2] != (batch, views):
        raise ValueError(
            f"expected Gaussians [B, G] and cameras [B, V] of the same B; got {list(gaussians.means.shape[:-1])}, "
            f"poses {list(cam_to_world.shape[:2])} and intrinsics {list(intrinsics_norm.shape[:2])}"
        )
    if backend not in ("torch", "gsplat"):
        raise ValueError(f"backend must be torch or gsplat; got {backend!r}")
    gaussians = gaussians.map(lambda part: part.float() if part.dtype.itemsize < 4 else part)
    inner = intrinsics_px(intrinsics_norm, *size)
    back = gaussians.means.new_zeros(3) if background is None else background
    if backend == "gsplat":
        return _gsplat(gaussians, cam_to_world, inner, size, near, back)
    image, alpha, depth = _splat(gaussians, cam_to_world, inner, size, near)
    return Picture(image + (1 - alpha)[:, :, None] * back[:, None, None], alpha, depth / alpha.clamp(min=1e-10))


def _splat(
    gaussians: Gaussians, cam_to_world: Tensor, inner: Tensor, size: tuple[int, int], near: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, alpha and summed depth of every pixel."""
    batch, views = cam_to_world.shape[:2]
    height, width = size
    if not len(gaussians):
        nothing = gaussians.means.new_zeros(batch, views, 5, height, width)
        return nothing[:, :, :3], nothing[:, :, 3], nothing[:, :, 4]
    rows, columns = -(-height // TILE), -(-width // TILE)
    values, low, high = _project(gaussians, cam_to_world, inner, size, near)
    order, counts = tile_lists(values[..., 9], low, high, rows, columns)
    canvas = blend_tiles(values.flatten(0, -2), order, counts, rows, columns)
    canvas = canvas.view(batch, views, rows, columns, TILE, TILE, 5).permute(0, 1, 6, 2, 4, 3, 5)
    canvas = canvas.reshape(batch, views, 5, rows * TILE, columns * TILE)[..., :height, :width]
    return canvas[:, :, :3], canvas[:, :, 3], canvas[:, :, 4]


def _project(
    gaussians: Gaussians, cam_to_world: Tensor, inner: Tensor, size: tuple[int, int], near: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each Gaussian as each camera sees it.

    Returns:
        ``[B, V, G, 10]``: pixel position, inverse covariance (a, b, c), opacity, colour, depth; and the box in pixels,
        ``[B, V, G, 2]`` from and to, empty for what is not seen.
    """
    height, width = size
    world_to_cam = torch.linalg.inv(cam_to_world)
    turn = world_to_cam[..., :3, :3]
    points = gaussians.means[:, None] @ turn.mT + world_to_cam[..., None, :3, 3]
    depth = points[..., 2]
    seen = depth > near
    z = torch.where(seen, depth, torch.ones_like(depth))
    focal = inner[..., [0, 1], [0, 1]][:, :, None]
    centre = inner[..., [0, 1], 2][:, :, None]
    slope = points[..., :2] / z[..., None]
    position = slope * focal + centre
    # The linear map is taken no further outside the picture than 0.3 of half its size, where it would blow up.
    extent = slope.new_tensor([width, height])
    slope = slope.clamp(-(centre + 0.15 * extent) / focal, (extent - centre + 0.15 * extent) / focal)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [
            torch.stack([focal[..., 0] / z, zero, -focal[..., 0] * slope[..., 0] / z], -1),
            torch.stack([zero, focal[..., 1] / z, -focal[..., 1] * slope[..., 1] / z], -1),
        ],
        -2,
    )
    linear = jacobian @ turn[:, :, None]
    spread = linear @ gaussians.covariances[:, None] @ linear.mT
    xx, xy, yy = spread[..., 0, 0] + DILATION, spread[..., 0, 1], spread[..., 1, 1] + DILATION
    determinant = xx * yy - xy * xy
    opacity = gaussians.opacities[:, None].expand_as(depth)
    seen = seen & (determinant > 0) & (opacity >= LEAST_ALPHA)
    safe = torch.where(determinant > 0, determinant, torch.ones_like(determinant))
    centres = cam_to_world[:, :, None, :3, 3]
    direction = torch.nn.functional.normalize(gaussians.means[:, None] - centres, dim=-1)
    colour = evaluate_sh(gaussians.sh[:, None], direction)
    values = torch.cat(
        [
            position,
            torch.stack([yy / safe, -xy / safe, xx / safe, opacity], -1),
            colour,
            depth[..., None],
        ],
        -1,
    )
    with torch.no_grad():
        # Beyond this many deviations alpha is below 1/255.
        reach = (2 * (opacity / LEAST_ALPHA).clamp(min=1).log()).sqrt()[..., None]
        radius = reach * torch.stack([xx, yy], -1).clamp(min=0).sqrt()
        edge = position.new_tensor([width, height])
        low = (position - radius).clamp(min=0)
        high = torch.minimum(position + radius, edge)
        seen &= (high > low).all(-1) & position.isfinite().all(-1)
        high = torch.where(seen[..., None], high, low.new_full((), -1.0))
    return values, low, high


def _gsplat(
    gaussians: Gaussians, cam_to_world: Tensor, inner: Tensor, size: tuple[int, int], near: float, background: Tensor
) -> Picture:
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise MissingExtraError("gpu", "hone-splat", "The backend gsplat") from error
    drawn, alpha, _ = rasterization(
        gaussians.means,
        gaussians.quats_wxyz,
        gaussians.scales,
        gaussians.opacities,
        gaussians.sh.mT,
        torch.linalg.inv(cam_to_world),
        inner,
        width=size[1],
        height=size[0],
        near_plane=near,
        sh_degree=gaussians.degree,
        packed=False,
        eps2d=DILATION,
        backgrounds=background.expand(*cam_to_world.shape[:2], 3),
        render_mode="RGB+ED",
    )
    return Picture(drawn[..., :3].movedim(-1, 2), alpha[..., 0], drawn[..., 3])
