"""Time of whole images at real sizes with random weights: dense, sparse, and with the last scales left out.

Random weights make no meaningful map, so that sparse scales choose by smooth random maps; what is timed is the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure
from hone_visual_ar.checkpoints import build
from hone_visual_ar.generation import Generation, Policy
from hone_visual_ar.infinity import INFINITY_SIZES, Infinity
from hone_visual_ar.sampling import Sampling
from hone_visual_ar.schedules import ScaleSchedule, infinity_schedule
from hone_visual_ar.tokenizers import BSQVAE, ScaleTokenizer
from hone_visual_ar.transformer import Condition, NextScaleTransformer

from .config import BenchConfig
from .flops import gflops, scale_gflops
from .models import SparsePolicy, tiny
from .peers import EarlyStop

__all__ = ["BenchReport", "ScaleGraphs", "bench", "smooth_map"]

TOKENIZERS = {14: "bsq_d14_patchify", 16: "bsq_d16", 32: "bsq_d32"}
STOPS = (1, 2, 3)
Labels = dict[str, str | int | float]


def smooth_map(grid: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    """A map ``[h, w]`` of a few blobs."""
    coarse = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)[0, 0].to(device)


class ScaleGraphs:
    """An image as one CUDA graph per scale; lengths are static, so that each is captured once.

    Args:
        start: Makes the empty generation.
        policy: Of static lengths.
    """

    def __init__(self, start: Callable[[], Generation], policy: Policy) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _eager(start(), policy)
        torch.cuda.current_stream().wait_stream(stream)
        self.run = start()
        self.run.state = policy.begin(self.run)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        for scale in range(len(self.run.schedule)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graphs[0].pool() if self.graphs else None):
                going_on = self.run.step(scale, policy)
            if not going_on:
                break
            self.graphs.append(graph)

    def __call__(self) -> torch.Tensor:
        """Replay all scales; the summed latent."""
        for graph in self.graphs:
            graph.replay()
        return self.run.latent


def _eager(run: Generation, policy: Policy) -> Generation:
    run.state = policy.begin(run)
    for scale in range(len(run.schedule)):
        if not run.step(scale, policy):
            break
    return run


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Result of ``bench``; as text, times beside the dense one's."""

    def __str__(self) -> str:
        lines = []
        found = {(row.labels.get("mode"), row.variant, row.metric): row for row in self.rows if not row.split}
        for (mode, variant, metric), row in found.items():
            if metric != "time":
                continue
            dense = found[mode, "dense", "time"].value
            work = found[mode, "dense", "gflops"].value / found[mode, variant, "gflops"].value
            lines.append(
                f"{mode or '':<9} {variant:<14} {row.value:>10.2f} ms +- {row.spread or 0:.2g}"
                f"  {dense / row.value:5.2f} x dense, of {work:.2f} by work"
            )
        lines += [f"decode    {row.value:10.2f} ms" for row in self.rows if row.metric == "decode"]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time every mode and variant.

    Rows: ``time`` (``ms``, transformer of a batch, all scales) and ``gflops`` of each variant and mode; ``scale_time``
    of each scale by graph (split: the scale); ``peak_memory``; ``cache``; ``decode`` of the tokenizer.

    Raises:
        ValueError: There is no such model or schedule.
        UnsupportedHardwareError: A published size, or graphs, are asked of a CPU.
        RuntimeError: A ratio of 0 differs from dense, or a graph from eager; no time is reported then.
    """
    device = resolve_device(run.device)
    if cfg.model != "tiny" and cfg.model not in INFINITY_SIZES:
        raise ValueError(f"model must be tiny or one of {', '.join(INFINITY_SIZES)}; got {cfg.model!r}")
    if device.type == "cpu" and (cfg.model != "tiny" or set(cfg.modes) != {"eager"}):
        raise UnsupportedHardwareError(
            f"{cfg.model} in modes {', '.join(cfg.modes)} needs a CUDA device", "no CUDA device", "--model tiny"
        )
    with torch.no_grad():
        _Bench(cfg, run, device).all()
    return BenchReport.of(run)


class _Bench:
    """The state that the parts share."""

    def __init__(self, cfg: BenchConfig, run: Run, device: torch.device) -> None:
        self.cfg, self.run, self.device = cfg, run, device
        torch.manual_seed(cfg.seed)
        self.model, self.tokenizer, self.schedule = self.build()
        self.condition = self.prompts()

    def build(self) -> tuple[NextScaleTransformer, ScaleTokenizer, ScaleSchedule]:
        cfg = self.cfg
        if cfg.model == "tiny":
            model, tokenizer, schedule = tiny(cfg.seed)
            return model.to(self.device), tokenizer.to(self.device), schedule
        schedule = infinity_schedule(cfg.pixels, cfg.aspect)
        dtype = resolve_dtype(cfg.dtype, self.device)
        real = build(cfg.model, self.device)
        assert isinstance(real, Infinity)
        codes = build(TOKENIZERS[real.config["code_dim"]], self.device)
        assert isinstance(codes, BSQVAE)
        return real.to_body_dtype(dtype).eval(), codes.to(dtype).eval(), schedule

    def prompts(self) -> Condition:
        channels, longest = self.model.config["text_channels"], self.model.config["text_maxlen"]
        count = min(self.cfg.text_tokens, longest)
        text = torch.randn(self.cfg.batch, count, channels, device=self.device)
        assert isinstance(self.model, Infinity)
        return self.model.condition(text, [count] * self.cfg.batch)

    def start(self) -> Generation:
        sampling = Sampling(guidance=4.0, top_p=0.97)
        seeds = range(self.cfg.batch)
        return Generation.start(
            self.model, self.tokenizer, self.condition, self.schedule, seeds=seeds, sampling=sampling
        )

    def policies(self) -> dict[str, Policy]:
        maps = {k: smooth_map(grid, self.cfg.seed + k, self.device) for k, grid in enumerate(self.schedule.grids)}
        stops = {f"early-stop-{count}": EarlyStop(count) for count in STOPS}
        return {"dense": Policy(), "sparse": SparsePolicy(self.cfg.settings, maps=maps), **stops}

    def all(self) -> None:
        self.check()
        for mode in self.cfg.modes:
            if mode == "compiled":
                for block in self.model.layers:
                    block.compile(dynamic=False)
            for name, policy in self.policies().items():
                self.time(mode, name, policy)
                self.clear()
        self.decode()

    def check(self) -> None:
        """Nothing left out is dense, bit for bit."""
        dense = _eager(self.start(), Policy())
        full = _eager(self.start(), SparsePolicy(replace(self.cfg.settings, ratio=0.0, select="topk")))
        if not torch.equal(full.latent, dense.latent):
            raise RuntimeError("a ratio of 0 differs from dense on this device; no time is reported")

    def time(self, mode: str, name: str, policy: Policy) -> None:
        labels: Labels = {"model": self.cfg.model, "batch": self.cfg.batch, "mode": mode}
        records = _eager(self.start(), policy).records
        options = {"warmup": self.cfg.warmup, "repeats": self.cfg.rounds, "device": self.device}
        if mode == "eager":
            self.cache_row(labels, name)
            timing = measure(lambda: _eager(self.start(), policy), **options)  # type: ignore[arg-type]
        else:
            graphs = ScaleGraphs(self.start, policy)
            eager = _eager(self.start(), policy).latent
            check_values(f"{name} by graph", graphs(), eager, tolerance=1e-5, advice="Time eager alone")
            timing = measure(graphs, **options)  # type: ignore[arg-type]
            for scale, graph in enumerate(graphs.graphs):
                each = measure(graph.replay, **options)  # type: ignore[arg-type]
                self.row(
                    each, "scale_time", name, labels | {"gflops": scale_gflops(records[scale], self.model)}, str(scale)
                )
        self.row(timing, "time", name, labels)
        work = gflops(records, self.model, self.cfg.text_tokens)
        self.run.row("gflops", work, unit="GFLOP", better="lower", variant=name, labels=labels)
        if timing.peak_bytes is not None:
            peak = timing.peak_bytes / 2**30
            self.run.row("peak_memory", peak, unit="GiB", better="lower", variant=name, labels=labels)

    def cache_row(self, labels: Labels, name: str) -> None:
        size = self.start().cache.bytes / 2**30
        self.run.row("cache", size, unit="GiB", better="lower", variant=name, labels=labels)

    def row(self, timing: Timing, metric: str, name: str, labels: Labels, split: str = "") -> None:
        spread = (timing.ms_p80 - timing.ms_p20) / 2
        self.run.row(
            metric, timing.ms_p50, unit="ms", better="lower", n=timing.n, spread=spread, variant=name, split=split,
            labels=labels,
        )  # fmt: skip

    def decode(self) -> None:
        latent = self.start().latent
        timing = measure(
            lambda: self.tokenizer.decode(latent), warmup=2, repeats=min(10, self.cfg.rounds), device=self.device
        )
        self.row(timing, "decode", "tokenizer", {"model": self.cfg.model, "batch": self.cfg.batch})

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
