"""A cache layer of transformers that holds, of each sample, the tokens that this layer kept."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from hone_kernels.kept_tokens import spread_tokens, take_tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["Chosen", "Counts", "Kept", "Reader", "SparseLayer", "check_cache", "sparse_layers"]

_ROOM = 256
"""Tokens to come that the note of what is read has room for."""


class Chosen(NamedTuple):
    """What was chosen, and, where a kernel chose, what it knows besides.

    Attributes:
        keep: ``[batch, tokens]``.
        idx: int32 ``[batch, tokens]``, positions of the kept tokens, ascending, in the first ``num`` entries.
        num: int32 ``[batch]``.
    """

    keep: Tensor
    idx: Tensor | None = None
    num: Tensor | None = None

    def located(self) -> tuple[Tensor, Tensor]:
        """``idx`` and ``num``, sought where no kernel gave them; nothing waits for the device."""
        idx = (~self.keep).to(torch.uint8).argsort(dim=-1, stable=True).int() if self.idx is None else self.idx
        return idx, self.keep.sum(-1).int() if self.num is None else self.num


class Counts:
    """How many tokens each sample keeps, on its way to the host while the device goes on.

    Args:
        num: ``[batch]``.
    """

    def __init__(self, num: Tensor) -> None:
        self._num = num.to("cpu", non_blocking=num.is_cuda)
        self._arrived: torch.cuda.Event | None = None
        if num.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(num.device))

    def read(self) -> list[int]:
        """The numbers, once they have come."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._num.tolist()


class Kept(NamedTuple):
    """Where the kept tokens of each sample stand, others behind them.

    Attributes:
        keep: ``[batch, tokens]``.
        places: ``[batch, most]``, positions of the kept tokens, ascending; of a sample that kept fewer than another,
            any behind them.
        valid: ``[batch, most]``, which entries are kept ones; None: all.
    """

    keep: Tensor
    places: Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, chosen: Tensor | Chosen, counts: Counts | None = None) -> Kept:
        """Look where they are; the one place that waits for the device.

        Args:
            chosen: Or ``[batch, tokens]`` of what is kept.
            counts: Of it, where they are on their way.
        """
        chosen = Chosen(chosen) if isinstance(chosen, Tensor) else chosen
        idx, num = chosen.located()
        found = (Counts(num) if counts is None else counts).read()
        low, most = min(found), max(found)
        valid = None if low == most else torch.arange(most, device=num.device) < num[:, None]
        return cls(chosen.keep, idx[:, :most].long(), valid)

    def take(self, *states: Tensor) -> tuple[Tensor, ...]:
        """``[batch, heads, most, dim]`` of ``[batch, heads, tokens, dim]`` each."""
        return take_tokens(states, self.places, backend=_backend(*states))

    def spread(self, states: Tensor) -> Tensor:
        """The inverse of ``take``: ``[batch, heads, tokens, dim]``, zero where nothing was kept."""
        return spread_tokens(states, self.keep, backend=_backend(states))


def _backend(*states: Tensor) -> Literal["auto", "reference"]:
    """The reference has gradients."""
    return "reference" if torch.is_grad_enabled() and any(x.requires_grad for x in states) else "auto"


class Reader:
    """Whether the forward that reads a cache knows what its layers kept; one for all layers.

    Attributes:
        here: It does.
    """

    def __init__(self) -> None:
        self.here = False


class SparseLayer(DynamicLayer):
    """Keys and values of a prompt's kept tokens, and of every token since.

    The tokens of a sample stand in their order, at the left; a sample that kept fewer than another is filled up at the
    end of its prompt. ``get_seq_length`` counts the tokens seen, evicted ones included: positions go on from there.
    Tokens since stand where they are expected and are read, so that nothing is written down of them before it is asked
    for: a step of decoding appends keys and values, as in a cache of transformers.

    Attributes:
        seen: Tokens that went in.
        prompt: Of these, the ones that came before the last eviction.
        whole: Whether all stored tokens are read.
        protected: ``[batch, tokens]``, which of the first tokens a selection may not drop; later ones are text.

    Args:
        captured: Its steps are captured, so that samples keep their order.
        reader: Says whether a forward may read it; None: any may.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, captured: bool = False, reader: Reader | None = None) -> None:
        super().__init__()
        self.captured, self.reader = captured, reader
        self.seen = self.prompt = 0
        # Of the first stored tokens; of later ones ``_valid`` has True, or nothing yet.
        self._positions: Tensor | None = None
        self._valid: Tensor | None = None
        self._noted = 0
        self.whole = True
        self.protected: Tensor | None = None

    @property
    def dropped(self) -> bool:
        """Whether something was dropped, or is stored and not read."""
        return self._positions is not None

    @property
    def lossy(self) -> bool:
        """Whether tokens are gone or not read; of a padded batch that kept every token it says so, too."""
        return self.dropped and (self.keys.shape[-2] < self.seen or not self.whole)

    @property
    def positions(self) -> Tensor | None:
        """``[batch, stored]``, where each stored token stood among those seen; None: nothing was dropped."""
        if self._positions is not None and (new := self.keys.shape[-2] - self._positions.shape[1]):
            at = torch.arange(self.seen - new, self.seen, device=self._positions.device)
            self._positions = torch.cat([self._positions, at.expand(len(self._positions), -1)], -1)
        return self._positions

    @property
    def valid(self) -> Tensor | None:
        """``[batch, stored]``, which stored tokens are read; None: nothing was dropped."""
        if self._valid is None:
            return None
        stored = self.keys.shape[-2]
        if (new := stored - self._valid.shape[1]) > 0:
            # With room for those to come.
            self._valid = torch.cat([self._valid, self._valid.new_ones(len(self._valid), new + _ROOM)], -1)
        return self._valid[:, :stored]

    def note(self, positions: Tensor | None, valid: Tensor | None) -> None:
        """Say of all stored tokens where they stood and which are read.

        Args:
            positions: See there.
            valid: See there.
        """
        self._positions, self._valid = positions, valid
        self._noted = 0 if valid is None else valid.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; see ``DynamicLayer``.

        Raises:
            ValueError: Tokens are gone or not to be read, and the forward does not know which.
        """
        if self.reader is not None and not self.reader.here and self.lossy:
            raise ValueError(
                "the cache holds what a token selection kept of its prompt, and this forward has no selection "
                "(detached, disabled, or another model). Attach for as long as the cache is used, or read the prompt "
                "anew"
            )
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def evict(self, kept: Kept, prompt: int) -> None:
        """Drop what is not kept, for good.

        Args:
            kept: Of all that was seen; nothing was evicted before.
            prompt: Tokens that were chosen from, the first of those seen; the others, guesses or an answer, are kept.
        """
        self.keys, self.values = kept.take(self.keys, self.values)
        self.whole, self.prompt = kept.valid is None, prompt
        self.note(kept.places, torch.ones_like(kept.places, dtype=torch.bool) if kept.valid is None else kept.valid)

    def read(self, keep: Tensor, prompt: int) -> None:
        """Store everything and read what is kept, until the next call.

        Args:
            keep: ``[batch, seen]``.
            prompt: As for ``evict``.
        """
        self.whole, self.prompt = False, prompt
        self.note(torch.arange(self.seen, device=keep.device).expand(len(keep), -1), keep)

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
        if self.dropped and left < self.prompt:
            raise ValueError(
                f"the cache cannot be cut to {left} tokens: of the first {self.prompt}, some are evicted. Run the "
                "shorter prompt from the start"
            )
        stop = self.keys.shape[-2] - (self.seen - left)
        if stop < self._noted and (positions := self.positions) is not None and (valid := self.valid) is not None:
            # Where a sample kept fewer than another, its last tokens are not in the last columns.
            gone = positions >= left
            self.note(positions.masked_fill(gone, -1)[:, :stop], (valid & ~gone)[:, :stop])
        elif self._positions is not None:
            self._positions = self._positions[:, :stop]
        self.keys, self.values = self.keys[..., :stop, :], self.values[..., :stop, :]
        self.seen = left
        if self.protected is not None:
            self.protected = self.protected[:, :left]

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.captured, self.reader)  # type: ignore[misc]

    def _rows(self, index: Tensor) -> None:
        if self.seen:
            self.keys, self.values = self.keys[index], self.values[index]
        if self._positions is not None and self._valid is not None:
            self._positions, self._valid = self._positions[index], self._valid[index]
        if self.protected is not None:
            self.protected = self.protected[index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take samples in another order, as beams do.

        Raises:
            ValueError: Its steps are captured.
        """
        if self.captured:
            raise ValueError(
                "beams reorder the cache after every token, and a captured step's stays where it is. Leave captured "
                "out, or num_beams"
            )
        if self.seen:
            self._rows(beam_idx.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        if self.seen:
            self._rows(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self._rows(indices)


def sparse_layers(cache: Any, num_layers: int, *, captured: bool = False) -> None:
    """Give an empty cache layers that can drop tokens.

    Raises:
        ValueError: See ``check_cache``.
    """
    check_cache(cache)
    reader = Reader()
    cache.layers[:] = [SparseLayer(captured, reader) for _ in range(num_layers)]


def check_cache(cache: Any) -> None:
    """Look whether a cache can drop tokens.

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
