"""References mean what they say under ``torch.autocast`` too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Make a function of tensors, the first of which says on what device, compute in the dtypes that it names.

    Autocast would take its matrix products to 16 bits, whatever dtype they were given in. That holds for the forward:
    as everywhere in torch, a backward belongs outside the autocast context.
    """

    @functools.wraps(function)
    def run(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        device = x.device.type
        # Meta tensors compute nothing, and torch knows no autocast for them.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)

    return run
