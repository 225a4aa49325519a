"""Block-sparse attention as its definition: a masked softmax, in float32 or float64, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

from .layout import BlockLayout

__all__ = ["attention_reference"]

# Logits held at a time. Larger temporaries go back to the system at every call, which costs more than they save.
_CHUNK_ELEMENTS = 1 << 21


@without_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    pooled_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over the listed keys and all pooled keys.

    Differentiable (twice, too) through plain torch operations. Computes in float64 for float64 inputs, else in float32.

    Args:
        q: ``[B, H, TQ, D]``.
        k: ``[B, HK, TK, D]``, H a multiple of HK.
        v: ``[B, HK, TK, D]``.
        layout: Which key blocks each query block reads.
        scale: Factor on ``q @ k``.
        pooled_k: ``[B, HK, G, D]`` further keys that every query reads, or None.
        pooled_v: ``[B, HK, G, D]``, their values.
        pooled_bias: broadcastable to ``[B, HK, G]``, natural-log units, added to their logits.

    Returns:
        ``out [B, H, TQ, D]`` in q's dtype and ``lse [B, H, TQ]``, the natural log-sum-exp of the logits, in the
        computing dtype. A query without a key has ``out = 0`` and ``lse = -inf``.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]

    def per_head(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(group, dim=1)

    column = torch.arange(layout.tokens_k, device=q.device)
    exists = column % layout.block_k < layout.key_counts()[:, column // layout.block_k]  # [B or 1, TK]
    blocks = layout.to_mask()
    # No weight times NaN is NaN: what no list names must not be multiplied.
    unread = ~blocks.any(2)[..., column // layout.block_k].unsqueeze(-1)  # [B or 1, H or 1, TK, 1]
    keys, values = (per_head(x).masked_fill(unread, 0) for x in (k, v))
    extra_bias = None
    if pooled_k is not None:
        assert pooled_v is not None
        extra_k, extra_v = per_head(pooled_k), per_head(pooled_v)
        values = torch.cat([values, extra_v], dim=2)
        if pooled_bias is not None:
            extra_bias = per_head(pooled_bias.expand(pooled_k.shape[:3]))[:, :, None, :]

    closed = ~(blocks[..., column // layout.block_k] & exists[:, None, None, :])  # [B or 1, H or 1, blocks of q, TK]
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * values.shape[2] * layout.block_q))
    outs, lses = [], []
    for first in range(0, layout.num_q_blocks, rows_per_chunk):
        start = first * layout.block_q
        stop = min(start + rows_per_chunk * layout.block_q, layout.tokens_q)
        query = q[:, :, start:stop].to(dtype) * scale
        row = torch.arange(start, stop, device=q.device) // layout.block_q
        logits = (query @ keys.transpose(-1, -2)).masked_fill(closed[:, :, row], -torch.inf)
        if pooled_k is not None:
            extra = query @ extra_k.transpose(-1, -2)
            logits = torch.cat([logits, extra if extra_bias is None else extra + extra_bias], dim=-1)
        top = logits.detach().amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)
        weights = (logits - top).exp()
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        safe = torch.where(empty, 1, total)
        outs.append((weights @ values / safe).to(q.dtype))
        lses.append(torch.where(empty, -torch.inf, top + safe.log()).squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
