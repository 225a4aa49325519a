"""Block scores as their definition, in float32 or float64, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["block_scores_reference"]

_LOG2E = 1.4426950408889634
_CHUNK_ELEMENTS = 1 << 26  # logits held at a time: 256 MiB in float32


@without_autocast
def block_scores_reference(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    kind: str,
    scale: float,
    *,
    rounding: torch.dtype | None = None,
) -> Tensor:
    """See ``block_scores``; here with float64 results for float64 inputs.

    Args:
        q: ``[B, H, TQ, D]``.
        k: ``[B, HK, TK, D]``.
        q_index: ``[B or 1, H or 1, NQ, R]``.
        k_index: ``[B or 1, H or 1, NK, S]``.
        kind: See ``block_scores``.
        scale: Factor on the logits.
        rounding: A dtype to which everything is rounded that the release of BLADE stores: block maxima (of logits in
            base 2), unnormalised scores, their sum, and scores.

    Returns:
        ``[B, H, NQ, NK]``.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, q_live = _gather(q, q_index, q.shape[1])
    keys, k_live = _gather(k, k_index, q.shape[1])
    queries, keys = queries.to(dtype) * scale, keys.to(dtype)
    if kind == "mean":
        queries, q_live = _mean(queries, q_live)
        keys, k_live = _mean(keys, k_live)
        kind = "paper"  # of one token per block

    batch, heads, num_q, rows, _ = queries.shape
    num_k, cols = keys.shape[2:4]
    keys_t = keys.flatten(2, 3).transpose(-1, -2)  # [B, H, D, NK*S]
    dead = ~k_live.flatten(2, 3)[:, :, None, None, :]
    step = max(1, _CHUNK_ELEMENTS // (batch * heads * rows * num_k * cols))
    scores = []
    for first in range(0, num_q, step):
        part = queries[:, :, first : first + step]
        live = q_live[:, :, first : first + step, :, None]  # [B, H, n, R, 1]
        logits = (part @ keys_t[:, :, None]).masked_fill(dead, -torch.inf).unflatten(-1, (num_k, cols))
        block = logits.logsumexp(-1) if kind == "lse" else logits.amax(-1)  # [B, H, n, R, NK]
        row = logits.amax((-1, -2)) if kind == "official" else logits.flatten(-2).logsumexp(-1)
        row = torch.where(row == -torch.inf, 0, row).unsqueeze(-1)
        if rounding is not None:
            block = (block * _LOG2E).to(rounding).to(dtype) / _LOG2E
        share = (block - row).exp() * live
        scores.append(share.sum(-2) if kind == "lse" else share.amax(-2))
    score = _rounded(torch.cat(scores, dim=2), rounding)
    total = _rounded(score.sum(-1, keepdim=True), rounding)
    return _rounded(score / torch.where(total == 0, 1, total), rounding)


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _gather(x: Tensor, index: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, H, N, S, D]`` at ``index``, zero where it is negative, and where it is not."""
    batch, own_heads, _, dim = x.shape
    index = index.expand(batch, heads, -1, -1)
    live = index >= 0
    x = x.repeat_interleave(heads // own_heads, dim=1)
    at = torch.where(live, index, 0).long().flatten(2).unsqueeze(-1).expand(-1, -1, -1, dim)
    tokens = x.gather(2, at).unflatten(2, index.shape[2:])
    return torch.where(live.unsqueeze(-1), tokens, 0), live


def _mean(tokens: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the live tokens of each block, as a block of one token."""
    count = live.sum(-1, keepdim=True)
    mean = tokens.sum(-2) / count.clamp(min=1)
    return mean.unsqueeze(-2), count > 0
