"""Top-p token selection, per layer and sample (formulas of public digests of the paper; the attention is ZipVL's).

``A`` is a layer's causal attention map with its heads averaged, ``a_j`` the sum of its column j. The budget comes from
``a``, the choice from ``a`` over the number of rows that see a column, so that early columns are not favoured.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "Mass",
    "column_mass",
    "kept_mass",
    "probe_rows",
    "ranked",
    "select",
    "soft_ratio",
    "token_ratio",
    "topp_budget",
    "uniform_ratio",
]

Normalizer = Literal["count", "zipcache"]
TOLERANCE = 1e-6
"""Of the total mass, within which p is reached: a sum of floats is not exact."""
_ELEMENTS = 1 << 25
"""Attention weights that are held at a time."""


class Mass(NamedTuple):
    """What the rows of a layer's attention say of its columns.

    Attributes:
        mass: ``[batch, tokens]``, a_j: attention that a column gets, summed over the rows looked at, heads averaged.
        rank: ``[batch, tokens]``, a_j over the rows that see column j.
    """

    mass: Float[Tensor, "batch tokens"]
    rank: Float[Tensor, "batch tokens"]


def probe_rows(num_tokens: int, recent: float, random: float, seed: int = 0) -> Int[Tensor, " rows"]:
    """Rows of the map that are computed: the most recent ones, and others drawn once for all layers.

    Args:
        num_tokens: Of the prompt, padding excluded.
        recent: Last rows; below 1 a share of the tokens, rounded up.
        random: Rows drawn among the others, likewise.
        seed: Of the draw, which depends on nothing else but ``num_tokens``.

    Returns:
        Row indices, ascending.

    Source: ZipCache, section 4.3 (5 % and 5 %); ZipVL (64 and 64).
    """
    last = min(num_tokens, _count(recent, num_tokens))
    others = min(num_tokens - last, _count(random, num_tokens))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(num_tokens - last, generator=generator)[:others]
    return torch.cat([drawn.sort().values, torch.arange(num_tokens - last, num_tokens)])


def _count(amount: float, tokens: int) -> int:
    return math.ceil(amount * tokens) if amount < 1 else int(amount)


def column_mass(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads_k tokens dim"],
    *,
    real: Bool[Tensor, "batch tokens"] | None = None,
    rows: Int[Tensor, "batch rows"] | None = None,
    scaling: float | None = None,
    normalizer: Normalizer = "count",
) -> Mass:
    """Column sums of the causal attention map, without holding the map.

    Args:
        query: After rotary positions; the last of ``key``'s tokens, where earlier turns have gone before.
        key: Likewise.
        real: False where the batch is padded; such rows and columns have no mass.
        rows: Rows of ``query`` to look at, -1 for none; all if None.
        scaling: Of the logits; 1 / sqrt(dim) if None.
        normalizer: See ``ranked``.
    """
    batch, heads, queries, dim = query.shape
    heads_k, tokens, device = key.shape[1], key.shape[2], query.device
    dtype = torch.promote_types(query.dtype, torch.float32)
    columns = torch.arange(tokens, device=device)
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    every = rows is None
    if rows is None:
        rows = torch.where(real, columns, -1)[:, tokens - queries :] - (tokens - queries)
    scale = dim**-0.5 if scaling is None else scaling
    mass = torch.zeros(batch, tokens, dtype=dtype, device=device)
    seen = torch.zeros(batch, tokens, dtype=dtype, device=device)
    keys = key.to(dtype).unsqueeze(2).transpose(-1, -2)
    size = max(1, _ELEMENTS // (batch * heads * tokens))
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        there, at = part >= 0, part.clamp(min=0)
        visible = (columns <= at[..., None] + tokens - queries) & real[:, None] & there[..., None]
        if every:
            picked = query[:, :, start : start + size]
        else:
            picked = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim))
        picked = (picked.to(dtype) * scale).unflatten(1, (heads_k, heads // heads_k))
        logits = (picked @ keys).flatten(1, 2)  # [B, H, R, T]
        # A row that is not there has no visible column: it is given all of them, and then no weight.
        logits = logits.masked_fill(~(visible | ~there[..., None])[:, None], -torch.inf)
        weights = logits.softmax(-1).mean(1) * there[..., None]
        mass = mass + weights.sum(1)
        seen = seen + visible.sum(1)
    return ranked(mass, seen, real, normalizer)


def ranked(
    mass: Float[Tensor, "batch tokens"],
    seen: Float[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"],
    real: Bool[Tensor, "batch tokens"],
    normalizer: Normalizer = "count",
) -> Mass:
    """The mass with the rank by it.

    Args:
        mass: Column sums over some rows.
        seen: How many of these rows see a column.
        real: Where tokens are.
        normalizer: What a_j is divided by for the ranking. ``count``: the rows looked at that see column j.
            ``zipcache``: all rows that see it, as in ZipCache's release, also where only some were summed.
    """
    if normalizer == "zipcache":
        seen = real.flip(-1).cumsum(-1).flip(-1)
    return Mass(mass, mass / seen.clamp(min=1))


def topp_budget(
    mass: Float[Tensor, "batch tokens"], p: float | Float[Tensor, " batch"], real: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, " batch"]:
    """Least number of tokens whose masses, largest first, sum to the share p of all mass.

    Args:
        mass: Not normalised.
        p: Share in (0, 1]; at 1 every token is kept, those without mass too.
        real: Where tokens are.
    """
    ordered = mass.double().masked_fill(~real, 0.0).sort(-1, descending=True).values.cumsum(-1)
    share = torch.as_tensor(p, dtype=torch.float64, device=mass.device).expand(len(mass))
    target = (share - TOLERANCE) * ordered[:, -1]
    budget = (ordered < target[:, None]).sum(-1) + 1
    num_tokens = real.sum(-1)
    return torch.where(share >= 1, num_tokens, torch.minimum(budget, num_tokens))


def select(
    rank: Float[Tensor, "batch tokens"],
    budget: Int[Tensor, " batch"],
    real: Bool[Tensor, "batch tokens"],
    protected: Bool[Tensor, "batch tokens"],
) -> Bool[Tensor, "batch tokens"]:
    """The kept set S: protected tokens first, then those of the highest rank, until the budget is spent.

    Args:
        rank: Normalised mass.
        budget: Tokens to keep, protected ones included; where they are more, they all stay.
        real: Where tokens are.
        protected: Tokens that stay in any case.
    """
    protected = protected & real
    score = rank.masked_fill(protected, torch.inf).masked_fill(~real, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return place < torch.maximum(budget, protected.sum(-1))[:, None]


def token_ratio(keep: Bool[Tensor, "batch tokens"], real: Bool[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
    """Kept tokens over tokens of the prompt, of one layer; tau is its mean over layers."""
    return (keep & real).sum(-1) / real.sum(-1)


def kept_mass(mass: Float[Tensor, "batch tokens"], keep: Bool[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
    """Share of the attention mass that the kept tokens hold; not p, since budget and choice differ in their scores."""
    return (mass * keep).sum(-1) / mass.sum(-1)


def soft_ratio(
    mass: Float[Tensor, "batch tokens"],
    real: Bool[Tensor, "batch tokens"],
    kind: Literal["entropy", "participation"] = "entropy",
) -> Float[Tensor, " batch"]:
    """Differentiable size of the mass's support over the number of tokens, in (0, 1].

    Args:
        mass: With its gradient.
        real: Where tokens are.
        kind: ``entropy``: exp(H(a / sum a)) / n. ``participation``: (sum a)^2 / (n sum a^2).

    Source: ours (not in the paper).
    """
    share = mass.masked_fill(~real, 0.0)
    share = share / share.sum(-1, keepdim=True)
    if kind == "participation":
        return 1 / (share.square().sum(-1) * real.sum(-1))
    entropy_nats = -torch.xlogy(share, share.clamp(min=torch.finfo(share.dtype).tiny)).sum(-1)
    return entropy_nats.exp() / real.sum(-1)


def uniform_ratio(
    p: float,
    num_tokens: int,
    rows: Int[Tensor, " rows"] | None = None,
    num_protected: int = 0,
) -> float:
    """Token ratio that a map without structure gives: every row spreads its attention evenly.

    Args:
        p: Share of the mass.
        num_tokens: Of the prompt.
        rows: Rows that are looked at; all if None.
        num_protected: Tokens that stay in any case.
    """
    rows = torch.arange(num_tokens) if rows is None else rows
    # Column j gets 1 / (i + 1) of each row i >= j.
    share = torch.zeros(num_tokens, dtype=torch.float64).index_add_(0, rows, 1 / (rows.double() + 1))
    mass = share.flip(0).cumsum(0).flip(0)
    budget = topp_budget(mass[None], p, torch.ones(1, num_tokens, dtype=torch.bool))
    return max(int(budget), num_protected) / num_tokens
