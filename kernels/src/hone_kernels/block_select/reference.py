"""Block selection as its definition, by sorting, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["select_blocks_reference", "tie_keys", "tie_steps"]


def tie_steps(num_k: int) -> tuple[int, int]:
    """How far the tie key, a number below ``num_k``, moves on per block and per row.

    Both have no divisor in common with ``num_k``, so that each row has every key once and each block gets every key in
    turn. The golden section spreads the first few of any stretch of blocks over it.
    """

    def near(part: float) -> int:
        step = max(1, round(num_k * part))
        while math.gcd(step, num_k) > 1:
            step += 1
        return step

    return near(0.6180339887), near(0.7548776662)


def tie_keys(num_q: int, num_k: int, device: torch.device) -> Tensor:
    """Which of tied blocks comes first, by ``spread_ties``: that of the lowest key; ``[NQ, NK]``."""
    step, turn = tie_steps(num_k)
    row, col = torch.arange(num_q, device=device), torch.arange(num_k, device=device)
    return (row[:, None] * turn + col * step) % num_k


@without_autocast
def select_blocks_reference(
    scores: Tensor,
    min_keep: int,
    max_keep: int,
    mass: float | None,
    inclusive: bool,
    keep_diagonal: bool,
    forced: int,
    spread_ties: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``select_blocks``."""
    num_q, num_k = scores.shape[-2:]
    row = torch.arange(num_q, device=scores.device)
    col = torch.arange(num_k, device=scores.device)
    ranked = scores.masked_fill(row[:, None] == col, torch.inf) if keep_diagonal else scores
    # Ties: the block that comes first; in 16 bits as the release of BLADE leaves them, to torch's sort.
    narrow = scores.dtype.itemsize == 2
    if spread_ties:
        first = tie_keys(num_q, num_k, scores.device).argsort(-1).expand_as(ranked)
        best = first.gather(-1, ranked.gather(-1, first).sort(dim=-1, descending=True, stable=True).indices)
    else:
        best = ranked.sort(dim=-1, descending=True, stable=not narrow).indices
    if mass is None:
        wanted = torch.full(scores.shape[:-1], max_keep, device=scores.device)
    else:
        reached = scores.gather(-1, best).cumsum(-1)
        # In 16 bits the running sum is rounded at each block, as in the release; so the total is its end.
        total = reached[..., -1:] if narrow else scores.sum(-1, keepdim=True)
        below = (reached < mass * total).sum(-1)
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
