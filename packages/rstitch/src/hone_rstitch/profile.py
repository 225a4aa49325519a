"""Measure both models' calls on this machine and fit the latency estimate of R-Stitch+."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch

from .config import NAMES, EngineConfig, ProfileConfig
from .engine import Engine
from .host import load_models
from .latency import Latency, write_latency

__all__ = ["ProfileReport", "profile"]


@dataclass(frozen=True, kw_only=True)
class ProfileReport(Report):
    """Coefficients, and how far the fit is from what was measured.

    Attributes:
        latency: file of the coefficients, which ``train-router`` takes.
    """

    latency: Path

    @classmethod
    def of(cls, run: Run) -> ProfileReport:
        """Return the report of a finished run."""
        return cls(path=run.path, rows=tuple(run.rows), latency=run.artifacts / "latency.json")

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            if row.metric == "call":
                read, cached = row.labels["tokens"], row.labels["cached"]
                lines.append(f"{row.variant:<5} reads {read:>4} after {cached:>5} in {row.value:9.3f} ms")
        lines += [f"{row.variant:<5} fit is off by {row.value:.1%}" for row in self.rows if row.metric == "fit_error"]
        return "\n".join([*lines, f"latency  {self.latency}", f"results  {self.path / 'results.json'}"])


def profile(cfg: ProfileConfig, run: Run) -> ProfileReport:
    """Time calls over tokens read and tokens cached, and fit the estimate.

    Raises:
        ValueError: A model is of no kind that runs on pages, or has fewer positions than the calls take; or there are
            too few kinds of calls.
    """
    pair = load_models(cfg.models, device=resolve_device(run.device))
    most = max(cfg.cached) + max(cfg.tokens)
    for name, model in zip(NAMES, (pair.small, pair.large), strict=True):
        positions = getattr(model.config, "max_position_embeddings", most)
        if most > positions:
            raise ValueError(
                f"calls of up to {max(cfg.tokens)} tokens after {max(cfg.cached)} take {most} positions; the {name} "
                f"model has {positions}. Lower cached or tokens"
            )
    engine = Engine(pair, EngineConfig(cache="paged", max_batch=1, max_tokens=most))
    found = []
    for name, side in zip(NAMES, engine._sides, strict=True):
        place = side.free.take(most)
        side.paged.admit(*place)
        side.paged.absorb(place[0], 0, [0] * most)
        points = []
        for cached in cfg.cached:
            for tokens in sorted({1, *cfg.tokens}):
                call = [(place[0], cached, [0] * tokens)]
                for _ in range(2):
                    side.paged.read(call)
                samples = []
                for _ in range(cfg.rounds):
                    with Stopwatch(pair.device) as watch:
                        side.paged.read(call)
                    samples.append(1e3 * watch.seconds)
                value = statistics.median(samples)
                points.append((tokens, cached, value))
                labels = {"tokens": tokens, "cached": cached}
                run.row("call", value, unit="ms", better="lower", n=cfg.rounds, variant=name, labels=labels)
        side.free.give(*place)
        fit = Latency.fit(points)
        misses = torch.tensor([abs(fit.of(n, kv) - value) / value for n, kv, value in points])
        run.row("fit_error", float(misses.median()), better="lower", n=len(points), variant=name)
        found.append(fit)
    small, large = found
    write_latency(run.artifacts / "latency.json", (small, large))
    return ProfileReport.of(run)
