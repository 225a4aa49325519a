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
from .method import nearest, pm_loss, umeyama
from .models import tiny

__all__ = ["BenchReport", "bench"]

SIZES = {"tiny": (64, 64), "depthsplat": (256, 448)}
HOST = "depthsplat-oct-pmloss-256x448"
PRODUCTS = "all pairs, torch by products"
"""Name of what is fast and not exact."""
CHUNK = 1 << 25
"""Distances that it holds at a time."""
NOISE = 0.01
"""Deviation of near predictions from the true points, over their distance."""


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Milliseconds by number of views."""

    def __str__(self) -> str:
        lines = [f"{'views':>5} {'points':>9} {'what':<50} {'ms':>10} {'peak, GiB':>10}"]
        peaks = {(row.variant, row.split, row.labels["views"]): row.value for row in self.rows if row.metric == "peak"}
        longer = {
            (row.variant, row.split, row.labels["views"]): row.value for row in self.rows if row.metric == "longer"
        }
        for row in self.rows:
            if row.metric == "time":
                views = row.labels["views"]
                peak = peaks.get((row.variant, row.split, views))
                shown = "-" if peak is None else f"{peak:.2f}"
                name = f"{row.split}, {row.variant}"
                line = f"{views:>5} {row.labels['points']:>9} {name:<50} {row.value:>10.2f} {shown:>10}"
                if (times := longer.get((row.variant, row.split, views))) is not None:
                    line += f"  {row.labels['asked']} points, {times:.1f}x as long for each"
                lines.append(line)
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
        if cfg.only != "step":
            _neighbours(cfg, run, points, labels)
        if cfg.only != "neighbours":
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
    """Times, and how much longer than the first backend each takes for a point."""
    device, cloud = points.device, points.flatten(0, -2)
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(cloud.shape, generator=generator).to(device) * NOISE * cloud.norm(dim=-1, keepdim=True)
    low, high = cloud.amin(0), cloud.amax(0)
    anywhere = low + (high - low) * torch.rand(cloud.shape, generator=generator).to(device)
    step = -(-(len(cloud) ** 2) // cfg.pairs)
    for split, asked in (("near predictions", cloud + noise), ("random predictions", anywhere)):
        some = asked[::step].contiguous()
        calls: dict[str, Callable[[], Tensor]] = {}
        if device.type == "cuda":
            calls["pruned kernel"] = partial(nearest, asked, cloud, backend="triton")
            calls["all pairs, kernel"] = partial(_all_pairs, asked, cloud)
        else:
            calls["tree"] = partial(nearest, asked, cloud, backend="kdtree")
        calls["all pairs, torch"] = partial(nearest, some, cloud, backend="torch")
        calls[PRODUCTS] = partial(_by_products, some, cloud)
        found = {name: call() for name, call in calls.items()}
        first = next(iter(found))
        true = (asked - cloud[found[first]]).square().sum(-1)
        for name, index in found.items():
            own, want = (asked, true) if len(index) == len(asked) else (some, true[::step])
            squared = (own - cloud[index]).square().sum(-1)
            if name == PRODUCTS:
                error = float((squared - want).norm() / want.norm())
                run.row("error", error, better="lower", n=len(want), variant=name, split=split, labels=labels)
            elif name != first:
                check_values(f"distances by {name}", squared, want, tolerance=1e-5)
        times = measure_interleaved(calls, warmup=1, rounds=cfg.rounds, seed=cfg.seed, device=device)
        for name, timing in times.items():
            count = len(found[name])
            _record(run, split, {name: timing}, labels | {"asked": count})
            if name != first:
                longer = timing.ms_p50 * len(asked) / count / times[first].ms_p50
                run.row("longer", longer, better="none", n=timing.n, variant=name, split=split, labels=labels)


def _all_pairs(asked: Tensor, cloud: Tensor) -> Tensor:
    from hone_kernels.nearest_points.triton import nearest_points_triton

    return nearest_points_triton(asked, cloud, prune=False)[0]


def _by_products(asked: Tensor, cloud: Tensor) -> Tensor:
    """As torch computes distances by default, |a|^2 + |b|^2 - 2ab: faster, and not exact."""
    rows = max(1, CHUNK // len(cloud))
    return torch.cat([torch.cdist(part, cloud).argmin(1) for part in asked.split(rows)])


def _step(cfg: BenchConfig, run: Run, context: Views, targets: Views, points: Tensor, labels: dict[str, Any]) -> None:
    """A training step without LPIPS and its optimiser, teacher's points at hand, and its parts one by one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        host = tiny(seed=cfg.seed) if cfg.model == "tiny" else build_published(HOST)
    host.to(points.device).train()
    config, teacher = PRESETS["paper"].config, points.flatten(1, -2)
    with torch.no_grad():
        held = host(context).gaussians.map(lambda part: part.clone())
        moved = umeyama(teacher, held.means)(teacher)[0]

    def pictures(gaussians: Any) -> Tensor:
        drawn = render(gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size)
        return (drawn.image_01 - targets.image_01).square().mean()

    def term(means: Tensor) -> Tensor:
        return config.weight * pm_loss(means, teacher, config).loss.mean()

    def alignment(means: Tensor) -> Tensor:
        moved = umeyama(teacher.to(means), means)(teacher)
        return moved.square().mean()

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

    calls: dict[str, Callable[[], object]] = {
        "with the term": lambda: whole(True),
        "pictures alone": lambda: whole(False),
        "part: network": network,
        "part: pictures": part(pictures),
        "part: term": part(lambda gaussians: term(gaussians.means)),
        "of the term: alignment": part(lambda gaussians: alignment(gaussians.means)),
        "of the term: nearest points": lambda: nearest(held.means[0], moved),
    }
    if cfg.vggt:
        calls["teacher: VGGT"] = _vggt(cfg, context)
    times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=points.device)
    _record(run, "step", times, labels)
    share = times["part: term"].ms_p50 / times["with the term"].ms_p50
    run.row("share", share, better="lower", n=cfg.rounds, variant="part: term", split="step", labels=labels)


def _vggt(cfg: BenchConfig, context: Views) -> Callable[[], object]:
    """The paper's teacher with random weights, asked about the context views."""
    from .vggt import VGGT, VGGT_1B, VGGTTeacher

    with torch.device(context.image_01.device), torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        teacher = VGGTTeacher(VGGT(VGGT_1B), name="random")
    return partial(teacher, context)
