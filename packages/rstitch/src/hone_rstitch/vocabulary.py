"""What the ids of one model are to the other: vocabularies of one family differ in padding and special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .config import LARGE

__all__ = ["Vocabulary", "check_text"]

PROBES = (
    "Let x = 12.5; then 3*4 = 12, so the answer is \\boxed{60}.",
    "  def f(n):\n\n\treturn [1, 2_000]  # naïve 漢字",
)
"""Texts that both tokenizers must cut alike: equal tokens may still be merged by different rules."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of emitted tokens, which are the large model's, and what the small model calls them.

    Attributes:
        to_small: ``[rows]`` of the large model's logits: the small model's id, -1 where it has none.
        eos: Ids of the large model that end a text.
    """

    to_small: Tensor
    eos: tuple[int, ...]

    @property
    def size(self) -> int:
        """V of the normalised entropy: tokens that both models know."""
        return int((self.to_small >= 0).sum())

    @classmethod
    def shared(cls, rows_small: int, rows_large: int, eos: Sequence[int]) -> Vocabulary:
        """One tokenizer for both; rows that only one of them has are padding.

        Args:
            rows_small: Of the small model's logits.
            rows_large: Of the large model's.
            eos: Ids that end a text.
        """
        ids = torch.arange(rows_large)
        return cls(torch.where(ids < rows_small, ids, -1), tuple(eos))

    @classmethod
    def of(
        cls,
        small: Any,
        large: Any,
        *,
        rows_small: int,
        rows_large: int,
        eos_small: Sequence[int],
        eos_large: Sequence[int],
    ) -> Vocabulary:
        """Match two tokenizers: ordinary tokens by id and text, added ones by text, ends of text by what they do.

        What ends a text for the small model alone is no token of both, so that it writes an end that the other knows.

        Args:
            small: Tokenizer of the small model.
            large: Tokenizer of the large model.
            rows_small: Of the small model's logits.
            rows_large: Of the large model's.
            eos_small: Ids that end the small model's text, the usual one first.
            eos_large: Likewise of the large model.

        Raises:
            ValueError: Ordinary tokens differ, or texts are cut differently: the pair cannot write one text.
        """
        base_small, added_small = _tokens(small)
        base_large, added_large = _tokens(large)
        if base_small != base_large:
            differ = {*base_small.items()} ^ {*base_large.items()}
            token = min(differ, key=lambda item: (item[1], item[0]))[0]
            raise ValueError(
                f"the two models must share their ordinary tokens; {len({name for name, _ in differ})} differ, such as "
                f"{token!r} (small {base_small.get(token)}, large {base_large.get(token)}). "
                "Take two models of one family."
            )
        _check_probes(small, large)
        if not eos_small or not eos_large:
            raise ValueError("each model needs an id that ends its text (generation_config.eos_token_id)")
        known = {id: id for id in base_large.values()}
        known |= {id: added_small[token] for token, id in added_large.items() if token in added_small}
        ends = {small_id for large_id, small_id in known.items() if large_id in eos_large}
        if eos_small[0] not in ends:
            known = {large_id: small_id for large_id, small_id in known.items() if small_id != eos_small[0]}
            known[eos_large[0]] = eos_small[0]
        # What ends the small model's text and not the large one's would leave a text that one has ended to go on.
        known = {large_id: id for large_id, id in known.items() if id not in eos_small or large_id in eos_large}
        to_small = torch.full((rows_large,), -1)
        for large_id, small_id in known.items():
            if large_id < rows_large and small_id < rows_small:
                to_small[large_id] = small_id
        return cls(to_small, tuple(eos_large))

    def to(self, device: torch.device | str) -> Vocabulary:
        """The same on a device."""
        return replace(self, to_small=self.to_small.to(device))

    def read(self, logits: Tensor, model: int) -> Tensor:
        """Logits of a model over the large model's ids, with what the other cannot read at minus infinity.

        Args:
            logits: ``[batch, rows of that model]``, where the vocabulary is.
            model: ``SMALL`` or ``LARGE``.

        Returns:
            ``[batch, rows of the large model]``, a copy. Ends of text of the large model stay open to it: nobody has to
            read them.
        """
        to_small = self.to_small
        open_ = to_small >= 0
        if model == LARGE:
            open_ = open_.index_fill(0, torch.tensor(self.eos, dtype=torch.long, device=logits.device), True)
            return logits.masked_fill(~open_, -torch.inf)
        return logits.index_select(-1, to_small.clamp(min=0)).masked_fill_(~open_, -torch.inf)

    def small_ids(self, ids: Sequence[int]) -> list[int]:
        """Ids of the large model as the small model knows them.

        Raises:
            ValueError: The small model has no such token.
        """
        found = self.to_small[torch.tensor(list(ids), dtype=torch.long)].tolist()
        if -1 in found:
            raise ValueError(
                f"the small model has no token for id {list(ids)[found.index(-1)]} of the large one; "
                "give the small model a prompt of its own (small_input_ids)"
            )
        return found


def check_text(tokenizer: Any, text: str) -> None:
    """Refuse a text that a model would read otherwise than it stands there.

    Vocabularies over bytes, as published pairs have, read every text.

    Args:
        tokenizer: Of the model; what is not of the tokenizers library is not looked at.
        text: What it is asked.

    Raises:
        ValueError: The tokenizer reads a part of the text as unknown.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    unknown = None if core is None else getattr(core.model, "unk_token", None)
    if core is None or not unknown:
        return
    found = core.encode(text, add_special_tokens=False)
    # A text that itself names the token is read as it stands.
    unread = {text[a:b]: None for token, (a, b) in zip(found.tokens, found.offsets, strict=True) if token == unknown}
    parts = [part for part in unread if part != unknown]
    if not parts:
        return
    shown = ", ".join(map(repr, parts[:8])) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
    letters = sorted({*core.get_vocab(with_added_tokens=False)} - {unknown})
    known = f", whose tokens are {' '.join(letters)}" if all(len(letter) == 1 for letter in letters) else ""
    raise ValueError(
        f"expected a question that the tokenizer can read{known}; it would read {shown} as {unknown}. "
        "The packaged pair is asked products, such as 123*45; for other questions give small and large"
    )


def _tokens(tokenizer: Any) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Ordinary and added tokens with their ids."""
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    return {token: id for token, id in tokenizer.get_vocab().items() if token not in added}, added


def _check_probes(small: Any, large: Any) -> None:
    for text in PROBES:
        cut = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (small, large)]
        if cut[0] != cut[1]:
            raise ValueError(f"the two tokenizers cut {text!r} differently; take two models of one family")
