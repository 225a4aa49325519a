"""Time and memory of sections that lie in each other, for what runs a few times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Meter"]


class Meter:
    """Seconds and peak memory by section; a section inside another one is not in that one's seconds.

    It waits for the device at both ends of a section.

    Args:
        device: What is measured.

    Attributes:
        seconds: By name, summed over the sections of that name.
        peak: By name, the most bytes that torch's allocator held in one, with what lies in it; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a section."""
        cuda = self.device.type == "cuda"

        def settle() -> float:
            if cuda:
                torch.cuda.synchronize(self.device)
                for outer in self._open:
                    self.peak[outer] = max(self.peak.get(outer, 0), torch.cuda.max_memory_allocated(self.device))
                torch.cuda.reset_peak_memory_stats(self.device)
            return time.perf_counter()

        start = settle()
        self._open.append(name)
        yield
        spent = settle() - start
        self._open.pop()
        self.seconds[name] += spent
        if self._open:
            self.seconds[self._open[-1]] -= spent
