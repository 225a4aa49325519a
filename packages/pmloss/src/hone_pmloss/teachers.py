"""Teachers: from posed views to a point per pixel.

A teacher's frame and scale are its own unless it says otherwise, since the loss moves its points onto the prediction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from hone_core.errors import CheckpointError
from hone_splat.cameras import unproject
from hone_splat.rooms import Rooms
from hone_splat.views import Views
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "DepthTeacher",
    "NamedViews",
    "OracleTeacher",
    "PointMap",
    "PrecomputedTeacher",
    "Shots",
    "Teacher",
    "digest_of",
    "name_views",
]


@dataclass(frozen=True)
class PointMap:
    """A point per pixel.

    Attributes:
        points: ``[B, V, H, W, 3]``; not finite where the teacher has none.
        confidence: ``[B, V, H, W]``, at least 0; None where the teacher has none.
        centres: ``[B, V, 3]``, camera centres in the teacher's frame; None where it has none.
    """

    points: Tensor
    confidence: Tensor | None = None
    centres: Tensor | None = None

    def take(self, index: Tensor) -> PointMap:
        """The views at ``index`` ``[B, N]`` of each scene, such as the anchors of a compressor, in that order."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        confidence, centres = (None if part is None else part[rows, index] for part in (self.confidence, self.centres))
        return PointMap(self.points[rows, index], confidence, centres)

    def resized(self, size: tuple[int, int]) -> PointMap:
        """At another height and width, by the nearest pixel: points between two surfaces belong to neither."""
        if self.points.shape[2:4] == size:
            return self
        rows, columns = (
            ((torch.arange(new, device=self.points.device) + 0.5) * old / new).long()
            for new, old in zip(size, self.points.shape[2:4], strict=True)
        )
        confidence = None if self.confidence is None else self.confidence[:, :, rows][..., columns]
        return PointMap(self.points[:, :, rows][:, :, :, columns], confidence, self.centres)


@dataclass(frozen=True)
class Shots:
    """Which pictures the views of a scene are, so that what a teacher said of them can be found again.

    Attributes:
        scene: Name of the scene.
        frames: Number of each view among its pictures.
    """

    scene: str
    frames: tuple[int, ...]


@dataclass(frozen=True)
class NamedViews(Views):
    """Views that say which pictures they are.

    Attributes:
        shots: One per scene.
    """

    shots: tuple[Shots, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shots) != len(self) or any(len(shots.frames) != self.count for shots in self.shots):
            found = [len(shots.frames) for shots in self.shots]
            raise ValueError(f"expected the frames of {self.count} views for each of {len(self)} scenes; got {found}")


def name_views(views: Views, shots: Sequence[Shots]) -> NamedViews:
    """The views, with the pictures that they are.

    Raises:
        ValueError: Their numbers differ.
    """
    parts = {field.name: getattr(views, field.name) for field in fields(Views)}
    return NamedViews(**parts, shots=tuple(shots))


def shots_of(views: Views) -> tuple[Shots, ...]:
    """Which pictures the views are.

    Raises:
        ValueError: They do not say.
    """
    if not isinstance(views, NamedViews):
        raise ValueError("these views do not say which pictures they are. Give them names: name_views(views, shots)")
    return views.shots


def digest_of(model: nn.Module) -> str:
    """Tells weights of one architecture from others, by the first and last value of every tensor."""
    ends = [part.detach().flatten()[[0, -1]].double() for part in model.state_dict().values() if part.numel()]
    return hashlib.sha256(torch.cat(ends).cpu().numpy().tobytes()).hexdigest()[:8]


class Teacher(Protocol):
    """What gives a point per pixel."""

    @property
    def name(self) -> str:
        """What tells its answers from those of other teachers, in the cache."""

    def __call__(self, views: Views) -> PointMap:
        """Points of every pixel of every view, in one frame per scene."""


class OracleTeacher:
    """The exact points of generated rooms, in the frame of the cameras.

    Args:
        rooms: Of the scenes, in the order of the batch.
    """

    name = "oracle"

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms

    def __call__(self, views: Views) -> PointMap:
        """See ``Teacher``."""
        if len(views) != len(self.rooms):
            raise ValueError(f"the oracle knows {len(self.rooms)} rooms; got views of {len(views)}")
        _, distance = self.rooms.see(views.cam_to_world, views.size, samples=1)
        points = unproject(distance, views.cam_to_world, views.intrinsics_norm, "distance")
        return PointMap(points, centres=views.cam_to_world[..., :3, 3])


class PrecomputedTeacher:
    """Points that lie in a folder, in one file ``SCENE.safetensors`` per scene.

    A file holds ``points`` ``[F, H, W, 3]``, ``frames`` ``[F]``, the number of each picture, and may hold
    ``confidence`` ``[F, H, W]``.

    Args:
        folder: Of the files.
        name: What the points come from.
    """

    def __init__(self, folder: Path, *, name: str = "precomputed") -> None:
        self.folder, self.name = folder, name

    def __call__(self, views: Views) -> PointMap:
        """See ``Teacher``; the views need names.

        Raises:
            CheckpointError: A scene's file is missing or damaged, or lacks a frame.
        """
        found = [self._read(shots, views.size) for shots in shots_of(views)]
        device = views.image_01.device
        trusts = [trust for _, trust in found if trust is not None]
        if trusts and len(trusts) < len(found):
            raise CheckpointError(f"{self.folder}: some scenes of the batch have a confidence and others none")
        confidence = torch.stack(trusts).to(device) if trusts else None
        return PointMap(torch.stack([points for points, _ in found]).to(device), confidence)

    def _read(self, shots: Shots, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{shots.scene}.safetensors"
        if Path(shots.scene).name != shots.scene or not path.is_file():
            raise CheckpointError(f"there are no points of scene {shots.scene!r}: expected {path}")
        try:
            data = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
        found = {name: list(part.shape) for name, part in sorted(data.items())}
        shape = found.get("points", [])
        wanted = {"points": [*shape[:3], 3], "frames": shape[:1], "confidence": shape[:3]}
        fits = all(found.get(name, want) == want for name, want in wanted.items())
        if len(shape) != 4 or "frames" not in data or not fits:
            raise CheckpointError(
                f"{path} must hold points [F, H, W, 3] and frames [F], and may hold confidence [F, H, W]; "
                f"it holds {found}"
            )
        rows = {int(frame): row for row, frame in enumerate(data["frames"])}
        if len(rows) < shape[0]:
            raise CheckpointError(f"{path} holds a frame twice: {data['frames'].tolist()}")
        if missing := [frame for frame in shots.frames if frame not in rows]:
            raise CheckpointError(f"{path} has no points of the frames {missing}")
        index = [rows[frame] for frame in shots.frames]
        trust = data["confidence"][index] if "confidence" in data else None
        whole = PointMap(data["points"][index][None].float(), None if trust is None else trust[None].float())
        whole = whole.resized(size)
        return whole.points[0], None if whole.confidence is None else whole.confidence[0]


class DepthTeacher(nn.Module):
    """A metric depth estimator of transformers, unprojected by the known cameras.

    DepthPro is told the known focal lengths in place of the ones that it guesses. Each view is looked at alone, so that
    cameras must be in metres, or ``metres_per_unit`` must say what they are in: otherwise the views' points do not fit
    together, and no similarity mends that.

    Args:
        model: ``DepthProForDepthEstimation``, or ``DepthAnythingForDepthEstimation`` of metric depth.
        processor: Its image processor.
        name: What tells its answers from those of other weights, in the cache.
        metres_per_unit: Size of the scene's unit.

    Raises:
        ValueError: The model gives no metric depth, or ``metres_per_unit`` is not positive.
    """

    def __init__(self, model: Any, processor: Any, *, name: str, metres_per_unit: float = 1.0) -> None:
        super().__init__()
        kind = model.config.model_type
        if kind not in ("depth_pro", "depth_anything"):
            raise ValueError(f"expected DepthPro or Depth-Anything; got {kind}")
        if kind == "depth_anything" and model.config.depth_estimation_type != "metric":
            raise ValueError(
                "these weights of Depth-Anything give relative inverse depth, of which no point map can be made. "
                "Use weights of metric depth."
            )
        if not metres_per_unit > 0:
            raise ValueError(f"metres_per_unit must be positive; got {metres_per_unit}")
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.metres_per_unit = metres_per_unit
        self.name = f"{kind}:{name}:{metres_per_unit:g}"

    @classmethod
    def load(cls, model: str, *, metres_per_unit: float = 1.0, device: torch.device | str = "cpu") -> DepthTeacher:
        """Load published weights; their licences forbid more than this package's does, and are named on their pages.

        Args:
            model: Folder, or name on the hub.
            metres_per_unit: Size of the scene's unit.
            device: Where it goes.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        loaded = AutoModelForDepthEstimation.from_pretrained(model).to(device)
        processor = AutoImageProcessor.from_pretrained(model)
        return cls(loaded, processor, name=f"{model}:{digest_of(loaded)}", metres_per_unit=metres_per_unit)

    @torch.no_grad()
    def forward(self, views: Views) -> PointMap:
        """See ``Teacher``."""
        depth = self._depth(views).to(views.image_01) / self.metres_per_unit
        points = unproject(depth, views.cam_to_world, views.intrinsics_norm, "depth_z")
        return PointMap(points, centres=views.cam_to_world[..., :3, 3])

    def _depth(self, views: Views) -> Float[Tensor, "batch view height width"]:
        """Depth along the optical axis, in metres."""
        images = views.image_01.flatten(0, 1)
        inputs = self.processor(images=list(images), do_rescale=False, return_tensors="pt")
        # One picture after the other: a processor may make a size of its own for each.
        depths = []
        for pixels, inner in zip(inputs["pixel_values"], views.intrinsics_norm.flatten(0, 1), strict=True):
            found = self.model(pixel_values=pixels[None].to(self.model.device, self.model.dtype))
            if self.model.config.model_type == "depth_pro":
                focal = float(inner[0, 0])
                angle = torch.tensor([math.degrees(2 * math.atan(0.5 / focal))], device=found.predicted_depth.device)
                found = replace(found, field_of_view=angle)
            (answer,) = self.processor.post_process_depth_estimation(found, target_sizes=[views.size])
            depths.append(answer["predicted_depth"])
        return torch.stack(depths).view(len(views), views.count, *views.size)
