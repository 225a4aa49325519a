"""Draws from logits: top-k, top-p, guidance per scale, and uniforms that belong to an image and a position.

A draw inverts the cumulative distribution at a uniform of its own, so that an image's token does not depend on the
batch, on the device, or on which other tokens ran.

Differs: the releases call ``torch.multinomial``; the distribution is the same, the stream is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "draw", "filter_logits", "uniforms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        guidance: Strength, of every scale or of each; what it means is the model's.
        temperature: Divides the logits before guidance, of every scale or of each.
        top_k: Most likely choices that are kept; 0 keeps all. More than there are is all.
        top_p: Least mass that is kept; 0 keeps all.
        greedy: Take the likeliest in place of drawing.
    """

    guidance: float | tuple[float, ...] = 1.0
    temperature: float | tuple[float, ...] = 1.0
    top_k: int = 0
    top_p: float = 0.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_k must not be negative and top_p lie in [0, 1]; got {self.top_k} and {self.top_p}")
        values = (self.temperature,) if isinstance(self.temperature, float | int) else self.temperature
        if not all(0 < value < math.inf for value in values):
            raise ValueError(
                f"temperature must be positive and finite; got {self.temperature}. Use greedy for its limit."
            )
        strengths = (self.guidance,) if isinstance(self.guidance, float | int) else self.guidance
        if not all(map(math.isfinite, strengths)):
            raise ValueError(f"guidance must be finite; got {self.guidance}")

    def at(self, scale: int, scales: int) -> tuple[float, float]:
        """Guidance and temperature of a scale.

        Raises:
            ValueError: There are not as many values as scales.
        """
        found = []
        for name in ("guidance", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, float | int):
                if len(value) != scales:
                    raise ValueError(f"{name} needs one value or one of each of {scales} scales; got {len(value)}")
                value = value[scale]
            found.append(float(value))
        return found[0], found[1]


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits ``[..., V]`` with everything but the likeliest at minus infinity.

    Args:
        logits: Any range.
        top_k: Ties with the last kept one stay.
        top_p: Choices are left out from the least likely while their sum is at most ``1 - top_p``; with two choices
            that is the likelier one alone where the other has at most ``1 - top_p``.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p > 0:
        ordered, places = logits.sort(dim=-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        out[..., -1] = False
        logits = logits.masked_fill(out.scatter(-1, places, out), -torch.inf)
    return logits


def uniforms(seeds: Sequence[int], tokens: int, groups: int, device: torch.device | str) -> Tensor:
    """One uniform in [0, 1) per image, position and choice, ``[B, tokens, groups]``, the same on every device.

    Args:
        seeds: Of each image.
        tokens: Of the whole schedule.
        groups: Choices of a token: its bits, or 1.
        device: Where they go.
    """
    drawn = [torch.rand(tokens, groups, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(device)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Indices ``[...]`` of logits ``[..., V]``.

    Args:
        logits: Guided and tempered.
        uniform: ``[...]`` in [0, 1).
        sampling: What is kept.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    if logits.shape[-1] == 2:
        return _draw_bits(filter_logits(logits.float(), top_k=sampling.top_k), uniform, sampling.top_p)
    kept = filter_logits(logits.float(), top_k=sampling.top_k, top_p=sampling.top_p)
    mass = kept.softmax(-1).cumsum(-1)
    return (mass[..., :-1] <= uniform[..., None] * mass[..., -1:]).sum(-1)


def _draw_bits(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """``draw`` of two choices, the same to the bit: millions of sorts of two are slow on a GPU."""
    zero, one = logits.softmax(-1).unbind(-1)
    drawn = zero <= uniform * (zero + one)
    if top_p > 0:
        drawn = torch.where(torch.minimum(zero, one) <= 1 - top_p, one >= zero, drawn)
    return drawn.long()
