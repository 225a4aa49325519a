"""NAR: which token is drawn when, what it may see, and how the heads of its neighbours are mixed.

A grid is drawn in steps of equal Manhattan distance to its first token. Each dimension of the grid has a head of its
own: the token on the left predicts by the "right" head, the one above by the "below" head, the one a frame earlier by
the "back" head. Where several neighbours exist, their logits are averaged.

Ids of tokens are in raster order: the last axis of the grid runs fastest. Slots are the order in which tokens are
drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hone_core.tensors import plain_tensors
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import HEADS, Mix

__all__ = [
    "Order",
    "Plan",
    "diagonal_order",
    "ends_of",
    "guide",
    "mask_of",
    "mix",
    "plan_of",
    "raster_order",
    "separate_loss",
]


@dataclass(frozen=True)
class Order:
    """In which steps a grid is drawn.

    Attributes:
        grid: Side of each axis, such as (rows, columns) or (frames, rows, columns).
        steps: Raster ids of the tokens that each step draws, independently given all steps before.
        raster: Whether a token follows the one before it, in place of its neighbours on the grid.
    """

    grid: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    raster: bool

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return prod(self.grid)

    @property
    def ids(self) -> tuple[int, ...]:
        """Raster id of each slot."""
        return tuple(itertools.chain.from_iterable(self.steps))

    @property
    def starts(self) -> tuple[int, ...]:
        """First slot of each step, and the end of the last."""
        return tuple(itertools.accumulate(map(len, self.steps), initial=0))


def _check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(grid) <= len(HEADS) or min(grid) < 1:
        raise ValueError(f"a grid has one to {len(HEADS)} positive sides; got {tuple(grid)}")
    return tuple(grid)


@lru_cache(maxsize=64)
def diagonal_order(grid: tuple[int, ...]) -> Order:
    """Steps of equal Manhattan distance to the first token, ids ascending within each.

    Source: Section 3.2 (near-to-far order); a grid of sides n_a takes ``sum(n_a) - D + 1`` steps.

    Raises:
        ValueError: The grid has no or too many sides, or an empty one.
    """
    grid = _check_grid(grid)
    steps: list[list[int]] = [[] for _ in range(sum(grid) - len(grid) + 1)]
    for number, place in enumerate(itertools.product(*map(range, grid))):
        steps[sum(place)].append(number)
    return Order(grid, tuple(map(tuple, steps)), raster=False)


@lru_cache(maxsize=64)
def raster_order(grid: tuple[int, ...]) -> Order:
    """One token after the other, the last axis fastest, as LlamaGen draws.

    Raises:
        ValueError: As ``diagonal_order``.
    """
    grid = _check_grid(grid)
    return Order(grid, tuple((number,) for number in range(prod(grid))), raster=True)


class Plan(NamedTuple):
    """Which head of which position predicts the token of each slot.

    Attributes:
        source: ``[tokens, heads]`` position in the sequence of condition and slots.
        weight: ``[tokens, heads]`` float32, rows summing to 1; 0 where a head reaches no token here.
    """

    source: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> Plan:
        """On a device."""
        return Plan(self.source.to(device), self.weight.to(device))


def plan_of(order: Order, condition: int, heads: int, kind: Mix = "average") -> Plan:
    """The plan of an order.

    The first token is predicted by all heads of the last condition token; another one by head ``a`` of its neighbour
    along axis ``D - 1 - a``, with equal weights over those that exist.

    Args:
        order: Of the tokens.
        condition: Tokens that stand before the grid's.
        heads: Of the model: one of each axis, or one alone, which predicts from the neighbour along the first axis
            that has one (the ablation of Table 4), or from the token before in raster order.
        kind: ``average``; or the one head that predicts wherever it can (the ablation of Table 5).

    Source: Section 3.3 (dimension-oriented heads). Kept for 32 plans; do not write into one.

    Raises:
        ValueError: There are not as many heads as axes, or ``kind`` is none of them.
    """
    dimensions = len(order.grid)
    if heads not in ((1,) if order.raster else (1, dimensions)):
        raise ValueError(
            f"a grid of {dimensions} axes in {'raster' if order.raster else 'diagonal'} order needs "
            f"{1 if order.raster else f'{dimensions} heads or 1'}; got {heads}"
        )
    if kind != "average" and kind not in HEADS[:heads]:
        raise ValueError(f"mix must be average or one of {', '.join(HEADS[:heads])}; got {kind!r}")
    return _plan(order, condition, heads, kind)


@lru_cache(maxsize=32)
def _plan(order: Order, condition: int, heads: int, kind: Mix) -> Plan:
    slot = {number: at for at, number in enumerate(order.ids)}
    stride = [prod(order.grid[axis + 1 :]) for axis in range(len(order.grid))]
    with plain_tensors():
        source = torch.full((order.tokens, heads), condition - 1)
        weight = torch.zeros(order.tokens, heads)
        for at, number in enumerate(order.ids):
            if number == 0:
                reached = dict.fromkeys(range(heads), -1)
            elif order.raster:
                reached = {0: number - 1}
            else:
                place = [number // stride[axis] % side for axis, side in enumerate(order.grid)]
                before = {axis: number - stride[axis] for axis, value in enumerate(place) if value > 0}
                if heads == 1:
                    reached = {0: before[min(before)]}
                else:
                    reached = {len(place) - 1 - axis: neighbour for axis, neighbour in before.items()}
            if kind != "average" and HEADS.index(kind) in reached:
                reached = {HEADS.index(kind): reached[HEADS.index(kind)]}
            for head, neighbour in reached.items():
                weight[at, head] = 1 / len(reached)
                if neighbour >= 0:
                    source[at, head] = condition + slot[neighbour]
        return Plan(source, weight)


def mask_of(
    order: Order, condition: int, device: torch.device | str, words: Bool[Tensor, "batch condition"] | None = None
) -> Bool[Tensor, "*batch sequence sequence"]:
    """Which position of condition and slots sees which; True may be read.

    Condition tokens are causal among themselves. A token sees the condition, its own step and those before. Words that
    are padding are seen by none but themselves, so that no row is empty.

    Args:
        order: Of the tokens.
        condition: Tokens that stand before the grid's.
        device: Where.
        words: True at words of a padded text; None where nothing is padded.

    Source: Section 3.2 (proximity mask).
    """
    ends = ends_of(order, condition, device)
    seen = torch.arange(len(ends), device=device) < ends[:, None]
    if words is None:
        return seen
    there = F.pad(words.to(device), (0, order.tokens), value=True)
    return (seen & there[:, None, :]) | torch.eye(len(ends), dtype=torch.bool, device=device)


def ends_of(order: Order, condition: int, device: torch.device | str) -> Tensor:
    """Where the prefix ends that each position of condition and slots sees, int32 ``[sequence]``: behind its own step.

    Source: Section 3.2 (proximity mask), with tokens in the order in which they are drawn.
    """
    ends = [*range(1, condition + 1)]
    for end, step in zip(order.starts[1:], order.steps, strict=True):
        ends += [condition + end] * len(step)
    return torch.tensor(ends, dtype=torch.int32, device=device)


def mix(
    logits: Sequence[Float[Tensor, "batch tokens vocabulary"]], weight: Float[Tensor, "tokens heads"]
) -> Float[Tensor, "batch tokens vocabulary"]:
    """Average of the heads' raw logits by the plan's weights.

    Args:
        logits: Of each head at the slots' sources.
        weight: Of the plan.

    Source: Section 3.3; the release averages logits, not probabilities.
    """
    total = logits[0] * weight[:, 0, None]
    for head in range(1, len(logits)):
        total = total + logits[head] * weight[:, head, None]
    return total


def separate_loss(
    logits: Sequence[Float[Tensor, "batch tokens vocabulary"]],
    weight: Float[Tensor, "tokens heads"],
    target: Int[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Cross-entropy of each head alone, over the tokens that it reaches; mean over heads.

    Differs: this is how the paper's sentence can be read; its release trains the mixture alone.
    """
    losses = []
    for head, each in enumerate(logits):
        reached = weight[:, head] > 0
        losses.append(F.cross_entropy(each[:, reached].flatten(0, 1).float(), target[:, reached].flatten()))
    return torch.stack(losses).mean()


def guide(
    conditional: Float[Tensor, "*batch vocabulary"], unconditional: Float[Tensor, "*batch vocabulary"], strength: float
) -> Float[Tensor, "*batch vocabulary"]:
    """Logits under classifier-free guidance; a strength of 1 is the conditional's own."""
    return unconditional + strength * (conditional - unconditional)
