"""FPSAttention (arXiv 2506.04648): E4M3 attention over a window of 3-D tiles, chosen by the denoising step.

The heart of the paper is four pieces, each in a file of its own: tiles (``tiles``), windows of them (``windows``), what
is rounded and what shares a scale (``quantization``), and which regime holds when (``schedule``). Here they make one
attention. With slots, that is tokens in tile order with padding up to whole blocks:

    (q8, s_q), (k8, s_k), (v8, s_v) = round(q), round(k - mean k), round(v)
    S = (q8 k8^T) s_q s_k / sqrt(dim)         over the key blocks that the window lists for a query's tile
    out = (e4m3(448 p) v8) s_v / (448 l)      p = exp(S - max S),  l = sum p

Trained with, its gradient is straight through: that of exact attention at the rounded operands.

Everywhere ``q, k, v`` hold the video tokens first, in tile order (``Tiling.order``), and then the text tokens, if text
is in the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention, straight_through_attention
from hone_kernels.attention_fp8.reference import attention_fp8_reference, rotate
from hone_kernels.precision import without_autocast
from jaxtyping import Float, Int
from torch import Tensor

from .config import FPSAttentionConfig, Regime
from .quantization import round_qkv
from .tiles import Tiling
from .windows import window_layout

__all__ = ["Plan", "Rope", "fps_attention"]

Rope = tuple[Float[Tensor, "tokens half_dim"], Float[Tensor, "tokens half_dim"]]
"""Cosines and sines of interleaved pairs, by place in the sequence; 1 and 0 where nothing turns (text)."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one regime does to sequences of one tiling. Made by ``Plan.of``, and good for every layer and step.

    Attributes:
        regime: Which.
        tokens: Length of the sequence.
        block: Tokens of a block.
        slots: See ``Tiling``, like the next two; int32, as kernels read it.
        places: See ``Tiling``.
        valid: See ``Tiling``.
        groups: int64 ``[blocks]``, blocks of one number share a scale; of no use where each token has its own.
        longest: Blocks of the largest group, if each group's blocks stand in a row; else None.
        layout: The window, as lists of key blocks.
    """

    regime: Regime
    tokens: int
    block: int
    slots: Int[Tensor, " slots"]
    places: Int[Tensor, " tokens"]
    valid: Int[Tensor, "1 blocks"]
    groups: Int[Tensor, " blocks"]
    longest: int | None
    layout: BlockLayout

    @classmethod
    def of(cls, regime: Regime, tiling: Tiling, cfg: FPSAttentionConfig) -> Plan:
        """Build it; this waits for the device."""
        groups = tiling.scale_groups(None if regime.scales == "tensor" else regime.scale_tile or cfg.tile)
        layout = window_layout(tiling, regime.window, cfg.border)
        lengths = groups.unique_consecutive(return_counts=True)[1]
        longest = int(lengths.max()) if len(lengths) == len(groups.unique()) else None
        slots = tiling.slots.int()
        return cls(regime, tiling.tokens, tiling.block, slots, tiling.places, tiling.valid, groups, longest, layout)


@overload
def fps_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: Plan,
    cfg: FPSAttentionConfig,
    rope: Rope | None = ...,
    scale: float | None = ...,
    overwrite_q: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def fps_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: Plan,
    cfg: FPSAttentionConfig,
    rope: Rope | None = ...,
    scale: float | None = ...,
    overwrite_q: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def fps_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    plan: Plan,
    cfg: FPSAttentionConfig,
    rope: Rope | None = None,
    scale: float | None = None,
    overwrite_q: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one regime.

    Args:
        q: Queries after QK-norm: video in tile order, then text.
        k: Keys, likewise.
        v: Values, likewise.
        plan: What the regime does to this sequence.
        cfg: ``smooth_k``, ``delta`` and ``backend``.
        rope: Rotary embedding of q and k that is still to be done; None if it is, or if there is none.
        scale: Factor on the logits; ``dim ** -0.5`` if None.
        overwrite_q: Whether the output may take the memory of q, which is lost. Where no gradient is recorded and q
            lies in memory as ``[batch, tokens, heads, dim]``, it does; a large attention then needs no more memory than
            a dense one.
        return_lse: Whether to return the log-sum-exp of the logits too.

    Returns:
        ``out`` like q; with ``return_lse`` also ``lse [batch, heads, tokens]``, natural log, of the keys with their
        mean, float32 (float64 for float64 inputs).

    Raises:
        ValueError: If q, k, v, rope and plan do not fit together.

    Source: section 3 and equations 1 to 6. ``delta="exact"`` as Attn-QAT (FastVideo), ``"forward"`` as SLA2 (arXiv
        2602.12675); how the paper sends gradients through the rounding is not described.
    """
    _check(q, k, v, plan.tokens, rope)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    emulated = plan.regime.e4m3 and (plan.regime.scales == "token" or cfg.backend == "reference")
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if plan.regime.plain and not return_lse:
        return _dense(*_rotated(q, k, rope), v, scale)
    if trains or emulated:
        q, k = _rotated(q, k, rope)
        out, lse = _on_slots(q, k, v, plan, cfg, scale, emulated)
        out = out.index_select(2, plan.places)
        return (out, lse.index_select(2, plan.places)) if return_lse else out
    batch, heads, _, dim = q.shape
    if overwrite_q and q.stride(3) == 1 and q.stride(1) == dim:
        out = q
    else:
        out = q.new_empty((batch, plan.tokens, heads, dim)).transpose(1, 2)
    lses = []
    for some, some_k in _parts(q, k, _PARTS[plan.regime.e4m3]):
        part = (q[:, some], k[:, some_k], v[:, some_k])
        lses.append(_into(out[:, some], *part, plan, cfg, rope, scale, return_lse))
    return (out, torch.cat(lses, dim=1)) if return_lse else out


_LARGE = 128 << 20
"""Bytes of q from which what is made of it, k and v is made for a part of the heads at a time."""

_PARTS = {True: 2, False: 4}
"""In how many parts: rounded to E4M3, or gathered as they are, which takes twice the memory."""


def _parts(q: Tensor, k: Tensor, parts: int) -> list[tuple[slice, slice]]:
    """Heads of queries and of keys that go together."""
    group, heads_k = q.shape[1] // k.shape[1], k.shape[1]
    if q.numel() * q.element_size() < _LARGE:
        parts = 1
    size = -(-heads_k // parts)
    return [(slice(i * group, (i + size) * group), slice(i, i + size)) for i in range(0, heads_k, size)]


def _into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, cfg: FPSAttentionConfig, rope: Rope | None,
    scale: float, return_lse: bool,
) -> Tensor:  # fmt: skip
    """Attention of some heads without gradient, written into ``out``, which may be q; its log-sum-exp if asked for."""
    if plan.regime.e4m3:
        # One op rotates, gathers and rounds; another scatters what it computes.
        operands = quantize_qkv(
            q, k, v, rope=rope, order=plan.slots, k_valid=plan.valid, block=plan.block, group=plan.groups,
            longest=plan.longest, smooth_k=cfg.smooth_k, for_lse=return_lse, backend=cfg.backend,
        )  # fmt: skip
        options: Any = {"scale": scale, "out": out, "order": plan.slots, "backend": cfg.backend}
        if not return_lse:
            quantized_attention(operands, plan.layout, **options)
            return out
        lse = quantized_attention(operands, plan.layout, return_lse=True, **options)[1]
    else:
        rows, lse = _on_slots(*_rotated(q, k, rope), v, plan, cfg, scale, emulated=False)
        out.copy_(rows.index_select(2, plan.places))
    return lse.index_select(2, plan.places)


def _on_slots(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, cfg: FPSAttentionConfig, scale: float, emulated: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each slot, with their gradients."""
    q, k, v = (x.index_select(2, plan.slots) for x in (q, k, v))
    options: Any = {"scale": scale, "return_lse": True, "backend": cfg.backend}
    if not plan.regime.e4m3:
        return block_sparse_attention(q, k, v, plan.layout, **options)
    if emulated:
        return _emulated(q, k, v, plan, cfg, scale)
    return straight_through_attention(
        q, k, v, plan.layout, smooth_k=cfg.smooth_k, group=plan.groups, delta=cfg.delta, **options
    )


def _rotated(q: Tensor, k: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    return (q, k) if rope is None else (rotate(q, *rope), rotate(k, *rope))


@without_autocast
def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@without_autocast
def _emulated(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, cfg: FPSAttentionConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in E4M3 with its gradient, in plain torch on slots: rounds where a kernel rounds, exact elsewhere."""
    given = q.dtype
    wide = torch.float64 if given == torch.float64 else torch.float32
    present = torch.zeros_like(plan.slots, dtype=torch.bool).index_fill_(0, plan.places, True)
    groups = plan.groups.repeat_interleave(plan.block)
    if plan.regime.scales == "token":
        groups = torch.arange(len(groups), device=groups.device)
    q, k, v = (torch.where(present[:, None], x.to(wide), 0.0) for x in (q, k, v))
    rounded = round_qkv(q, k, v, groups=groups, present=present, smooth_k=cfg.smooth_k)
    tq, tk, tv = (x + (r.to(wide) - x).detach() for x, r in ((q, rounded.q), (k, rounded.k), (v, rounded.v)))
    out, lse = block_sparse_attention(tq, tk, tv, plan.layout, scale=scale, return_lse=True, backend="reference")
    with torch.no_grad():
        lossy, _ = attention_fp8_reference(tq, tk, tv, plan.layout, scale)
    error = lossy - out.detach()
    if cfg.delta == "forward":
        # The same value; its gradient to a logit of probability p is -p sum(dout * error), which is what the rounded
        # output in place of the exact one adds to it.
        error = error * (1 - (lse - lse.detach())).unsqueeze(-1)
    if rounded.k_mean is not None:
        mean = rounded.k_mean.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        lse = lse + scale * (q * mean.unsqueeze(2)).sum(-1)
    return (out + error).to(given), lse


def _check(q: Tensor, k: Tensor, v: Tensor, tokens: int, rope: Rope | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim]; got {list(x.shape)}")
        if x.shape[2] != tokens:
            raise ValueError(
                f"{name} must have the {tokens} tokens of the plan's grid and text; got {x.shape[2]}. Make a plan for "
                "this grid; leave cross-attention dense"
            )
    for table in rope or ():
        if table.shape != (tokens, q.shape[3] // 2):
            raise ValueError(
                f"rope must be two tables [tokens, dim / 2] = {[tokens, q.shape[3] // 2]}; got {list(table.shape)}. "
                "Text turns by none: cosine 1, sine 0"
            )
