"""The rounding of FPSAttention: what is E4M3, and what shares a scale. In plain torch, the definition of it.

    s = max |x| / 448,  x8 = e4m3(x / s)      Q and K: per head and tile (or larger box, tensor, token)
                                              V: per head and channel, over the sequence
    P8 = e4m3(448 p),  p = exp(s - max) in (0, 1]
    out = s_V / (448 l) * P8 @ V8             l = sum of p as it is

Source: the paper's equations 1 and 4 (of which equation 1 prints the scale the other way up), with P's scale 1/448.
Differs: the paper does not say which 8-bit format; E4M3 here (1/448 implies it, and E5M2 has twice its error). K may
    lose its mean first, as in SageAttention (arXiv 2410.02367): softmax does not notice, but E4M3 has more room. The
    denominator sums unrounded probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hone_kernels.attention_fp8.reference import in_mean
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["E4M3_MAX", "Rounded", "round_e4m3", "round_qkv"]

E4M3_MAX = 448.0
"""Largest E4M3 value."""

_AMAX_MIN = E4M3_MAX * torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Rounded:
    """Queries, keys and values that E4M3 can hold up to their scales.

    Attributes:
        q: ``[B, H, S, D]`` float32, scaled back.
        k: ``[B, HK, S, D]``, without ``k_mean``.
        v: ``[B, HK, S, D]``.
        q_scale: ``[B, H, S]`` float32, of each slot.
        k_scale: ``[B, HK, S]``.
        v_scale: ``[B, HK, D]``.
        k_mean: ``[B, HK, D]``, what was subtracted from every key, or None.
    """

    q: Float[Tensor, "batch heads slots dim"]
    k: Float[Tensor, "batch kv_heads slots dim"]
    v: Float[Tensor, "batch kv_heads slots dim"]
    q_scale: Float[Tensor, "batch heads slots"]
    k_scale: Float[Tensor, "batch kv_heads slots"]
    v_scale: Float[Tensor, "batch kv_heads dim"]
    k_mean: Float[Tensor, "batch kv_heads dim"] | None


def round_e4m3(x: Float[Tensor, "*shape"], amax: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """What E4M3 holds of x at the scale ``amax / 448``, scaled back, in float32.

    Args:
        x: Finite or not; what is not becomes NaN, since E4M3 has no infinity.
        amax: The largest magnitude that must fit, not negative; zero stands for the least that divides.

    Returns:
        float32; magnitudes beyond ``amax`` stop there.
    """
    x, amax = x.float(), amax.float().clamp(min=_AMAX_MIN)
    # Tensors on both sides: torch would turn a division with a number into two roundings.
    top = torch.full_like(amax, E4M3_MAX)
    fits = (x * (top / amax)).clamp(-E4M3_MAX, E4M3_MAX)  # a cast beyond 448 gives NaN on some devices
    return torch.where(x.isfinite(), fits, torch.nan).to(torch.float8_e4m3fn).float() * (amax / top)


@torch.no_grad()
def round_qkv(
    q: Float[Tensor, "batch heads slots dim"],
    k: Float[Tensor, "batch kv_heads slots dim"],
    v: Float[Tensor, "batch kv_heads slots dim"],
    *,
    groups: Int[Tensor, " slots"],
    present: Bool[Tensor, " slots"],
    smooth_k: bool = True,
) -> Rounded:
    """Round operands of attention, slot by slot.

    Args:
        q: Queries, after QK-norm and rotary embedding.
        k: Keys, likewise.
        v: Values.
        groups: Slots of one number share a scale of Q and one of K.
        present: Slots that hold a token. The others count in no scale and no mean, and become zero.
        smooth_k: Whether keys lose their mean over the tokens; of more than 8,192 over a sample, as in the kernels.
    """
    q, k, v = (torch.where(present[:, None], x.float(), 0.0) for x in (q, k, v))
    k_mean = None
    if smooth_k:
        seen = present & in_mean(len(present), present.device)
        k_mean = (_finite(k) * seen[:, None]).sum(2) / seen.sum().clamp(min=1)
        k = torch.where(present[:, None], k - k_mean.unsqueeze(2), 0.0)
    q_amax, k_amax = _group_amax(q, groups), _group_amax(k, groups)
    v_amax = _finite(v).abs().amax(2)
    return Rounded(
        q=round_e4m3(q, q_amax.unsqueeze(-1)),
        k=round_e4m3(k, k_amax.unsqueeze(-1)),
        v=round_e4m3(v, v_amax.unsqueeze(2)),
        q_scale=q_amax.clamp(min=_AMAX_MIN) / E4M3_MAX,
        k_scale=k_amax.clamp(min=_AMAX_MIN) / E4M3_MAX,
        v_scale=v_amax.clamp(min=_AMAX_MIN) / E4M3_MAX,
        k_mean=k_mean,
    )


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def _group_amax(x: Tensor, groups: Tensor) -> Tensor:
    """The largest magnitude of each slot's group: ``[B, H, S]``."""
    peak = _finite(x).abs().amax(-1)
    index = groups.expand(peak.shape)
    most = peak.new_zeros((*peak.shape[:2], int(groups.max()) + 1)).scatter_reduce(-1, index, peak, "amax")
    return most.gather(-1, index)
