"""Parts of a decoding step in Triton: few, small launches, since a step of a small model is as long as its launches."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hone_kernels.checks import check_programs
from hone_kernels.launch import dependent, launches_overlap

__all__ = [
    "add_rms_norm_triton",
    "linear_of_one_triton",
    "paged_attention_triton",
    "rotate_append_triton",
    "rotate_attend_triton",
    "silu_mul_triton",
    "splits_of",
]

LOG2E = math.log2(math.e)
PROGRAMS_PER_MULTIPROCESSOR = 2
"""Programs that attention is split into at least, where there are keys enough."""


@triton.jit
def _norm_kernel(X, RESIDUAL, WEIGHT, OUT, TOTAL, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(X + row * width + at, mask=inside, other=0.0)
    if RESIDUAL is not None:
        x = (x.to(tl.float32) + tl.load(RESIDUAL + row * width + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(TOTAL + row * width + at, x, mask=inside)
    wide = x.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight, as transformers does.
    tl.store(OUT + row * width + at, weight * scaled.to(x.dtype).to(tl.float32), mask=inside)


def add_rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``add_rms_norm``."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _norm_kernel[(tokens,)](x, residual, weight, out, total, width, eps, BLOCK=block, num_warps=4 + 4 * (block > 2048))
    return out, total


@triton.jit
def _silu_kernel(X, OUT, width, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(X + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(X + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(OUT + row * width + at, active * up, mask=inside)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """See ``silu_mul``."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    check_programs("tokens", tokens)
    out = gate_up.new_empty(tokens, width)
    _silu_kernel[(triton.cdiv(width, 512), tokens)](gate_up, out, width, BLOCK=512, num_warps=2)
    return out


@triton.jit
def _linear_kernel(
    X, WEIGHT, BIAS, NORM, RESIDUAL, OUT, outputs, width, eps, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    k = tl.arange(0, BLOCK_K)
    lines = WEIGHT + n.to(tl.int64)[:, None] * width + k[None, :]
    ups = lines + tl.cast(outputs, tl.int64) * width
    first = inside[:, None] & (k < width)[None, :]
    # Weights are nobody's output: the first ones are on their way while the launch before still works.
    weight = tl.load(lines, mask=first, other=0.0)
    if GATED:
        up = tl.load(ups, mask=first, other=0.0)
    if NORM is not None:
        scale = tl.load(NORM + k, mask=k < width, other=0.0)
    if OVERLAP:
        gdc_wait()
    x = tl.load(X + k, mask=k < width, other=0.0)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        at = start + k
        left = at + BLOCK_K < width
        after = inside[:, None] & left[None, :]
        following = tl.load(lines + start + BLOCK_K, mask=after, other=0.0)
        if GATED:
            following_up = tl.load(ups + start + BLOCK_K, mask=after, other=0.0)
        following_x = tl.load(X + at + BLOCK_K, mask=left, other=0.0)
        if NORM is not None:
            following_scale = tl.load(NORM + at + BLOCK_K, mask=left, other=0.0)
        wide = x.to(tl.float32)
        if NORM is not None:
            # The norm's factor is one number, which is multiplied at the end.
            squares += wide * wide
            wide *= scale.to(tl.float32)
            scale = following_scale
        sums += weight.to(tl.float32) * wide[None, :]
        weight = following
        if GATED:
            up_sums += up.to(tl.float32) * wide[None, :]
            up = following_up
        x = following_x
    factor = 1.0
    if NORM is not None:
        factor = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    out = tl.sum(sums, 1) * factor
    kind = OUT.dtype.element_ty
    if BIAS is not None:
        out += tl.load(BIAS + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up_out = tl.sum(up_sums, 1) * factor
        if BIAS is not None:
            up_out += tl.load(BIAS + outputs + n, mask=inside, other=0.0).to(tl.float32)
        out = out.to(kind).to(tl.float32)
        out = (out / (1.0 + tl.exp(-out))).to(kind).to(tl.float32) * up_out.to(kind).to(tl.float32)
    if RESIDUAL is not None:
        out = out.to(kind).to(tl.float32) + tl.load(RESIDUAL + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + n, out, mask=inside)


def _tile(outputs: int, width: int, gated: bool, normed: bool) -> tuple[int, int, int]:
    """Chosen on an H200 among twelve, for the layers of models of 1.5, 7 and 14 billion weights."""
    if outputs >= 32768:
        return 2, 512, 2
    if gated:
        return (2, 512, 2) if width <= 2048 else (4, 512, 4)
    if normed:
        return (4, 1024, 4) if width <= 2048 else (2, 512, 2)
    return 2, 2048, 4


def linear_of_one_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    *,
    tile: tuple[int, int, int] | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """See ``linear_of_one``; ``tile`` is outputs and inputs that a program takes at once, and its warps.

    With ``overlap`` the launch is on its way while the one before ends (programmatic dependent launch, from Hopper on);
    chosen if None.
    """
    outputs, width = weight.shape
    outputs = outputs // 2 if gated else outputs
    if tile is None:
        tile = _tile(outputs, width, gated, norm is not None)
    block_n, block_k, warps = tile
    overlap = launches_overlap(x.device) if overlap is None else overlap
    out = x.new_empty(1, outputs)
    _linear_kernel[(triton.cdiv(outputs, block_n),)](
        x, weight, bias, norm, residual, out, outputs, width, eps, GATED=gated, BLOCK_N=block_n, BLOCK_K=block_k,
        OVERLAP=overlap, num_warps=warps, **dependent(overlap),
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    QKV, COS, SIN, POSITIONS, ROWS, TABLE, KEYS, VALUES, QUERIES, Q_NORM, K_NORM, eps, tokens, table_stride,
    heads, heads_k, DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, PADDED)
    inside = half < DIM // 2
    source = QKV + (token * (heads + 2 * heads_k) + head) * DIM + half
    left = tl.load(source, mask=inside, other=0.0)
    right = tl.load(source + DIM // 2, mask=inside, other=0.0)
    position = tl.load(POSITIONS + token)
    where = tl.maximum(position, 0)
    if head < heads + heads_k:
        if Q_NORM is not None:
            a, b = left.to(tl.float32), right.to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DIM + eps)
            norm = Q_NORM if head < heads else K_NORM
            first = tl.load(norm + half, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(norm + DIM // 2 + half, mask=inside, other=0.0).to(tl.float32)
            left = (first * (a * scale).to(left.dtype).to(tl.float32)).to(left.dtype)
            right = (second * (b * scale).to(right.dtype).to(tl.float32)).to(right.dtype)
        cos = tl.load(COS + where * (DIM // 2) + half, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(SIN + where * (DIM // 2) + half, mask=inside, other=0.0).to(tl.float32)
        a, b = left.to(tl.float32), right.to(tl.float32)
        left = (a * cos - b * sin).to(left.dtype)
        right = (b * cos + a * sin).to(right.dtype)
    if head < heads:
        out = QUERIES + (token * heads + head) * DIM + half
        tl.store(out, left, mask=inside)
        tl.store(out + DIM // 2, right, mask=inside)
    else:
        row = tl.load(ROWS + token // tokens).to(tl.int64)
        page = tl.load(TABLE + row * table_stride + where // PAGE).to(tl.int64)
        kept = inside & (position >= 0)
        is_key = head < heads + heads_k
        head_k = head - heads if is_key else head - heads - heads_k
        offset = ((page * heads_k + head_k) * PAGE + where % PAGE) * DIM + half
        if is_key:
            tl.store(KEYS + offset, left, mask=kept)
            tl.store(KEYS + offset + DIM // 2, right, mask=kept)
        else:
            tl.store(VALUES + offset, left, mask=kept)
            tl.store(VALUES + offset + DIM // 2, right, mask=kept)


def rotate_append_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """See ``rotate_append``."""
    heads_k, page, dim = keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * heads_k
    queries = qkv.new_empty(qkv.shape[0], heads, dim)
    _rotate_kernel[(qkv.shape[0], heads + 2 * heads_k)](
        qkv, cos, sin, positions, rows, table, keys, values, queries, q_norm, k_norm, eps, positions.shape[1],
        table.stride(0), heads, heads_k, DIM=dim, PADDED=triton.next_power_of_2(dim // 2), PAGE=page, num_warps=1,
    )  # fmt: skip
    return queries


@triton.jit
def _attention_kernel(
    Q, KEYS, VALUES, POSITIONS, ROWS, TABLE, OUT, LSE, scale, tokens, table_stride, heads, heads_k, splits,
    GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens * GROUPS, BLOCK_M)
    tile = tl.program_id(0) // tiles
    head_k = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < tokens * GROUPS
    token = (tile * tokens + m // GROUPS).to(tl.int64)
    line = token * heads + head_k * GROUPS + m % GROUPS
    position = tl.load(POSITIONS + token, mask=real, other=-1)
    row = tl.load(ROWS + tile).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < DIM
    q = tl.load(Q + line[:, None] * DIM + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    blocks = tl.cdiv(tl.max(position, 0) + 1, BLOCK_N)
    per = tl.cdiv(blocks, splits)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for block in range(split * per, tl.minimum(split * per + per, blocks)):
        at = block * BLOCK_N + tl.arange(0, BLOCK_N)
        page = tl.load(TABLE + row * table_stride + block * BLOCK_N // PAGE).to(tl.int64)
        offset = ((page * heads_k + head_k) * PAGE + block * BLOCK_N % PAGE + tl.arange(0, BLOCK_N)) * DIM
        k = tl.load(KEYS + offset[None, :] + d[:, None], mask=inside[:, None], other=0.0)
        v = tl.load(VALUES + offset[:, None] + d[None, :], mask=inside[None, :], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where(at[None, :] <= position[:, None], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A query that has seen nothing yet has no highest logit.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    seen = tl.where(total == 0.0, 1.0, total)
    out = (line * splits + split)[:, None] * DIM + d[None, :]
    tl.store(OUT + out, sums / seen[:, None], mask=real[:, None] & inside[None, :])
    if LSE is not None:
        tl.store(LSE + line * splits + split, tl.where(total == 0.0, -float("inf"), top + tl.log2(seen)), mask=real)


@triton.jit
def _merge_kernel(PARTS, LSE, OUT, splits, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, PADDED)
    inside = d < DIM
    lse = tl.load(LSE + line * splits + split, mask=split < splits, other=-float("inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    parts = tl.load(
        PARTS + (line * splits + split)[:, None] * DIM + d[None, :],
        mask=(split < splits)[:, None] & inside[None, :],
        other=0.0,
    )
    total = tl.sum(weight, 0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + line * DIM + d, out, mask=inside)


@triton.jit
def _factors(NORM, COS, SIN, place, d, DIM: tl.constexpr):
    """Weights of a norm (None: 1) for channels and their partners, and cosines and signed sines of a rotation."""
    own, other = 1.0, 1.0
    if NORM is not None:
        own = tl.load(NORM + d, mask=d < DIM, other=0.0).to(tl.float32)
        other = tl.load(NORM + (d + DIM // 2) % DIM, mask=d < DIM, other=0.0).to(tl.float32)
    angle = place * (DIM // 2) + d % (DIM // 2)
    cos = tl.load(COS + angle, mask=d < DIM, other=0.0).to(tl.float32)
    sin = tl.load(SIN + angle, mask=d < DIM, other=0.0).to(tl.float32)
    return own, other, cos, tl.where(d < DIM // 2, -sin, sin)


@triton.jit
def _turned(x, y, factors, eps, kind: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, AXIS: tl.constexpr):
    """Heads x, normalised if there is a norm, and rotated; y are each channel's partners."""
    own, other, cos, sin = factors
    x, y = x.to(tl.float32), y.to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, AXIS, keep_dims=True) / DIM + eps)
        x = (own * (x * factor).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        y = (other * (y * factor).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    return (x * cos + y * sin).to(kind)


@triton.jit
def _old_block(CACHE, TABLE, row, head_k, block, position, d, table_stride, heads_k, DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys or values ``[BLOCK_N, PADDED]`` of a block, zero from the new token on: its launch writes that one."""
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    page = tl.load(TABLE + row * table_stride + block * BLOCK_N // PAGE).to(tl.int64)
    offset = ((page * heads_k + head_k) * PAGE + block * BLOCK_N % PAGE + tl.arange(0, BLOCK_N)) * DIM
    return tl.load(CACHE + offset[:, None] + d[None, :], mask=(d < DIM)[None, :] & (at < position)[:, None], other=0.0)


@triton.jit
def _attend_kernel(
    QKV, COS, SIN, POSITIONS, ROWS, TABLE, KEYS, VALUES, Q_NORM, K_NORM, PARTS, LSE, COUNTS, OUT, eps, scale,
    table_stride, heads, heads_k, splits, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LINES: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head_k = tl.program_id(1)
    split = tl.program_id(2)
    kind = KEYS.dtype.element_ty
    # Where tokens stand, and what was cached before this step, no launch nearby writes: all of it is on its way while
    # the launch before still works.
    position = tl.load(POSITIONS + token)
    row = tl.load(ROWS + token).to(tl.int64)
    place = tl.maximum(position, 0)
    blocks = tl.cdiv(position + 1, BLOCK_N)
    per = tl.maximum(tl.cdiv(blocks, splits), 1)
    # Programs beyond these have no keys. Padding has none either, and one program that says so.
    active = tl.maximum(tl.cdiv(blocks, per), 1)
    if split < active:
        d = tl.arange(0, PADDED)
        inside = d < DIM
        partner = (d + DIM // 2) % DIM
        first = split * per
        k = _old_block(KEYS, TABLE, row, head_k, first, position, d, table_stride, heads_k, DIM, PAGE, BLOCK_N)
        v = _old_block(VALUES, TABLE, row, head_k, first, position, d, table_stride, heads_k, DIM, PAGE, BLOCK_N)
        of_k = _factors(K_NORM, COS, SIN, place, d, DIM)
        of_q = _factors(Q_NORM, COS, SIN, place, d[None, :], DIM)
        last = tl.load(TABLE + row * table_stride + place // PAGE).to(tl.int64)
        if OVERLAP:
            gdc_wait()
        m = tl.arange(0, BLOCK_M)
        real = m < GROUPS
        line = token * heads + head_k * GROUPS + m
        seen_q = real[:, None] & inside[None, :]
        source = QKV + token * (heads + 2 * heads_k) * DIM
        at_q = source + ((head_k * GROUPS + m) * DIM)[:, None]
        at_k = source + (heads + head_k) * DIM
        q = tl.load(at_q + d[None, :], mask=seen_q, other=0.0)
        q_partner = tl.load(at_q + partner[None, :], mask=seen_q, other=0.0)
        new_k = tl.load(at_k + d, mask=inside, other=0.0)
        k_partner = tl.load(at_k + partner, mask=inside, other=0.0)
        new_v = tl.load(at_k + heads_k * DIM + d, mask=inside, other=0.0).to(kind)
        q = _turned(q, q_partner, of_q, eps, kind, Q_NORM is not None, DIM, 1)
        new_k = _turned(new_k, k_partner, of_k, eps, kind, K_NORM is not None, DIM, 0)
        if split == active - 1:
            kept = ((last * heads_k + head_k) * PAGE + place % PAGE) * DIM + d
            tl.store(KEYS + kept, new_k, mask=inside & (position >= 0))
            tl.store(VALUES + kept, new_v, mask=inside & (position >= 0))
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, PADDED], tl.float32)
        end = tl.minimum(first + per, blocks)
        for block in range(first, end):
            at = block * BLOCK_N + tl.arange(0, BLOCK_N)
            own = (at == position)[:, None]
            k = tl.where(own, new_k[None, :], k)
            v = tl.where(own, new_v[None, :], v)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            logits = tl.where((at <= position)[None, :], logits, -float("inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weights, 1)
            sums = sums * fade[:, None] + tl.dot(weights.to(kind), v, input_precision="ieee")
            top = higher
            # Beyond the last block nothing is read.
            following = tl.minimum(block + 1, blocks - 1)
            until = tl.where(block + 1 < end, position, 0)
            k = _old_block(KEYS, TABLE, row, head_k, following, until, d, table_stride, heads_k, DIM, PAGE, BLOCK_N)
            v = _old_block(VALUES, TABLE, row, head_k, following, until, d, table_stride, heads_k, DIM, PAGE, BLOCK_N)
        mean = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        if active == 1:
            tl.store(OUT + line[:, None] * DIM + d[None, :], mean, mask=seen_q)
        else:
            tl.store(PARTS + (line * splits + split)[:, None] * DIM + d[None, :], mean, mask=seen_q)
            tl.store(LSE + line * splits + split, top + tl.log2(total), mask=real)
            tl.debug_barrier()
            # Whoever comes last finds all parts written, and joins them.
            count = COUNTS + token * heads_k + head_k
            if tl.atomic_add(count, 1, sem="acq_rel") == active - 1:
                g = tl.arange(0, LINES)
                of_g = token * heads + head_k * GROUPS + g
                part = tl.arange(0, SPLITS)
                there = (g < GROUPS)[:, None] & (part < active)[None, :]
                at_lse = LSE + of_g[:, None] * splits + part[None, :]
                lse = tl.load(at_lse, mask=there, other=-float("inf"), cache_modifier=".cg")
                highest = tl.max(lse, 1)
                # Lines that pad the tile have seen nothing.
                highest = tl.where(highest == -float("inf"), 0.0, highest)
                whole = tl.sum(tl.exp2(lse - highest[:, None]), 1)
                joined = tl.zeros([LINES, PADDED], tl.float32)
                for start in range(0, active, CHUNK):
                    some = start + tl.arange(0, CHUNK)
                    near = (g < GROUPS)[:, None] & (some < active)[None, :]
                    at_part = of_g[:, None] * splits + some[None, :]
                    weight = tl.load(LSE + at_part, mask=near, other=-float("inf"), cache_modifier=".cg")
                    parts = tl.load(
                        PARTS + at_part[:, :, None] * DIM + d[None, None, :],
                        mask=near[:, :, None] & inside[None, None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    joined += tl.sum(parts * tl.exp2(weight - highest[:, None])[:, :, None], 1)
                joined = joined / tl.where(whole == 0.0, 1.0, whole)[:, None]
                tl.store(OUT + of_g[:, None] * DIM + d[None, :], joined, mask=(g < GROUPS)[:, None] & inside[None, :])
                tl.store(count, 0)


def rotate_attend_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    *,
    splits: int | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """See ``rotate_attend``; ``splits`` and ``overlap`` are chosen unless told, as by the launches that it replaces."""
    heads_k, page, dim = keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * heads_k
    groups, tiles = heads // heads_k, len(rows)
    block_n = _keys_of_a_block(page)
    if splits is None:
        splits = splits_of(tiles * heads_k, table.shape[1] * page, block_n, _multiprocessors(qkv.device))
    overlap = launches_overlap(qkv.device) if overlap is None else overlap
    out = qkv.new_empty(tiles, heads, dim)
    parts = torch.empty(tiles, heads, splits, dim, dtype=torch.float32, device=qkv.device)
    lse = torch.empty(tiles, heads, splits, dtype=torch.float32, device=qkv.device)
    _attend_kernel[(tiles, heads_k, splits)](
        qkv, cos, sin, positions, rows, table, keys, values, q_norm, k_norm, parts, lse, counts, out, eps,
        scale * LOG2E, table.stride(0), heads, heads_k, splits, GROUPS=groups, DIM=dim,
        PADDED=max(16, triton.next_power_of_2(dim)), PAGE=page, BLOCK_M=max(16, triton.next_power_of_2(groups)),
        BLOCK_N=block_n, LINES=triton.next_power_of_2(groups), SPLITS=triton.next_power_of_2(splits), CHUNK=8,
        OVERLAP=overlap, num_warps=4,
        **dependent(overlap),
    )  # fmt: skip
    return out


def _keys_of_a_block(page: int) -> int:
    block = min(64, page)
    if page % block or block < 16 or block & (block - 1):
        raise ValueError(f"a page must hold 16, 32 or a multiple of 64 tokens; got {page}")
    return block


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def splits_of(programs: int, longest: int, block: int, multiprocessors: int) -> int:
    """Into how many parts keys are split: enough to fill the device, at most 32, and each of a block at least.

    Args:
        programs: Without splits.
        longest: Positions that a row may have.
        block: Keys that are read at once.
        multiprocessors: Of the device.
    """
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs)
    return max(1, min(32, wanted, triton.cdiv(longest, block)))


def paged_attention_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rows: Tensor,
    table: Tensor,
    scale: float,
    *,
    splits: int | None = None,
) -> Tensor:
    """See ``paged_attention``; ``splits`` is chosen by the number of programs unless told."""
    tiles, tokens = positions.shape
    heads_k, page, dim = keys.shape[1:]
    heads = q.shape[1]
    groups = heads // heads_k
    block_m = min(64, max(16, triton.next_power_of_2(tokens * groups)))
    block_n = _keys_of_a_block(page)
    programs = tiles * triton.cdiv(tokens * groups, block_m)
    if splits is None:
        splits = splits_of(programs * heads_k, table.shape[1] * page, block_n, _multiprocessors(q.device))
    out = torch.empty_like(q)
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(q.shape[0], heads, splits, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[0], heads, splits, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(dim))
    _attention_kernel[(programs, heads_k, splits)](
        q, keys, values, positions, rows, table, parts, lse, scale * LOG2E, tokens, table.stride(0),
        heads, heads_k, splits, GROUPS=groups, DIM=dim, PADDED=padded, PAGE=page, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(q.shape[0] * heads,)](
            parts, lse, out, splits, DIM=dim, PADDED=padded, SPLITS=triton.next_power_of_2(splits), num_warps=1
        )
    return out
