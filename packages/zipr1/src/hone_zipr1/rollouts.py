"""Answers of the tiny host, a whole batch at once: sampled or greedy, dense or with selected tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from hone_lm.decoders import cache_keyword, cache_of
from torch import Tensor

from .data import Mosaics, mosaics
from .host import ANSWER_TOKENS, Host
from .models import SparseHandle
from .reinforce import Drawn

__all__ = ["HostTask", "Rollout", "answer_logps", "rollout"]


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


class HostTask:
    """Mosaics and the tiny host, as ``reinforce`` asks for them.

    Args:
        host: Trained.
        original: The same weights, frozen.
        seed: Of the mosaics; another seed, other mosaics.
        process: Number of this process among those that train together.
    """

    def __init__(self, host: Host, original: Host, *, seed: int, process: int = 0) -> None:
        self.host, self.original = host, original
        self.model = host.model
        self._seed = 1_000_000_000 * (seed + 11) + 10_000_000 * process

    def draw(self, step: int, prompts: int, group: int) -> Mosaics:
        """Mosaics of digits that may be trained on."""
        cells = self.host.config.cells
        return mosaics(prompts, cells, self._seed + step, device=self.host.device).repeated(group)

    @torch.no_grad()
    def features(self, rows: Mosaics) -> Tensor:
        """Mean embeddings of the picture and of the question, side by side."""
        embeds, text = self.original.embedded(rows)["inputs_embeds"], self.host.protected(len(rows))
        parts = [embeds[group].view(len(rows), -1, embeds.shape[-1]).mean(1) for group in (~text, text)]
        return torch.cat(parts, -1)

    def sample(self, rows: Mosaics, handle: SparseHandle, p: Tensor, temperature: float, seed: int) -> Drawn:
        """See ``rollout``."""
        generator = torch.Generator(self.host.device).manual_seed(seed)
        found = rollout(self.host, rows, handle, p=p, temperature=temperature, generator=generator)
        return Drawn(found.ids, found.logps, found.mask, found.ratio, self.host.grade(rows, found.ids))

    def logps(
        self, rows: Mosaics, ids: Tensor, handle: SparseHandle, p: Tensor, temperature: float, soft: bool
    ) -> Tensor:
        """See ``answer_logps``."""
        found = answer_logps(self.host, rows, ids, handle, p=p, soft=soft, temperature=temperature)
        return found.gather(2, ids[..., None])[..., 0]

    def part(self, rows: Mosaics, which: slice) -> Mosaics:
        """Some of them."""
        return rows.part(which)

    @torch.no_grad()
    def reference(self, rows: Mosaics, ids: Tensor, temperature: float, handle: SparseHandle) -> Tensor:
        """Of the original, dense."""
        return answer_logps(self.original, rows, ids, temperature=temperature).gather(2, ids[..., None])[..., 0]

    def right(self, rows: Mosaics) -> tuple[Tensor, Tensor]:
        """See ``Host.answer_ids``."""
        return self.host.answer_ids(rows)
