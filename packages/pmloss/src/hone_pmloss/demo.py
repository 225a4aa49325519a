"""The demo: a room's point cloud at occlusion edges, by pictures alone and with PM-Loss beside them.

First the mechanism, without a network: the depths of the context views' pixels are optimised, from the true ones
blurred over edges, as networks blur them. Then both arms of the packaged host on rooms that neither was trained on. The
teacher is the exact point map, which says nothing of what a real teacher gives. Runs on a two-core CPU and downloads
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.progress import Progress, progress_bar
from hone_core.runs import Report, Run
from hone_splat.cameras import quat_to_matrix, unproject
from hone_splat.files import write_ply
from hone_splat.gaussians import Gaussians
from hone_splat.harmonics import C0
from hone_splat.metrics import psnr
from hone_splat.rendering import render
from hone_splat.rooms import Rooms
from hone_splat.views import Views
from torch import Tensor

from . import grading, plots
from .config import DemoConfig, PMLossConfig
from .data import BEYOND, CONTEXT, GRADED, frames_beyond, graded_rooms
from .geometry import KnownDepth, boundary_band, cloud_errors
from .host import load_host
from .method import pm_loss
from .teachers import OracleTeacher

__all__ = ["ARMS", "HOSTS", "DemoReport", "compared", "demo"]

ARMS = {
    "start": "blurred depth, as at the start",
    "photometric": "pictures alone",
    "pm": "with PM-Loss",
    "pm_normalised": "with PM-Loss, scale-normalised",
}
HOSTS = {"photometric": "host trained by pictures alone", "pm": "host trained with PM-Loss"}
METRICS: dict[str, tuple[str, Literal["higher", "lower"]]] = {
    "flying": ("", "lower"),
    "accuracy": ("", "lower"),
    "band_error": ("", "lower"),
    "psnr_between": ("dB", "higher"),
    "psnr_beyond": ("dB", "higher"),
}
TITLES = ("flying", "error", "at edges", "PSNR between", "PSNR beyond")
"""Of the metrics, in their order."""
HOST_TARGETS = 4
"""Views of each kind that a host is asked for in a room."""
BAND = 2
"""Pixels from a depth edge that belong to its band."""
FLYING = 0.1
"""Share of the depth from which a point counts as flying: at 48 pixels, neighbours are a quarter of that apart."""


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, a table.

    Attributes:
        picture: Clouds from above and views from beyond the given ones.
        hosts: The same of the packaged host's arms.
        splats: Each arm's cloud, by its name, and each host's of the room that is drawn.
        truth: Known depth, for ``eval``.
    """

    picture: Path
    hosts: Path
    splats: dict[str, Path]
    truth: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a finished run."""
        splats = {name: run.artifacts / f"{name}.ply" for name in (*ARMS, *(f"host_{arm}" for arm in HOSTS))}
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            picture=run.figures / "cloud.png",
            hosts=run.figures / "hosts.png",
            splats=splats,
            truth=run.artifacts / "truth.safetensors",
        )

    def __str__(self) -> str:
        found = {(row.variant, row.metric): row.value for row in self.rows}
        lines = [f"{'depths after':<32}" + "".join(f"{title:>14}" for title in TITLES)]
        for arm, name in ARMS.items():
            flying, *errors = (found[arm, metric] for metric in METRICS)
            shown = [f"{flying:.1%}", *(f"{error:.3f}" for error in errors[:2]), *(f"{db:.2f}" for db in errors[2:])]
            lines.append(f"{name:<32}" + "".join(f"{value:>14}" for value in shown))
        lines += ["", *(compared(found, arm) for arm in ("pm", "pm_normalised"))]
        lines += ["this is one room and no network; the paper's claims are what reproduce asks"]
        titles = ("flying", "depth", "at edges", "PSNR between", "PSNR beyond")
        lines += ["", f"{'rooms of the tiny host':<32}" + "".join(f"{title:>14}" for title in titles)]
        for arm, name in HOSTS.items():
            asked = ("flying", "depth_abs_rel", "depth_at_edges", "psnr_between", "psnr_beyond")
            flying, *errors = (found[f"host_{arm}", metric] for metric in asked)
            shown = [f"{flying:.1%}", *(f"{error:.3f}" for error in errors[:2]), *(f"{db:.2f}" for db in errors[2:])]
            lines.append(f"{name:<32}" + "".join(f"{value:>14}" for value in shown))
        lines += [
            "",
            f"pictures {self.picture}",
            f"         {self.hosts}",
            *(f"splat    {path}" for path in self.splats.values()),
        ]
        return "\n".join([*lines, f"truth    {self.truth}", f"results  {self.path / 'results.json'}"])


def compared(found: Mapping[tuple[str, str], float], arm: str) -> str:
    """What an arm does worse and better than pictures alone, in a line.

    Args:
        found: Value of each arm and metric.
        arm: One of ``ARMS``.
    """
    sides: dict[str, list[str]] = {"worse": [], "better": []}
    for (metric, (_, better)), title in zip(METRICS.items(), TITLES, strict=True):
        gap = found[arm, metric] - found["photometric", metric]
        if gap:
            sides["better" if (gap > 0) == (better == "higher") else "worse"].append(title)
    said = "; ".join(f"{side} {', '.join(titles)}" for side, titles in sides.items() if titles)
    return f"{ARMS[arm]}, against {ARMS['photometric']}: {said or 'the same'}"


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Optimise the depths in both arms, and grade the clouds against the room."""
    device = resolve_device(run.device)
    rooms = Rooms.draw([GRADED + 500 + cfg.seed], device=device)
    first, last = CONTEXT
    frames = {
        "context": torch.linspace(first, last, cfg.views).round().long(),
        "train": torch.linspace(first + 1, last - 1, cfg.targets).round().long(),
        "between": torch.arange(first + 2, last, 3),
        "beyond": torch.cat([torch.arange(first - BEYOND, first, 3), torch.arange(last + 2, last + 1 + BEYOND, 3)]),
    }
    seen = {name: rooms.views(index[None].to(device), cfg.size) for name, index in frames.items()}
    views = {name: pair[0] for name, pair in seen.items()}
    context, distance = seen["context"]
    truth = KnownDepth.of_distance(context, distance[0])
    teacher = _own_frame(OracleTeacher(rooms)(context).points.flatten(1, 3), cfg.seed)
    start = _blurred(distance, cfg.blur).log()
    depths = {"start": start}
    settings = {
        "photometric": None,
        "pm": PMLossConfig(weight=cfg.weight),
        "pm_normalised": PMLossConfig(weight=cfg.weight, scale_normalised="full"),
    }
    with progress_bar(len(settings) * cfg.steps, desc="depths", quiet=run.quiet) as progress:
        for arm, pm in settings.items():
            depths[arm] = _optimise(cfg, context, views["train"], start, teacher, pm, progress)
    shown = {}
    for arm, log_depth in depths.items():
        splat = _splat(context, log_depth)
        write_ply(splat[0], run.artifacts / f"{arm}.ply")
        grades, pictures = _grade(splat, truth, views)
        for metric, (unit, better) in METRICS.items():
            run.row(metric, grades[metric], unit=unit, better=better, variant=arm)
        shown[arm] = (splat.means[0], pictures)
    truth.write(run.artifacts / "truth.safetensors")
    true_splat = _splat(context, distance.log())
    plots.clouds(
        {"true": (true_splat.means[0], views["beyond"].image_01[0])} | {ARMS[arm]: pair for arm, pair in shown.items()},
        true_splat.sh[0, :, :, 0] * C0 + 0.5,
        run.figures / "cloud.png",
        views=_places(frames["beyond"]),
        title=f"a room from {cfg.views} views: from above, and as seen from beyond them",
    )
    _hosts(cfg, run, device)
    return DemoReport.of(run)


def _hosts(cfg: DemoConfig, run: Run, device: torch.device) -> None:
    """Grade both arms of the packaged host, and draw them in the first room."""
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    first = 600 + cfg.rooms * cfg.seed
    loaded = {arm: load_host(arm, device=device) for arm in HOSTS}
    size = loaded["pm"].config.size
    scenes = [graded_rooms([first + room], HOST_TARGETS, size, device=device) for room in range(cfg.rooms)]
    beyond = scenes[0].beyond
    assert beyond is not None
    context = scenes[0].context
    true_splat = _splat(context, scenes[0].distance.log())
    shown["true"] = (true_splat.means[0], beyond.image_01[0])
    for arm, one in loaded.items():
        host = one.host.eval()
        for metric, values in grading.grade(host, scenes).items():
            unit, better = grading.METRICS[metric]
            run.row(metric, float(values.mean()), unit=unit, better=better, n=cfg.rooms, variant=f"host_{arm}")
        with torch.inference_mode():
            splat = host(context).gaussians
            picture = render(splat, beyond.cam_to_world, beyond.intrinsics_norm, beyond.size)
        write_ply(splat[0], run.artifacts / f"host_{arm}.ply")
        shown[HOSTS[arm]] = (splat.means[0], picture.image_01[0])
    plots.clouds(
        shown,
        true_splat.sh[0, :, :, 0] * C0 + 0.5,
        run.figures / "hosts.png",
        views=_places(frames_beyond(HOST_TARGETS)),
        title="a room that the tiny host was not trained on, from 2 views: from above, and as seen from beyond them",
    )


def _places(frames: Tensor) -> list[str]:
    """Where views beyond the given ones lie, in words."""
    first, last = CONTEXT
    away = [(first - frame, "before") if frame < first else (frame - last, "after") for frame in frames.tolist()]
    return [f"{count} {'frame' if count == 1 else 'frames'} {side}" for count, side in away]


def _own_frame(points: Tensor, seed: int) -> Tensor:
    """Points in another frame and scale, as of a teacher that knows no cameras."""
    generator = torch.Generator().manual_seed(seed)
    turn = quat_to_matrix(torch.randn(4, generator=generator)).to(points)
    return 0.37 * points @ turn.mT + torch.randn(3, generator=generator).to(points)


def _blurred(distance: Tensor, width: int) -> Tensor:
    """Distances averaged over a square, which puts pixels at edges between their surfaces."""
    half = width // 2
    return F.avg_pool2d(F.pad(distance, (half,) * 4, mode="replicate"), width, stride=1)


def _splat(views: Views, log_depth: Tensor) -> Gaussians:
    """A round, opaque Gaussian per pixel, of the pixel's colour and about its size."""
    depth = log_depth.exp()
    means = unproject(depth, views.cam_to_world, views.intrinsics_norm, "distance").flatten(1, 3)
    pixel = 1 / (views.size[1] * views.intrinsics_norm[:, :, 0, 0])
    scale = (0.5 * pixel[..., None, None] * depth.detach()).flatten(1)[..., None].expand(-1, -1, 3)
    quats = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(means).expand(*means.shape[:2], 4)
    colour = ((views.image_01.movedim(2, -1).flatten(1, 3) - 0.5) / C0)[..., None]
    return Gaussians(means, scale, quats, torch.full_like(means[..., 0], 0.95), colour)


def _optimise(
    cfg: DemoConfig,
    context: Views,
    targets: Views,
    start: Tensor,
    teacher: Tensor,
    pm: PMLossConfig | None,
    progress: Progress,
) -> Tensor:
    """Logarithms of depth after the steps."""
    log_depth = start.clone().requires_grad_()
    # Pixels that nothing pulls at would be moved by rounding alone with a smaller epsilon.
    optimizer = torch.optim.Adam([log_depth], cfg.lr, eps=1e-5)
    for _ in range(cfg.steps):
        splat = _splat(context, log_depth)
        picture = render(splat, targets.cam_to_world, targets.intrinsics_norm, targets.size)
        loss = (picture.image_01 - targets.image_01).square().mean()
        if pm is not None:
            loss = loss + pm.weight * pm_loss(splat.means, teacher, pm).loss.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update()
    return log_depth.detach()


@torch.no_grad()
def _grade(splat: Gaussians, truth: KnownDepth, views: dict[str, Views]) -> tuple[dict[str, float], Tensor]:
    """Grades of a cloud, and its pictures from beyond."""
    errors = cloud_errors(splat.means[0], truth, flying=FLYING)
    band = boundary_band(truth.depth_z, width=BAND).flatten()
    grades = {
        "flying": float(errors.flying.double().mean()),
        "band_error": float(errors.accuracy[band].mean()),
        "accuracy": float(errors.accuracy.mean()),
    }
    pictures = {}
    for name in ("between", "beyond"):
        asked = views[name]
        pictures[name] = render(splat, asked.cam_to_world, asked.intrinsics_norm, asked.size).image_01[0]
        grades[f"psnr_{name}"] = float(psnr(pictures[name], asked.image_01[0]).mean())
    return grades, pictures["beyond"]
