"""What views cost: host alone, host with ZPressor, anchors alone, the fusion by a loop over anchors, one view more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_core.timing import check_values, measure_interleaved
from hone_splat.published import build_published
from hone_splat.views import Views
from torch import Tensor

from .config import PRESETS, BenchConfig, HostConfig
from .data import graded_rooms
from .method import Clusters, ViewStream, ZPressor, cluster_views, farthest_points
from .models import attach, tiny

__all__ = ["BenchReport", "bench", "fuse_by_loop"]

SIZES = {"tiny": (64, 64), "mvsplat": (256, 256), "depthsplat": (256, 448)}
HOSTS = {"mvsplat": "mvsplat", "depthsplat": "depthsplat-oct-zpressor-256x448"}


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Milliseconds and memory over the number of views."""

    def __str__(self) -> str:
        lines = [f"{'views':>5} {'what':<24} {'ms':>10} {'peak, GiB':>10}"]
        memory = {(row.variant, row.labels["views"]): row.value for row in self.rows if row.metric == "peak_memory"}
        for row in self.rows:
            if row.metric == "forward":
                views = row.labels["views"]
                peak = memory.get((row.variant, views))
                shown = "-" if peak is None else f"{peak:.2f}"
                lines.append(f"{views:>5} {row.variant:<24} {row.value:>10.2f} {shown:>10}")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def fuse_by_loop(module: ZPressor, features: Tensor, clusters: Clusters, precision: Any) -> Tensor:
    """The same module, anchor after anchor, as the release runs it."""
    batch, views = features.shape[:2]
    flat = features.flatten(0, 1)
    fused = []
    for pair, (members, real) in enumerate(zip(clusters.support, clusters.real, strict=True)):
        scene = pair // clusters.anchors.shape[1]
        own = int(clusters.anchors.flatten()[pair]) + scene * views
        chosen = torch.cat([members.new_tensor([own]), members[real]])
        support = torch.arange(1, len(chosen), device=features.device)[None]
        one = Clusters(support.new_zeros(1, 1), support, torch.ones_like(support, dtype=torch.bool))
        fused.append(module(flat[chosen][None], one, precision)[0, 0])
    return torch.stack(fused).unflatten(0, (batch, -1))


@torch.inference_mode()
def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time one forward of each, after the fused module is compared with the loop.

    Raises:
        RuntimeError: They differ.
    """
    device = resolve_device(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        host = tiny(HostConfig(), seed=cfg.seed) if cfg.model == "tiny" else build_published(HOSTS[cfg.model])
    host.config = replace(host.config, sweep=cfg.sweep)
    host.to(device)
    settings = replace(PRESETS[cfg.model].config, anchors=cfg.anchors)
    size = cfg.size or SIZES[cfg.model]
    for count in cfg.views:
        views = _views(count, size, device)
        calls, pair, folded = _calls(cfg, host, settings, views)
        for name in pair.keys() - {"fusion by a loop"}:
            check_values(name, pair[name](), pair["fusion by a loop"](), tolerance=1e-2)
        times = measure_interleaved(
            calls | pair | {"one view folded in": folded}, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=device
        )
        for name, timing in times.items():
            labels = {"views": count}
            run.row("forward", timing.ms_p50, unit="ms", better="lower", n=cfg.rounds, variant=name, labels=labels)
            if timing.peak_bytes is not None:
                peak = timing.peak_bytes / 2**30
                run.row("peak_memory", peak, unit="GiB", better="lower", n=cfg.rounds, variant=name, labels=labels)
    return BenchReport.of(run)


def _views(count: int, size: tuple[int, int], device: torch.device) -> Views:
    scene = graded_rooms([0], min(count, 49), 1, 16, device=device).context
    repeat = -(-count // scene.count)

    def grow(part: Tensor) -> Tensor:
        return part.repeat(1, repeat, *(1,) * (part.ndim - 2))[:, :count]

    poses = grow(scene.cam_to_world)
    # Poses beyond the path's length stand a little beside those that they repeat.
    poses[:, :, :3, 3] += 1e-2 * (torch.arange(count, device=device) // scene.count)[None, :, None]
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, count, 3, *size, generator=generator).to(device)
    return Views(image, poses, grow(scene.intrinsics_norm), grow(scene.near), grow(scene.far))


def _calls(
    cfg: BenchConfig, host: Any, settings: Any, views: Views
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]], Callable[[], Any]]:
    def alone() -> Any:
        return host(views).depth

    def compressed(fuse: bool) -> Callable[[], Any]:
        handle = attach(host, replace(settings, fuse=fuse))
        compressor = handle.compressor
        handle.detach()

        def call() -> Any:
            host.join.zipmatch = compressor
            try:
                return host(views).depth
            finally:
                host.join.zipmatch = None

        return call

    calls: dict[str, Callable[[], Any]] = {"host with ZPressor": compressed(True), "anchors alone": compressed(False)}
    if views.count <= cfg.host_views:
        calls["host alone"] = alone
    module = ZPressor(host.channels, settings.layers).to(views.near.device)
    stride = 8 if cfg.model == "depthsplat" else 4
    height, width = (side // stride for side in views.size)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, views.count, host.channels, height, width, generator=generator).to(views.near.device)
    centres = views.cam_to_world[..., :3, 3]
    clusters = cluster_views(centres, farthest_points(centres, cfg.anchors))
    pair = {
        "fusion": lambda: module(features, clusters, settings.precision),
        "fusion by a loop": lambda: fuse_by_loop(module, features, clusters, settings.precision),
    }
    if features.is_cuda:
        pair["fusion, varlen"] = lambda: module(features, clusters, "bfloat16", "varlen")
    return calls, pair, _folding(module, features[0], centres[0], clusters, settings.precision)


def _folding(
    module: ZPressor, features: Tensor, centres: Tensor, clusters: Clusters, precision: Any
) -> Callable[[], Any]:
    """A call that folds the last view that is no anchor into what holds all others; every call does the same."""
    anchors = clusters.anchors[0]
    rest = [view for view in range(len(features)) if view not in anchors.tolist()] or [0]
    stream = ViewStream(module, features[anchors], centres[anchors], precision)
    for view in rest[:-1]:
        stream.add(features[view], centres[view])

    def call() -> Tensor:
        stream.tokens[stream.add(features[rest[-1]], centres[rest[-1]])].pop()
        return stream.features

    return call
