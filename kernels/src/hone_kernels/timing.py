"""Times of GPU calls against each other, in random order.

Attention kernels run at a card's power limit, so a time depends on what ran just before it. Each round therefore runs
every call once, in a fresh random order, and medians are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Times", "interleaved"]

_COVER_CYCLES = 4_000_000
"""About 2 ms of GPU clock, in which the host enqueues: launch time is then not in a short kernel's time."""


@dataclass(frozen=True)
class Times:
    """20th, 50th and 80th percentile in milliseconds over ``n`` calls."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    n: int


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3, seed: int = 0
) -> dict[str, Times]:
    """Time every call ``rounds`` times on the current CUDA device, interleaved.

    Args:
        calls: Name to call; everything that it does is timed.
        rounds: Timed calls of each, at least 1.
        warmup: Untimed calls of each first.
        seed: Of the order.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(seed)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            torch.cuda._sleep(_COVER_CYCLES)
            begin.record()
            calls[name]()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: Times(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist(), n=rounds)
        for name, values in samples.items()
    }
