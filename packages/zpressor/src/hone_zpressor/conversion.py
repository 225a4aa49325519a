"""Your photographs as chunks of RealEstate10K and DL3DV, with an evaluation index: what ``eval`` and trainers read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_splat.captures import Capture, fit_range, read_colmap, read_transforms
from hone_splat.chunks import ChunkScene, write_chunks
from hone_splat.ranges import HOSTS
from torch import Tensor

from .anchors import farthest_points
from .config import ConvertConfig

__all__ = ["ConvertReport", "convert", "evaluation_views", "read_captures"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertReport(Report):
    """Chunks of photographs.

    Attributes:
        chunks: Folder with index.json.
        index: Evaluation index.
    """

    chunks: Path
    index: Path

    @classmethod
    def of(cls, run: Run) -> ConvertReport:
        """Return the report of a finished run."""
        folder = run.artifacts / "chunks"
        return cls(path=run.path, rows=tuple(run.rows), chunks=folder, index=run.artifacts / "evaluation_index.json")

    def __str__(self) -> str:
        lines = [f"{row.variant:<24} {row.metric:<12} {row.value:>8g}" for row in self.rows]
        return "\n".join([*lines, "", f"chunks   {self.chunks}", f"index    {self.index}"])


def evaluation_views(cam_to_world: Tensor, context: int, targets: int, frames: int) -> tuple[list[int], list[int]]:
    """Context and target views of a scene, as the releases choose them.

    Contexts are the farthest cameras of the first ``frames``, sorted; the rest of these is cut into ``targets`` parts
    of equal size, of which the first frames are the targets.

    Args:
        cam_to_world: ``[V, 4, 4]``, in the order in which they were taken.
        context: Views that are given.
        targets: Views that are asked for.
        frames: First views that count.

    Raises:
        ValueError: There are too few.

    Source: generate_evaluation_index.py of the release.
    """
    centres = cam_to_world[:frames, :3, 3]
    if len(centres) < context + targets:
        raise ValueError(f"expected at least {context + targets} views; got {len(centres)}")
    given = sorted(farthest_points(centres[None], context)[0].tolist())
    rest = [view for view in range(len(centres)) if view not in given]
    width = len(rest) // targets
    return given, rest[: width * targets : width]


def read_captures(cfg: ConvertConfig) -> Iterator[tuple[str, Capture]]:
    """Name and photographs of each scene."""
    for path in cfg.captures:
        if path.suffix == ".json":
            yield path.resolve().parent.name, read_transforms(path)
        else:
            yield path.resolve().name, read_colmap(path)


def convert(cfg: ConvertConfig, run: Run) -> ConvertReport:
    """Write chunks and index; pictures are taken over byte for byte, cameras scaled to the host's depths."""
    limits, index = HOSTS[cfg.model], {}

    def scenes() -> Iterator[ChunkScene]:
        for name, capture in read_captures(cfg):
            scale = fit_range(capture, limits.near, limits.far).scale
            poses = capture.cam_to_world.clone()
            poses[:, :3, 3] *= scale
            given, asked = evaluation_views(poses, cfg.context, cfg.targets, cfg.frames)
            index[name] = {"context": given, "target": asked}
            run.row("views", len(capture), better="none", variant=name)
            run.row("scale", scale, better="none", variant=name)
            pictures = tuple(
                torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in capture.images
            )
            yield ChunkScene.of_pictures(name, pictures, poses, capture.intrinsics_norm)

    report = ConvertReport.of(run)
    # What a run that was broken off left is no whole set.
    (report.chunks / "index.json").unlink(missing_ok=True)
    write_chunks(scenes(), report.chunks)
    atomic_write_json(report.index, index)
    return ConvertReport.of(run)
