"""FP8 attention as its definition: quantisation to E4M3, and attention on the rounded operands, in plain torch.

The emulation rounds where a kernel rounds (operands once, P tile by tile) and is exact elsewhere, so what remains
between it and a kernel is the order of float32 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.attention.layout import BlockLayout
from hone_kernels.precision import without_autocast

__all__ = [
    "AMAX_MIN",
    "E4M3_MAX",
    "V_PADDING",
    "attention_fp8_reference",
    "dequantize",
    "group_amax",
    "in_mean",
    "mean_step",
    "put_rows",
    "quantize_reference",
    "rotate",
    "scales",
]

E4M3_MAX = 448.0
"""Largest E4M3 value."""

V_PADDING = 128
"""v8's last axis is a multiple of it, so that no kernel has to look where the keys end."""

AMAX_MIN = E4M3_MAX * torch.finfo(torch.float32).tiny
"""A scale is at least the smallest normal float32, so that a block of zeros still divides."""

MEAN_RUN, MEAN_RUNS = 128, 64
"""The mean of K is over all keys up to 64 runs of 128, and over as many runs at most of a longer sequence."""

# Logits held at a time.
_CHUNK_ELEMENTS = 1 << 21


@without_autocast
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs, rounded to x's dtype as diffusers' Wan does.

    Args:
        x: ``[B, H, S, D]``.
        cos: ``[S, D/2]``.
        sin: ``[S, D/2]``.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@without_autocast
def quantize_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    k_valid: Tensor | None,
    block: int,
    groups: Tensor | None,
    smooth_k: bool,
    for_lse: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of ``FP8Operands`` in their order, without ``block``; see ``quantize_qkv`` for the arguments."""
    if cos is not None:
        assert sin is not None
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if order is not None:
        q, k, v = (x[:, :, order.long()] for x in (q, k, v))
    q, k, v = q.float(), k.float(), v.float()
    tokens = k.shape[2]
    if k_valid is not None:
        absent = absent_keys(k_valid, tokens, block)
        k, v = k.masked_fill(absent, 0), v.masked_fill(absent, 0)
        if order is not None:
            q = q.masked_fill(absent, 0)
    k_mean = q_dot_mean = None
    if smooth_k:
        seen = in_mean(tokens, k.device)[:, None]
        count = (seen if k_valid is None else seen & ~absent).sum(-2).clamp(min=1)
        k_mean = (_finite(k) * seen).sum(2) / count  # [B, HK, D]
        k = k - k_mean.unsqueeze(2)
        if k_valid is not None:
            k = k.masked_fill(absent, 0)
        if for_lse:
            q_dot_mean = (q * k_mean.repeat_interleave(q.shape[1] // k.shape[1], dim=1).unsqueeze(2)).sum(-1)
    q8, q_scale = _quantize_blocks(q, block, groups)
    k8, k_scale = _quantize_blocks(k, block, groups)
    v_scale, v_factor = scales(_finite(v).abs().amax(2))  # [B, HK, D]
    v = torch.nn.functional.pad(v, (0, 0, 0, -tokens % V_PADDING))
    v8 = _to_v_order(_cast(v, v_factor.unsqueeze(2)).transpose(-1, -2))
    return q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean


def mean_step(tokens: int) -> int:
    """Of how many runs of ``MEAN_RUN`` keys one is in the mean."""
    return max(1, -(-tokens // (MEAN_RUN * MEAN_RUNS)))


def in_mean(tokens: int, device: torch.device) -> Tensor:
    """Which keys are in the mean: ``[tokens]`` bool."""
    return torch.arange(tokens, device=device) // MEAN_RUN % mean_step(tokens) == 0


def absent_keys(k_valid: Tensor, tokens: int, block: int) -> Tensor:
    """Where no key exists: ``[B or 1, 1, tokens, 1]`` bool."""
    at = torch.arange(tokens, device=k_valid.device)
    return (at % block >= k_valid[:, at // block])[:, None, :, None]


def _to_v_order(x: Tensor) -> Tensor:
    """Keys (last axis) into the order of ``FP8Operands.v8``."""
    return x.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def _from_v_order(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, and what to multiply by before the cast."""
    amax = amax.clamp(min=AMAX_MIN)
    # Tensors on both sides: torch would turn a division with a number into two roundings.
    top = torch.full_like(amax, E4M3_MAX)
    return amax / top, top / amax


def _cast(x: Tensor, factor: Tensor) -> Tensor:
    # E4M3 has no infinity: what is not finite becomes NaN, which reaches the outputs that read it and no others.
    return torch.where(x.isfinite(), (x * factor).clamp(-E4M3_MAX, E4M3_MAX), torch.nan).to(torch.float8_e4m3fn)


def group_amax(amax: Tensor, groups: Tensor | None) -> Tensor:
    """Of the largest magnitude of each block ``[B, H, N]`` that of its group, for each block again."""
    if groups is None:
        return amax
    index = groups[: amax.shape[-1]].long().expand(amax.shape)
    return torch.zeros_like(amax).scatter_reduce(-1, index, amax, "amax").gather(-1, index)


def _quantize_blocks(x: Tensor, block: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x [B, H, S, D]`` as E4M3 with one scale per group of blocks, repeated for each block: ``[B, H, N]``."""
    tokens = x.shape[2]
    peak = torch.nn.functional.pad(_finite(x).abs().amax(-1), (0, -tokens % block)).unflatten(-1, (-1, block)).amax(-1)
    scale, factor = scales(group_amax(peak, groups))
    return _cast(x, factor.repeat_interleave(block, dim=-1)[..., :tokens, None]).contiguous(), scale


@without_autocast
def dequantize(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``q [B, H, TQ, D]``, ``k`` and ``v [B, HK, TK, D]`` again; k without its mean."""

    def rows(x8: Tensor, scale: Tensor) -> Tensor:
        return (x8.float() * scale.repeat_interleave(block, dim=-1)[..., : x8.shape[2], None]).to(dtype)

    v = _from_v_order(v8)[..., : k8.shape[2]].transpose(-1, -2).float() * v_scale.unsqueeze(2)
    return rows(q8, q_scale), rows(k8, k_scale), v.to(dtype).contiguous()


def put_rows(out: Tensor, rows: Tensor, order: Tensor | None, k_valid: Tensor | None, block: int) -> None:
    """Write ``rows [B, H, TQ, D]`` into ``out [B, H, S, D]``: row i to place ``order[i]``, if that slot has a token."""
    if order is None:
        out.copy_(rows)
        return
    if k_valid is None:
        index = order.long().expand(rows.shape[0], -1)
    else:
        # The rows of padding go to a place behind the last, which nobody reads.
        gone = absent_keys(k_valid, rows.shape[2], block)[:, 0, :, 0]
        index = torch.where(gone, out.shape[2], order.long()).expand(rows.shape[0], -1)
    padded = torch.cat([out, torch.empty_like(out[:, :, :1])], dim=2)
    padded.scatter_(2, index[:, None, :, None].expand(rows.shape), rows.to(out.dtype))
    out.copy_(padded[:, :, :-1])


@without_autocast
def attention_fp8_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, *, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention on dequantised operands with P rounded to E4M3, as a kernel that reads ``tile`` keys at a time.

    Such a kernel rounds P against the largest logit met so far, not the row's largest: the emulation does the same.

    Args:
        q: ``[B, H, TQ, D]``, dequantised, float32 or float64.
        k: ``[B, HK, TK, D]``.
        v: ``[B, HK, TK, D]``.
        layout: Which key blocks each query block reads.
        scale: Factor on the logits.
        tile: Keys read at a time, a divisor of ``layout.block_k``; the whole block if None.

    Returns:
        ``out [B, H, TQ, D]`` and ``lse [B, H, TQ]``, natural log, in the inputs' dtype. A query without a key has
        ``out = 0`` and ``lse = -inf``.
    """
    tile = layout.block_k if tile is None else tile
    group = q.shape[1] // k.shape[1]
    padding = -layout.tokens_k % tile
    keys, values = (
        torch.nn.functional.pad(x.repeat_interleave(group, dim=1), (0, 0, 0, padding)) for x in (k, v)
    )  # [B, H, whole tiles, D]
    column = torch.arange(keys.shape[2], device=q.device)
    exists = column % layout.block_k < layout.key_counts()[:, column // layout.block_k]
    # A key that is not there weighs nothing even if it is NaN.
    keys, values = (x.masked_fill(~exists[:, None, :, None], 0) for x in (keys, values))
    blocks = layout.to_mask()
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * keys.shape[2] * layout.block_q))
    outs, lses = [], []
    for first in range(0, layout.num_q_blocks, rows_per_chunk):
        start = first * layout.block_q
        stop = min(start + rows_per_chunk * layout.block_q, layout.tokens_q)
        row = torch.arange(start, stop, device=q.device) // layout.block_q
        allowed = blocks[:, :, row][..., column // layout.block_k] & exists[:, None, None, :]
        logits = (q[:, :, start:stop] @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
        logits = logits.unflatten(-1, (-1, tile))  # [B, H, rows, tiles, tile]
        top = logits.amax(-1).cummax(-1).values
        top = top.unsqueeze(-1)
        p = (logits - torch.where(top == -torch.inf, 0, top)).exp()
        rounded = (p * E4M3_MAX).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).to(p.dtype) / E4M3_MAX
        last = torch.where(top[..., -1:, :] == -torch.inf, 0, top[..., -1:, :])
        fade = (top - last).exp()
        total = (p.sum(-1, keepdim=True) * fade).sum(-2)
        empty = total == 0
        weights = (rounded * fade).flatten(-2) / torch.where(empty, 1, total)
        outs.append(weights @ values)
        lses.append(torch.where(empty, -torch.inf, last.squeeze(-1) + total.log()).squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
