"""A decoding step that a GPU replays: caches of fixed addresses, whose lengths grow on the device.

The step is the decoder's own forward, recorded once for a cache as a CUDA graph, so that the host launches once a token
in place of a thousand times. On a CPU the same step runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .cache import SparseLayer

__all__ = ["FixedLayer", "Step"]

ROOM = 256
"""Tokens that the first step of an answer makes room for; each time it is full, for twice as many."""


class FixedLayer(DynamicLayer):
    """What a layer stores, with room behind it; the layer's own tensors become views of it.

    Args:
        stored: The layer.
        real: ``[batch, tokens]``, False where padded; of a layer that dropped nothing. None without padding.
        room: Tokens to come.

    Attributes:
        valid: ``[batch, tokens and room]``, which entries are read.
        slot: ``[1]``, where the next token goes; counted on the device.
    """

    slot: Tensor

    def __init__(self, stored: SparseLayer, real: Tensor | None, room: int) -> None:
        super().__init__()
        self.stored, self.num = stored, stored.keys.shape[2]
        self.keys, self.values = _longer(stored.keys, room, 2), _longer(stored.values, room, 2)
        batch, device = len(self.keys), self.keys.device
        valid = stored.valid
        if valid is None:
            valid = torch.ones(batch, self.num, dtype=torch.bool, device=device) if real is None else real
        self.valid = _longer(valid[:, : self.num], room, 1)
        self.valid[:, self.num :] = False
        self.positions: Tensor | None = None
        if stored.positions is not None:
            self.positions = _longer(stored.positions, room, 1)
            self.positions[:, self.num :] = torch.arange(stored.seen, stored.seen + room, device=device)
        self.is_initialized = True
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each sample at its place; all that there is room for is returned."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        self.valid.index_fill_(1, self.slot, True)
        return self.keys, self.values

    def grew(self) -> None:
        """Tell the layer of a token that was written."""
        self.num += 1
        self.stored.seen += 1
        self._show()

    def _show(self) -> None:
        stored = self.stored
        stored.keys, stored.values = self.keys[:, :, : self.num], self.values[:, :, : self.num]
        if self.positions is not None:
            stored.note(self.positions[:, : self.num], self.valid[:, : self.num])
        self._shown = stored.keys

    @property
    def current(self) -> bool:
        """Whether the layer is as it was left."""
        return self.stored.keys is self._shown


def _longer(states: Tensor, room: int, dim: int) -> Tensor:
    """A copy with unwritten room at the end of an axis."""
    shape = list(states.shape)
    shape[dim] += room
    out = states.new_empty(shape)
    out.narrow(dim, 0, states.shape[dim]).copy_(states)
    return out


class Step:
    """One token after what a cache holds, and again.

    The first step runs as it is, which compiles kernels and lets libraries take their workspaces, the second one is
    recorded, and replayed from then on.

    Args:
        forward: The decoder's, from embeddings, positions and a cache.
        layers: Of the cache that is decoded from.
        real: ``[batch, tokens seen or more]``, False where padded; None without padding.
        embeds: ``[batch, 1, channels]`` of a step; others will have its shape.
        positions: Likewise.
        weights: What the forward reads besides; a graph reads it from where it was.
        room: Tokens to come.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Cache], Any],
        layers: Sequence[SparseLayer],
        real: Tensor | None,
        embeds: Tensor,
        positions: Tensor,
        weights: Sequence[Tensor],
        room: int = ROOM,
    ) -> None:
        self.forward, self.room, self.left = forward, room, room
        self.layers = [FixedLayer(layer, real, room) for layer in layers]
        slots = torch.tensor([layer.num for layer in self.layers], device=embeds.device)
        for layer, slot in zip(self.layers, slots.split(1), strict=True):
            layer.slot = slot
        self._slots, self._cache = slots, Cache(layers=list(self.layers))
        self._embeds, self._positions = embeds.clone(), positions.clone()
        self._weights, self._addresses = weights, [weight.data_ptr() for weight in weights]
        self._out: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(embeds.device) if embeds.device.type == "cuda" else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self  # of a cache, which a copy of the model does not have

    def fits(self, layers: Sequence[SparseLayer], embeds: Tensor, positions: Tensor) -> bool:
        """Whether it can go on: cache and weights are where they were, inputs have its shapes, and there is room."""
        return (
            self.left > 0
            and all(mine.current and mine.stored is layer for mine, layer in zip(self.layers, layers, strict=True))
            and (embeds.shape, embeds.dtype) == (self._embeds.shape, self._embeds.dtype)
            and positions.shape == self._positions.shape
            and [weight.data_ptr() for weight in self._weights] == self._addresses
        )

    def _work(self) -> None:
        self._out = self.forward(self._embeds, self._positions, self._cache)
        self._slots += 1

    def __call__(self, embeds: Tensor, positions: Tensor) -> Any:
        """What the forward returns; its tensors hold until the next step."""
        self._embeds.copy_(embeds)
        self._positions.copy_(positions)
        if self._stream is None:
            self._work()
        elif self._out is None:
            current = torch.cuda.current_stream(embeds.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._work()
            current.wait_stream(self._stream)
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile. The memory is this graph's own: another may run beside it.
                with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._work()
            self._graph.replay()
        self.left -= 1
        for layer in self.layers:
            layer.grew()
        return self._out
