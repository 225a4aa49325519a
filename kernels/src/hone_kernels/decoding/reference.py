"""The parts of a decoding step as their definition, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "add_rms_norm_reference",
    "linear_of_one_reference",
    "paged_attention_reference",
    "rotate_append_reference",
    "silu_mul_reference",
]


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``add_rms_norm``."""
    total = x if residual is None else residual + x
    return _norm(total, weight, eps), total


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """See ``silu_mul``."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def linear_of_one_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """See ``linear_of_one``."""
    x = x if norm is None else _norm(x, norm, eps)
    out = torch.nn.functional.linear(x, weight, bias)
    out = silu_mul_reference(out) if gated else out
    return out if residual is None else residual + out


def rotate_append_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """See ``rotate_append``."""
    tiles, tokens = positions.shape
    heads_k, page, dim = keys.shape[1:]
    q, k, v = qkv.view(tiles * tokens, -1, dim).split([qkv.shape[1] // dim - 2 * heads_k, heads_k, heads_k], 1)
    at = positions.flatten().long()
    if q_norm is not None:
        q = _norm(q, q_norm, eps)
    if k_norm is not None:
        k = _norm(k, k_norm, eps)
    turned = [_rotate(x, cos[at.clamp(min=0)][:, None], sin[at.clamp(min=0)][:, None]) for x in (q, k)]
    real = at >= 0
    kept = at[real]
    row = rows.long()[:, None].expand(-1, tokens).flatten()[real]
    pages = table[row, kept // page].long()
    keys[pages, :, kept % page] = turned[1][real]
    values[pages, :, kept % page] = v[real]
    return turned[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def paged_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor, table: Tensor, scale: float
) -> Tensor:
    """See ``paged_attention``."""
    tiles, tokens = positions.shape
    heads_k, page, dim = keys.shape[1:]
    used = max(1, -(-(int(positions.max()) + 1) // page))
    pages = table[rows.long(), :used].long()  # [tiles, used]
    # [tiles, used, HK, page, D] -> [tiles, HK, used * page, D]
    k, v = (x[pages].transpose(1, 2).reshape(tiles, heads_k, used * page, dim) for x in (keys, values))
    slots = torch.arange(used * page, device=q.device)
    seen = slots <= positions.long()[..., None]
    # A padding query sees one slot, so that there is a softmax; nobody reads its output.
    seen[..., 0] = True
    groups = q.shape[1] // heads_k
    asked = q.view(tiles, tokens, heads_k, groups, dim).permute(0, 2, 3, 1, 4)
    logits = torch.einsum("nhgqd,nhkd->nhgqk", asked, k) * scale
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf)
    # As transformers' own attention: softmax in float32 at least.
    weights = weights.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    # What a slot beyond a row's length holds is nobody's, and may be anything.
    live = seen.any(1)[:, None, :, None]
    out = torch.einsum("nhgqk,nhkd->nhgqd", weights, v.masked_fill(~live, 0.0))
    return out.permute(0, 3, 1, 2, 4).reshape(tiles * tokens, -1, dim)
