"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.launch import Notes, Plans, eager, on_device_of, plannable

from .reference import select_blocks_reference

__all__ = ["SUPPORT", "Backend", "SelectedBlocks", "select_blocks"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(dtypes=(torch.float32,), language="triton", min_sm=80),
}
"""``dtypes`` are those of the scores."""


class SelectedBlocks(NamedTuple):
    """Lists of kept key blocks, as ``hone_kernels.attention.BlockLayout`` wants them.

    Attributes:
        kv_idx: int32 ``[B, H, NQ, L]``, ascending in the first ``kv_num`` entries, 0 behind them. L is NK with forced
            blocks, else ``max_keep``.
        kv_num: int32 ``[B, H, NQ]``.
        clamped: bool ``[B, H, NQ]``, whether ``mass`` asked for more than ``max_keep`` blocks; False in forced rows.
    """

    kv_idx: Tensor
    kv_num: Tensor
    clamped: Tensor


def select_blocks(
    scores: Tensor,
    *,
    max_keep: int,
    min_keep: int = 1,
    mass: float | None = None,
    inclusive: bool = True,
    keep_diagonal: bool = False,
    forced: int = 0,
    spread_ties: bool = False,
    backend: Backend = "auto",
) -> SelectedBlocks:
    """Keep the best-scored key blocks of each row; no call waits for the device.

    Blocks are ranked by score, ties by position or spread over the row. With ``mass`` a row keeps the fewest whose
    scores reach ``mass`` times the row's sum, clamped to ``[min_keep, max_keep]``; without it, ``max_keep``.

    Args:
        scores: float ``[B, H, NQ, NK]``, not negative. Those of 16 bits are summed up in 16 bits, as the release of
            BLADE does; only the reference takes them.
        max_keep: Most blocks of a row, 1 to NK.
        min_keep: Fewest blocks of a row, 1 to ``max_keep``.
        mass: Share of the row's sum, in (0, 1], or None.
        inclusive: Whether the block that reaches ``mass`` is kept; if not, one block fewer (before clamping).
        keep_diagonal: Whether block i of row i ranks first whatever its score.
        forced: The last so many rows keep every block, and every row keeps the last so many blocks, beyond
            ``max_keep``.
        spread_ties: Whether tied blocks rank in an order that is spread over the row and differs from row to row, and
            not by position.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Raises:
        ValueError: If a count, a share, the dtype or the backend does not fit.

    Source: ``mass`` with clamps is the mask rule of BLADE (arXiv 2508.10774); its release has ``inclusive=False``.
    """
    options = (min_keep, max_keep, mass, inclusive, keep_diagonal, forced, spread_ties)
    planned = plannable()
    again = _plans.find((options, backend), (scores,)) if planned else None
    if again is not None:
        parts, addresses, stream = again
        return SelectedBlocks(*parts.blocks(addresses, stream))
    if scores.dim() != 4 or not scores.numel():
        raise ValueError(f"scores must be [B, H, NQ, NK] and not empty; got {list(scores.shape)}")
    num_q, num_k = scores.shape[-2:]
    if not 1 <= min_keep <= max_keep <= num_k:
        raise ValueError(
            f"1 <= min_keep <= max_keep <= {num_k} (key blocks) must hold; got min_keep={min_keep}, max_keep={max_keep}"
        )
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass is a share of the row's sum in (0, 1], or None; got {mass}")
    if not 0 <= forced <= min(num_q, num_k):
        raise ValueError(f"forced must lie in [0, {min(num_q, num_k)}], the number of blocks; got {forced}")
    asked = backend
    backend = choose("select_blocks", backend, SUPPORT, scores.device, scores.dtype)
    # As an operator only where something traces the call.
    if not eager(scores):
        return SelectedBlocks(*torch.ops.hone_kernels.select_blocks(scores.detach(), *options, backend))
    if not planned or backend == "reference" or scores.requires_grad:
        return SelectedBlocks(*_run(scores.detach(), *options, backend))
    notes = Notes(scores)
    found = _run(scores, *options, backend, notes)
    _plans.add((options, asked), (scores,), blocks=notes.replay(*found))
    return SelectedBlocks(*found)


_plans = Plans()


def _run(
    scores: Tensor,
    min_keep: int,
    max_keep: int,
    mass: float | None,
    inclusive: bool,
    keep_diagonal: bool,
    forced: int,
    spread_ties: bool,
    backend: str,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return select_blocks_reference(scores, min_keep, max_keep, mass, inclusive, keep_diagonal, forced, spread_ties)
    from .triton import select_blocks_triton  # needs Triton

    with on_device_of(scores):
        options = (min_keep, max_keep, mass, inclusive, keep_diagonal, forced, spread_ties)
        return select_blocks_triton(scores, *options, notes)


@torch.library.custom_op("hone_kernels::select_blocks", mutates_args=())
def _select_blocks(
    scores: Tensor,
    min_keep: int,
    max_keep: int,
    mass: float | None,
    inclusive: bool,
    keep_diagonal: bool,
    forced: int,
    spread_ties: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(scores, min_keep, max_keep, mass, inclusive, keep_diagonal, forced, spread_ties, backend)


@_select_blocks.register_fake
def _(
    scores: Tensor,
    min_keep: int,
    max_keep: int,
    mass: float | None,
    inclusive: bool,
    keep_diagonal: bool,
    forced: int,
    spread_ties: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    width = scores.shape[-1] if forced else max_keep
    rows = scores.shape[:-1]
    return (
        scores.new_empty((*rows, width), dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.bool),
    )
