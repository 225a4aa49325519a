"""``bench``: the unmasking loop at published shapes, as released and as here.

Baseline is MoMask's loop re-created: conditional and unconditional passes one after the other, ranks by two sorts. Here
both passes are one batch; on a CUDA device the pass is one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.runs import Report, Run
from hone_core.timing import check_values, measure_interleaved
from torch import Tensor

from .config import BenchConfig
from .decoding import guided, unmask
from .method import Condition
from .mogents import MoGenTSTokenizer
from .published import MaskTransformer, MaskTransformer2D
from .tokenizers import RVQVAE

__all__ = ["BenchReport", "bench", "eager_loop", "graphed"]

SHAPES: dict[str, tuple[Callable[[], Any], int]] = {
    "momask": (MaskTransformer, 1),
    "mogents": (MaskTransformer2D, 6),
    "tiny": (lambda: MaskTransformer(64, 32, 48, 64, 2, 4), 1),
}


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """Milliseconds of each way."""

    def __str__(self) -> str:
        lines = [f"{'batch':>5} {'what':<28} {'ms':>10} {'speedup':>8}"]
        base = {row.labels["batch"]: row.value for row in self.rows if row.variant == "released loop"}
        for row in self.rows:
            if row.metric == "time":
                share = base[row.labels["batch"]] / row.value
                lines.append(f"{row.labels['batch']:>5} {row.variant:<28} {row.value:>10.2f} {share:>8.2f}")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def eager_loop(
    model: Any, condition: Condition, valid: Tensor, parts: int, generator: torch.Generator, steps: int, scale: float
) -> Tensor:
    """MoMask's loop as its release writes it."""
    batch, time = valid.shape
    there = valid[..., None].expand(batch, time, parts)
    ids = torch.where(there, model.mask_id, model.mask_id + 1)
    scores = torch.where(there, 0.0, 1e5).flatten(1)
    gone = torch.ones(batch, dtype=torch.bool, device=valid.device)
    for step in torch.linspace(0, 1, steps).tolist():
        count = (math.cos(math.pi / 2 * step) * valid.sum(1) * parts).round().clamp(min=1)
        masked = (scores.argsort(dim=1).argsort(dim=1) < count[:, None]).view(ids.shape)
        ids = torch.where(masked, model.mask_id, ids)
        asked = model(ids, condition, valid)
        nothing = model(ids, condition.dropped(gone, gone), valid)
        logits = (nothing + (asked - nothing) * scale).float()
        kept = math.ceil(0.1 * logits.shape[-1])
        values, at = logits.topk(kept, dim=-1)
        filtered = torch.full_like(logits, -math.inf).scatter(-1, at, values)
        odds = filtered.softmax(-1)
        drawn = torch.multinomial(odds.flatten(0, 2), 1, generator=generator).view(ids.shape)
        ids = torch.where(masked, drawn, ids)
        sure = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
        scores = torch.where(masked, sure, torch.full_like(sure, 1e5)).flatten(1)
    return ids


def graphed(call: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """A pass of fixed shape as one CUDA graph; what it returns is written over by the next call."""
    held = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(held)

    def replay(ids: Tensor) -> Tensor:
        held.copy_(ids)
        graph.replay()
        return out

    return replay


def _both(model: Any, condition: Condition, valid: Tensor, scale: float, ids: Tensor) -> Tensor:
    return guided(model, ids, condition, valid, scale, 1.0)


@torch.inference_mode()
def bench(cfg: BenchConfig, run: Run) -> BenchReport:
    """Time whole generations with random weights, after one pass of each way is compared.

    Raises:
        UnsupportedHardwareError: Graphs are asked for without a CUDA device.
        RuntimeError: The ways differ.
    """
    device = resolve_device(run.device)
    if cfg.graphs and device.type != "cuda":
        raise UnsupportedHardwareError("CUDA graphs need a CUDA device", f"a {device.type} device", "--no-graphs")
    dtype = resolve_dtype(cfg.dtype, device)
    make, parts = SHAPES[cfg.model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = make().eval().to(device, dtype)
        tokenizer: Any = None
        if cfg.model == "momask":
            tokenizer = RVQVAE().eval().to(device, dtype)
        elif cfg.model == "mogents":
            tokenizer = MoGenTSTokenizer().eval().to(device, dtype)
    for batch in cfg.batches:
        text = torch.randn(batch, 512, generator=torch.Generator().manual_seed(cfg.seed)).to(device, dtype)
        condition = Condition(text=text)
        valid = torch.ones(batch, cfg.tokens, dtype=torch.bool, device=device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        ids = torch.randint(model.codes, (batch, cfg.tokens, parts), device=device, generator=generator)

        both = partial(_both, model, condition, valid, cfg.guidance)
        gone = torch.ones(batch, dtype=torch.bool, device=device)
        asked, nothing = model(ids, condition, valid), model(ids, condition.dropped(gone, gone), valid)
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        check_values(
            "guidance in one batch", both(ids), nothing + (asked - nothing) * cfg.guidance, tolerance=tolerance
        )

        made = partial(unmask, valid=valid, parts=parts, mask_id=model.mask_id, generator=generator, steps=cfg.steps)
        calls: dict[str, Callable[[], object]] = {
            "released loop": partial(eager_loop, model, condition, valid, parts, generator, cfg.steps, cfg.guidance),
            "one batch": partial(made, both),
        }
        if cfg.graphs:
            step = graphed(both, ids)
            check_values("the graph", step(ids), both(ids), tolerance=tolerance)
            calls["one batch, graphs"] = partial(made, step)
        if tokenizer is not None:
            levels = torch.randint(256, (batch, cfg.tokens, 6), device=device, generator=generator)
            grid = torch.randint(256, (batch, cfg.tokens, 6, 6), device=device, generator=generator)
            held = (levels,) if parts == 1 else (levels, grid)
            calls["decoder"] = partial(tokenizer.forward_decoder, *held)
        times = measure_interleaved(calls, warmup=2, rounds=cfg.rounds, seed=cfg.seed, device=device)
        for name, timing in times.items():
            run.row(
                "time", timing.ms_p50, unit="ms", better="lower", n=cfg.rounds, variant=name, labels={"batch": batch}
            )
    return BenchReport.of(run)
