"""What tiny hosts draw: handwritten digits, and clips of a moving shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from . import data, shapes
from .data import Digits
from .grading import accuracy, distance, nearest

__all__ = ["TASKS", "Task"]


@dataclass(frozen=True)
class Task:
    """Grids of tokens with classes, and how drawn ones are read.

    Attributes:
        name: ``digits`` or ``shapes``.
        grid: Sides of a grid, last axis fastest.
        levels: Tokens there are, which are grey levels.
        classes: Of them.
        examples: Of the split ``train`` or ``test``.
        read: Class ``[N]`` that grids ``[N, tokens]`` show.
    """

    name: str
    grid: tuple[int, ...]
    levels: int
    classes: int
    examples: Callable[[str], Digits]
    read: Callable[[Tensor], Tensor]

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a picture: of a clip, all frames side by side."""
        return self.grid[-2], prod(self.grid[:-2]) * self.grid[-1]

    def flat(self, tokens: Tensor) -> Tensor:
        """Grids ``[..., tokens]`` as pictures ``[..., rows, columns]``."""
        if len(self.grid) == 2:
            return tokens.unflatten(-1, self.grid)
        return tokens.unflatten(-1, self.grid).movedim(-3, -2).flatten(-2)

    def to_image(self, tokens: Tensor) -> Tensor:
        """Grey pictures ``[N, 1, rows, columns]`` in [0, 1] of tokens ``[N, tokens]``."""
        return (self.flat(tokens).float() / (self.levels - 1))[:, None]

    def accuracy(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Which drawn grids ``[N]`` read as what they were asked to show."""
        return accuracy(tokens, labels, self.read)

    def distance(self, tokens: Tensor) -> float:
        """Frechet distance of drawn grids to the training ones, see ``grading.distance``."""
        return distance(tokens, self.examples("train").tokens)


TASKS = {
    "digits": Task("digits", data.GRID, data.LEVELS, data.CLASSES, data.digits, nearest),
    "shapes": Task("shapes", shapes.GRID, shapes.LEVELS, shapes.CLASSES, shapes.shapes, shapes.read_shapes),
}
