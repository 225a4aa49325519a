"""Column sums of a causal attention map as their definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.precision import without_autocast

__all__ = ["column_mass_reference"]


@without_autocast
def column_mass_reference(
    q: Tensor, k: Tensor, rows: Tensor, real: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``column_mass``."""
    exact = torch.promote_types(q.dtype, torch.float32)
    heads, dim = q.shape[1], q.shape[3]
    columns = torch.arange(k.shape[2], device=q.device)
    there, at = rows >= 0, rows.clamp(min=0).long()
    before = k.shape[2] - q.shape[2]  # keys of earlier turns
    visible = (columns <= at[..., None] + before) & there[..., None]  # [B, R, TK]
    if real is not None:
        visible = visible & real[:, None]
    picked = q.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim)).to(exact)
    keys = k.to(exact).repeat_interleave(heads // k.shape[1], 1)
    logits = (picked @ keys.transpose(-1, -2) * scale).masked_fill(~visible[:, None], -torch.inf)
    # The softmax of a row that sees nothing is no number; its weights are 0.
    weights = logits.softmax(-1).masked_fill(~visible[:, None], 0.0)
    mass, seen = weights.sum(2).mean(1), visible.sum(1, dtype=torch.int32)
    return mass, seen, mass / seen.clamp(min=1)
