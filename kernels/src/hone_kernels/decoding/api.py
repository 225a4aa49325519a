"""The public functions: checks and choice of backend. They are called inside captured graphs, and none waits."""

from __future__ import annotations

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_contiguous

from .reference import (
    add_rms_norm_reference,
    linear_of_one_reference,
    paged_attention_reference,
    rotate_append_reference,
    silu_mul_reference,
)

__all__ = [
    "SUPPORT",
    "Backend",
    "add_rms_norm",
    "linear_of_one",
    "paged_attention",
    "rotate_append",
    "rotate_attend",
    "silu_mul",
]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", min_sm=80),
}
"""``dtypes`` are those of activations and caches."""


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalise the sum. Tensors are contiguous.

    Args:
        x: ``[T, C]``.
        residual: ``[T, C]``, or None for the first norm.
        weight: ``[C]``.
        eps: Added to the mean square.
        backend: Which; see ``SUPPORT``.

    Returns:
        The normalised sum and the sum, each ``[T, C]``.

    Raises:
        ValueError: Shapes do not fit together, or the kernel gets a tensor that is not contiguous.
    """
    if x.dim() != 2 or weight.shape != x.shape[1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"expected x and residual [T, C] and weight [C]; got {list(x.shape)}, "
            f"{None if residual is None else list(residual.shape)} and {list(weight.shape)}"
        )
    if choose("add_rms_norm", backend, SUPPORT, x.device, x.dtype) == "reference":
        return add_rms_norm_reference(x, residual, weight, eps)
    check_contiguous(x=x, residual=residual, weight=weight)
    from .triton import add_rms_norm_triton  # needs Triton

    return add_rms_norm_triton(x, residual, weight, eps)


def silu_mul(gate_up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: ``[T, 2 C]``, contiguous; gates first.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[T, C]``.

    Raises:
        ValueError: The last axis has no halves, or the kernel gets a tensor that is not contiguous or more than 65,535
            tokens.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2 C]; got {list(gate_up.shape)}")
    if choose("silu_mul", backend, SUPPORT, gate_up.device, gate_up.dtype) == "reference":
        return silu_mul_reference(gate_up)
    check_contiguous(gate_up=gate_up)
    from .triton import silu_mul_triton  # needs Triton

    return silu_mul_triton(gate_up)


def linear_of_one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    gated: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """A linear layer of a single token, with what stands before and after it in a decoder, in one launch.

    Weights and biases are read before the kernels launched earlier have ended: none of those may write them. Tensors
    are contiguous.

    Args:
        x: ``[1, C]``.
        weight: ``[N, C]``.
        bias: ``[N]``.
        norm: ``[C]``, weight of an RMS norm of x; None without one.
        eps: Of the norm.
        residual: ``[1, N]``, added at the end; ``[1, N / 2]`` where gated.
        gated: The first half of the outputs are gates, and silu(gate) * up is what comes out, ``[1, N / 2]``.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[1, N]``.

    Raises:
        ValueError: Shapes do not fit together, or the kernel gets a tensor that is not contiguous.
    """
    outputs, width = weight.shape
    if x.shape != (1, width) or (gated and outputs % 2):
        raise ValueError(f"x must be [1, {width}], and gated outputs even; got {list(x.shape)} and {outputs}")
    if residual is not None and residual.shape != (1, outputs // 2 if gated else outputs):
        raise ValueError(f"the residual must have the output's shape; got {list(residual.shape)}")
    if choose("linear_of_one", backend, SUPPORT, x.device, x.dtype) == "reference":
        return linear_of_one_reference(x, weight, bias, norm, eps, residual, gated)
    check_contiguous(x=x, weight=weight, bias=bias, norm=norm, residual=residual)
    from .triton import linear_of_one_triton  # needs Triton

    return linear_of_one_triton(x, weight, bias, norm, eps, residual, gated)


def rotate_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate queries and keys by their positions, and write keys and values to the pages of their rows, in place.

    Tensors are contiguous, but that rows of the table may lie apart.

    Args:
        qkv: ``[tiles * tokens, (H + 2 HK) * D]``: queries, keys and values of each token.
        cos: ``[positions, D / 2]``, of the first half of the rotation.
        sin: Likewise.
        positions: int32 ``[tiles, tokens]``, where each token stands in its row; -1 is padding, which is not written.
        rows: int32 ``[tiles]``, row of the table that each tile of tokens belongs to.
        table: int32 ``[rows, pages of a row]``: the page that holds positions ``page * i`` and on.
        keys: ``[pages, HK, page, D]``.
        values: Likewise.
        q_norm: ``[D]``, weight of a norm of each query head; None without one.
        k_norm: Likewise of keys, with ``q_norm``.
        eps: Of these norms.
        backend: Which; see ``SUPPORT``.

    Returns:
        Rotated queries ``[tiles * tokens, H, D]``.

    Raises:
        ValueError: Shapes do not fit together, or the kernel gets a tensor that is not contiguous.
    """
    _check(positions, rows, table, keys, values)
    _check_qkv(qkv, cos, sin, positions, keys)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("queries and keys are normalised together; expected q_norm and k_norm, or neither")
    arguments = (qkv, cos, sin, positions, rows, table, keys, values, q_norm, k_norm, eps)
    if choose("rotate_append", backend, SUPPORT, qkv.device, qkv.dtype) == "reference":
        return rotate_append_reference(*arguments)
    _check_memory(*arguments[:-1])
    from .triton import rotate_append_triton  # needs Triton

    return rotate_append_triton(*arguments)


def rotate_attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    *,
    scale: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    """``rotate_append`` and ``paged_attention`` in one launch, for rows with one new token each.

    Tensors are contiguous, but that rows of the table may lie apart.
    Positions, rows, the table and what was cached for earlier tokens are read before the launches just before have
    ended: no kernel that overlaps the next one may write them.

    Args:
        qkv: ``[tiles, (H + 2 HK) * D]``: queries, keys and values of each token.
        cos: ``[positions, D / 2]``, of the first half of the rotation.
        sin: Likewise.
        positions: int32 ``[tiles, 1]``; -1 is padding, which is not written and whose output means nothing.
        rows: int32 ``[tiles]``, all different but for padding.
        table: int32 ``[rows, pages of a row]``.
        keys: ``[pages, HK, page, D]``; every slot of a named page is finite.
        values: Likewise.
        counts: int32 ``[tiles * HK]`` or more, zeros, and zeros again when the launch has ended: programs that share a
            head count themselves there. Calls that run at the same time need one each.
        scale: Of the logits.
        q_norm: ``[D]``, weight of a norm of each query head; None without one.
        k_norm: Likewise of keys.
        eps: Of these norms.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[tiles, H, D]``.

    Raises:
        ValueError: Shapes do not fit together, or the kernel gets a tensor that is not contiguous.
    """
    _check(positions, rows, table, keys, values)
    _check_qkv(qkv, cos, sin, positions, keys)
    if positions.shape[1] != 1 or counts.dtype != torch.int32 or counts.numel() < len(rows) * keys.shape[1]:
        raise ValueError(
            f"expected one token a tile and counts int32 [{len(rows) * keys.shape[1]}] at least; got "
            f"{positions.shape[1]} and {counts.dtype} {list(counts.shape)}"
        )
    if choose("rotate_attend", backend, SUPPORT, qkv.device, qkv.dtype) == "reference":
        q = rotate_append_reference(qkv, cos, sin, positions, rows, table, keys, values, q_norm, k_norm, eps)
        return paged_attention_reference(q, keys, values, positions, rows, table, scale)
    _check_memory(qkv, cos, sin, positions, rows, table, keys, values, q_norm, k_norm)
    check_contiguous(counts=counts)
    from .triton import rotate_attend_triton  # needs Triton

    return rotate_attend_triton(qkv, cos, sin, positions, rows, table, keys, values, counts, q_norm, k_norm, eps, scale)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    *,
    scale: float,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of tokens to what the pages of their row hold, up to and with their own position.

    Tensors are contiguous, but that rows of the table may lie apart.

    Args:
        q: ``[tiles * tokens, H, D]``.
        keys: ``[pages, HK, page, D]``; every slot of a named page is finite.
        values: Likewise.
        positions: int32 ``[tiles, tokens]``; -1 is padding, whose output is finite and means nothing.
        rows: int32 ``[tiles]``.
        table: int32 ``[rows, pages of a row]``.
        scale: Of the logits.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[tiles * tokens, H, D]``.

    Raises:
        ValueError: Shapes do not fit together, or the kernel gets a tensor that is not contiguous.
    """
    _check(positions, rows, table, keys, values)
    if q.dim() != 3 or q.shape[0] != positions.numel() or q.shape[2] != keys.shape[3] or q.shape[1] % keys.shape[1]:
        raise ValueError(
            f"q must be [{positions.numel()}, H, {keys.shape[3]}], H a multiple of {keys.shape[1]}; got {list(q.shape)}"
        )
    if choose("paged_attention", backend, SUPPORT, q.device, q.dtype) == "reference":
        return paged_attention_reference(q, keys, values, positions, rows, table, scale)
    _check_memory(None, None, None, positions, rows, table, keys, values, None, None)
    check_contiguous(q=q)
    from .triton import paged_attention_triton  # needs Triton

    return paged_attention_triton(q, keys, values, positions, rows, table, scale)


def _check(positions: Tensor, rows: Tensor, table: Tensor, keys: Tensor, values: Tensor) -> None:
    if keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(f"keys and values must be [pages, HK, page, D]; got {list(keys.shape)}, {list(values.shape)}")
    if positions.dim() != 2 or rows.shape != positions.shape[:1] or table.dim() != 2:
        raise ValueError(
            "expected positions [tiles, tokens], rows [tiles] and table [rows, pages]; got "
            f"{list(positions.shape)}, {list(rows.shape)} and {list(table.shape)}"
        )


def _check_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor) -> None:
    dim, heads_k = keys.shape[3], keys.shape[1]
    heads, rest = divmod(qkv.shape[-1], dim)
    if qkv.shape[0] != positions.numel() or rest or heads <= 2 * heads_k or (heads - 2 * heads_k) % heads_k:
        raise ValueError(
            f"qkv must be [{positions.numel()}, (H + 2 * {heads_k}) * {dim}], H a multiple of {heads_k}; "
            f"got {list(qkv.shape)}"
        )
    if dim % 2 or cos.shape != sin.shape or cos.shape[1] != dim // 2:
        raise ValueError(
            f"cos and sin must be [positions, D / 2], D even; got {list(cos.shape)} and {list(sin.shape)} for D {dim}"
        )


def _check_memory(
    qkv: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    """Only rows of the table may lie apart."""
    check_contiguous(
        qkv=qkv, cos=cos, sin=sin, positions=positions, rows=rows, keys=keys, values=values, q_norm=q_norm,
        k_norm=k_norm, **{"a row of the table": table[:1]},
    )  # fmt: skip
