"""The functions in Triton: a program per token, tile of tokens or tile of bits. All are bound by memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.checks import unit_last
from hone_kernels.draws import row_warps

__all__ = [
    "add_change_triton",
    "draw_bits_triton",
    "gather_modulate_triton",
    "pack_tokens_triton",
    "spread_tokens_triton",
    "take_tokens_triton",
    "unpack_tokens_triton",
]

_TOKENS = 64
"""Of one head, that a program moves."""


@triton.jit
def _gather_kernel(X, INDEX, SCALE, SHIFT, KEPT, OUT, tokens, kept, channels, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # of [R, n]
    row = token // kept
    at = tl.arange(0, BLOCK)
    inside = at < channels
    source = row * tokens + tl.load(INDEX + token)
    x = tl.load(X + source * channels + at, mask=inside, other=0.0)
    tl.store(KEPT + token * channels + at, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide, 0) / channels
    away = tl.where(inside, wide - mean, 0.0)
    scale = tl.load(SCALE + row * channels + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + row * channels + at, mask=inside, other=0.0).to(tl.float32)
    normed = away * tl.rsqrt(tl.sum(away * away, 0) / channels + eps)
    tl.store(OUT + token * channels + at, normed * (1.0 + scale) + shift, mask=inside)


def gather_modulate_triton(
    x: Tensor, idx: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor]:
    """See ``gather_modulate``."""
    x, idx, scale, shift = (t.contiguous() for t in (x, idx, scale, shift))
    (rows, tokens, channels), kept = x.shape, idx.shape[1]
    out = x.new_empty(rows, kept, channels, dtype=dtype)
    taken = torch.empty_like(out, dtype=x.dtype)
    block = triton.next_power_of_2(channels)
    if kept:
        _gather_kernel[(rows * kept,)](
            x, idx, scale, shift, taken, out, tokens, kept, channels, eps, BLOCK=block, num_warps=row_warps(block)
        )
    return taken, out


@triton.jit
def _change_kernel(
    X, UPDATE, GAMMA, BEFORE, AFTER, CHANGE, tokens, channels, measured, RELATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # of [R, n]
    at = tl.arange(0, BLOCK)
    inside = at < channels
    here = token * channels + at
    x = tl.load(X + here, mask=inside, other=0.0)
    update = tl.load(UPDATE + here, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(GAMMA + token // tokens * channels + at, mask=inside, other=0.0).to(tl.float32)
    after = (x.to(tl.float32) + (gamma * update).to(x.dtype).to(tl.float32)).to(x.dtype)
    tl.store(AFTER + here, after, mask=inside)
    if token < measured:
        before = tl.load(BEFORE + here, mask=inside, other=0.0).to(tl.float32)
        away = after.to(tl.float32) - before
        change = tl.sum(away * away, 0) / channels
        if RELATIVE:
            change = change / (tl.sum(before * before, 0) / channels)
        tl.store(CHANGE + token, change)


def add_change_triton(
    x: Tensor, update: Tensor, gamma: Tensor, before: Tensor, images: int, relative: bool
) -> tuple[Tensor, Tensor]:
    """See ``add_change``."""
    x, update, gamma, before = (t.contiguous() for t in (x, update, gamma, before))
    rows, tokens, channels = x.shape
    after = torch.empty_like(x)
    change = x.new_empty(images, tokens, dtype=torch.float32)
    block = triton.next_power_of_2(channels)
    _change_kernel[(rows * tokens,)](
        x, update, gamma, before, after, change, tokens, channels, images * tokens,
        RELATIVE=relative, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return after, change


@triton.jit
def _pair(LOGITS, source, inside, temperature):
    first = tl.load(LOGITS + source, mask=inside, other=0.0).to(tl.float32) / temperature
    return first, tl.load(LOGITS + source + 1, mask=inside, other=0.0).to(tl.float32) / temperature


@triton.jit
def _draw_kernel(
    LOGITS, UNIFORM, SLOT, BITS, total, tokens, kept, width, other, guidance, temperature, least,
    GUIDED: tl.constexpr, SURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of [B, L, d]
    inside = at < total
    position = at // width
    token = position
    if SLOT is not None:
        token = position // tokens * kept + tl.load(SLOT + position, mask=inside, other=0)
    source = 2 * (token * width + at % width)
    first, second = _pair(LOGITS, source, inside, temperature)
    if GUIDED:
        first_other, second_other = _pair(LOGITS, source + other, inside, temperature)
        first = guidance * first + (1.0 - guidance) * first_other
        second = guidance * second + (1.0 - guidance) * second_other
    most = tl.maximum(first, second)
    first, second = tl.exp(first - most), tl.exp(second - most)
    mass = first + second
    first, second = first / mass, second / mass
    bit = first <= tl.load(UNIFORM + at, mask=inside, other=0.0) * (first + second)
    if SURE:
        bit = tl.where(tl.minimum(first, second) <= least, second > first, bit)
    tl.store(BITS + at, bit.to(tl.int64), mask=inside)


def draw_bits_triton(
    logits: Tensor, uniform: Tensor, slot: Tensor | None, guidance: float, temperature: float, top_p: float
) -> Tensor:
    """See ``draw_bits``."""
    logits, uniform = logits.contiguous(), uniform.contiguous()
    slot = None if slot is None else slot.contiguous()
    images, tokens, width = uniform.shape
    bits = torch.empty(uniform.shape, dtype=torch.int64, device=uniform.device)
    total, kept = uniform.numel(), logits.shape[1]
    _draw_kernel[(triton.cdiv(total, 1024),)](
        logits, uniform, slot, bits, total, tokens, kept, width, images * kept * width * 2,
        float(guidance), float(temperature), float(1 - top_p),
        GUIDED=len(logits) > images, SURE=top_p > 0, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return bits


@triton.jit
def _take_kernel(
    ONE, TWO, THREE, INDEX, OUT_1, OUT_2, OUT_3,
    stride_1b, stride_1h, stride_1t, stride_2b, stride_2h, stride_2t, stride_3b, stride_3h, stride_3t,
    stride_index, kept, dim, heads_1, heads_2, heads_3, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)  # of the three, one after the other
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    inside = (slot < kept)[:, None] & (d < dim)[None, :]
    token = tl.load(INDEX + b * stride_index + slot, mask=slot < kept, other=0).to(tl.int64)[:, None]
    place = slot[:, None].to(tl.int64) * dim + d[None, :]
    if head < heads_1:
        x = tl.load(ONE + b * stride_1b + head * stride_1h + token * stride_1t + d[None, :], mask=inside)
        tl.store(OUT_1 + (b * heads_1 + head) * kept * dim + place, x, mask=inside)
    elif head < heads_1 + heads_2:
        head -= heads_1
        x = tl.load(TWO + b * stride_2b + head * stride_2h + token * stride_2t + d[None, :], mask=inside)
        tl.store(OUT_2 + (b * heads_2 + head) * kept * dim + place, x, mask=inside)
    else:
        head -= heads_1 + heads_2
        x = tl.load(THREE + b * stride_3b + head * stride_3h + token * stride_3t + d[None, :], mask=inside)
        tl.store(OUT_3 + (b * heads_3 + head) * kept * dim + place, x, mask=inside)


def take_tokens_triton(states: Sequence[Tensor], idx: Tensor) -> tuple[Tensor, ...]:
    """See ``take_tokens``."""
    given = [unit_last(x) for x in states]
    idx = unit_last(idx)
    (batch, kept), dim = idx.shape, given[0].shape[3]
    out = tuple(x.new_empty(batch, x.shape[1], kept, dim) for x in given)
    heads = [x.shape[1] for x in given] + [0] * (3 - len(given))
    # Fewer than three: the last one stands in, with no head.
    xs, outs = ([*some, *[some[-1]] * (3 - len(given))] for some in (given, out))
    strides = (stride for x in xs for stride in x.stride()[:3])
    if kept:
        _take_kernel[(triton.cdiv(kept, _TOKENS), sum(heads), batch)](
            *xs, idx, *outs, *strides, idx.stride(0), kept, dim, *heads,
            BT=_TOKENS, BD=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _pack_kernel(
    ONE, TWO, THREE, INDEX, NUM, OUT_1, OUT_2, OUT_3, ENDS, ROW,
    stride_1b, stride_1h, stride_1t, stride_2b, stride_2h, stride_2t, stride_3b, stride_3h, stride_3t,
    batch, tokens, dim, heads_1, heads_2, heads_3, BB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)  # of the three, one after the other
    b = tl.program_id(2).to(tl.int64)
    others = tl.arange(0, BB)
    first = tl.sum(tl.load(NUM + others, mask=(others < batch) & (others < b), other=0), 0)
    num = tl.load(NUM + b)
    slot = tile * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    # Behind the end nothing is read or written.
    inside = (slot < num)[:, None] & (d < dim)[None, :]
    at = tl.load(INDEX + b * tokens + slot, mask=slot < num, other=0)
    row = (first + slot).to(tl.int64)
    if head == 0:
        tl.store(ROW + b * tokens + at, row.to(tl.int32), mask=slot < num)
        if tile == 0:
            tl.store(ENDS + b + 1, first + num)
            if b == 0:
                tl.store(ENDS, 0)
    token = at.to(tl.int64)[:, None]
    if head < heads_1:
        x = tl.load(ONE + b * stride_1b + head * stride_1h + token * stride_1t + d[None, :], mask=inside)
        tl.store(OUT_1 + (row[:, None] * heads_1 + head) * dim + d[None, :], x, mask=inside)
    elif head < heads_1 + heads_2:
        head -= heads_1
        x = tl.load(TWO + b * stride_2b + head * stride_2h + token * stride_2t + d[None, :], mask=inside)
        tl.store(OUT_2 + (row[:, None] * heads_2 + head) * dim + d[None, :], x, mask=inside)
    else:
        head -= heads_1 + heads_2
        x = tl.load(THREE + b * stride_3b + head * stride_3h + token * stride_3t + d[None, :], mask=inside)
        tl.store(OUT_3 + (row[:, None] * heads_3 + head) * dim + d[None, :], x, mask=inside)


def pack_tokens_triton(states: Sequence[Tensor], idx: Tensor, num: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """See ``pack_tokens``."""
    given = [unit_last(x) for x in states]
    idx, num = idx.contiguous(), num.contiguous()
    (batch, tokens), dim = idx.shape, given[0].shape[3]
    out = tuple(x.new_empty(batch * tokens, x.shape[1], dim) for x in given)
    # Without a token there is no program that writes the ends.
    ends, row = (idx.new_empty if tokens else idx.new_zeros)(batch + 1), torch.empty_like(idx)
    heads = [x.shape[1] for x in given] + [0] * (3 - len(given))
    # Fewer than three: the last one stands in, with no head.
    xs, outs = ([*some, *[some[-1]] * (3 - len(given))] for some in (given, out))
    strides = (stride for x in xs for stride in x.stride()[:3])
    _pack_kernel[(triton.cdiv(tokens, _TOKENS), sum(heads), batch)](
        *xs, idx, num, *outs, ends, row, *strides, batch, tokens, dim, *heads,
        BB=triton.next_power_of_2(batch), BT=_TOKENS, BD=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return out, ends, row


@triton.jit
def _spread_kernel(
    X, KEEP, COUNT, OUT, stride_b, stride_h, stride_t, tokens, dim,
    OFFSET: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """COUNT: the place of a kept token in X, and OFFSET."""
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    here = b * tokens + at
    keep = tl.load(KEEP + here, mask=at < tokens, other=0) != 0
    slot = tl.load(COUNT + here, mask=keep, other=OFFSET).to(tl.int64) - OFFSET
    inside = (d < dim)[None, :]
    source = X + b * stride_b + head * stride_h + slot[:, None] * stride_t + d[None, :]
    x = tl.load(source, mask=keep[:, None] & inside, other=0.0)
    place = (here[:, None] * tl.num_programs(1) + head) * dim + d[None, :]
    tl.store(OUT + place, x, mask=(at < tokens)[:, None] & inside)


def spread_tokens_triton(x: Tensor, keep: Tensor) -> Tensor:
    """See ``spread_tokens``."""
    return _spread(x, keep, keep.cumsum(-1, dtype=torch.int32), 1)


def unpack_tokens_triton(x: Tensor, keep: Tensor, row: Tensor) -> Tensor:
    """See ``unpack_tokens``."""
    return _spread(x.transpose(0, 1).expand(len(keep), -1, -1, -1), keep, row.contiguous(), 0)


def _spread(x: Tensor, keep: Tensor, count: Tensor, offset: int) -> Tensor:
    x, keep = unit_last(x), keep.contiguous()
    (batch, heads, _, dim), tokens = x.shape, keep.shape[1]
    out = x.new_empty(batch, tokens, heads, dim)
    _spread_kernel[(triton.cdiv(tokens, _TOKENS), heads, batch)](
        x, keep, count, out, *x.stride()[:3], tokens, dim,
        OFFSET=offset, BT=_TOKENS, BD=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)
