"""A person's own photographs: what a host would make of them, and the splat that it makes."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.devices import resolve_device
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path, atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Report, Row, Run
from hone_splat.cameras import fly_through
from hone_splat.captures import Capture, SceneRange, fit_range, load_views, overlap, read_colmap, read_transforms
from hone_splat.files import read_ply, write_ply
from hone_splat.formats import write_cloud
from hone_splat.published import load_published, load_trained
from hone_splat.ranges import HOSTS
from hone_splat.rendering import render
from hone_splat.videos import write_video
from hone_splat.views import Views
from torch import Tensor

from .anchors import farthest_points
from .budget import Budget, forward_cost, most_anchors
from .config import PRESETS, DoctorConfig, EvalConfig, RenderConfig, ViewConfig, ZPressorConfig
from .grading import with_settings
from .host import load_host
from .models import attach, tiny
from .places import find_capture, trained_on_chunks

__all__ = [
    "DoctorReport",
    "RenderReport",
    "contexts",
    "doctor",
    "examine",
    "load_model",
    "read_capture",
    "render_capture",
    "warn_of_guess",
]

log = logging.getLogger(__name__)

CHUNK = 8
"""Frames that are rendered and kept at a time; a run that was broken off goes on after the last."""
LEAST_OVERLAP = 0.3
MOST_BASELINE = 0.5
"""Below such an overlap of each view with its best neighbour, and above such a distance to it over the scene's median
depth, matching has little to go by: ours."""


@dataclass(frozen=True, kw_only=True)
class DoctorReport(Report):
    """What was found of a capture; as text, a table and what lies outside the host's training.

    Attributes:
        warnings: One sentence each.
    """

    warnings: tuple[str, ...]

    @classmethod
    def of(cls, run: Run) -> DoctorReport:
        """Return the report of a finished run."""
        found = json.loads((run.artifacts / "warnings.json").read_text("utf-8"))
        return cls(path=run.path, rows=tuple(run.rows), warnings=tuple(found))

    def __str__(self) -> str:
        lines = [_line(row) for row in self.rows]
        lines += ["", *(f"! {text}" for text in self.warnings)] if self.warnings else ["", "nothing unusual"]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


@dataclass(frozen=True, kw_only=True)
class RenderReport(Report):
    """A splat of photographs.

    Attributes:
        splat: The cloud, in the capture's units and axes.
        video: The flight.
    """

    splat: Path
    video: Path

    @classmethod
    def of(cls, run: Run) -> RenderReport:
        """Return the report of a finished run."""
        splat, video = run.artifacts / "scene.ply", run.artifacts / "fly.mp4"
        return cls(path=run.path, rows=tuple(run.rows), splat=splat, video=video)

    def __str__(self) -> str:
        lines = [_line(row) for row in self.rows]
        lines += ["", f"splat    {self.splat}", f"video    {self.video}"]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def _line(row: Row) -> str:
    value = f"{row.value:.0f}" if row.value == int(row.value) else f"{row.value:.4g}"
    return f"{row.metric.replace('_', ' '):<34} {value:>10} {row.unit}".rstrip()


def read_capture(cfg: DoctorConfig | RenderConfig | ViewConfig) -> tuple[Capture, SceneRange]:
    """The photographs that a command names, and how they are scaled.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A host cannot use them; the message says why.
    """
    find_capture(cfg)
    if cfg.colmap is not None:
        capture = read_colmap(cfg.colmap, cfg.images)
    else:
        assert cfg.transforms is not None, "it was found"
        capture = read_transforms(cfg.transforms)
    bounds = None if cfg.near is None or cfg.far is None else (cfg.near, cfg.far)
    return capture, fit_range(capture, HOSTS[cfg.model].near, HOSTS[cfg.model].far, bounds=bounds)


def warn_of_guess(scene: SceneRange) -> None:
    """Say where depths were guessed, which the splat depends on."""
    if scene.guessed:
        log.warning("depths are %s", scene.source)


def contexts(capture: Capture, views: int) -> list[int]:
    """Numbers of the views that a host is given, in the capture's order: the farthest cameras."""
    centres = capture.cam_to_world[None, :, :3, 3]
    return sorted(farthest_points(centres, min(views, len(capture)))[0].tolist())


def examine(capture: Capture, scene: SceneRange, cfg: DoctorConfig) -> tuple[dict[str, tuple[float, str]], list[str]]:
    """Measures of a capture with their units, and what lies outside of the host's training.

    Args:
        capture: The photographs.
        scene: How they are scaled.
        cfg: What would be asked of the host.
    """
    host, chosen = HOSTS[cfg.model], capture.take(contexts(capture, cfg.views))
    centres = chosen.cam_to_world[:, :3, 3]
    distance = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    nearest = distance.amin(1)
    seen = overlap(chosen.cam_to_world, chosen.intrinsics_norm, scene.depths[0], scene.depths[2])
    best = seen.fill_diagonal_(0).amax(1)
    height, width = host.size
    inner = chosen.intrinsics_norm[0]
    # The field of view that is left when the picture is cut to the host's shape.
    ratio = (capture.size[1] / capture.size[0]) / (width / height)
    wide = [2 * math.degrees(math.atan(0.5 * min(1.0, part) / float(inner[axis, axis])))
            for axis, part in ((0, 1 / ratio), (1, ratio))]  # fmt: skip
    baseline = float(nearest.median()) / scene.depths[1]
    values = {
        "photographs": (len(capture), ""),
        "context_views": (len(chosen), ""),
        "depth_5th_percentile": (scene.depths[0], "units"),
        "depth_median": (scene.depths[1], "units"),
        "depth_95th_percentile": (scene.depths[2], "units"),
        "scale_to_the_host": (scene.scale, ""),
        "near_of_the_host": (scene.near, ""),
        "far_of_the_host": (scene.far, ""),
        "nearest_baseline_median": (float(nearest.median()), "units"),
        "nearest_baseline_over_depth": (baseline, ""),
        "field_of_view_horizontal": (wide[0], "degrees"),
        "field_of_view_vertical": (wide[1], "degrees"),
        "overlap_with_best_neighbour": (float(best.mean()), ""),
        "least_overlap": (float(best.min()), ""),
    }
    warnings = [f"depths are {scene.source}"] if scene.guessed else []
    if scene.scale * scene.depths[2] > host.far:
        warnings.append(
            f"depth: the 95th percentile is {scene.scale * scene.depths[2]:.3g} in the host's units, beyond the "
            f"{host.far:g} that {cfg.model} was trained with; what is farther is drawn at {host.far:g}"
        )
    if host.fov_deg is not None and not host.fov_deg[0] <= wide[0] <= host.fov_deg[1]:
        warnings.append(
            f"field of view: {wide[0]:.0f} degrees; {cfg.model} was trained with {host.fov_deg[0]:g} to "
            f"{host.fov_deg[1]:g}"
        )
    if len(capture) < cfg.anchors:
        warnings.append(f"views: {len(capture)} photographs for {cfg.anchors} anchors; each will be an anchor")
    if baseline > MOST_BASELINE:
        warnings.append(f"baselines: {baseline:.2f} of the median depth to the nearest view; take more photographs")
    alone = [chosen.images[i].name for i in (best < LEAST_OVERLAP).nonzero()[:, 0].tolist()]
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
        warnings.append(f"overlap: less than {LEAST_OVERLAP:.0%} of the view is seen by another one in {shown}")
    if float(nearest.min()) == 0:
        warnings.append("poses: two views stand at the same place, which gives matching nothing to go by")
    centre = (inner[:2, 2] - 0.5).abs().amax()
    if float(centre) > 0.05:
        warnings.append(
            f"principal point: {float(centre):.0%} of the picture off its centre; published hosts had it there"
        )
    return values, warnings


def doctor(cfg: DoctorConfig, run: Run) -> DoctorReport:
    """Measure a capture and say what a host was not trained for."""
    capture, scene = read_capture(cfg)
    values, warnings = examine(capture, scene, cfg)
    for metric, (value, unit) in values.items():
        run.row(metric, value, unit=unit, better="higher")
    atomic_write_json(run.artifacts / "warnings.json", warnings)
    return DoctorReport.of(run)


def load_model(cfg: RenderConfig | EvalConfig | ViewConfig, device: torch.device | str = "cpu") -> Any:
    """The host with its weights, and the compressor on it.

    Raises:
        CheckpointError: There are no weights, or they are of another architecture.
        ValueError: The arm is ``zpressor``, and the checkpoint holds none.
    """
    if cfg.model == "tiny" and not trained_on_chunks(cfg):
        found = load_host(cfg.arm, path=cfg.checkpoint, device=device)
        if found.handle is not None:
            with_settings(found, anchors=cfg.anchors)
        return found.host
    if cfg.checkpoint is None:
        raise CheckpointError(f"weights of {cfg.model} are not packaged: name a checkpoint")
    if cfg.model == "tiny":
        host: Any = tiny()
        weights = load_trained(cfg.checkpoint, host)
    else:
        host, weights = load_published(cfg.checkpoint, cfg.model)
    if cfg.arm == "zpressor" and weights is None:
        raise ValueError(
            f"{cfg.checkpoint} holds no ZPressor: it is a host alone. Choose --arm host or --arm anchors, or a "
            f"checkpoint with ZPressor."
        )
    if cfg.arm != "host":
        fuse = cfg.arm == "zpressor"
        layers = {name.split(".")[2] for name in weights or () if name.startswith("self_attn_layers.0.")}
        settings = ZPressorConfig(
            anchors=cfg.anchors, fuse=fuse, layers=len(layers) or PRESETS["mvsplat"].config.layers
        )
        attach(host, settings, weights=weights if fuse else None)
    return host.to(device).eval()


@torch.inference_mode()
def render_capture(cfg: RenderConfig, run: Run) -> RenderReport:
    """Make the splat, in the capture's units, and fly along its context cameras."""
    device = resolve_device(run.device)
    capture, scene = read_capture(cfg)
    chosen = capture.take(contexts(capture, cfg.views))
    size = cfg.size or HOSTS[cfg.model].size
    views = load_views(chosen, size, scene)
    views.check()
    file = run.artifacts / "scene.ply"
    if not file.exists():
        host = load_model(cfg, device)
        given = views.map(lambda part: part.to(device))
        # A run that goes on still says how many the budget allowed.
        atomic_write_json(run.artifacts / "anchors.json", _fit_budget(cfg, host, given))
        cloud = host(given).gaussians[0]
        kept = cloud.pruned(opacity=cfg.prune)
        if not len(kept):
            raise ValueError(f"none of {len(cloud)} Gaussians has an opacity of {cfg.prune:g}; lower --prune")
        write_ply(kept.scaled(1 / scene.scale), file)
    # Frames are of the file, so that a run that goes on draws the same ones.
    cloud = read_ply(file).map(lambda part: part.to(device))
    anchors = json.loads((run.artifacts / "anchors.json").read_text("utf-8"))
    if anchors is not None:
        run.row("anchors", anchors, better="none")
    run.row("context_views", len(chosen), better="higher")
    run.row("gaussians", len(cloud), better="lower")
    run.row("scale_to_the_host", scene.scale, better="higher")
    run.row("near_of_the_host", scene.near, better="higher")
    run.row("far_of_the_host", scene.far, better="higher")
    frames = _frames(cfg, run, cloud, chosen.cam_to_world.float(), views.intrinsics_norm[0, 0], size, scene)
    write_video(frames, run.artifacts / "fly.mp4", fps=cfg.fps)
    if cfg.splat is not None:
        write_cloud(cloud, cfg.splat)
    if cfg.video is not None:
        with atomic_path(cfg.video) as scratch:
            shutil.copyfile(run.artifacts / "fly.mp4", scratch)
    shutil.rmtree(run.artifacts / "frames")
    return RenderReport.of(run)


def _fit_budget(cfg: RenderConfig, host: Any, views: Views) -> int | None:
    """Set the most anchors that the budget allows; None where there is no budget."""
    if cfg.budget_seconds is None and cfg.budget_gib is None:
        return None
    budget = Budget(cfg.budget_seconds, cfg.budget_gib)
    found = most_anchors(lambda anchors: forward_cost(host, views, anchors), views.count, budget)
    host.join.zipmatch.config = replace(host.join.zipmatch.config, anchors=found)
    return found


def _frames(
    cfg: RenderConfig, run: Run, cloud: Any, poses: Tensor, inner: Tensor, size: tuple[int, int], scene: SceneRange
) -> Tensor:
    """Pictures of the flight; those that an earlier attempt left are read."""
    folder = run.artifacts / "frames"
    folder.mkdir(exist_ok=True)
    batch = cloud.map(lambda part: part[None])
    path = fly_through(poses, cfg.frames).to(cloud.means.device)
    pieces = []
    with progress_bar(cfg.frames, desc="frames", quiet=run.quiet) as bar:
        for start in range(0, cfg.frames, CHUNK):
            file, some = folder / f"{start:06d}.npy", path[None, start : start + CHUNK]
            if not file.exists():
                intrinsics = inner.to(some.device).expand(1, some.shape[1], 3, 3)
                near = 0.2 * scene.near / scene.scale
                picture = render(batch, some, intrinsics, size, near=near, backend=cfg.backend).image_01[0]
                pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
                with atomic_path(file) as scratch:
                    np.save(scratch, pixels)
            pieces.append(torch.from_numpy(np.load(file)).float() / 255)
            bar.update(some.shape[1])
    return torch.cat(pieces)
