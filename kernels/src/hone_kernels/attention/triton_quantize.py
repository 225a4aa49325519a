"""The prologue of FP8 attention in Triton: rotate, permute, scale, round and, for V, transpose.

Everything here waits for memory, so what counts is bytes: Q and K are read once and written once, by programs that hold
a whole block; V is read twice, since its scales span the sequence. Programs that run at the same time take neighbouring
heads of the same tokens, which lie side by side in ``[B, S, H, D]`` and share their rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8_reference import AMAX_MIN, E4M3_MAX, V_PADDING, scales
from .triton import _bhs, _strides

__all__ = ["PROLOGUE", "Prologue", "quantize_triton"]

_AMAX_MIN = tl.constexpr(AMAX_MIN)
_MAX = tl.constexpr(E4M3_MAX)
_V_ROWS = tl.constexpr(V_PADDING)


@dataclass(frozen=True)
class Prologue:
    """Launch settings.

    Attributes:
        warps: Of a program that holds one block.
        registers: Cap per thread: programs that share a multiprocessor load while others compute.
        heads: Heads of the same tokens that a program works through, when it rotates: it then finds all but the first's
            rotary tables in its cache.
    """

    warps: int = 8
    registers: int = 128
    heads: int = 4


PROLOGUE = Prologue()


@triton.jit
def _exists(slot, tokens, valid_ptr, offset, BLOCK: tl.constexpr, VALID: tl.constexpr):
    """Which slots hold a token. ``offset``: of this batch element's counts."""
    live = slot < tokens
    if VALID:
        live = live & (slot % BLOCK < tl.load(valid_ptr + offset + slot // BLOCK, mask=live, other=0))
    return live


@triton.jit
def _tokens(x_ptr, stride, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS: tl.constexpr, DIM: tl.constexpr,
            ORDER: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """The tokens of these slots of one head, rotated: ``[ROWS, DIM]`` in their own dtype, zeros where none is."""
    at = slot
    if ORDER:
        at = tl.load(order_ptr + slot, mask=live, other=0)
    keep = live[:, None]
    x = tl.load(x_ptr + (at.to(tl.int64) * stride)[:, None] + tl.arange(0, DIM)[None, :], mask=keep, other=0.0)
    if ROPE:
        HALF: tl.constexpr = DIM // 2
        table = (at * HALF)[:, None] + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + table, mask=keep, other=0.0)
        sin = tl.load(sin_ptr + table, mask=keep, other=0.0)
        even, odd = tl.split(x.to(tl.float32).reshape([ROWS, HALF, 2]))
        x = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape([ROWS, DIM]).to(x.dtype)
    return x


@triton.jit
def _magnitude(x):
    """Absolute values, zero for what is not finite."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def _cast(x, factor):
    y = tl.minimum(tl.maximum(x * factor, -_MAX), _MAX)
    # A cast would turn an infinity into the largest value.
    return tl.where(tl.abs(x) < float("inf"), y, float("nan")).to(tl.float8e4nv)


@triton.jit
def _channels_kernel(
    x_ptr, order_ptr, cos_ptr, sin_ptr, valid_ptr, part_ptr, sxb, sxh, sxs, sval, heads, tokens,
    DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr, ROPE: tl.constexpr,
    VALID: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Of ROWS tokens the sum (SUM) or the largest magnitude of each channel: ``part [B, heads, parts, DIM]``."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    batch = tl.program_id(2)
    slot = part * ROWS + tl.arange(0, ROWS)
    live = _exists(slot, tokens, valid_ptr, batch * sval, BLOCK, VALID)
    x_ptr += batch.to(tl.int64) * sxb + head.to(tl.int64) * sxh
    x = _tokens(x_ptr, sxs, slot, live, order_ptr, cos_ptr, sin_ptr, ROWS, DIM, ORDER, ROPE).to(tl.float32)
    if SUM:
        result = tl.sum(tl.where(tl.abs(x) < float("inf"), x, 0.0), 0)
    else:
        result = tl.max(_magnitude(x), 0)
    row = (batch * heads + head) * tl.num_programs(1) + part
    tl.store(part_ptr + row.to(tl.int64) * DIM + tl.arange(0, DIM), result)


@triton.jit
def _rows_kernel(
    x_ptr, order_ptr, cos_ptr, sin_ptr, valid_ptr, mean_ptr, x8_ptr, scale_ptr, factor_ptr, dot_ptr,
    sxb, sxh, sxs, sval, heads, tokens,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ORDER: tl.constexpr,
    ROPE: tl.constexpr, VALID: tl.constexpr, MEAN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One block of queries or keys of a few heads.

    MEAN: ``"subtract"`` the mean from keys, store the ``"dot"`` of queries with it (GROUP query heads share one), or
    ``"none"``. STEP: ``"all"`` in one go; where scales span several blocks ``"amax"`` first, into ``scale``, and
    ``"cast"`` afterwards, by ``factor``.
    """
    block = tl.program_id(1)
    batch = tl.program_id(2)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM)
    live = _exists(slot, tokens, valid_ptr, batch * sval, BLOCK, VALID)
    first = tl.program_id(0) * HEADS
    for head in range(first, tl.minimum(first + HEADS, heads)):
        row = batch.to(tl.int64) * heads + head
        source = x_ptr + batch.to(tl.int64) * sxb + tl.cast(head, tl.int64) * sxh
        x = _tokens(source, sxs, slot, live, order_ptr, cos_ptr, sin_ptr, BLOCK, DIM, ORDER, ROPE).to(tl.float32)
        if MEAN != "none":
            mean = tl.load(mean_ptr + (row // GROUP) * DIM + dim)[None, :]
            if MEAN == "subtract":
                x = tl.where(live[:, None], x - mean, 0.0)
            elif STEP != "amax":
                tl.store(dot_ptr + row * tokens + slot, tl.sum(x * mean, 1), mask=slot < tokens)
        at = row * tl.num_programs(1) + block
        if STEP == "cast":
            factor = tl.load(factor_ptr + at)
        else:
            amax = tl.max(_magnitude(x))
            if STEP == "amax":
                tl.store(scale_ptr + at, amax)
            else:
                amax = tl.maximum(amax, _AMAX_MIN)
                factor = tl.div_rn(_MAX, amax)
                tl.store(scale_ptr + at, tl.div_rn(amax, _MAX))
        if STEP != "amax":
            out = x8_ptr + row * tokens * DIM + (slot * DIM)[:, None] + dim[None, :]
            # As many channels a thread as 16-byte loads bring it: none changes threads.
            out = tl.max_contiguous(tl.multiple_of(out, [1, 8]), [1, 8])
            tl.store(out, _cast(x, factor), mask=(slot < tokens)[:, None])


@triton.jit
def _values_kernel(
    v_ptr, order_ptr, valid_ptr, amax_ptr, v8_ptr, scale_ptr, svb, svh, svs, sval, heads, tokens,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """128 values of one head, rounded and transposed; the first program of a head stores its scales."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    batch = tl.program_id(2)
    row = batch.to(tl.int64) * heads + head
    dim = tl.arange(0, DIM)
    place = tl.arange(0, _V_ROWS)
    # Place 4 t + 2 j + e of each 16 belongs to key 8 j + 2 t + e: see FP8Operands.
    key = (place & -16) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)
    slot = part * _V_ROWS + key
    live = _exists(slot, tokens, valid_ptr, batch * sval, BLOCK, VALID)
    v_ptr += batch.to(tl.int64) * svb + head.to(tl.int64) * svh
    v = _tokens(v_ptr, svs, slot, live, order_ptr, None, None, _V_ROWS, DIM, ORDER, False).to(tl.float32)
    amax = tl.maximum(tl.load(amax_ptr + row * DIM + dim), _AMAX_MIN)
    if part == 0:
        tl.store(scale_ptr + row * DIM + dim, tl.div_rn(amax, _MAX))
    v8 = tl.trans(_cast(v, tl.div_rn(_MAX, amax)[None, :]))
    out = v8_ptr + (row * DIM + dim)[:, None] * (tl.num_programs(1) * _V_ROWS) + (part * _V_ROWS + place)[None, :]
    tl.store(out, v8)


def quantize_triton(
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
    settings: Prologue = PROLOGUE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As ``quantize_reference``."""
    batch, heads, tokens_q, dim = q.shape
    heads_k, tokens_k = k.shape[1:3]
    if order is not None:
        tokens_q = tokens_k = order.shape[0]
    keys = dict(DIM=dim, BLOCK=block, ORDER=order is not None, VALID=k_valid is not None)
    valid_stride = _strides(k_valid, (0,))

    def channels(x: Tensor, rotated: bool, total: bool) -> Tensor:
        """Sum or largest magnitude of each channel over 128 tokens at a time: ``[B, HK, parts, D]``."""
        rotated = rotated and cos is not None
        parts = triton.cdiv(tokens_k, 128)
        part = torch.empty((batch, heads_k, parts, dim), dtype=torch.float32, device=x.device)
        _channels_kernel[heads_k, parts, batch](
            x, order, cos, sin, k_valid, part, *_bhs(x), *valid_stride, heads_k, tokens_k,
            ROWS=128, ROPE=rotated, SUM=total, num_warps=settings.warps, **keys,
        )  # fmt: skip
        return part

    k_mean = q_dot_mean = None
    if smooth_k:
        count = tokens_k
        if k_valid is not None:
            ends = torch.arange(0, tokens_k, block, device=k.device)
            count = torch.minimum(k_valid, tokens_k - ends).sum(-1).clamp(min=1)[:, None, None]
        k_mean = channels(k, True, True).sum(2) / count
        q_dot_mean = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q.device)

    def rows(x: Tensor, tokens: int, valid: Tensor | None, mean: str) -> tuple[Tensor, Tensor]:
        own = x.shape[1]
        blocks = triton.cdiv(tokens, block)
        x8 = torch.empty((batch, own, tokens, dim), dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty((batch, own, blocks), dtype=torch.float32, device=x.device)
        chunk = 1 if cos is None else settings.heads

        def launch(step: str, scale: Tensor | None, factor: Tensor | None) -> None:
            _rows_kernel[triton.cdiv(own, chunk), blocks, batch](
                x, order, cos, sin, valid, k_mean, x8, scale, factor, q_dot_mean,
                *_bhs(x), *_strides(valid, (0,)), own, tokens,
                DIM=dim, BLOCK=block, HEADS=chunk, GROUP=own // heads_k, ORDER=order is not None, ROPE=cos is not None,
                VALID=valid is not None, MEAN=mean, STEP=step, num_warps=settings.warps, maxnreg=settings.registers,
            )  # fmt: skip

        if group == 1:
            launch("all", scale, None)
            return x8, scale
        launch("amax", scale, None)
        amax = torch.nn.functional.pad(scale, (0, -blocks % group)).unflatten(-1, (-1, group)).amax(-1)
        amax = amax.repeat_interleave(group, dim=-1)[..., :blocks].contiguous()
        scale, factor = scales(amax)
        launch("cast", None, factor)
        return x8, scale

    # Padding slots hold no query either; without an order queries have slots of their own.
    q8, q_scale = rows(q, tokens_q, k_valid if order is not None else None, "dot" if smooth_k else "none")
    k8, k_scale = rows(k, tokens_k, k_valid, "subtract" if smooth_k else "none")

    amax = channels(v, False, False).amax(2)
    parts = triton.cdiv(tokens_k, V_PADDING)
    v8 = torch.empty((batch, heads_k, dim, parts * V_PADDING), dtype=torch.float8_e4m3fn, device=v.device)
    v_scale = torch.empty((batch, heads_k, dim), dtype=torch.float32, device=v.device)
    _values_kernel[heads_k, parts, batch](
        v, order, k_valid, amax, v8, v_scale, *_bhs(v), *valid_stride, heads_k, tokens_k,
        num_warps=settings.warps, **keys,
    )  # fmt: skip
    return q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean
