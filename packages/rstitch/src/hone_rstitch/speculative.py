"""The lossless baseline: greedy speculative decoding with the small model as the draft.

Its text is the large model's own, so that nothing has to be decoded: what it costs follows from where the two models'
likeliest tokens agree along that text, which one forward pass of the small model says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import SMALL
from .models import Pair

__all__ = ["agreements", "speculative_calls"]


def speculative_calls(agree: Sequence[bool], draft: int, room: int) -> tuple[int, int]:
    """Calls of the small and the large model.

    Each round the small model drafts up to ``draft`` tokens, and stops where the text ends; the large model reads them
    in one call, keeps those that are its own, and writes the next one.

    Args:
        agree: Of each token of the large model's text: the small model, given what stands before, would write it too.
        draft: Tokens of a draft at most.
        room: Tokens that a text may have; a draft leaves room for the large model's own.
    """
    at = small = large = 0
    while at < len(agree):
        most = min(draft, room - at - 1)
        left = agree[at : at + most]
        kept = next((count for count, same in enumerate(left) if not same), len(left))
        # After a token that is not the text's the small model drafts on, not knowing that it is.
        small += most if kept < len(left) else len(left)
        large += 1
        at += kept + 1
    return small, large


@torch.no_grad()
def agreements(
    pair: Pair, prompts: Sequence[list[int]], texts: Sequence[list[int]], *, batch: int = 16
) -> list[list[bool]]:
    """Where the small model's likeliest token is the text's.

    Args:
        pair: Of the models.
        prompts: The small model's, in its ids.
        texts: The large model's, in its ids.
        batch: Texts at a time.
    """
    found: list[list[bool]] = []
    device = pair.small.device
    vocabulary = pair.vocabulary.to(device)
    known = pair.vocabulary.to_small.tolist()
    for start in range(0, len(texts), batch):
        part = list(zip(prompts[start : start + batch], texts[start : start + batch], strict=True))
        # A last token that only the large model has is not read by anyone.
        rows = [[*prompt, *(max(0, known[id]) for id in text)] for prompt, text in part]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        # Padding stands behind what is read, where causal attention does not look.
        logits = pair.small(ids, use_cache=False).logits
        for at, (prompt, text) in enumerate(part):
            seen = vocabulary.read(logits[at, len(prompt) - 1 : len(prompt) - 1 + len(text)], SMALL)
            found.append([a == b for a, b in zip(seen.argmax(-1).tolist(), text, strict=True)])
    return found
