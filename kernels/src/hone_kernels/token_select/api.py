"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_tensor

from .reference import select_tokens_reference

__all__ = ["SUPPORT", "Backend", "SelectedTokens", "select_tokens"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32)),
    "triton": Support(dtypes=(torch.float32,), language="triton", min_sm=80),
}
"""``dtypes`` are those of the ranks and masses."""


class SelectedTokens(NamedTuple):
    """The kept tokens of each sample.

    Attributes:
        keep: bool ``[B, T]``.
        idx: int32 ``[B, T]``, positions of the kept ones, ascending, in the first ``num`` entries; 0 behind them.
        num: int32 ``[B]``.
    """

    keep: Tensor
    idx: Tensor
    num: Tensor


def select_tokens(
    rank: Tensor,
    *,
    real: Tensor,
    protected: Tensor,
    mass: Tensor | None = None,
    p: Tensor | None = None,
    budget: Tensor | None = None,
    backend: Backend = "auto",
) -> SelectedTokens:
    """Keep protected tokens, then the best-ranked ones until the budget is spent; no call waits for the device.

    The budget is the least number of tokens whose masses, largest first, sum to the share ``p`` of all mass (to a
    millionth of it), or is given. Tokens that tie rank by position. Where more are protected, they all stay.

    Args:
        rank: ``[B, T]``, not negative.
        real: bool ``[B, T]``, where tokens are; the others are never kept, and their masses do not count.
        protected: bool ``[B, T]``, tokens that stay in any case and count in the budget.
        mass: ``[B, T]``, not negative, of the dtype of ``rank``; with ``p``.
        p: ``[B]``, shares in (0, 1]; at 1 every token is kept, those without mass too.
        budget: integers ``[B]``, at least 1, in place of ``mass`` and ``p``.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Raises:
        ValueError: A shape, dtype, device or backend does not fit, or the budget is given twice or not at all.
    """
    if rank.dim() != 2 or not rank.numel():
        raise ValueError(f"rank must be [B, T] and not empty; got {list(rank.shape)}")
    if (mass is None) != (p is None) or (mass is None) == (budget is None):
        raise ValueError("the budget comes from mass and p together, or from budget alone")
    batch = rank.shape[0]
    check_tensor("real", real, rank.shape, rank.device, torch.bool)
    check_tensor("protected", protected, rank.shape, rank.device, torch.bool)
    if mass is not None:
        check_tensor("mass", mass, rank.shape, rank.device, rank.dtype)
    if p is not None:
        check_tensor("p", p, (batch,), rank.device)
    if budget is not None:
        check_tensor("budget", budget, (batch,), rank.device, torch.int64, torch.int32)
    backend = choose("select_tokens", backend, SUPPORT, rank.device, rank.dtype)
    mass, p = (None if x is None else x.detach() for x in (mass, p))
    return SelectedTokens(
        *torch.ops.hone_kernels.select_tokens(rank.detach(), mass, p, budget, real, protected, backend)
    )


@torch.library.custom_op("hone_kernels::select_tokens", mutates_args=())
def _select_tokens(
    rank: Tensor,
    mass: Tensor | None,
    p: Tensor | None,
    budget: Tensor | None,
    real: Tensor,
    protected: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return select_tokens_reference(rank, mass, p, budget, real, protected)
    from .triton import select_tokens_triton  # needs Triton

    with torch.cuda.device_of(rank):
        return select_tokens_triton(rank, mass, p, budget, real, protected)


@_select_tokens.register_fake
def _(
    rank: Tensor,
    mass: Tensor | None,
    p: Tensor | None,
    budget: Tensor | None,
    real: Tensor,
    protected: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(rank, dtype=torch.bool),
        torch.empty_like(rank, dtype=torch.int32),
        rank.new_empty(rank.shape[:1], dtype=torch.int32),
    )
