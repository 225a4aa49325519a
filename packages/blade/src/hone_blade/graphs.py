"""A function of tensors as a CUDA graph: its launches are recorded once and replayed.

The kernels are the same in the same order, so the values are too. What a replay saves is the host's part, which is most
of the time of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Replayed"]

WARM_UP = 2
"""Calls before the recording: kernels are compiled, and what is cached is made."""


class Replayed:
    """A function that the first call records.

    Its tensors' memory is the graph's: the next call overwrites what this one returned. It may read other tensors, such
    as weights, which have to stay where they are; it may not wait for the device or change anything.

    Args:
        function: Of tensors of one device, with no other arguments; shapes and dtypes must not change.
        generator: What it draws from, of the device. A replay goes on from the generator's state, as a call would.
        pool: ``torch.cuda.graph_pool_handle()``: memory shared with graphs that are replayed in the order of their
            recording.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], generator: torch.Generator, pool: Any) -> None:
        self.function, self.generator, self.pool = function, generator, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's outputs for these inputs."""
        with torch.cuda.device(inputs[0].device):
            if self._graph is None:
                self._graph = self._record(inputs)
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
        return self._outputs

    def _record(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [x.clone() for x in inputs]
        drawn = self.generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.function(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.generator.set_state(drawn)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self.pool):
            self._outputs = self.function(*self._inputs)
        return graph
