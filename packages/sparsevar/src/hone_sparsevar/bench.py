"""Time of whole images at real sizes with random weights: dense, sparse, and with the last scales left out.

Random weights make no meaningful map, so that sparse scales choose by smooth random maps; what is timed is the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.progress import Progress, progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Timing, check_values, measure
from hone_visual_ar.checkpoints import build
from hone_visual_ar.generation import Generation, Policy
from hone_visual_ar.infinity import Infinity
from hone_visual_ar.pipelines import tokenizer_of
from hone_visual_ar.sampling import Sampling
from hone_visual_ar.schedules import ScaleSchedule, infinity_schedule
from hone_visual_ar.tokenizers import ScaleTokenizer
from hone_visual_ar.transformer import NextScaleTransformer, Observe
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel

from . import inputs
from .config import BenchConfig
from .flops import gflops, scale_gflops
from .models import SparsePolicy, tiny
from .peers import EarlyStop

__all__ = ["BenchReport", "ScaleGraphs", "bench", "smooth_map", "without_blocks"]

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

    Attributes:
        peak_bytes: The most that torch's allocator held while graphs were captured: weights, cache and all between.
    """

    def __init__(self, start: Callable[[], Generation], policy: Policy) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            scales = len(_eager(start(), policy).records)
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.run = start()
        self.run.state = policy.begin(self.run)
        # The first graph reads it, and a capture hands what nothing holds back to the driver.
        self.first_latent = self.run.latent
        self.graphs: list[torch.cuda.CUDAGraph] = []
        for scale in range(scales):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graphs[0].pool() if self.graphs else None):
                self.run.step(scale, policy)
            self.graphs.append(graph)
        self.peak_bytes = torch.cuda.max_memory_allocated()

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


@contextmanager
def without_blocks(model: NextScaleTransformer) -> Iterator[None]:
    """Blocks give their tokens back as they came; who looks at each is shown these."""

    def through(x: torch.Tensor, *_: Any, observe: Observe | None = None) -> torch.Tensor:
        if observe is not None:
            for number in range(len(model.layers)):
                observe(number, x, x)
        return x

    model.run_blocks = through  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model.run_blocks


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU cuDNN's attention first, the fastest that torch has there, for every variant."""
    if device.type == "cpu":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Result of ``bench``; as text, times beside the dense one's."""

    def __str__(self) -> str:
        lines = []
        found = {(row.labels.get("mode"), row.variant, row.metric): row for row in self.rows if not row.split}
        around = sum(row.value for row in self.rows if row.metric in ("text", "decode"))
        for (mode, variant, metric), row in found.items():
            if metric != "time":
                continue
            dense = found[mode, "dense", "time"].value
            work = found[mode, "dense", "gflops"].value / found[mode, variant, "gflops"].value
            whole = (dense + around) / (row.value + around)
            line = f"{mode or '':<9} {variant:<14} {row.value:>10.2f} ms +- {row.spread or 0:.2g}"
            line += f"  {dense / row.value:5.2f} x dense, {dense / row.value / work:.2f} of {work:.2f} by work"
            line += f", {whole:.2f} with text and decode"
            if peak := found.get((mode, variant, "peak_memory")):
                line += f", {peak.value:.2f} GiB"
            if outside := found.get((mode, variant, "outside_blocks")):
                line += f", {outside.value:.2f} ms of it outside the blocks"
            lines.append(line)
        lines += [f"{r.metric:<9} {r.value:25.2f} ms" for r in self.rows if r.metric in ("text", "decode")]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time every mode and variant.

    Rows: ``time`` (``ms``, transformer of a batch, all scales) and ``gflops`` of each variant and mode; by graph
    ``scale_time`` of each scale (split: the scale) and ``outside_blocks``, of all that is not blocks; ``peak_memory``
    of weights, cache and what lies between; ``cache``; ``text`` of the text encoder (random weights of Flan-T5-XL's
    shape) with what the transformer makes of it; ``decode`` of the tokenizer.

    Raises:
        ValueError: There is no such model or schedule.
        UnsupportedHardwareError: A published size, or graphs, are asked of a CPU.
        RuntimeError: A ratio of 0 differs from dense, or a graph from eager; no time is reported then.
    """
    device = resolve_device(run.device)
    inputs.bench(cfg)
    if device.type == "cpu" and (cfg.model != "tiny" or cfg.kernels or set(cfg.modes) != {"eager"}):
        raise UnsupportedHardwareError(
            f"{cfg.model} in modes {', '.join(cfg.modes)} needs a CUDA device", "no CUDA device", "--model tiny"
        )
    with torch.no_grad(), _attention(device):
        _Bench(cfg, run, device).all()
    return BenchReport.of(run)


class _Bench:
    """The state that the parts share."""

    def __init__(self, cfg: BenchConfig, run: Run, device: torch.device) -> None:
        self.cfg, self.run, self.device = cfg, run, device
        torch.manual_seed(cfg.seed)
        self.model, self.tokenizer, self.schedule = self.build()
        self.condition = self.model.condition(*self.text())

    def build(self) -> tuple[Infinity, ScaleTokenizer, ScaleSchedule]:
        cfg = self.cfg
        if cfg.model == "tiny":
            model, tokenizer, schedule = tiny(cfg.seed)
            return model.to(self.device), tokenizer.to(self.device), schedule
        schedule = infinity_schedule(cfg.pixels, cfg.aspect)
        dtype = resolve_dtype(cfg.dtype, self.device)
        real: Any = build(cfg.model, self.device)
        codes: Any = build(tokenizer_of(cfg.model), self.device)
        return real.to_body_dtype(dtype).eval(), codes.to(dtype, memory_format=torch.channels_last).eval(), schedule

    def text(self) -> tuple[torch.Tensor, list[int]]:
        shape = (self.cfg.batch, self.cfg.words, self.model.config["text_channels"])
        return torch.randn(shape, device=self.device), [self.cfg.words] * self.cfg.batch

    def start(self, policy: Policy) -> Generation:
        return Generation.start(
            self.model,
            self.tokenizer,
            self.condition,
            self.schedule,
            seeds=range(self.cfg.batch),
            sampling=Sampling(guidance=4.0, top_p=0.97),
            capacity=policy.capacity(self.schedule),
        )

    def policies(self) -> dict[str, Policy]:
        maps = {k: smooth_map(grid, self.cfg.seed + k, self.device) for k, grid in enumerate(self.schedule.grids)}
        stops = {f"early-stop-{count}": EarlyStop(count) for count in self.cfg.stops}
        policies = {"dense": Policy(), "sparse": SparsePolicy(self.cfg.settings, maps=maps), **stops}
        if self.cfg.kernels:
            policies["sparse-kernels"] = SparsePolicy(replace(self.cfg.settings, backend="triton"), maps=maps)
        return policies

    def eager(self, policy: Policy) -> Generation:
        return _eager(self.start(policy), policy)

    def all(self) -> None:
        self.check()
        policies = self.policies()
        rest = [self.decode] if self.cfg.model == "tiny" else [self.decode, self.encode]
        total = len(self.cfg.modes) * len(policies) + len(rest)
        with progress_bar(total, desc=self.cfg.model, quiet=self.run.quiet) as bar:
            for mode in self.cfg.modes:
                if mode == "compiled":
                    for block in self.model.layers:
                        block.compile_around(dynamic=True)
                for name, policy in policies.items():
                    bar.show(now=f"{name}, {mode}")
                    self.time(mode, name, policy)
                    self.done(bar)
            for part in rest:
                bar.show(now=part.__name__)
                part()
                self.done(bar)

    def check(self) -> None:
        """Nothing left out is dense, bit for bit."""
        full = SparsePolicy(replace(self.cfg.settings, ratio=0.0, select="topk", backend="torch"))
        if not torch.equal(self.eager(full).latent, self.eager(Policy()).latent):
            raise RuntimeError("a ratio of 0 differs from dense on this device; no time is reported")

    def time(self, mode: str, name: str, policy: Policy) -> None:
        labels: Labels = {"model": self.cfg.model, "batch": self.cfg.batch, "mode": mode}
        options: Any = {"warmup": self.cfg.warmup, "repeats": self.cfg.rounds, "device": self.device}
        plain = self.eager(policy)
        records = plain.records
        self.value("cache", plain.cache.bytes / 2**30, "GiB", name, labels)
        if mode == "eager":
            del plain
            timing = measure(lambda: self.eager(policy), **options)
            peak = timing.peak_bytes
        else:
            latent = plain.latent
            del plain
            graphs = ScaleGraphs(lambda: self.start(policy), policy)
            check_values(f"{name} by graph", graphs(), latent, tolerance=1e-5, advice="Time eager alone")
            timing, peak = measure(graphs, **options), graphs.peak_bytes
            options |= {"warmup": 1, "repeats": max(1, self.cfg.rounds // 4)}
            for scale, graph in enumerate(graphs.graphs):
                work = labels | {"gflops": scale_gflops(records[scale], self.model, self.cfg.words)}
                self.row(measure(graph.replay, **options), "scale_time", name, work, str(scale))
            del graphs
            self.clear()
            # Fused kernels share a loop with the blocks, so that there is no time without them.
            if name != "sparse-kernels":
                self.outside(name, policy, labels)
        self.row(timing, "time", name, labels)
        self.value("gflops", gflops(records, self.model, self.cfg.words), "GFLOP", name, labels)
        if peak is not None:
            self.value("peak_memory", peak / 2**30, "GiB", name, labels)

    def outside(self, name: str, policy: Policy, labels: Labels) -> None:
        """Time of all that is not blocks: embedding, selection, gather, head, draws, filling, the latent."""
        options: Any = {"warmup": 1, "repeats": max(3, self.cfg.rounds // 2), "device": self.device}
        with without_blocks(self.model):
            graphs = ScaleGraphs(lambda: self.start(policy), policy)
            self.row(measure(graphs, **options), "outside_blocks", name, labels)

    def value(self, metric: str, value: float, unit: str, name: str, labels: Labels) -> None:
        self.run.row(metric, value, unit=unit, better="lower", variant=name, labels=labels)

    def row(self, timing: Timing, metric: str, name: str, labels: Labels, split: str = "") -> None:
        spread = (timing.ms_p80 - timing.ms_p20) / 2
        self.run.row(
            metric, timing.ms_p50, unit="ms", better="lower", n=timing.n, spread=spread, variant=name, split=split,
            labels=labels,
        )  # fmt: skip

    def decode(self) -> None:
        latent = self.start(EarlyStop(1)).latent
        options: Any = {"warmup": 2, "repeats": min(10, self.cfg.rounds), "device": self.device}
        timing = measure(lambda: self.tokenizer.decode(latent), **options)
        self.row(timing, "decode", "tokenizer", {"model": self.cfg.model, "batch": self.cfg.batch})

    def encode(self) -> None:
        """The text encoder's time; its weights are random as all others."""
        text, lengths = self.text()
        config = T5Config(
            d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, use_cache=False,
        )  # fmt: skip
        with torch.device(self.device):
            encoder = T5EncoderModel(config).to(resolve_dtype(self.cfg.dtype, self.device)).eval()
        ids = torch.randint(0, config.vocab_size, text.shape[:2], device=self.device)

        def both() -> object:
            return self.model.condition(encoder(ids).last_hidden_state.float(), lengths)

        options: Any = {"warmup": 2, "repeats": min(10, self.cfg.rounds), "device": self.device}
        self.row(measure(both, **options), "text", "encoder", {"model": self.cfg.model, "batch": self.cfg.batch})

    def done(self, bar: Progress) -> None:
        """What was timed lasts, whatever comes after it."""
        self.run.save()
        self.clear()
        bar.update()

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
