"""Answers of the tiny host, a whole batch at once: sampled or greedy, dense or with selected tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from hone_lm.decoders import cache_keyword, cache_of
from torch import Tensor

from .data import Mosaics
from .host import ANSWER_TOKENS, Host
from .models import SparseHandle

__all__ = ["Rollout", "answer_logps", "rollout"]


class Rollout(NamedTuple):
    """Answers and what they cost.

    Attributes:
        ids: ``[batch, ANSWER_TOKENS]``, padded after the end of text.
        logps: ``[batch, ANSWER_TOKENS]``, of each token when it was drawn.
        mask: ``[batch, ANSWER_TOKENS]``, which are tokens of the answer, its end included.
        ratio: ``[batch]``, tau; 1 for the dense model.
        layer_ratio: ``[layers, batch]``, or None for the dense model.
    """

    ids: Tensor
    logps: Tensor
    mask: Tensor
    ratio: Tensor
    layer_ratio: Tensor | None


@torch.no_grad()
def rollout(
    host: Host,
    batch: Mosaics,
    handle: SparseHandle | None = None,
    *,
    p: Tensor | None = None,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Answer every question.

    Args:
        host: The model.
        batch: Questions.
        handle: What is attached to it; None answers densely.
        p: ``[batch]``, a threshold per question; the handle's if None.
        temperature: Of sampling; None is greedy.
        generator: Of the draws, on the host's device.
    """
    model, count = host.model, len(batch)
    tokenizer = host.processor.tokenizer
    keyword = cache_keyword(model)
    given: Any = nullcontext() if handle is None else handle.using(p=p, protected=host.protected(count))
    ids, logps, mask = [], [], []
    done = torch.zeros(count, dtype=torch.bool, device=host.device)
    with given:
        inputs: dict[str, Any] = dict(host.embedded(batch))
        start = inputs["inputs_embeds"].shape[1]
        for at in range(ANSWER_TOKENS):
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            logp = (out.logits[:, -1].float() / (temperature or 1.0)).log_softmax(-1)
            if temperature is None:
                token = logp.argmax(-1)
            else:
                token = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
            token = token.masked_fill(done, tokenizer.pad_token_id)
            ids.append(token)
            logps.append(logp.gather(1, token[:, None])[:, 0])
            mask.append(~done)
            done = done | (token == tokenizer.eos_token_id)
            inputs = {
                "inputs_embeds": model.get_input_embeddings()(token[:, None]),
                "position_ids": host.positions(start + at, start + at + 1, count),
                keyword: cache_of(out),
            }
    stats = None if handle is None else handle.stats
    ratio = torch.ones(count, device=host.device) if stats is None else stats.ratio
    layers = None if stats is None else stats.layer_ratio
    return Rollout(torch.stack(ids, 1), torch.stack(logps, 1), torch.stack(mask, 1), ratio, layers)


def answer_logps(
    host: Host,
    batch: Mosaics,
    ids: Tensor,
    handle: SparseHandle | None = None,
    *,
    p: Tensor | None = None,
    soft: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities ``[batch, ANSWER_TOKENS, vocabulary]`` at each token of given answers, with gradient.

    The selection is that of the prompt alone, as in ``rollout``.

    Args:
        host: The model.
        batch: Questions.
        ids: ``[batch, ANSWER_TOKENS]``.
        handle: What is attached; None is dense.
        p: As in ``rollout``.
        soft: Record the differentiable support size in ``handle.stats``.
        temperature: At which the answers were drawn.
    """
    given: Any = nullcontext()
    if handle is not None:
        protected = host.protected(len(batch))
        given = handle.using(p=p, protected=protected, prompt_tokens=protected.shape[1], soft=soft)
    with given:
        out = host.model(**host.embedded(batch, ids[:, :-1]), use_cache=False, logits_to_keep=ANSWER_TOKENS)
    return (out.logits.float() / temperature).log_softmax(-1)
