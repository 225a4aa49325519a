"""What views cost: host alone, host with ZPressor, anchors alone, the fusion by a loop over anchors, one view more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure_interleaved
from hone_splat.published import build_published
from hone_splat.views import Views
from torch import Tensor

from .anchors import Clusters, cluster_views, farthest_points, one_list
from .config import PRESETS, BenchConfig, HostConfig
from .data import graded_rooms
from .method import Attention, ViewStream, ZPressor
from .models import attach, tiny

__all__ = ["BenchReport", "bench", "fuse_by_loop"]

SIZES = {"tiny": (64, 64), "mvsplat": (256, 256), "depthsplat": (256, 448)}
HOSTS = {"mvsplat": "mvsplat", "depthsplat": "depthsplat-oct-zpressor-256x448"}
TOLERANCE = 2e-2
"""Of a host's depth under another cost volume, attention or precision of products."""
CAPTURED = "fusion, captured"
BASE = 12
"""Views from which the price of one more is counted."""
_MVSPLAT = (
    ("features", "backbone.backbone", "start"),
    ("fusion", "backbone.zipmatch", "start"),
    ("matching", "backbone.transformer", "start"),
    ("cost volume", "backbone.transformer", "end"),
    ("depth", "depth_predictor.corr_refine_net.0", "start"),
    ("Gaussians", "depth_predictor.upsampler.0", "start"),
)
PARTS = {
    "tiny": _MVSPLAT,
    "mvsplat": _MVSPLAT,
    "depthsplat": (
        ("features", "depth_predictor.backbone", "start"),
        ("fusion", "depth_predictor.zipmatch", "start"),
        ("matching", "depth_predictor.transformer", "start"),
        ("monocular prior", "depth_predictor.pretrained", "start"),
        ("cost volume", "depth_predictor.pretrained", "end"),
        ("depth", "depth_predictor.regressor.0", "start"),
        ("Gaussians", "feature_upsampler", "start"),
    ),
}
"""Parts of a forward, in order: each lasts from where this module starts or ends to where the next part begins."""

Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Milliseconds and memory over the number of views."""

    def __str__(self) -> str:
        lines = [f"{'views':>5} {'what':<26} {'sweep, products':<20} {'ms':>10} {'peak, GiB':>10}"]
        memory = {_place(row): row.value for row in self.rows if row.metric == "peak_memory"}
        parts: dict[tuple[Any, ...], list[str]] = {}
        for row in self.rows:
            if row.metric == "part":
                parts.setdefault(_place(row), []).append(f"{row.split} {row.value:.2f}")
        for row in self.rows:
            views, how = row.labels["views"], ", ".join(str(row.labels[key]) for key in ("sweep", "matmul"))
            line = f"{views:>5} {row.variant:<26} {how:<20} "
            if row.metric == "forward":
                peak = memory.get(_place(row))
                lines.append(line + f"{row.value:>10.2f} {'-' if peak is None else f'{peak:.2f}':>10}")
                if found := parts.get(_place(row)):
                    lines.append(f"{'':>8}{', '.join(found)}")
            elif row.metric == "out_of_memory":
                lines.append(line + "does not fit")
            elif row.metric == "view_more":
                lines.append(line + f"{row.value:>10.2f}  for each view beyond {BASE}")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def _place(row: Any) -> tuple[Any, ...]:
    return row.variant, *sorted(row.labels.items())


def fuse_by_loop(module: ZPressor, features: Tensor, clusters: Clusters, precision: Any) -> Tensor:
    """The same module as the release runs it: cross-attention anchor after anchor, self-attention over all at once."""
    batch, views = features.shape[:2]
    tokens = features.flatten(0, 1).flatten(2).mT
    first = torch.arange(batch, device=features.device)[:, None] * views
    anchor = tokens.index_select(0, (clusters.anchors + first).flatten())
    own = []
    for members, real in zip(clusters.support, clusters.real, strict=True):
        numbers = members[real].to(features.device)
        own.append((tokens.index_select(0, numbers), one_list(len(numbers), features.device)))
    cross_layers: Any = module.cross_attn_layers[0]
    self_layers: Any = module.self_attn_layers[0]
    for cross, within in zip(cross_layers, self_layers, strict=True):
        read = [
            one[None] if lists is None else cross(one[None], support, lists, precision)
            for one, (support, lists) in zip(anchor, own, strict=True)
        ]
        anchor = within(torch.cat(read), precision)
    return anchor.mT.unflatten(-1, features.shape[-2:]).unflatten(0, (batch, -1))


@torch.inference_mode()
def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time one forward of each, after what must be equal is compared.

    A variant that does not fit into the device's memory is said to, and the others are timed.

    Raises:
        RuntimeError: Two that must be equal differ.
    """
    device = resolve_device(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        host = tiny(HostConfig(), seed=cfg.seed) if cfg.model == "tiny" else build_published(HOSTS[cfg.model])
    host.to(device)
    for count in cfg.views:
        views = _views(count, cfg.size or SIZES[cfg.model], device)
        _time_hosts(cfg, run, host, views)
        _time_fusion(cfg, run, host, views)
    _price_views(run)
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


# Whole forwards, and their parts --------------------------------------------------------------------------------------


def _time_hosts(cfg: BenchConfig, run: Run, host: Any, views: Views) -> None:
    joined = _compressors(cfg, host, views)
    calls: dict[tuple[str, str, str], Callable[[], Tensor]] = {}
    for matmul, sweep, name in product(cfg.matmuls, cfg.sweeps, joined):
        calls[name, sweep, matmul] = _forward(host, views, joined[name], sweep, matmul)
    device = views.near.device
    shared = _shared(views)
    for key in list(calls):
        if not _fits(calls[key]):
            del calls[key]
            run.row("out_of_memory", 1, better="lower", variant=key[0], labels=shared | _how(*key[1:]))
    for key, call in calls.items():
        # The first of the same kind: another cost volume, attention or precision changes little.
        kind = key[0].split(",")[0]
        like = next(other for other in calls if other[0].split(",")[0] == kind)
        if like != key:
            check_values(", ".join(key), call(), calls[like](), tolerance=TOLERANCE)
    names = {", ".join(key): key for key in calls}
    times = measure_interleaved(
        {name: calls[key] for name, key in names.items()}, warmup=1, rounds=cfg.rounds, seed=cfg.seed, device=device
    )
    for name, key in names.items():
        variant, labels = key[0], shared | _how(*key[1:])
        _record(run, times[name], variant, labels)
        parts = _time_parts(cfg, host, joined[variant], calls[key], device)
        for part, took in parts.items():
            run.row("part", took, unit="ms", better="lower", n=cfg.rounds, variant=variant, split=part, labels=labels)


def _compressors(cfg: BenchConfig, host: Any, views: Views) -> dict[str, Any]:
    """What joins the host in each variant; None for the host alone."""
    settings = replace(PRESETS[cfg.model].config, anchors=cfg.anchors)
    kinds = {"host with ZPressor": settings, "anchors alone": replace(settings, fuse=False)}
    if views.near.is_cuda:
        ragged = replace(settings, precision="bfloat16", attention="varlen")
        kinds = {
            "host with ZPressor": ragged,
            "host with ZPressor, padded": replace(settings, attention="padded"),
            "anchors alone": kinds["anchors alone"],
        }
    joined: dict[str, Any] = {}
    weights = None
    for name, config in kinds.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            handle = attach(host, config, weights=weights if config.fuse else None)
        joined[name] = handle.compressor
        handle.detach()
        weights = weights or handle.compressor.state_dict()
    return joined | ({"host alone": None} if views.count <= cfg.host_views else {})


def _forward(host: Any, views: Views, compressor: Any, sweep: str, matmul: str) -> Callable[[], Tensor]:
    config = replace(host.config, sweep=sweep)

    def call() -> Tensor:
        host.config, host.join.zipmatch = config, compressor
        try:
            with _products(matmul):
                return host(views).depth
        finally:
            host.join.zipmatch = None

    return call


@contextmanager
def _products(matmul: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if matmul == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fits(call: Callable[[], Any]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        fits = False
    else:
        return True
    torch.cuda.empty_cache()
    return fits


def _time_parts(
    cfg: BenchConfig, host: Any, compressor: Any, call: Callable[[], Any], device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each part that a call runs, by marks where its modules start and end."""
    samples: dict[str, list[float]] = {}
    modules = dict(host.named_modules())
    for _ in range(cfg.rounds):
        marks: list[tuple[str, Any]] = []
        with ExitStack() as stack:
            for name, path, where in PARTS[cfg.model]:
                module = compressor if path.endswith("zipmatch") else modules[path]
                if module is None:
                    continue
                hook = module.register_forward_pre_hook if where == "start" else module.register_forward_hook
                stack.callback(hook(partial(_mark, marks, name, device)).remove)
            call()
        _mark(marks, "", device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for (name, begin), (_, end) in pairwise(marks):
            took = begin.elapsed_time(end) if device.type == "cuda" else (end - begin) * 1e3
            samples.setdefault(name, []).append(took)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _mark(marks: list[tuple[str, Any]], name: str, device: torch.device, *_: Any) -> None:
    """Note that a part begins, on the device's clock."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((name, event))
    else:
        marks.append((name, time.perf_counter()))


def _price_views(run: Run) -> None:
    """What a view beyond the twelfth costs, from the times at most views and at twelve."""
    times = {_place(row): row for row in run.rows if row.metric == "forward"}
    last: dict[tuple[Any, ...], Any] = {}
    for row in times.values():
        key = row.variant, row.labels["sweep"], row.labels["matmul"]
        if key not in last or row.labels["views"] > last[key].labels["views"]:
            last[key] = row
    for row in last.values():
        base = times.get(_place(replace(row, labels=row.labels | {"views": BASE})))
        if base is not None and row.labels["views"] > BASE and row.variant.startswith("host"):
            price = (row.value - base.value) / (row.labels["views"] - BASE)
            run.row("view_more", price, unit="ms", better="lower", n=row.n, variant=row.variant, labels=row.labels)


def _shared(views: Views) -> dict[str, str | int | float]:
    return {"size": "x".join(map(str, views.size)), "views": views.count}


def _how(sweep: str, matmul: str) -> dict[str, str | int | float]:
    return {"sweep": sweep, "matmul": matmul}


def _record(run: Run, timing: Timing, variant: str, labels: dict[str, Any]) -> None:
    run.row("forward", timing.ms_p50, unit="ms", better="lower", n=timing.n, variant=variant, labels=labels)
    if timing.peak_bytes is not None:
        peak = timing.peak_bytes / 2**30
        run.row("peak_memory", peak, unit="GiB", better="lower", n=timing.n, variant=variant, labels=labels)


# The module alone -----------------------------------------------------------------------------------------------------


def _time_fusion(cfg: BenchConfig, run: Run, host: Any, views: Views) -> None:
    """All pairs at once, the loop, and one view more, on features of the host's shape."""
    settings, device = PRESETS[cfg.model].config, views.near.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        module = ZPressor(host.channels, settings.layers).to(device)
    stride = 8 if cfg.model == "depthsplat" else 4
    height, width = (side // stride for side in views.size)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, views.count, host.channels, height, width, generator=generator).to(device)
    centres = views.cam_to_world[..., :3, 3]

    clusters = cluster_views(centres, farthest_points(centres, cfg.anchors))

    def fused(attention: Attention) -> Tensor:
        # Of a copy, whose lists are made anew, as in every forward of a host.
        return module(features, replace(clusters), settings.precision, attention)

    calls: Calls = {"fusion": lambda: fused("padded")}
    if device.type == "cuda" and settings.precision == "bfloat16":
        calls = {"fusion": lambda: fused("varlen"), "fusion, padded": lambda: fused("padded")}
    calls["fusion by a loop"] = lambda: fuse_by_loop(module, features, clusters, settings.precision)
    for name in [name for name in calls if not _fits(calls[name])]:
        del calls[name]
        run.row("out_of_memory", 1, better="lower", variant=name, labels=_shared(views) | _how("none", "any"))
    for name in calls.keys() - {"fusion by a loop"}:
        check_values(name, calls[name](), calls["fusion by a loop"](), tolerance=1e-2)
    calls["one view folded in"] = _folding(module, features[0], centres[0], clusters, settings.precision)
    for matmul in cfg.matmuls:
        with _products(matmul):
            if device.type == "cuda" and "fusion" in calls:
                attention: Attention = "varlen" if settings.precision == "bfloat16" else "padded"
                calls[CAPTURED] = _captured(partial(module, features, clusters, settings.precision, attention))
                check_values(CAPTURED, calls[CAPTURED](), calls["fusion"](), tolerance=1e-3)
            times = measure_interleaved(calls, warmup=2, rounds=2 * cfg.rounds, seed=cfg.seed, device=device)
        for name, timing in times.items():
            # A graph's memory is kept apart, and was counted when it was captured.
            timing = replace(timing, peak_bytes=None) if name == CAPTURED else timing
            _record(run, timing, name, _shared(views) | _how("none", matmul))


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph: what is left of its time where nothing waits for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def _folding(
    module: ZPressor, features: Tensor, centres: Tensor, clusters: Clusters, precision: Any
) -> Callable[[], Tensor]:
    """A call that folds the last view that is no anchor into what holds all others; every call does the same.

    Where every view is an anchor, the first is folded in once more.
    """
    anchors = clusters.anchors[0]
    rest = [view for view in range(len(features)) if view not in anchors.tolist()] or [0]
    stream = ViewStream(module, features[anchors], centres[anchors], precision)
    for view in rest[:-1]:
        stream.add(features[view], centres[view])

    def call() -> Tensor:
        stream.tokens[stream.add(features[rest[-1]], centres[rest[-1]])].pop()
        return stream.features

    return call
