"""FP8 block-sparse attention: quantised operands, the forward on them, and training through both.

With operands rounded to E4M3 (``x8 = round(x / scale)``) and ``s_ij = scale * q_scale_i * k_scale_j * (q8_i . k8_j)``:

    p_ij  = exp(s_ij - max_i)                                        in (0, 1]
    l_i   = sum over listed j of p_ij                                from p as it is
    out_i = v_scale / (448 * l_i) * sum of round(448 * p_ij) v8_j    from p rounded to E4M3
    lse_i = max_i + log(l_i) + scale * q_i . k_mean                  the last term where K was smoothed

``max_i`` is the largest logit met so far: what was accumulated is rescaled when it grows, as in any online softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hone_kernels.backends import Backend, choose, triton_reason, warn_once

from .api import Support, _check_axes, _check_scale, _check_tensors, _expanded, _lists, _unit_last, why_not
from .fp8_reference import V_PADDING, absent_keys, attention_fp8_reference, dequantize, quantize_reference
from .layout import BlockLayout
from .reference import attention_reference

__all__ = ["FP8_SUPPORT", "Delta", "FP8Operands", "block_sparse_attention_fp8", "fp8_block_sparse_attention",
           "quantize_qkv"]  # fmt: skip

Delta = Literal["exact", "forward"]

FP8_SUPPORT: dict[str, Support] = {
    "reference": Support(
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        head_dims=None,
        blocks=None,
        min_sm=None,
        backward=True,
    ),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims=(32, 64, 128),
        blocks=(64, 128),
        min_sm=80,
        backward=True,
    ),
}

_INDICES = (torch.int32, torch.int64)

BLOCKS = (64, 128)
"""Tokens that a scale may be for, before ``group``."""

Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""``FP8Operands`` without ``block``, as an operator returns it: what is absent is empty."""


@dataclass(frozen=True, eq=False)
class FP8Operands:
    """q, k and v rounded to E4M3, with the factors that scale them back.

    ``q = q8 * q_scale`` and ``k = k8 * k_scale`` per block of ``block`` tokens, ``v = v8 * v_scale`` per channel. All
    tensors are contiguous. Made by ``quantize_qkv``.

    Attributes:
        q8: ``[B, H, TQ, D]`` float8_e4m3fn.
        k8: ``[B, HK, TK, D]`` float8_e4m3fn, zero where a key does not exist.
        v8: ``[B, HK, D, TKP]`` float8_e4m3fn: transposed, as FP8 matrix units want it, and padded with zeros to ``TKP =
            ceil(TK / 128) * 128``; zero where a key does not exist. Of every 16 keys, key ``8 * j + 2 * t + e`` stands
            at ``4 * t + 2 * j + e`` (t < 4, j < 2, e < 2): a thread t that holds columns ``8 * j + 2 * t + e`` of the
            logits then holds P as the next product reads it, and no value changes threads.
        q_scale: ``[B, H, ceil(TQ / block)]`` float32, positive. Blocks that share a scale repeat it.
        k_scale: ``[B, HK, ceil(TK / block)]`` float32, positive.
        v_scale: ``[B, HK, D]`` float32, positive.
        block: Tokens per entry of ``q_scale`` and ``k_scale``: 64 or 128.
        k_mean: ``[B, HK, D]`` float32, what was subtracted from every key, or None.
        q_dot_mean: ``[B, H, TQ]`` float32, ``q . k_mean`` of q before it was rounded, or None. The log-sum-exp of the
            keys as they were is that of the smoothed ones plus ``scale * q_dot_mean``.
    """

    q8: Tensor
    k8: Tensor
    v8: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    block: int
    k_mean: Tensor | None = None
    q_dot_mean: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("q8", "k8", "v8"):
            x = getattr(self, name)
            if x.dtype != torch.float8_e4m3fn or x.dim() != 4:
                raise TypeError(f"{name} must be float8_e4m3fn with 4 axes; got {x.dtype} {list(x.shape)}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be 64 or 128; got {self.block}")
        (batch, heads, tokens_q, dim), (_, heads_k, tokens_k, _) = self.q8.shape, self.k8.shape
        shapes = {
            "q8": tuple(self.q8.shape),
            "k8": (batch, heads_k, tokens_k, dim),
            "v8": (batch, heads_k, dim, -(-tokens_k // V_PADDING) * V_PADDING),
            "q_scale": (batch, heads, -(-tokens_q // self.block)),
            "k_scale": (batch, heads_k, -(-tokens_k // self.block)),
            "v_scale": (batch, heads_k, dim),
        }
        if self.k_mean is not None:
            shapes |= {"k_mean": (batch, heads_k, dim), "q_dot_mean": (batch, heads, tokens_q)}
        for name, want in shapes.items():
            x = getattr(self, name)
            if x is None or tuple(x.shape) != want:
                got = None if x is None else list(x.shape)
                raise ValueError(
                    f"{name} must be {list(want)} for q8 {list(self.q8.shape)} and k8 {list(self.k8.shape)} in blocks "
                    f"of {self.block}; got {got}"
                )
            if not x.is_contiguous():
                raise ValueError(f"{name} must be contiguous, as quantize_qkv makes it; call .contiguous()")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded ``q [B, H, TQ, D]``, ``k`` and ``v [B, HK, TK, D]``; k without ``k_mean``."""
        tensors = (self.q8, self.k8, self.v8, self.q_scale, self.k_scale, self.v_scale)
        return dequantize(*tensors, self.block, dtype)


def _check_block(block: int, group: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"scales and k_valid count blocks of 64 or 128 tokens; got {block}")
    if group < 1:
        raise ValueError(f"group counts the blocks that share a scale and must be positive; got {group}")


def _tables(rope: tuple[Tensor, Tensor], tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[S, D/2]`` from one of the accepted forms."""
    if len(rope) != 2:
        raise ValueError(f"rope must be a pair of tables (cos, sin); got {len(rope)}")
    tables = []
    for name, x, first in (("cos", rope[0], 0), ("sin", rope[1], 1)):
        if x.numel() == tokens * dim:
            x = x.reshape(tokens, dim)[:, first::2]
        elif x.numel() == tokens * dim // 2:
            x = x.reshape(tokens, dim // 2)
        else:
            raise ValueError(
                f"rope's {name} must be [S, D/2] = {[tokens, dim // 2]}, or {[tokens, dim]} with each pair's value at "
                f"both places; got {list(x.shape)}"
            )
        tables.append(x.float().contiguous())
    return tables[0], tables[1]


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 128,
    group: int = 1,
    smooth_k: bool = False,
    rope: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
    k_valid: Tensor | None = None,
    backend: Backend = "auto",
) -> FP8Operands:
    """Rotate, permute and round q, k and v to E4M3.

    Q and K get one scale per ``group`` blocks and head, ``amax / 448``; V one per channel and head over the sequence. A
    block of zeros gets the smallest scale that divides safely. What is not finite takes no part in ``amax`` and becomes
    NaN. No gradient: see ``block_sparse_attention_fp8``.

    Args:
        q: ``[B, H, S, D]``, any strides with D contiguous.
        k: ``[B, HK, S, D]``.
        v: ``[B, HK, S, D]``.
        block: Tokens of a block, 64 or 128: of the scales, and of ``k_valid``.
        group: Blocks that share a scale.
        smooth_k: Whether to subtract from K its mean over the keys that exist (per head and channel). It changes
            nothing in softmax and removes what all keys share, which would else take up E4M3's range.
        rope: Cosines and sines of a rotary embedding on interleaved pairs for q and k, each ``[S, D/2]``, or ``[S, D]``
            as diffusers' Wan has them (further axes of length 1 are dropped). By position in q, before ``order``.
        order: ``[T]`` int32 or int64, ``order[slot]`` the position in q, k and v that a slot takes its token from;
            T need not be S. Slots take the place of tokens in what is returned.
        k_valid: ``[B or 1, ceil(TK / block)]`` int32, as in ``BlockLayout``: keys behind it do not exist. They are
            zeros and count in no scale or mean; with ``order`` so are the queries of their slots.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Raises:
        ValueError: If shapes, options and backend do not fit together.
        TypeError: If dtypes do not.

    Source: FPSAttention (arXiv 2506.04648), equations 1 and 4; SageAttention (arXiv 2410.02367) for ``smooth_k``.
    """
    _check_quantize(q, k, v, rope, order, k_valid, block, group)
    cos, sin = (None, None) if rope is None else _tables(rope, q.shape[2], q.shape[3])
    q, k, v = (_unit_last(x.detach()) for x in (q, k, v))
    order, k_valid = (None if x is None else _unit_last(x) for x in (order, k_valid))
    args = (q, k, v, cos, sin, order, k_valid, block, group, smooth_k)
    if choose("quantize_qkv", backend, q.device, lambda name: fp8_why_not(name, q, (block,))) == "reference":
        *tensors, k_mean, q_dot_mean = quantize_reference(*args)
        return FP8Operands(*tensors, block, k_mean, q_dot_mean)
    *tensors, k_mean, q_dot_mean = _quantize_op(*args)
    return FP8Operands(*tensors, block, *((k_mean, q_dot_mean) if smooth_k else ()))


def _check_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    order: Tensor | None,
    k_valid: Tensor | None,
    block: int,
    group: int,
) -> None:
    _check_block(block, group)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_axes(name, x)
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"q, k and v must share dtype and device; got {q.dtype} on {q.device} for q and {x.dtype} on "
                f"{x.device} for {name}"
            )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q [B, H, TQ, D], k and v [B, HK, TK, D] must share B and D, and H must be a multiple of HK; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if (rope is not None or order is not None) and q.shape[2] != k.shape[2]:
        raise ValueError(f"rope and order need as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
    if rope is not None and q.shape[3] % 2:
        raise ValueError(f"rope rotates pairs of channels; got an odd head_dim {q.shape[3]}")
    tokens = k.shape[2]
    if order is not None:
        if order.shape == (0,) or order.dim() != 1 or order.dtype not in _INDICES or order.device != q.device:
            raise ValueError(
                f"order must be [T] with T >= 1, int32 or int64 on {q.device}; got {order.dtype} {list(order.shape)} "
                f"on {order.device}"
            )
        tokens = order.shape[0]
    if k_valid is not None:
        blocks = -(-tokens // block)
        if k_valid.dim() != 2 or k_valid.shape[0] not in (1, q.shape[0]) or k_valid.shape[1] != blocks:
            raise ValueError(
                f"k_valid must be [1 or {q.shape[0]}, {blocks}], one count per block of {block} keys; got "
                f"{list(k_valid.shape)}"
            )
        if k_valid.dtype != torch.int32 or k_valid.device != q.device:
            raise TypeError(f"k_valid must be int32 on {q.device}; got {k_valid.dtype} on {k_valid.device}")


def fp8_why_not(backend: str, q: Tensor, blocks: tuple[int, ...]) -> str | None:
    """Why this backend cannot take these inputs, or None."""
    if backend not in FP8_SUPPORT:
        return f"it has no FP8 kernel; {', '.join(FP8_SUPPORT)} have"
    support = FP8_SUPPORT[backend]
    if q.dtype != torch.float8_e4m3fn and q.dtype not in support.dtypes:
        return f"it takes {', '.join(str(d) for d in support.dtypes)}; got {q.dtype}"
    if support.head_dims is not None and q.shape[3] not in support.head_dims:
        return f"it takes head_dim in {support.head_dims}; got {q.shape[3]}"
    for block in blocks:
        if support.blocks is not None and block not in support.blocks:
            return f"it takes blocks of {support.blocks} tokens; got {block}"
    return triton_reason(q.device, support.min_sm) if backend == "triton" else None


def fp8_block_sparse_attention(
    operands: FP8Operands,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over listed key blocks on E4M3 operands; the formulas are at the head of this module.

    No gradient, and no call waits for the device.

    Args:
        operands: From ``quantize_qkv``; with padded keys, of the same ``k_valid`` as the layout.
        layout: Which key blocks each query block of each head reads.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        return_lse: Whether to return the log-sum-exp too.
        out_dtype: Of the output. The reference computes in float64 for float64, else in float32.
        backend: As for ``quantize_qkv``.

    Returns:
        ``out [B, H, TQ, D]``, in memory ``[B, TQ, H, D]``, as the projection behind it wants it; with ``return_lse``
        also ``lse [B, H, TQ]`` float32 (float64), natural log, of the keys before smoothing. A query without any key
        gets ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: If operands, layout and backend do not fit together.
        TypeError: If the layout is not a ``BlockLayout``.

    Source: FPSAttention (arXiv 2506.04648), section 3.
    """
    if not isinstance(operands, FP8Operands):
        raise TypeError(f"operands must be FP8Operands, from quantize_qkv; got {type(operands).__name__}")
    _check_tensors(operands.q8, operands.k8, operands.k8, layout)
    scale = _check_scale(scale, operands.q8.shape[3])
    if not out_dtype.is_floating_point or out_dtype.itemsize == 1:
        raise TypeError(f"out_dtype must be float64, float32, bfloat16 or float16; got {out_dtype}")
    blocks = (layout.block_q, layout.block_k)
    q8 = operands.q8
    backend = choose("fp8_block_sparse_attention", backend, q8.device, lambda name: fp8_why_not(name, q8, blocks))
    if backend == "reference":
        dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
        out, lse = attention_fp8_reference(*operands.dequantize(dtype), layout, scale)
        out = out.to(out_dtype).transpose(1, 2).contiguous().transpose(1, 2)
    else:
        out, lse = _forward_op(
            q8, operands.k8, operands.v8, operands.q_scale, operands.k_scale, operands.v_scale,
            *_lists(layout), operands.block, *blocks, scale, out_dtype,
        )  # fmt: skip
    if not return_lse:
        return out
    return out, lse if operands.q_dot_mean is None else lse + scale * operands.q_dot_mean


def block_sparse_attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    smooth_k: bool = False,
    group: int = 1,
    delta: Delta = "exact",
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``block_sparse_attention`` with operands and P rounded to E4M3, differentiable straight through the rounding.

    The gradient is that of exact attention at the rounded q, k and v (each rounding passes its gradient on unchanged:
    ``x + (round(x) - x).detach()``), so it is computed by the 16-bit backward on them.

    Args:
        q: ``[B, H, TQ, D]``, any strides with D contiguous.
        k: ``[B, HK, TK, D]``, H a multiple of HK.
        v: ``[B, HK, TK, D]``.
        layout: Which key blocks each query block of each head reads.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        smooth_k: See ``quantize_qkv``.
        group: Blocks that share a scale: of 128 tokens, or where the layout has ``k_valid`` of its ``block_k``.
        delta: What the softmax gradient subtracts, ``sum(dout * out)`` per query, takes ``out`` from: ``"exact"``, the
            output with P unrounded, which the backward computes again, at the cost of a 16-bit forward; ``"forward"``,
            the rounded output that is there already. Only with the first do the gradients of a query's logits sum to
            zero; with the second the rounding of P leaks into dq and dk as an error common to all keys of a query.
        return_lse: Whether to return the log-sum-exp too.
        backend: As for ``quantize_qkv``. It names the FP8 kernels; the 16-bit forward of ``delta="exact"`` is Gluon's
            where that can run.

    Returns:
        As ``fp8_block_sparse_attention``, in q's dtype.

    Raises:
        ValueError: If shapes, layout, options and backend do not fit together.
        TypeError: If dtypes differ or the layout is not a ``BlockLayout``.

    Source: ``"exact"`` as Attn-QAT (FastVideo), ``"forward"`` as SLA2 (arXiv 2602.12675).
    Differs: dV takes P unrounded, where Attn-QAT rounds it there too.
    """
    _check_tensors(q, k, v, layout)
    if delta not in get_args(Delta):
        raise ValueError(f"delta must be one of {get_args(Delta)}; got {delta!r}")
    block = 128 if layout.k_valid is None else layout.block_k
    _check_block(block, group)
    scale = _check_scale(scale, q.shape[3])
    blocks = (layout.block_q, layout.block_k)
    if (
        choose("block_sparse_attention_fp8", backend, q.device, lambda name: fp8_why_not(name, q, blocks))
        == "reference"
    ):
        out, lse = _straight_through_reference(q, k, v, layout, scale, smooth_k, group, delta, block)
        return (out, lse) if return_lse else out
    out, lse, *_, q_dot_mean = _straight_through_op(
        *(_unit_last(x) for x in (q, k, v)), *_lists(layout), block, *blocks, scale, group, smooth_k, delta,
    )  # fmt: skip
    if not return_lse:
        return out
    return out, lse + scale * q_dot_mean if smooth_k else lse


def _straight_through_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, smooth_k: bool, group: int, delta: Delta,
    block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op and its gradient in plain torch."""
    given = q.dtype
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    operands = quantize_qkv(
        q, k, v, block=block, group=group, smooth_k=smooth_k, k_valid=layout.k_valid, backend="reference"
    )
    rounded = operands.dequantize(dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if layout.k_valid is not None:
        # Keys that do not exist were rounded to zero whatever they hold, and NaN minus NaN is none.
        absent = absent_keys(layout.k_valid, layout.tokens_k, block)
        k, v = k.masked_fill(absent, 0), v.masked_fill(absent, 0)
    through = [x + (r - x).detach() for x, r in zip((q, k, v), rounded, strict=True)]
    out, lse = attention_reference(*through, layout, scale)
    lossy, lossy_lse = attention_fp8_reference(*rounded, layout, scale)
    error = (lossy - out).detach()
    if delta == "forward":
        # The same value; its gradient to each logit is what sum(dout * error) in delta makes of it.
        error = error * (1 - (lse - lse.detach()).nan_to_num()).unsqueeze(-1)
    lse = lse + (lossy_lse - lse).nan_to_num().detach()
    if operands.k_mean is not None:
        lse = lse + scale * (q * _per_query_head(operands.k_mean, q)).sum(-1)
    return (out + error).to(given), lse


def _per_query_head(k_mean: Tensor, q: Tensor) -> Tensor:
    """``[B, H, 1, D]`` in q's dtype."""
    return k_mean.to(q.dtype).repeat_interleave(q.shape[1] // k_mean.shape[1], dim=1).unsqueeze(2)


@torch.library.custom_op("hone::quantize_qkv", mutates_args=())
def _quantize_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    k_valid: Tensor | None,
    block: int,
    group: int,
    smooth_k: bool,
) -> Fields:
    return _quantize(q, k, v, cos, sin, order, k_valid, block, group, smooth_k)


@_quantize_op.register_fake
def _(q, k, v, cos, sin, order, k_valid, block, group, smooth_k):
    return _fake_fields(q, k, None if order is None else order.shape[0], block, smooth_k)


def _quantize(q, k, v, cos, sin, order, k_valid, block, group, smooth_k) -> Fields:
    from .triton_fp8 import has_e4m3
    from .triton_quantize import quantize_triton

    if has_e4m3(q):
        with torch.cuda.device_of(q):
            fields = quantize_triton(q, k, v, cos, sin, order, k_valid, block, group, smooth_k)
    else:
        warn_once(
            "quantize_qkv", f"{q.device} has no E4M3 (compute capability 8.9): rounding in torch, products in bfloat16"
        )
        fields = quantize_reference(q, k, v, cos, sin, order, k_valid, block, group, smooth_k)
    # A custom op returns tensors only: an absent one is empty.
    return tuple(q.new_empty(0, dtype=torch.float32) if x is None else x for x in fields)


def _fake_fields(q: Tensor, k: Tensor, slots: int | None, block: int, smooth_k: bool) -> Fields:
    (batch, heads, tokens_q, dim), (_, heads_k, tokens_k, _) = q.shape, k.shape
    if slots is not None:
        tokens_q = tokens_k = slots
    shapes8 = (
        (batch, heads, tokens_q, dim),
        (batch, heads_k, tokens_k, dim),
        (batch, heads_k, dim, -(-tokens_k // V_PADDING) * V_PADDING),
    )
    shapes = [(batch, heads, -(-tokens_q // block)), (batch, heads_k, -(-tokens_k // block)), (batch, heads_k, dim)]
    shapes += [(batch, heads_k, dim), (batch, heads, tokens_q)] if smooth_k else [(0,), (0,)]
    return (
        *(q.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in shapes8),
        *(q.new_empty(shape, dtype=torch.float32) for shape in shapes),
    )


@torch.library.custom_op("hone::fp8_block_sparse_attention", mutates_args=())
def _forward_op(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from .triton_fp8 import attention_fp8_forward

    with torch.cuda.device_of(q8):
        return attention_fp8_forward(
            q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, out_dtype
        )


@_forward_op.register_fake
def _(q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, out_dtype):
    return _fake_output(q8, out_dtype)


def _fake_output(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    out = q.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)
    return out, q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("hone::block_sparse_attention_fp8", mutates_args=())
def _straight_through_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    group: int,
    smooth_k: bool,
    delta: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp of the smoothed keys, and the operands, kept for the backward instead of q, k and v."""
    from .triton_fp8 import attention_fp8_forward

    fields = _quantize(q, k, v, None, None, None, k_valid, block, group, smooth_k)
    with torch.cuda.device_of(q):
        out, lse = attention_fp8_forward(*fields[:6], kv_num, kv_idx, k_valid, block, block_q, block_k, scale, q.dtype)
    return out, lse, *fields


@_straight_through_op.register_fake
def _(q, k, v, kv_num, kv_idx, k_valid, block, block_q, block_k, scale, group, smooth_k, delta):
    return *_fake_output(q, q.dtype), *_fake_fields(q, k, None, block, smooth_k)


@torch.library.custom_op("hone::block_sparse_attention_fp8_backward", mutates_args=())
def _straight_through_backward_op(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    delta: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import attention_backward, attention_forward
    from .triton_fp8 import has_e4m3

    operands = (q8, k8, v8, q_scale, k_scale, v_scale, block, dout.dtype)
    layout = BlockLayout(kv_num, kv_idx, q8.shape[2], k8.shape[2], block_q, block_k)
    columns = layout.transpose()
    no_pooled = (None, None, None)
    with torch.cuda.device_of(q8):
        if has_e4m3(q8):
            from .triton_quantize import dequantize_triton

            q, k, v = dequantize_triton(*operands)
        else:
            q, k, v = dequantize(*operands)
        if delta == "exact":
            if why_not("gluon", q, layout) is None:
                from .gluon_sm90 import attention_forward
            out, lse = attention_forward(q, k, v, kv_num, kv_idx, k_valid, *no_pooled, block_q, block_k, scale)
        return attention_backward(
            _expanded(dout), dlse.contiguous(), q, k, v, out, lse, kv_num, kv_idx, columns.kv_num, columns.kv_idx,
            k_valid, *no_pooled, block_q, block_k, scale,
        )[:3]  # fmt: skip


@_straight_through_backward_op.register_fake
def _(dout, dlse, out, lse, q8, k8, v8, q_scale, k_scale, v_scale, kv_num, kv_idx, k_valid, block, block_q, block_k,
      scale, delta):  # fmt: skip
    return tuple(x.new_empty(x.shape, dtype=dout.dtype) for x in (q8, k8, k8))


def _save(ctx, inputs, output):
    _, _, _, kv_num, kv_idx, k_valid, *ctx.sizes, ctx.scale, _, ctx.smooth_k, ctx.delta = inputs
    out, lse, *fields = output
    # The operands are outputs that carry no gradient: without this they would each get one of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *fields[:7], kv_num, kv_idx, k_valid)


def _backward(ctx, dout, dlse, *rest):
    out, lse, *fields, k_mean, kv_num, kv_idx, k_valid = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = torch.ops.hone.block_sparse_attention_fp8_backward(
        dout, torch.zeros_like(lse) if dlse is None else dlse, out, lse, *fields, kv_num, kv_idx, k_valid, *ctx.sizes,
        ctx.scale, ctx.delta,
    )  # fmt: skip
    if rest[-1] is not None and ctx.smooth_k:
        dq = dq + rest[-1].unsqueeze(-1).to(dq.dtype) * _per_query_head(k_mean, dq)
    return dq, dk, dv, *[None] * 10


_straight_through_op.register_autograd(_backward, setup_context=_save)
