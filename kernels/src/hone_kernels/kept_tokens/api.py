"""The public functions: checks and choice of backend. They are called inside captured graphs, and none waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_tensor

from .reference import (
    add_change_reference,
    draw_bits_reference,
    gather_modulate_reference,
    pack_tokens_reference,
    spread_tokens_reference,
    take_tokens_reference,
    unpack_tokens_reference,
)

__all__ = [
    "SUPPORT",
    "Backend",
    "Packed",
    "add_change",
    "draw_bits",
    "gather_modulate",
    "pack_tokens",
    "spread_tokens",
    "take_tokens",
    "unpack_tokens",
]

_HALF = (torch.bfloat16, torch.float16)

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, *_HALF)),
    "triton": Support(dtypes=(torch.float32, *_HALF), language="triton", min_sm=80),
}
"""``dtypes`` are those of the tokens, or of the logits."""


def gather_modulate(
    x: Tensor,
    idx: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    dtype: torch.dtype,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Kept tokens, and beside them their norm without weights, times ``1 + scale``, plus ``shift``: one pass.

    Args:
        x: ``[R, L, C]``, all tokens.
        idx: int64 ``[R, n]``, positions of the kept ones.
        scale: ``[R, C]``.
        shift: ``[R, C]``.
        dtype: Of the modulated tokens, which are computed in float32.
        eps: Added to the variance.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[R, n, C]`` of the dtype of ``x``, and ``[R, n, C]`` of ``dtype``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    rows, channels = _tokens("x", x), x.shape[-1]
    check_tensor("idx", idx, (rows, None), x.device, torch.int64)
    check_tensor("scale", scale, (rows, channels), x.device)
    check_tensor("shift", shift, (rows, channels), x.device)
    if choose("gather_modulate", backend, SUPPORT, x.device, x.dtype) == "reference":
        return gather_modulate_reference(x, idx, scale, shift, dtype, eps)
    from .triton import gather_modulate_triton  # needs Triton

    with torch.cuda.device_of(x):
        return gather_modulate_triton(x, idx, scale, shift, dtype, eps)


def add_change(
    x: Tensor,
    update: Tensor,
    gamma: Tensor,
    before: Tensor,
    *,
    images: int | None = None,
    relative: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The last sum of a residual block, and how much the block changed each token: one pass.

    Args:
        x: ``[R, n, C]``, tokens before the sum.
        update: ``[R, n, C]``, what its last layer gives.
        gamma: ``[R, C]``, its gate.
        before: ``[R, n, C]``, tokens that entered the block, of the dtype of ``x``.
        images: Rows whose change is wanted, the first ones; all if None.
        relative: Divide by the mean square of ``before``.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``x + gamma * update`` ``[R, n, C]`` and, float32 ``[images, n]``, the mean square of what that and ``before``
        differ by.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    rows = _tokens("x", x)
    check_tensor("update", update, x.shape, x.device)
    check_tensor("before", before, x.shape, x.device, x.dtype)
    check_tensor("gamma", gamma, (rows, x.shape[-1]), x.device)
    images = rows if images is None else images
    if not 0 <= images <= rows:
        raise ValueError(f"images must be a number of rows, 0 to {rows}; got {images}")
    if choose("add_change", backend, SUPPORT, x.device, x.dtype) == "reference":
        return add_change_reference(x, update, gamma, before, images, relative)
    from .triton import add_change_triton  # needs Triton

    with torch.cuda.device_of(x):
        return add_change_triton(x, update, gamma, before, images, relative)


def draw_bits(
    logits: Tensor,
    uniform: Tensor,
    *,
    slot: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Bits at every position from the logits of the tokens that ran: guidance, filling and draw in one pass.

    A bit is 1 where its uniform is not below the share of 0.

    Args:
        logits: ``[B, n, d, 2]``, or ``[2 B, n, d, 2]`` with the unconditional rows behind the conditional ones.
        uniform: float32 ``[B, L, d]`` in [0, 1).
        slot: int64 ``[B, L]``, which of the n tokens speaks for each position; None: each for its own, and L is n.
        guidance: ``guidance * conditional + (1 - guidance) * unconditional``, where there are such rows.
        temperature: Divides the logits before that.
        top_p: Where the unlikelier bit has a share of at most ``1 - top_p``, the likelier is taken; 0: never.
        backend: Which; see ``SUPPORT``.

    Returns:
        int64 ``[B, L, d]`` of 0 and 1.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or a number is out of its range.
    """
    if logits.dim() != 4 or logits.shape[-1] != 2 or uniform.dim() != 3:
        raise ValueError(
            f"expected logits [B or 2 B, n, d, 2] and uniform [B, L, d]; got {list(logits.shape)} and "
            f"{list(uniform.shape)}"
        )
    images, tokens = uniform.shape[:2]
    if len(logits) not in (images, 2 * images):
        raise ValueError(f"logits must have {images} or {2 * images} rows, as uniform has {images}; got {len(logits)}")
    check_tensor(
        "uniform", uniform, (images, tokens if slot is not None else logits.shape[1], logits.shape[2]), logits.device
    )
    if slot is not None:
        check_tensor("slot", slot, (images, tokens), logits.device, torch.int64)
    if not temperature > 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature must be positive and top_p lie in [0, 1]; got {temperature} and {top_p}")
    if choose("draw_bits", backend, SUPPORT, logits.device, logits.dtype) == "reference":
        return draw_bits_reference(logits, uniform, slot, guidance, temperature, top_p)
    from .triton import draw_bits_triton  # needs Triton

    with torch.cuda.device_of(logits):
        return draw_bits_triton(logits, uniform, slot, guidance, temperature, top_p)


def take_tokens(states: Sequence[Tensor], idx: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, ...]:
    """Some tokens of queries, keys and values, in one launch; the reference has gradients.

    Args:
        states: One to three of ``[B, H, T, D]``, H of each its own.
        idx: int64 ``[B, n]``, which tokens of a sample, in the order wanted.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[B, H, n, D]`` of each, contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    first = _states(states)
    check_tensor("idx", idx, (len(first), None), first.device, torch.int64)
    if choose("take_tokens", backend, SUPPORT, first.device, first.dtype) == "reference":
        return take_tokens_reference(states, idx)
    from .triton import take_tokens_triton  # needs Triton

    with torch.cuda.device_of(first):
        return take_tokens_triton(states, idx)


def spread_tokens(x: Tensor, keep: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The inverse of ``take_tokens``: each token where it was, zeros where none was kept; the reference has gradients.

    Args:
        x: ``[B, H, n, D]``.
        keep: bool ``[B, T]``, at most n of a sample; its i-th True gets the i-th token.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[B, H, T, D]``; the kernel's heads of a token stand side by side in memory.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    check_tensor("x", x, (None, None, None, None), x.device)
    check_tensor("keep", keep, (len(x), None), x.device, torch.bool)
    if choose("spread_tokens", backend, SUPPORT, x.device, x.dtype) == "reference":
        return spread_tokens_reference(x, keep)
    from .triton import spread_tokens_triton  # needs Triton

    with torch.cuda.device_of(x):
        return spread_tokens_triton(x, keep)


class Packed(NamedTuple):
    """Kept tokens of all samples, one sample after the other.

    Attributes:
        states: ``[B T, H, D]`` of each; what stands behind the last kept token means nothing.
        ends: int32 ``[B + 1]``, where each sample begins, and the number of all.
        row: int32 ``[B, T]``, where a kept token stands; of others it means nothing.
    """

    states: tuple[Tensor, ...]
    ends: Tensor
    row: Tensor


def pack_tokens(states: Sequence[Tensor], idx: Tensor, num: Tensor, *, backend: Backend = "auto") -> Packed:
    """Lay some tokens of queries, keys and values one sample after the other, in one launch.

    How many they are only the device has to know: there is room for all, and what is behind them is not touched.

    Args:
        states: One to three of ``[B, H, T, D]``, H of each its own.
        idx: int32 ``[B, T]``, tokens of each sample in the order wanted, in the first ``num`` entries.
        num: int32 ``[B]``.
        backend: Which; see ``SUPPORT``. No gradient flows through Triton's.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    first = _states(states)
    batch, _, tokens, _ = first.shape
    check_tensor("idx", idx, (batch, tokens), first.device, torch.int32)
    check_tensor("num", num, (batch,), first.device, torch.int32)
    if choose("pack_tokens", backend, SUPPORT, first.device, first.dtype) == "reference":
        return Packed(*pack_tokens_reference(states, idx, num))
    from .triton import pack_tokens_triton  # needs Triton

    with torch.cuda.device_of(first):
        return Packed(*pack_tokens_triton(states, idx, num))


def unpack_tokens(x: Tensor, keep: Tensor, row: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The inverse of ``pack_tokens``: each token where it was, zeros where none was kept.

    Args:
        x: ``[B T, H, D]``.
        keep: bool ``[B, T]``, which tokens were packed.
        row: int32 ``[B, T]``, of ``pack_tokens``.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[B, H, T, D]``; the heads of a token stand side by side in memory.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    check_tensor("keep", keep, (None, None), x.device, torch.bool)
    check_tensor("row", row, keep.shape, x.device, torch.int32)
    check_tensor("x", x, (keep.numel(), None, None), x.device)
    if choose("unpack_tokens", backend, SUPPORT, x.device, x.dtype) == "reference":
        return unpack_tokens_reference(x, keep, row)
    from .triton import unpack_tokens_triton  # needs Triton

    with torch.cuda.device_of(x):
        return unpack_tokens_triton(x, keep, row)


def _states(states: Sequence[Tensor]) -> Tensor:
    """The first of one to three ``[B, H, T, D]`` that fit together."""
    if not 1 <= len(states) <= 3 or states[0].dim() != 4:
        raise ValueError(f"states must be one to three of [B, H, T, D]; got {[list(x.shape) for x in states]}")
    first = states[0]
    batch, _, tokens, dim = first.shape
    for number, x in enumerate(states):
        check_tensor(f"states[{number}]", x, (batch, None, tokens, dim), first.device, first.dtype)
    return first


def _tokens(name: str, x: Tensor) -> int:
    """Rows of ``[R, L, C]``."""
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"{name} must be [R, L, C] and not empty; got {list(x.shape)}")
    return x.shape[0]
