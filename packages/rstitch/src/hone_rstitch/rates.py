"""The engine on pages: steps beside what memory bandwidth allows, gaps, and rates of many requests at once."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import Stopwatch, Timing, check_values, measure_interleaved
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .config import LARGE, NAMES, SMALL, BenchConfig, EngineConfig, SamplingConfig, StitchConfig
from .engine import Engine, Job
from .method import token_time
from .models import Pair
from .paged import PagedModel

__all__ = ["rates"]

STEPS, TEXTS = 20, 3

log = logging.getLogger(__name__)


def rates(cfg: BenchConfig, run: Run, pair: Pair) -> None:
    """Measure the engine, and write rows into the run.

    Args:
        cfg: Shapes and lengths.
        run: The run, entered.
        pair: Its models; tokenizers are not needed.

    Raises:
        RuntimeError: The engine and transformers' forward do not say the same; no time is reported then.
    """
    most = max(cfg.batches)
    room = cfg.context + max(cfg.tokens, *cfg.gaps) + 1
    engine = Engine(pair, EngineConfig(cache="paged", max_batch=most, max_tokens=most * room, max_queue=most))
    generator = torch.Generator().manual_seed(cfg.seed)
    # Ordinary ids of both models; the packaged pair has few.
    ids = torch.randint(0, 10, (cfg.context,), generator=generator).tolist()
    bandwidth = _bandwidth(engine.device)
    if bandwidth is not None:
        run.row("bandwidth", bandwidth / 1e9, unit="GB/s", better="none", variant="specified")
    with torch.no_grad():
        steps = [_steps(cfg, run, engine, model, ids, which) for which, model in enumerate((pair.small, pair.large))]
        _texts(cfg, run, engine, ids, steps)
        _beside(cfg, run, pair, ids)


def _steps(cfg: BenchConfig, run: Run, engine: Engine, model: Any, ids: list[int], which: int) -> float:
    """Times of steps and gaps of one model; returns the wall time of a step of one row, in milliseconds."""
    paged: PagedModel = engine._sides[which].paged
    name, most = NAMES[which], max(cfg.batches)
    places = [engine._sides[which].free.take(cfg.context + max(cfg.gaps)) for _ in range(most)]
    for place in places:
        paged.admit(*place)
        paged.absorb(place[0], 0, ids)
    found = paged.read([(places[0][0], cfg.context, ids[:1])])
    want = model(torch.tensor([[*ids, ids[0]]], device=model.device), logits_to_keep=1).logits[:, -1]
    if paged.ids is not None:
        want = want.index_select(-1, paged.ids)
    open_ = ~paged.closed
    # Two ways of rounding differ by a few units of the format through dozens of layers.
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}.get(paged.decoder.dtype, 0.1)
    check_values(f"the {name} model's logits on pages", found.logits[:, open_], want[:, open_], tolerance=tolerance)
    bandwidth = _bandwidth(paged.device)
    wall_of_one = 0.0
    for batch in cfg.batches:
        gaps = [(row, cfg.context, ids[:1]) for row, _ in places[:batch]]
        times = _wall(partial(paged.read, gaps), cfg, paged.device)
        labels = {"batch": batch}
        run.row("step", times.ms_p50, unit="ms", better="lower", n=times.n, variant=name, labels=labels)
        wall_of_one = wall_of_one or times.ms_p50
        # A single row takes fewer launches.
        words = ("plain", "fused") if batch == 1 else ("plain",)
        calls = {word: paged.step(batch, fused=word == "fused") for word in words}
        said = [call.run(gaps).logits[:, open_] for call in calls.values()]
        check_values(f"the {name} model's logits in fewer launches", said[-1], said[0], tolerance=tolerance)
        inside = measure_interleaved(
            {word: call.again for word, call in calls.items()}, warmup=2, rounds=cfg.rounds, device=paged.device
        )
        for word, one in inside.items():
            run.row(
                "graph", one.ms_p50, unit="ms", better="lower", n=one.n, variant=name,
                labels=labels | {"launches": word},
            )  # fmt: skip
        if bandwidth is not None:
            size = paged.decoder.step_bytes + batch * (cfg.context + 1) * paged.decoder.token_bytes
            floor = 1e3 * size / bandwidth
            run.row("floor", floor, unit="ms", better="none", variant=name, labels=labels)
            run.row("of_bandwidth", floor / times.ms_p50, better="higher", variant=name, labels=labels)
    for gap in sorted({1, *cfg.gaps}):
        piece = [(places[0][0], cfg.context, (ids * gap)[:gap])]
        times = _wall(partial(paged.read, piece), cfg, paged.device)
        run.row(
            "read", times.ms_p50, unit="ms", better="lower", n=times.n, variant=name, labels={"gap": gap, "batch": 1}
        )
    for place in places:
        engine._sides[which].free.give(*place)
    return wall_of_one


def _wall(call: Callable[[], object], cfg: BenchConfig, device: torch.device) -> Timing:
    """Time per call of several in a row, host included."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(cfg.rounds):
        with Stopwatch(device) as watch:
            for _ in range(STEPS):
                call()
        samples.append(1e3 * watch.seconds / STEPS)
    cuts = statistics.quantiles(samples, n=5) if len(samples) > 1 else samples * 4
    return Timing(ms_p20=cuts[0], ms_p50=statistics.median(samples), ms_p80=cuts[3], n=cfg.rounds)


def _texts(cfg: BenchConfig, run: Run, engine: Engine, ids: list[int], steps: list[float]) -> None:
    """Rates of one model alone and of stitched texts, over batches and over when the large model starts."""
    drawn = StitchConfig(policy="random", share=cfg.share, run_length=cfg.run_length, discards=True, prefill="both")
    for batch in cfg.batches:
        variants = {
            "small": (StitchConfig(policy="small", prefill="both"), 1),
            "large": (StitchConfig(policy="large", prefill="both"), 1),
        }
        variants |= {
            "stitched" if count == 1 else f"stitched, large from {count}": (drawn, count)
            for count in sorted({1, max(1, batch // 4), max(1, batch // 2)})
        }
        for name, (stitch, large_batch) in variants.items():
            engine.config = replace(engine.config, large_batch=large_batch)
            # The first text captures what calls it comes to.
            texts = [_text(cfg, engine, ids, stitch, batch) for _ in range(1 + TEXTS)][1:]
            rate = statistics.median(count / seconds for count, seconds, _ in texts)
            labels = {"batch": batch, "large_batch": large_batch}
            run.row("rate", rate, unit="tokens/s", better="higher", n=TEXTS, variant=name, labels=labels)
            log.info("%d x %s: %.1f tokens/s", batch, name, rate)
            jobs = texts[-1][2]
            tokens = sum(len(job.tokens) for job in jobs)
            share = sum(job.usage.tokens[LARGE] for job in jobs) / tokens
            discards = sum(job.usage.discarded for job in jobs) / tokens
            if stitch is not drawn:
                continue
            run.row("large_share", share, better="none", n=tokens, variant=name, labels=labels)
            run.row("discards", discards, better="none", n=tokens, variant=name, labels=labels)
            if batch == 1:
                predicted = token_time(share, discards, small=steps[SMALL], large=steps[LARGE])
                run.row("formula_rate", 1000 / predicted, unit="tokens/s", better="none", variant=name, labels=labels)


def _text(
    cfg: BenchConfig, engine: Engine, ids: list[int], stitch: StitchConfig, batch: int
) -> tuple[int, float, list[Job]]:
    """Tokens, seconds and requests of a batch of texts; their prompts are read before the clock starts."""
    sampling = SamplingConfig(max_new_tokens=cfg.tokens)
    ends, engine.ends = engine.ends, set()
    try:
        jobs = [engine.submit((ids, ids), stitch, sampling, seed=cfg.seed + at) for at in range(batch)]
        engine.step()
        before = sum(len(job.tokens) for job in jobs)
        with Stopwatch(engine.device) as watch:
            while engine.step():
                pass
    finally:
        engine.ends = ends
    for job in jobs:
        job.wait(0)
    return sum(len(job.tokens) for job in jobs) - before, watch.seconds, jobs


def _beside(cfg: BenchConfig, run: Run, pair: Pair, ids: list[int]) -> None:
    """Both models in transformers' generate, for the smallest batch and, eager, the largest."""
    for batch in sorted({min(cfg.batches), max(cfg.batches)}):
        prompt = torch.tensor([ids] * batch, device=pair.device)
        ways: dict[str, dict[str, Any]] = {}
        if "eager" in cfg.peers:
            ways["transformers"] = {}
        if "static" in cfg.peers and batch == min(cfg.batches):
            ways["transformers, static cache"] = {"cache_implementation": "static"}
        for way, options in ways.items():
            for name, model in zip(NAMES, (pair.small, pair.large), strict=True):
                _rate(cfg, run, f"{name}, {way}", model, prompt, options)
        if "assisted" in cfg.peers and batch == 1:
            # It refuses vocabularies that differ in padding.
            pair.small.resize_token_embeddings(pair.large.config.vocab_size)
            _rate(cfg, run, "large, assisted decoding", pair.large, prompt, {"assistant_model": pair.small})


class _Clock(StoppingCriteria):
    """When texts had which length; generate asks after each of its steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: list[tuple[float, int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seen.append((time.perf_counter(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _rate(cfg: BenchConfig, run: Run, variant: str, model: Any, prompt: Tensor, options: dict[str, Any]) -> None:
    new = 1 + min(cfg.tokens, 32)
    for _ in range(3):  # the first two compile and warm up
        clock = _Clock(prompt.device)
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]), **options,
        )  # fmt: skip
    (first, before), (last, after) = clock.seen[0], clock.seen[-1]
    if after == before:
        raise RuntimeError(f"{variant} wrote {new} tokens in one step, which is too few to time; give more --tokens")
    rate = len(prompt) * (after - before) / (last - first)
    run.row("rate", rate, unit="tokens/s", better="higher", n=1, variant=variant, labels={"batch": len(prompt)})
    log.info("%d x %s: %.1f tokens/s", len(prompt), variant, rate)


def _bandwidth(device: torch.device) -> float | None:
    """Bytes a second that the memory of a GPU is specified for; None on a CPU, or where the driver does not say."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    # Kilohertz, two transfers a cycle, bits.
    return 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8 or None
