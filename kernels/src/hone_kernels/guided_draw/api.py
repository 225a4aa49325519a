"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_tensor

from .reference import draw_tokens_reference

__all__ = ["MOST", "SUPPORT", "Backend", "draw_tokens"]

MOST = 4096
"""Tokens of a vocabulary that the kernel takes: a program holds a row."""

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", min_sm=80),
}
"""``dtypes`` are those of the logits."""


def draw_tokens(
    logits: Tensor,
    weights: Sequence[float],
    uniform: Tensor,
    *,
    keep: int | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw one token from each row of guided logits, and say how likely it was; no call waits for the device.

    The guided logits are ``sum_s weights[s] logits[s]``, in float32. A token is drawn from the softmax of the ``keep``
    largest (all that tie with the last of them too) over the temperature: the first whose cumulated mass goes beyond
    ``uniform`` of it all. Its probability is that under all guided logits, at temperature 1.

    Args:
        logits: ``[S, N, V]``, of 1 to 3 settings of the condition. Finite, but that minus infinity in a setting of
            positive weight is a token that cannot come; each row has one that can.
        weights: ``[S]``, of the settings.
        uniform: float32 ``[N]``, in [0, 1).
        keep: Tokens that may be drawn, 1 to V; all if None.
        temperature: Of the draws; 0 takes the likeliest, the first of those that tie.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        int64 ``[N]`` and float32 ``[N]``, or float64 of float64 logits.

    Raises:
        ValueError: A shape, a number, the dtype, the device or the backend does not fit.

    Source: the sampling steps of MoMask (Guo et al., CVPR 2024), which draw by another way of chance.
    """
    if logits.dim() != 3 or not 1 <= len(logits) <= 3 or not logits.shape[-1]:
        raise ValueError(f"logits must be [S, N, V] of one to three settings; got {list(logits.shape)}")
    settings, rows, vocabulary = logits.shape
    if len(weights) != settings:
        raise ValueError(f"weights must be {settings}, as logits have settings; got {len(weights)}")
    check_tensor("uniform", uniform, (rows,), logits.device, torch.float32)
    keep = vocabulary if keep is None else keep
    if not 1 <= keep <= vocabulary or temperature < 0:
        raise ValueError(f"keep must be 1 to {vocabulary} and temperature not negative; got {keep} and {temperature}")
    if vocabulary > MOST:
        if backend == "triton":
            raise ValueError(f"the triton backend takes {MOST} tokens at most; got {vocabulary}. Use the reference")
        backend = "reference"
    backend = choose("draw_tokens", backend, SUPPORT, logits.device, logits.dtype)
    numbers = [float(weight) for weight in weights]
    return torch.ops.hone_kernels.draw_tokens(logits.detach(), numbers, uniform, keep, float(temperature), backend)


@torch.library.custom_op("hone_kernels::draw_tokens", mutates_args=())
def _draw_tokens(
    logits: Tensor, weights: Sequence[float], uniform: Tensor, keep: int, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return draw_tokens_reference(logits, weights, uniform, keep, temperature)
    from .triton import draw_tokens_triton  # needs Triton

    with torch.cuda.device_of(logits):
        return draw_tokens_triton(logits, weights, uniform, keep, temperature)


@_draw_tokens.register_fake
def _(
    logits: Tensor, weights: Sequence[float], uniform: Tensor, keep: int, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return uniform.new_empty(uniform.shape, dtype=torch.int64), uniform.new_empty(uniform.shape, dtype=exact)
