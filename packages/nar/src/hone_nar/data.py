"""Handwritten digits as grids of tokens, without a tokenizer: a grey level is a token.

The digits are scikit-learn's (the test set of UCI's "Optical Recognition of Handwritten Digits", CC BY 4.0): 1797 of
8 x 8 pixels and 17 levels, of which 1500 are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from hone_core.tensors import plain_tensors
from torch import Tensor

__all__ = ["CLASSES", "GRID", "LEVELS", "TRAINED", "Digits", "digits", "to_image"]

GRID = (8, 8)
LEVELS, CLASSES, TRAINED = 17, 10, 1500


@dataclass(frozen=True)
class Digits:
    """Some digits.

    Attributes:
        tokens: ``[N, 64]`` levels in raster order.
        labels: ``[N]`` what they show.
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Digits:
        """On a device."""
        return Digits(self.tokens.to(device), self.labels.to(device))

    def split(self, name: str, trained: int) -> Digits:
        """The first ones, which are trained on (``train``), or the others (``test``).

        Raises:
            ValueError: It is neither.
        """
        if name not in ("train", "test"):
            raise ValueError(f"split must be train or test; got {name!r}")
        part = slice(trained) if name == "train" else slice(trained, None)
        return Digits(self.tokens[part], self.labels[part])


@lru_cache(maxsize=1)
def _all() -> Digits:
    from sklearn.datasets import load_digits

    found = load_digits()
    with plain_tensors():
        tokens = torch.tensor(found.images, dtype=torch.long).flatten(1)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        return Digits(tokens[order], torch.tensor(found.target, dtype=torch.long)[order])


def digits(split: str) -> Digits:
    """Those that are trained on, or the held-out ones.

    Args:
        split: ``train`` or ``test``; no digit is in both.

    Raises:
        ValueError: It is neither.
    """
    return _all().split(split, TRAINED)


def to_image(tokens: Tensor) -> Tensor:
    """Grey pictures ``[N, 1, 8, 8]`` in [0, 1] of tokens ``[N, 64]``."""
    return (tokens.float() / (LEVELS - 1)).unflatten(1, (1, *GRID))
