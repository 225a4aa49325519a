"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_heads, check_scale

from .reference import column_mass_reference

__all__ = ["SUPPORT", "Backend", "ColumnMass", "column_mass"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", head_dims=(16, 32, 64, 128), min_sm=80
    ),
}
"""``dtypes`` are those of q and k."""


class ColumnMass(NamedTuple):
    """What some rows of a causal attention map give to its columns.

    Attributes:
        mass: float32 (the reference: float64 of float64) ``[B, TK]``, summed over the rows, mean over heads.
        seen: int32 ``[B, TK]``, how many of the rows see a column.
        rank: as ``mass``, which is divided by ``seen``; 0 where that is 0.
    """

    mass: Tensor
    seen: Tensor
    rank: Tensor


def column_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    *,
    real: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> ColumnMass:
    """Sum the softmax of some rows over the rows, column by column; no call waits for the device, no gradient flows.

    Row i sees the keys 0 .. i + TK - TQ: where there are more keys than queries, those are of earlier turns.

    Args:
        q: ``[B, H, TQ, D]``, TQ at most TK.
        k: ``[B, HK, TK, D]``, H a multiple of HK.
        rows: int32 or int64 ``[B, R]``, positions of rows in q, below TQ; negative for none.
        real: bool ``[B, TK]``, False for keys that no row sees.
        scale: Of the logits; ``D ** -0.5`` if None.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Raises:
        ValueError: A shape, dtype, device or backend does not fit.
        TypeError: q and k are of different dtypes, or the scale is a tensor.

    Source: the probe rows of ZipCache (arXiv 2405.14256) and ZipVL (arXiv 2410.08584).
    """
    check_heads(q, k)
    scale = check_scale(scale, q.shape[3])
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must not have more tokens than k; got {q.shape[2]} and {k.shape[2]}")
    if rows.dim() != 2 or len(rows) != len(q) or not rows.shape[1] or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be integers [{len(q)}, R], R at least 1; got {rows.dtype} {list(rows.shape)}")
    if real is not None and (real.shape != (len(k), k.shape[2]) or real.dtype != torch.bool):
        raise ValueError(f"real must be bool [{len(k)}, {k.shape[2]}]; got {real.dtype} {list(real.shape)}")
    for name, x in {"rows": rows, "real": real}.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is; got {x.device}")
    backend = choose("column_mass", backend, SUPPORT, q.device, q.dtype, head_dim=q.shape[3])
    return ColumnMass(*torch.ops.hone_kernels.column_mass(q.detach(), k.detach(), rows, real, scale, backend))


@torch.library.custom_op("hone_kernels::column_mass", mutates_args=())
def _column_mass(
    q: Tensor, k: Tensor, rows: Tensor, real: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return column_mass_reference(q, k, rows, real, scale)
    from .triton import column_mass_triton  # needs Triton

    with torch.cuda.device_of(q):
        return column_mass_triton(q, k, rows, real, scale)


@_column_mass.register_fake
def _(
    q: Tensor, k: Tensor, rows: Tensor, real: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (k.shape[0], k.shape[2])
    mass = k.new_empty(shape, dtype=torch.promote_types(k.dtype, torch.float32))
    return mass, k.new_empty(shape, dtype=torch.int32), torch.empty_like(mass)
