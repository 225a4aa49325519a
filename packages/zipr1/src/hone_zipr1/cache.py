"""A cache layer of transformers that holds, of each sample, the tokens that this layer kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["SparseLayer", "sparse_layers"]


class SparseLayer(DynamicLayer):
    """Keys and values of a prompt's kept tokens, and of every token since.

    The tokens of a sample stand in their order, at the left; a sample that kept fewer than another is filled up at the
    end of its prompt. ``get_seq_length`` counts the tokens seen, evicted ones included: positions go on from there.

    Attributes:
        seen: Tokens that went in.
        prompt: Of these, the ones that came before the last eviction.
        positions: ``[batch, stored]``, where each stored token stood among those seen; None: nothing was dropped.
        valid: ``[batch, stored]``, which stored tokens are read; None as well then.
        whole: Whether all stored tokens are read.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.prompt = 0
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None
        self.whole = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; see ``DynamicLayer``."""
        keys, values = super().update(key_states, value_states)
        new = key_states.shape[-2]
        if self.positions is not None and self.valid is not None:
            at = torch.arange(self.seen, self.seen + new, device=keys.device).expand(len(keys), -1)
            self.positions = torch.cat([self.positions, at], -1)
            self.valid = torch.cat([self.valid, torch.ones_like(at, dtype=torch.bool)], -1)
        self.seen += new
        return keys, values

    def evict(self, keep: Tensor) -> None:
        """Drop what is not kept, for good.

        Args:
            keep: ``[batch, seen]``; nothing was evicted before.
        """
        keys, values = self.keys, self.values
        counts = keep.sum(-1)
        stored = int(counts.max())
        # Kept ones first, each in its order.
        order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[:, :stored]
        index = order[:, None, :, None]
        self.keys = keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3]))
        self.values = values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))
        self.positions = order
        self.valid = torch.arange(stored, device=keep.device) < counts[:, None]
        self.whole = bool((counts == stored).all())
        self.prompt = self.seen

    def read(self, keep: Tensor) -> None:
        """Store everything and read what is kept, until the next call.

        Args:
            keep: ``[batch, seen]``.
        """
        self.positions = torch.arange(self.seen, device=keep.device).expand(len(keep), -1)
        self.valid, self.whole, self.prompt = keep, False, self.seen

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: so many if negative, else all beyond so many.

        Raises:
            ValueError: They are in the prompt, of which some are gone.
        """
        left = self.seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.seen)
        if left == self.seen:
            return
        if self.positions is not None and left < self.prompt:
            raise ValueError(
                f"the cache cannot be cut to {left} tokens: of the first {self.prompt}, some are evicted. Run the "
                "shorter prompt from the start"
            )
        stop = self.keys.shape[-2] - (self.seen - left)
        self.keys, self.values = self.keys[..., :stop, :], self.values[..., :stop, :]
        if self.positions is not None and self.valid is not None:
            self.positions, self.valid = self.positions[:, :stop], self.valid[:, :stop]
        self.seen = left

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def _rows(self, index: Tensor) -> None:
        if self.seen:
            self.keys, self.values = self.keys[index], self.values[index]
        if self.positions is not None and self.valid is not None:
            self.positions, self.valid = self.positions[index], self.valid[index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take samples in another order, as beams do."""
        if self.seen:
            self._rows(beam_idx.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        if self.seen:
            self._rows(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self._rows(indices)


def sparse_layers(cache: Any, num_layers: int) -> None:
    """Give an empty cache layers that can drop tokens.

    Raises:
        ValueError: It is of another kind: static, quantised, offloaded or with sliding windows.
    """
    layers = getattr(cache, "layers", None)
    plain = type(cache) is DynamicCache and all(type(layer) in (DynamicLayer, SparseLayer) for layer in layers or ())
    if not plain or cache.offloading:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers or ()})) or "no layers yet"
        raise ValueError(
            f"token selection keeps a cache of its own length per layer and sample, so it needs a DynamicCache that is "
            f"not offloaded; got {type(cache).__name__} ({kinds}). Leave cache_implementation out"
        )
    cache.layers[:] = [SparseLayer() for _ in range(num_layers)]
