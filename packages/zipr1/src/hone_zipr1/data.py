"""Mosaics of handwritten digits, and questions about them.

The digits are scikit-learn's (the test set of UCI's "Optical Recognition of Handwritten Digits", CC BY 4.0), 8 x 8
pixels each. The first 1400 are trained on, the others only asked about.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .config import KINDS

__all__ = ["TRAINED", "Mosaics", "digits", "mosaics", "parse_question", "questions"]

TRAINED = 1400
Split = Literal["train", "test"]


@lru_cache(maxsize=4)
def digits(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """All digits: pictures ``[1797, 8, 8]`` in [0, 1] and what they show ``[1797]``."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32) / 16
    return pictures.to(device), torch.tensor(found.target, dtype=torch.long).to(device)


@dataclass(frozen=True)
class Mosaics:
    """A batch of mosaics with a question each.

    Attributes:
        image_01: ``[batch, height, width]``, grey, in [0, 1].
        labels: ``[batch, cells]``, the digit of each cell, row by row.
        kind: ``[batch]``, index in ``KINDS``.
        asked: ``[batch, 2]``, cells; of a digit question both are the same.
        answer: ``[batch]``, the number asked for.
    """

    image_01: Tensor
    labels: Tensor
    kind: Tensor
    asked: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.image_01)

    def part(self, rows: slice) -> Mosaics:
        """Some of them."""
        return Mosaics(self.image_01[rows], self.labels[rows], self.kind[rows], self.asked[rows], self.answer[rows])

    def repeated(self, times: int) -> Mosaics:
        """Each so many times, one after the other."""
        return Mosaics(
            *(
                getattr(self, name).repeat_interleave(times, 0)
                for name in ("image_01", "labels", "kind", "asked", "answer")
            )
        )

    def asking(self, kind: int, asked: tuple[int, int]) -> Mosaics:
        """The same mosaics with one question for all."""
        at = torch.tensor(asked, device=self.labels.device).expand(len(self), 2)
        return replace(self, kind=torch.full_like(self.kind, kind), asked=at, answer=_answers(self.labels, at, kind))


def _answers(labels: Tensor, asked: Tensor, kind: int | Tensor) -> Tensor:
    shown = labels.gather(1, asked)
    return torch.where(torch.as_tensor(kind, device=labels.device) == 0, shown[:, 0], shown.sum(1))


def mosaics(
    count: int, cells: int, seed: int, *, split: Split = "train", device: torch.device | str = "cpu"
) -> Mosaics:
    """Draw mosaics; half of the questions are of each kind.

    Args:
        count: How many.
        cells: Along a side.
        seed: The same gives the same, on one kind of device.
        split: Which digits.
        device: Where they are made.
    """
    pictures, shown = digits(str(device))
    pool = (0, TRAINED) if split == "train" else (TRAINED, len(shown))
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    chosen = draw(*pool, count, cells * cells)
    tiles = pictures[chosen].view(count, cells, cells, 8, 8)
    labels = shown[chosen]
    kind = draw(0, len(KINDS), count)
    first = draw(0, cells * cells, count)
    second = (first + draw(1, cells * cells, count)) % (cells * cells)
    asked = torch.stack([first, torch.where(kind == 0, first, second)], 1)
    image = tiles.transpose(2, 3).reshape(count, 8 * cells, 8 * cells)
    return Mosaics(image, labels, kind, asked, _answers(labels, asked, kind))


def cell_name(cell: int, cells: int) -> str:
    """Such as B3: second row, third column."""
    return f"{string.ascii_uppercase[cell // cells]}{cell % cells + 1}"


def questions(batch: Mosaics) -> list[str]:
    """The questions as text; a digit question names its cell twice, so that all are as long."""
    cells = round(batch.labels.shape[1] ** 0.5)
    return [
        f"{KINDS[kind]} {cell_name(first, cells)} {cell_name(second, cells)}"
        for kind, (first, second) in zip(batch.kind.tolist(), batch.asked.tolist(), strict=True)
    ]


def parse_question(text: str, cells: int) -> tuple[int, tuple[int, int]]:
    """Kind and cells of a question such as "digit B3" or "sum A1 C2".

    Raises:
        ValueError: It is none.
    """
    names = {cell_name(cell, cells): cell for cell in range(cells * cells)}
    kind, *asked = text.split()
    if kind == "digit" and len(asked) == 1:
        asked = asked * 2
    if (
        kind not in KINDS
        or len(asked) != 2
        or not set(asked) <= names.keys()
        or (kind == "digit") != (len(set(asked)) == 1)
    ):
        raise ValueError(
            f'the tiny host understands "digit B3" and "sum A1 C2", of cells A1 .. '
            f"{cell_name(cells * cells - 1, cells)}, two different ones in a sum; got {text!r}"
        )
    return KINDS.index(kind), (names[asked[0]], names[asked[1]])
