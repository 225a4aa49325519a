"""Token selection as its definition, by sorting, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "select_tokens_reference"]

TOLERANCE = 1e-6
"""Of the total mass, within which a share is reached: a sum of floats is not exact."""


def select_tokens_reference(
    rank: Tensor, mass: Tensor | None, p: Tensor | None, budget: Tensor | None, real: Tensor, protected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``select_tokens``."""
    total = real.sum(-1)
    if mass is not None:
        assert p is not None, "the op checks it"
        reached = mass.double().masked_fill(~real, 0.0).sort(-1, descending=True).values.cumsum(-1)
        share = p.double()
        count = (reached < ((share - TOLERANCE) * reached[:, -1])[:, None]).sum(-1) + 1
        count = torch.where(share >= 1, total, torch.minimum(count, total))
    else:
        assert budget is not None, "the op checks it"
        count = torch.minimum(budget.long(), total)
    protected = protected & real
    count = torch.maximum(count, protected.sum(-1))
    score = rank.masked_fill(protected, torch.inf).masked_fill(~real, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    columns = torch.arange(rank.shape[1], device=rank.device).expand_as(order)
    keep = torch.empty_like(order).scatter_(1, order, columns) < count[:, None]
    # A kept token goes to the slot that counts the kept ones before it; everything else goes to a spare last slot.
    slot = torch.where(keep, keep.cumsum(-1) - 1, rank.shape[1])
    index = torch.zeros(len(rank), rank.shape[1] + 1, dtype=torch.int32, device=rank.device)
    index.scatter_(1, slot, columns.int())
    return keep, index[:, :-1].contiguous(), count.int()
