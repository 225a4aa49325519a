"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_heads, check_scale, check_tensor

from .reference import decode_attention_reference

__all__ = ["SUPPORT", "Backend", "decode_attention"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", head_dims=(16, 32, 64, 128), min_sm=80
    ),
}
"""``dtypes`` are those of q, k and v."""


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, *, scale: float | None = None, backend: Backend = "auto"
) -> Tensor:
    """Attend from one token of each sample to the valid entries of its cache; no call waits, no gradient flows.

    Args:
        q: ``[B, H, 1, D]``.
        k: ``[B, HK, S, D]``, H a multiple of HK.
        v: As k.
        valid: bool ``[B, S]``; what the other entries hold is not loaded.
        scale: Of the logits; ``D ** -0.5`` if None.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        ``[B, H, 1, D]``; zeros where nothing is valid.

    Raises:
        ValueError: A shape, device or backend does not fit.
        TypeError: Dtypes differ, or the scale is a tensor.
    """
    check_heads(q, k, v)
    scale = check_scale(scale, q.shape[3])
    if q.shape[2] != 1:
        raise ValueError(f"q must hold one token of each sample, [B, H, 1, D]; got {list(q.shape)}")
    check_tensor("valid", valid, (len(k), k.shape[2]), q.device, torch.bool)
    backend = choose("decode_attention", backend, SUPPORT, q.device, q.dtype, head_dim=q.shape[3])
    return torch.ops.hone_kernels.decode_attention(q.detach(), k.detach(), v.detach(), valid, scale, backend)


@torch.library.custom_op("hone_kernels::decode_attention", mutates_args=())
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float, backend: str) -> Tensor:
    if backend == "reference":
        return decode_attention_reference(q, k, v, valid, scale)
    from .triton import decode_attention_triton  # needs Triton

    with torch.cuda.device_of(q):
        return decode_attention_triton(q, k, v, valid, scale)


@_decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float, backend: str) -> Tensor:
    return q.new_empty(q.shape)
