"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_tensor

from .reference import read_logits_reference

__all__ = ["SUPPORT", "Backend", "Gate", "LogitSignals", "read_logits"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", min_sm=80),
}
"""``dtypes`` are those of the logits."""

Gate = Literal["entropy", "confidence"]


class LogitSignals(NamedTuple):
    """What one next-token distribution says; each ``[B]``.

    Attributes:
        entropy: Over ln ``size``, in [0, 1]; float32, or the logits' float64. NaN where a logit is NaN or +inf.
        confidence: Probability of the likeliest token; as ``entropy``.
        token: int64, the likeliest token, the first of those that tie.
        forced: bool, only one token can come (every other logit is minus infinity): nothing was decided.
        uncertain: bool, the gate is open: not forced, and entropy > threshold or confidence < threshold; False without
            a threshold.
    """

    entropy: Tensor
    confidence: Tensor
    token: Tensor
    forced: Tensor
    uncertain: Tensor


def read_logits(
    logits: Tensor,
    *,
    size: int | None = None,
    threshold: Tensor | None = None,
    gate: Gate = "entropy",
    backend: Backend = "auto",
) -> LogitSignals:
    """Read entropy, likeliest token and the route of each row off its logits; no call waits for the device.

    Args:
        logits: float ``[B, V]``; minus infinity is a token that cannot come, and each row has one that can. Rows may
            lie apart in memory, entries of a row not.
        size: Number of tokens whose uniform distribution has entropy 1, at least 2; V unless told.
        threshold: float32 ``[B]`` on the logits' device, of each row's gate.
        gate: What the threshold is compared with.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Raises:
        ValueError: If a shape, the dtype, the device or the backend does not fit.

    Source: the gates of R-Stitch (arXiv 2507.17307): Eq. 1, and the maximum probability of its first version.
    """
    if logits.dim() != 2 or not logits.numel():
        raise ValueError(f"logits must be [B, V] and not empty; got {list(logits.shape)}")
    rows, vocabulary = logits.shape
    size = vocabulary if size is None else size
    if size < 2:
        raise ValueError(f"size must be at least 2, since the entropy is divided by its logarithm; got {size}")
    if gate not in get_args(Gate):
        raise ValueError(f"gate must be one of {get_args(Gate)}; got {gate!r}")
    if threshold is not None:
        check_tensor("threshold", threshold, (rows,), logits.device, torch.float32)
    backend = choose("read_logits", backend, SUPPORT, logits.device, logits.dtype)
    threshold = None if threshold is None else threshold.detach()
    return LogitSignals(*torch.ops.hone_kernels.read_logits(logits.detach(), size, threshold, gate, backend))


@torch.library.custom_op("hone_kernels::read_logits", mutates_args=())
def _read_logits(
    logits: Tensor, size: int, threshold: Tensor | None, gate: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "reference":
        return read_logits_reference(logits, size, threshold, gate)
    from .triton import read_logits_triton  # needs Triton

    with torch.cuda.device_of(logits):
        return read_logits_triton(logits, size, threshold, gate)


@_read_logits.register_fake
def _(
    logits: Tensor, size: int, threshold: Tensor | None, gate: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(rows, dtype=exact),
        logits.new_empty(rows, dtype=exact),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, dtype=torch.bool),
    )
