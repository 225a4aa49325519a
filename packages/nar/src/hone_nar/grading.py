"""How well digits are drawn: what the nearest real digit shows, and how far a set of them lies from the real ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hone_visual_ar.quality import frechet
from torch import Tensor

from .data import Digits, digits

__all__ = ["COMPONENTS", "accuracy", "bits", "distance", "nearest"]

COMPONENTS = 16
"""Principal components of the training digits in which distances of sets are measured."""


def nearest(tokens: Tensor) -> Tensor:
    """What the nearest training digit ``[N]`` of each shows, by squared distance of levels."""
    train = digits("train")
    place = torch.cdist(tokens.cpu().float(), train.tokens.float()).argmin(1)
    return train.labels[place]


def accuracy(tokens: Tensor, labels: Tensor, read: Callable[[Tensor], Tensor] = nearest) -> Tensor:
    """Which drawn grids ``[N]`` read as what they were asked to show."""
    return read(tokens) == labels.cpu()


def distance(tokens: Tensor, real: Tensor | None = None) -> float:
    """Frechet distance of drawn grids ``[N, tokens]`` to real ones, by default the training digits.

    Taken in the first principal components of the real ones.
    """
    train = (digits("train").tokens if real is None else real).double()
    center = train.mean(0)
    _, _, axes = torch.linalg.svd(train - center, full_matrices=False)
    basis = axes[:COMPONENTS].T
    return frechet((tokens.cpu().double() - center) @ basis, (train - center) @ basis)


@torch.no_grad()
def bits(nll: Callable[[Tensor, Tensor], Tensor], test: Digits, *, batch: int = 250) -> Tensor:
    """Bits of each token ``[N, 64]`` of held-out digits, given their classes.

    Args:
        nll: Nats ``[B, 64]`` of tokens and labels.
        test: Digits, on the model's device.
        batch: Digits at a time.
    """
    parts = [nll(test.tokens[at : at + batch], test.labels[at : at + batch]).cpu() for at in range(0, len(test), batch)]
    return torch.cat(parts) / math.log(2)
