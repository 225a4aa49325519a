"""What a splat is measured against: depth of a person's photographs, by files or by a teacher, or a scanned cloud.

A scanned cloud may come with where it is known to hold, as DTU's do: a grid of what the scanner observed, and the plane
that the object stands on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.errors import CheckpointError
from hone_splat.captures import Capture, SceneRange, load_views, read_colmap, read_points, read_transforms
from jaxtyping import Bool, Float
from torch import Tensor

from .config import EvalConfig
from .geometry import KnownDepth
from .teachers import DepthTeacher

__all__ = ["KnownCloud", "find_truth", "read_depth", "thinned", "truth_of"]

SUFFIXES = (".geometric.bin", ".photometric.bin", ".bin", ".npy", ".png")


def read_depth(path: Path, unit: float) -> Float[Tensor, "height width"]:
    """Depth along the optical axis, in the capture's units; 0 where none is known.

    Args:
        path: COLMAP's dense ``.bin``, ``.npy``, or ``.png`` of one channel, in whole units.
        unit: Of a ``.png``'s values, in the capture's units.

    Raises:
        CheckpointError: It is none of these.
    """
    data: Any
    if path.suffix == ".bin":
        head, *body = path.read_bytes().split(b"&", 3)
        try:
            width, height, channels = int(head), int(body[0]), int(body[1])
            data = np.frombuffer(body[2], "<f4").reshape((width, height, channels), order="F")[..., 0].T
        except (IndexError, ValueError) as error:
            raise CheckpointError(f"{path} is no depth map of COLMAP, or is cut short: {error}") from error
    elif path.suffix == ".npy":
        data = np.load(path, allow_pickle=False)
    else:
        from PIL import Image

        with Image.open(path) as image:
            data = unit * np.asarray(image, np.float64)
    if data.ndim != 2:
        raise CheckpointError(f"{path}: expected a depth [H, W]; got {list(data.shape)}")
    found = torch.from_numpy(np.array(data, np.float32, order="C"))
    return torch.where(found.isfinite() & (found > 0), found, 0.0)


def _depth_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """The depth of each picture, by its name with or without its suffix, in a folder of the same name if it is there.

    Raises:
        FileNotFoundError: A picture has none.
        ValueError: Two have the same one.
    """
    found: dict[Path, Path] = {}
    for image in images:
        path = _depth_file(folder, image)
        if path in found:
            raise ValueError(
                f"{path} would be the depth of {found[path]} and of {image}, which have one name: put the depths into "
                "folders as the pictures are"
            )
        found[path] = image
    return list(found)


def _depth_file(folder: Path, image: Path) -> Path:
    parts = image.absolute().parts
    for start in range(1, len(parts)):
        place = folder.joinpath(*parts[start:-1])
        for suffix in SUFFIXES:
            for name in (image.name, image.stem):
                if (path := place / f"{name}{suffix}").is_file():
                    return path
    raise FileNotFoundError(f"{folder} has no depth of {image.name}: one of {', '.join(SUFFIXES)} was sought")


def _capture(cfg: EvalConfig) -> Capture:
    if cfg.transforms is not None:
        return read_transforms(cfg.transforms)
    assert cfg.colmap is not None
    return read_colmap(cfg.colmap, cfg.images)


def _size(capture: Capture, side: int) -> tuple[int, int]:
    height, width = capture.size
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _stored_depth(cfg: EvalConfig, capture: Capture) -> KnownDepth:
    assert cfg.depths is not None
    height, width = _size(capture, cfg.side)
    maps = []
    for path in _depth_files(cfg.depths, capture.images):
        whole = read_depth(path, cfg.depth_unit)
        if abs(whole.shape[1] * capture.size[0] - whole.shape[0] * capture.size[1]) > max(capture.size):
            raise ValueError(f"{path} is {list(whole.shape)} and its picture {list(capture.size)}: another shape")
        rows, columns = (
            ((torch.arange(new) + 0.5) * old / new).long()
            for new, old in zip((height, width), whole.shape, strict=True)
        )
        maps.append(whole[rows][:, columns])
    return KnownDepth(capture.cam_to_world.float(), capture.intrinsics_norm.float(), torch.stack(maps))


def _taught_depth(cfg: EvalConfig, capture: Capture, device: torch.device | str) -> KnownDepth:
    assert cfg.teacher is not None
    teacher = DepthTeacher.load(cfg.teacher, metres_per_unit=cfg.metres_per_unit, device=device)
    # Neither the scale nor near and far matter to a teacher of depth.
    plain = SceneRange(scale=1.0, near=1.0, far=2.0, depths=(1.0, 1.0, 1.0), source="none")
    views = load_views(capture, _size(capture, cfg.side), plain)
    points = teacher(views.map(lambda part: part.to(device))).points[0].cpu()
    poses = views.cam_to_world[0]
    depth = ((points - poses[:, None, None, :3, 3]) * poses[:, None, None, :3, 2]).sum(-1)
    return KnownDepth(poses, views.intrinsics_norm[0], depth)


@dataclass(frozen=True)
class KnownCloud:
    """True points, and where they say something.

    Attributes:
        points: ``[M, 3]``, in the splat's frame and unit.
        observed: ``[X, Y, Z]``, cells that were observed; centres elsewhere do not count. None for everywhere.
        corner: ``[3]``, centre of the first cell.
        step: Side of a cell.
        plane: ``[4]``; true points with a negative value of it do not count. None for all.
    """

    points: Tensor
    observed: Tensor | None = None
    corner: Tensor | None = None
    step: float = 1.0
    plane: Tensor | None = None

    @classmethod
    def read(cls, cloud: Path, observed: Path | None = None, plane: Path | None = None) -> KnownCloud:
        """Read a ``.ply``, and DTU's ``ObsMask*.mat`` and ``Plane*.mat``.

        Raises:
            FileNotFoundError: A file is missing.
            CheckpointError: A ``.mat`` does not hold what DTU's do.
        """
        grid, normal = _mat(observed, "ObsMask", "BB", "Res"), _mat(plane, "P")
        return cls(
            read_points(cloud).float(),
            None if grid is None else torch.from_numpy(np.ascontiguousarray(grid["ObsMask"], bool)),
            None if grid is None else torch.from_numpy(np.asarray(grid["BB"], np.float32)[0].copy()),
            1.0 if grid is None else float(np.asarray(grid["Res"]).item()),
            None if normal is None else torch.from_numpy(np.asarray(normal["P"], np.float32).reshape(4).copy()),
        )

    def sees(self, points: Float[Tensor, "n 3"]) -> Bool[Tensor, " n"]:
        """Whether a centre lies in an observed cell."""
        if self.observed is None or self.corner is None:
            return torch.ones(len(points), dtype=torch.bool)
        cell = ((points - self.corner) / self.step).round().long()
        limit = torch.tensor(self.observed.shape)
        inside = ((cell >= 0) & (cell < limit)).all(-1)
        x, y, z = torch.minimum(cell.clamp(min=0), limit - 1).unbind(-1)
        return inside & self.observed[x, y, z]

    def counted(self) -> Bool[Tensor, " m"]:
        """Which true points the splat has to cover."""
        if self.plane is None:
            return torch.ones(len(self.points), dtype=torch.bool)
        return self.points @ self.plane[:3] + self.plane[3] > 0


def _mat(path: Path | None, *names: str) -> dict[str, Any] | None:
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a .mat of DTU with {', '.join(names)}")
    from scipy.io import loadmat

    try:
        data = loadmat(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is no .mat file: {error}") from error
    if missing := [name for name in names if name not in data]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}, which DTU's files hold")
    return data


def thinned(points: Float[Tensor, "n 3"], spacing: float, *, seed: int = 0) -> Float[Tensor, "m 3"]:
    """Points of a cloud, taken in a random order, each of which clears all others within ``spacing``; DTU's rule."""
    from scipy.spatial import cKDTree

    data = points.double().numpy()
    tree, kept = cKDTree(data), np.ones(len(data), bool)
    for index in torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).tolist():
        if kept[index]:
            kept[tree.query_ball_point(data[index], spacing)] = False
            kept[index] = True
    return points[torch.from_numpy(kept)]


def find_truth(cfg: EvalConfig) -> None:
    """Look for what the splat is measured against, without loading a network.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: A file is not what it should be.
        ValueError: Cameras are impossible or distorted.
    """
    if cfg.truth is not None:
        KnownDepth.read(cfg.truth)
    elif cfg.cloud is not None:
        KnownCloud.read(cfg.cloud, cfg.observed, cfg.plane)
    else:
        capture = _capture(cfg)
        if cfg.depths is not None:
            _depth_files(cfg.depths, capture.images)


def truth_of(cfg: EvalConfig, device: torch.device | str) -> KnownDepth | KnownCloud:
    """Read it, or ask the teacher."""
    if cfg.truth is not None:
        return KnownDepth.read(cfg.truth)
    if cfg.cloud is not None:
        return KnownCloud.read(cfg.cloud, cfg.observed, cfg.plane)
    capture = _capture(cfg)
    return _stored_depth(cfg, capture) if cfg.depths is not None else _taught_depth(cfg, capture, device)
