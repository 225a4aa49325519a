"""How far a splat lies from known surfaces: clouds of centres, depth pictures, and the bands along depth edges.

Nothing is aligned: a splat in another frame or scale than the truth is wrong, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_splat.cameras import check_cameras, pixel_centres, rays, unproject
from hone_splat.gaussians import Gaussians
from hone_splat.rendering import render
from hone_splat.views import Views
from jaxtyping import Bool, Float
from torch import Tensor

from .method import nearest

__all__ = ["CloudErrors", "KnownDepth", "boundary_band", "cloud_errors", "depth_edges", "splat_depth"]

JUMP = 0.1
"""Relative step between neighbouring pixels' depths from which it is an edge."""


@dataclass(frozen=True)
class KnownDepth:
    """Cameras of one scene, and the true depth of each of their pixels.

    Attributes:
        cam_to_world: ``[V, 4, 4]``, OpenCV axes, in the splat's frame.
        intrinsics_norm: ``[V, 3, 3]``.
        depth_z: ``[V, H, W]`` along the optical axis, in the splat's unit; 0 or not finite where it is not known.
    """

    cam_to_world: Tensor
    intrinsics_norm: Tensor
    depth_z: Tensor

    def __post_init__(self) -> None:
        views = len(self.cam_to_world)
        if self.depth_z.ndim != 3 or len(self.depth_z) != views:
            raise ValueError(f"depth_z must be [{views}, H, W]; got {list(self.depth_z.shape)}")
        check_cameras(self.cam_to_world, self.intrinsics_norm)
        if not bool(self.known.any()):
            raise ValueError("no depth is known: every value is 0 or not finite")

    @classmethod
    def of_distance(cls, views: Views, distance: Float[Tensor, "view height width"], scene: int = 0) -> KnownDepth:
        """From distances along the rays of a scene's views."""
        inner = views.intrinsics_norm[scene]
        height, width = distance.shape[1:]
        points = pixel_centres(height, width, device=distance.device).flatten(0, 1).expand(len(inner), -1, 2)
        cosine = rays(points, inner, "distance")[..., 2].view(distance.shape)
        return cls(views.cam_to_world[scene], inner, distance * cosine)

    @classmethod
    def read(cls, path: Path) -> KnownDepth:
        """Read what ``write`` wrote, or any safetensors file with these three tensors.

        Raises:
            CheckpointError: It is no such file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        try:
            data = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
        wanted = ("cam_to_world", "intrinsics_norm", "depth_z")
        if missing := [name for name in wanted if name not in data]:
            raise CheckpointError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(data))}")
        return cls(*(data[name].float() for name in wanted))

    def write(self, path: Path) -> Path:
        """Write a safetensors file; returns its path."""
        names = ("cam_to_world", "intrinsics_norm", "depth_z")
        return save_safetensors({name: getattr(self, name).cpu() for name in names}, path)

    @property
    def known(self) -> Bool[Tensor, "view height width"]:
        """Where the depth is known."""
        return self.depth_z.isfinite() & (self.depth_z > 0)

    def points(self) -> tuple[Float[Tensor, "point 3"], Float[Tensor, " point"]]:
        """True points, and the depth at which their cameras see them."""
        known = self.known
        depth = torch.where(known, self.depth_z, 1.0)
        points = unproject(depth, self.cam_to_world, self.intrinsics_norm, "depth_z")
        return points[known], depth[known]


@dataclass(frozen=True)
class CloudErrors:
    """Distances between a cloud and true points.

    Attributes:
        accuracy: ``[N]``, from each point to the nearest true one.
        completion: ``[M]``, from each true point to the nearest of the cloud.
        relative: ``[N]``, accuracy over the depth there.
        flying: ``[N]``, whether that is more than a share.
        spacing: ``[M]``, from each true point to the next, below which distances say nothing.
    """

    accuracy: Tensor
    completion: Tensor
    relative: Tensor
    flying: Tensor
    spacing: Tensor


@torch.no_grad()
def cloud_errors(points: Float[Tensor, "n 3"], truth: KnownDepth, *, flying: float = 0.02) -> CloudErrors:
    """Compare centres with true points.

    Args:
        points: Of the splat.
        truth: Cameras and depth.
        flying: Share of the depth from which a point counts as flying.
    """
    true, depth = truth.points()
    index = nearest(points, true)
    accuracy = (points - true[index]).norm(dim=-1)
    completion = (true - points[nearest(true, points)]).norm(dim=-1)
    relative = accuracy / depth[index]
    return CloudErrors(accuracy, completion, relative, relative > flying, _spacing(true))


def _spacing(points: Tensor) -> Tensor:
    """Distance from each point to its nearest other."""
    from scipy.spatial import cKDTree

    data = points.double().cpu().numpy()
    found, _ = cKDTree(data).query(data, k=2)
    return torch.as_tensor(found[:, 1])


def depth_edges(
    depth_z: Float[Tensor, "view height width"], *, jump: float = JUMP
) -> Bool[Tensor, "view height width"]:
    """Pixels whose depth differs from a neighbour's by more than a share of the smaller one; NaN differs from none."""
    edges = torch.zeros_like(depth_z, dtype=torch.bool)
    for dim in (1, 2):
        first, second = depth_z.narrow(dim, 0, depth_z.shape[dim] - 1), depth_z.narrow(dim, 1, depth_z.shape[dim] - 1)
        step = (first - second).abs() > jump * torch.minimum(first, second)
        edges.narrow(dim, 0, step.shape[dim]).logical_or_(step)
        edges.narrow(dim, 1, step.shape[dim]).logical_or_(step)
    return edges


def boundary_band(
    depth_z: Float[Tensor, "view height width"], *, width: int, jump: float = JUMP
) -> Bool[Tensor, "view height width"]:
    """Pixels at most ``width`` rows and columns from a depth edge."""
    edges = depth_edges(depth_z, jump=jump)[:, None].float()
    return F.max_pool2d(edges, 2 * width + 1, stride=1, padding=width)[:, 0] > 0


@torch.no_grad()
def splat_depth(gaussians: Gaussians, truth: KnownDepth) -> tuple[Tensor, Tensor]:
    """Depth of a splat as the true cameras see it, and how much of each pixel it covers; both ``[V, H, W]``."""
    height, width = truth.depth_z.shape[1:]
    # One after the other: what every view sees of every Gaussian would be gigabytes for a hundred photographs.
    pictures = [
        render(gaussians[None], pose[None, None], inner[None, None], (height, width))
        for pose, inner in zip(truth.cam_to_world, truth.intrinsics_norm, strict=True)
    ]
    depth, alpha = ([getattr(picture, name)[0, 0] for picture in pictures] for name in ("depth_z", "alpha"))
    return torch.stack(depth), torch.stack(alpha)
