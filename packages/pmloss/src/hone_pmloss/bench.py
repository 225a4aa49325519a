"""What the term costs: nearest neighbours of a room's points by every backend, and the parts of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure_interleaved
from hone_splat.cameras import unproject
from hone_splat.published import build_published
from hone_splat.rendering import render
from hone_splat.rooms import FAR, NEAR, Rooms
from hone_splat.views import Views
from torch import Tensor

from .config import PRESETS, BenchConfig
from .method import Backend, nearest, pm_loss
from .models import tiny

__all__ = ["BenchReport", "bench"]

SIZES = {"tiny": (64, 64), "depthsplat": (256, 448)}
HOST = "depthsplat-oct-pmloss-256x448"
NOISE = 0.01
"""Deviation of near predictions from the true points, over their distance."""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Milliseconds by number of views."""

    def __str__(self) -> str:
        lines = [f"{'views':>5} {'points':>9} {'what':<38} {'ms':>10} {'peak, GiB':>10}"]
        peaks = {(row.variant, row.split, row.labels["views"]): row.value for row in self.rows if row.metric == "peak"}
        for row in self.rows:
            if row.metric == "time":
                views = row.labels["views"]
                peak = peaks.get((row.variant, row.split, views))
                shown = "-" if peak is None else f"{peak:.2f}"
                name = f"{row.split}, {row.variant}"
                lines.append(f"{views:>5} {row.labels['points']:>9} {name:<38} {row.value:>10.2f} {shown:>10}")
        lines += [
            f"{row.labels['views']:>5} {row.labels['points']:>9} term over step {row.value:.3f}"
            for row in self.rows
            if row.metric == "share"
        ]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Compare distances, then time.

    Raises:
        RuntimeError: Two backends find different distances; no time is reported then.
    """
    device = resolve_device(run.device)
    size = cfg.size or SIZES[cfg.model]
    rooms = Rooms.draw([cfg.seed]).to(device)
    for count in cfg.views:
        context, points = _views(rooms, 0, count, size)
        targets, _ = _views(rooms, 1, cfg.targets, size)
        labels = {"views": count, "points": count * size[0] * size[1]}
        _neighbours(cfg, run, points, labels)
        _step(cfg, run, context, targets, points, labels)
    return BenchReport.of(run)


def _views(rooms: Rooms, first: int, count: int, size: tuple[int, int]) -> tuple[Views, Tensor]:
    """Every second frame of the path, and the true points of its pixels."""
    poses = rooms.cam_to_world[:, first : first + 2 * count : 2]
    image, distance = rooms.see(poses, size, samples=1)
    inner = rooms.intrinsics_norm[:, None].expand(-1, count, 3, 3)
    bounds = torch.ones(1, count, device=poses.device)
    points = unproject(distance, poses, inner, "distance")
    return Views(image, poses, inner, NEAR * bounds, FAR * bounds), points


def _record(run: Run, split: str, times: dict[str, Timing], labels: dict[str, Any]) -> None:
    for variant, timing in times.items():
        run.row(
            "time", timing.ms_p50, unit="ms", better="lower", n=timing.n, variant=variant, split=split, labels=labels
        )
        if timing.peak_bytes is not None:
            peak = timing.peak_bytes / 2**30
            run.row("peak", peak, unit="GiB", better="lower", n=timing.n, variant=variant, split=split, labels=labels)


def _neighbours(cfg: BenchConfig, run: Run, points: Tensor, labels: dict[str, Any]) -> None:
    device, cloud = points.device, points.flatten(0, -2)
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(cloud.shape, generator=generator).to(device) * NOISE * cloud.norm(dim=-1, keepdim=True)
    low, high = cloud.amin(0), cloud.amax(0)
    anywhere = low + (high - low) * torch.rand(cloud.shape, generator=generator).to(device)
    for split, asked in (("near predictions", cloud + noise), ("random predictions", anywhere)):
        calls: dict[str, Callable[[], Tensor]] = {}

        def add(name: str, backend: Backend, asked: Tensor = asked, calls: dict[str, Any] = calls) -> None:
            calls[name] = lambda: nearest(asked, cloud, backend=backend)

        add(*(("pruned kernel", "triton") if device.type == "cuda" else ("tree", "kdtree")))
        if len(cloud) <= cfg.all_pairs:
            add("all pairs, torch", "torch")
            if device.type == "cuda":
                calls["all pairs, kernel"] = partial(_all_pairs, asked, cloud)
        found = {name: (asked - cloud[call()]).square().sum(-1) for name, call in calls.items()}
        first, *others = found
        for name in others:
            check_values(f"distances by {name}", found[name], found[first], tolerance=1e-5)
        _record(
            run, split, measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=device), labels
        )


def _all_pairs(asked: Tensor, cloud: Tensor) -> Tensor:
    from hone_kernels.nearest_points.triton import nearest_points_triton

    return nearest_points_triton(asked, cloud, prune=False)[0]


def _step(cfg: BenchConfig, run: Run, context: Views, targets: Views, points: Tensor, labels: dict[str, Any]) -> None:
    """A training step without its optimiser, teacher's points at hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        host = tiny(seed=cfg.seed) if cfg.model == "tiny" else build_published(HOST)
    host.to(points.device).train()
    config, teacher = PRESETS["paper"].config, points.flatten(1, -2)
    with torch.no_grad():
        held = host(context).gaussians.map(lambda part: part.clone())

    def pictures(gaussians: Any) -> Tensor:
        drawn = render(gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size)
        return (drawn.image_01 - targets.image_01).square().mean()

    def term(means: Tensor) -> Tensor:
        return config.weight * pm_loss(means, teacher, config).loss.mean()

    def leaf() -> Any:
        return held.map(lambda part: part.detach().requires_grad_())

    def whole(with_term: bool) -> None:
        host.zero_grad(set_to_none=True)
        gaussians = host(context).gaussians
        loss = pictures(gaussians)
        (loss + term(gaussians.means) if with_term else loss).backward()

    def part(loss: Callable[[Any], Tensor]) -> Callable[[], None]:
        return lambda: loss(leaf()).backward()

    def network() -> None:
        host.zero_grad(set_to_none=True)
        gaussians = host(context).gaussians
        sum(value.sum() for value in (gaussians.means, gaussians.scales, gaussians.opacities, gaussians.sh)).backward()

    calls: dict[str, Callable[[], None]] = {
        "with the term": lambda: whole(True),
        "pictures alone": lambda: whole(False),
        "part: network": network,
        "part: pictures": part(pictures),
        "part: term": part(lambda gaussians: term(gaussians.means)),
    }
    times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=points.device)
    _record(run, "step", times, labels)
    share = times["part: term"].ms_p50 / times["with the term"].ms_p50
    run.row("share", share, better="lower", n=cfg.rounds, variant="part: term", split="step", labels=labels)
