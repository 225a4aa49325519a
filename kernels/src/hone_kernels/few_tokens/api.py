"""The public functions: checks and choice of backend. They are called inside captured graphs, and none waits."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_contiguous

from .reference import attend_slots_reference, gated_of_few_reference

__all__ = ["SUPPORT", "TOKENS", "Backend", "attend_slots", "gated_of_few"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", min_sm=80),
}
"""``dtypes`` are those of activations, weights and caches."""

TOKENS = 64
"""Most tokens of a product, and most of a row in attention: programs hold all of them."""


def gated_of_few(x: Tensor, gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate(x)) * up(x) of few tokens in one launch.

    Args:
        x: ``[T, C]``, contiguous.
        gate: ``[N, C]``, contiguous.
        up: Likewise.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[T, N]``.

    Raises:
        ValueError: Shapes do not fit together, there are more tokens than ``TOKENS``, or the kernel gets a tensor that
            is not contiguous.
    """
    if x.dim() != 2 or gate.dim() != 2 or x.shape[1] != gate.shape[1] or up.shape != gate.shape:
        raise ValueError(
            f"expected x [T, C], gate and up [N, C]; got {list(x.shape)}, {list(gate.shape)} and {list(up.shape)}"
        )
    if not 1 <= len(x) <= TOKENS:
        raise ValueError(f"expected 1 to {TOKENS} tokens; got {len(x)}")
    if choose("gated_of_few", backend, SUPPORT, x.device, x.dtype) == "reference":
        return gated_of_few_reference(x, gate, up)
    check_contiguous(x=x, gate=gate, up=up)
    from .triton import gated_of_few_triton  # needs Triton

    return gated_of_few_triton(x, gate, up)


def attend_slots(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    begin: int,
    *,
    scale: float,
    words: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate new tokens, write their keys and values to their slots, and attend to all slots up to the last of them.

    New tokens see each other in both directions. What is cached for earlier slots is read before the launches just
    before have ended: no kernel that overlaps the next one may write it.

    Args:
        qkv: ``[R, n, (H + 2 HK) * D]``, contiguous: queries, keys and values of each token.
        rope: Cosines and sines, float32 ``[slots, D / 2]``, contiguous, of adjacent pairs of channels; None: positions
            are in the tokens.
        keys: ``[R, HK, slots, D]``, contiguous; slots from ``begin`` on are written.
        values: Likewise.
        begin: Slot of the first new token.
        scale: Of the logits.
        words: bool ``[R, T]``, contiguous: which of the first T slots may be read; T at most ``begin``.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[R, n, H * D]``.

    Raises:
        ValueError: Shapes do not fit together, there are more new tokens than ``TOKENS``, or the kernel gets a tensor
            that is not contiguous.
    """
    if keys.dim() != 4 or keys.shape != values.shape or qkv.dim() != 3 or len(qkv) != len(keys):
        raise ValueError(
            f"expected qkv [R, n, (H + 2 HK) * D], keys and values [R, HK, slots, D]; got {list(qkv.shape)}, "
            f"{list(keys.shape)} and {list(values.shape)}"
        )
    _, heads_k, slots, dim = keys.shape
    tokens, (heads, rest) = qkv.shape[1], divmod(qkv.shape[2], dim)
    if rest or heads <= 2 * heads_k or heads % heads_k:
        raise ValueError(f"qkv must have (H + 2 * {heads_k}) * {dim} channels, H a multiple of {heads_k}; got {heads}")
    if not 1 <= tokens <= TOKENS or begin < 0 or begin + tokens > slots:
        raise ValueError(f"expected 1 to {TOKENS} tokens in {slots} slots; got {tokens} from {begin} on")
    if rope is not None and (dim % 2 or any(table.shape != (slots, dim // 2) for table in rope)):
        raise ValueError(
            f"rope must be two tables [{slots}, D / 2], D even; got {[list(table.shape) for table in rope]} for D {dim}"
        )
    if words is not None and (
        words.dim() != 2 or len(words) != len(qkv) or words.shape[1] > begin or words.dtype != torch.bool
    ):
        raise ValueError(
            f"words must be bool [{len(qkv)}, T], T at most {begin}; got {words.dtype} {list(words.shape)}"
        )
    if choose("attend_slots", backend, SUPPORT, qkv.device, qkv.dtype) == "reference":
        return attend_slots_reference(qkv, rope, keys, values, begin, scale, words)
    cos, sin = rope or (None, None)
    check_contiguous(qkv=qkv, cos=cos, sin=sin, keys=keys, values=values, words=words)
    from .triton import attend_slots_triton  # needs Triton

    return attend_slots_triton(qkv, rope, keys, values, begin, scale, words)
