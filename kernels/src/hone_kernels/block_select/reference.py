"""Block selection as its definition, by sorting, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["select_blocks_reference"]


@without_autocast
def select_blocks_reference(
    scores: Tensor,
    min_keep: int,
    max_keep: int,
    mass: float | None,
    inclusive: bool,
    keep_diagonal: bool,
    forced: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``select_blocks``."""
    num_q, num_k = scores.shape[-2:]
    row = torch.arange(num_q, device=scores.device)
    col = torch.arange(num_k, device=scores.device)
    ranked = scores.masked_fill(row[:, None] == col, torch.inf) if keep_diagonal else scores
    best = ranked.sort(dim=-1, descending=True, stable=True).indices  # ties: the lower block first
    if mass is None:
        wanted = torch.full(scores.shape[:-1], max_keep, device=scores.device)
    else:
        reached = scores.gather(-1, best).cumsum(-1)
        below = (reached < mass * scores.sum(-1, keepdim=True)).sum(-1)
        wanted = (below + 1).clamp(max=num_k) - (0 if inclusive else 1)
    clamped = wanted > max_keep
    count = wanted.clamp(min_keep, max_keep)
    rank = torch.empty_like(best).scatter_(-1, best, col.expand_as(best))
    keep = rank < count.unsqueeze(-1)
    if forced:
        last = row >= num_q - forced
        keep = keep | (col >= num_k - forced) | last[:, None]
        clamped = clamped & ~last
    width = num_k if forced else max_keep
    # A kept block goes to the slot that counts the kept ones before it; everything else goes to a spare last slot.
    slot = torch.where(keep, keep.cumsum(-1) - 1, width)
    idx = torch.zeros((*keep.shape[:-1], width + 1), dtype=torch.int32, device=scores.device)
    idx.scatter_(-1, slot, col.to(torch.int32).expand_as(slot))
    return idx[..., :width].contiguous(), keep.sum(-1, dtype=torch.int32), clamped
