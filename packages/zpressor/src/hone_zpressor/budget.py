"""How many anchors fit a budget of time or memory: found by trying, on this machine, with the views at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hone_splat.views import Views

__all__ = ["Budget", "Cost", "forward_cost", "most_anchors"]

LEAST = 2
"""Hosts match views with each other."""


@dataclass(frozen=True)
class Cost:
    """Of one forward.

    Attributes:
        seconds: Wall clock.
        peak_bytes: Most memory of the device that it held, weights included; None where it is not measured.
    """

    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Budget:
    """Of one forward.

    Attributes:
        seconds: Wall clock; None for any.
        gib: Memory of the device, weights included; None for any.
    """

    seconds: float | None = None
    gib: float | None = None

    def holds(self, cost: Cost | None) -> bool:
        """Whether a forward stays within it; None is one that ran out of memory.

        Raises:
            ValueError: Memory is asked for where it is not measured.
        """
        if cost is None:
            return False
        if self.gib is not None:
            if cost.peak_bytes is None:
                raise ValueError("memory is measured on a CUDA device alone: give a budget of seconds here")
            if cost.peak_bytes > self.gib * 2**30:
                return False
        return self.seconds is None or cost.seconds <= self.seconds


def most_anchors(cost: Callable[[int], Cost | None], most: int, budget: Budget) -> int:
    """Largest number of anchors that fits, if more anchors cost more: doubled from two, then halved in between.

    Args:
        cost: What a forward with so many anchors costs; None where it ran out of memory.
        most: Views that there are.
        budget: To stay within.

    Raises:
        ValueError: Two anchors do not fit, or there are fewer views.
    """
    if most < LEAST:
        raise ValueError(f"expected at least {LEAST} views; got {most}")
    first = cost(LEAST)
    if not budget.holds(first):
        found = "ran out of memory" if first is None else _shown(first)
        raise ValueError(
            f"{budget} is too small: a forward with {LEAST} anchors {found}. Give more, or smaller pictures"
        )
    fits, fails = LEAST, most + 1
    while fits + 1 < fails:
        # Nothing above a number that failed is tried.
        tried = min(2 * fits, most) if fails > most else (fits + fails) // 2
        if budget.holds(cost(tried)):
            fits = tried
        else:
            fails = tried
    return fits


def _shown(cost: Cost) -> str:
    memory = "" if cost.peak_bytes is None else f" and holds {cost.peak_bytes / 2**30:.2f} GiB"
    return f"takes {cost.seconds:.2f} s{memory}"


@torch.inference_mode()
def forward_cost(host: Any, views: Views, anchors: int) -> Cost | None:
    """Run a compressed host twice and measure the second; None where memory ran out.

    Args:
        host: With a compressor, see ``attach``; its setting is left at ``anchors``.
        views: That it is given.
        anchors: That it keeps.
    """
    compressor, device = host.join.zipmatch, views.image_01.device
    compressor.config = replace(compressor.config, anchors=anchors)
    cuda = device.type == "cuda"
    try:
        host(views)
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        host(views)
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return Cost(seconds, torch.cuda.max_memory_allocated(device) if cuda else None)
