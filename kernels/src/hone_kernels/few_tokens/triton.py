"""A pass over few tokens in Triton: launches of little work, where what counts is how long one waits for memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hone_kernels.launch import dependent, launches_overlap

__all__ = ["attend_slots_triton", "gated_of_few_triton"]

LOG2E = math.log2(math.e)
LINE = 128
"""Bytes that a prefetch brings."""


@triton.jit
def _prefetch(pointers):
    """Ask for the lines of memory that pointers point into, and do not wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["tokens"])
def _gated_kernel(
    X, GATE, UP, OUT, tokens, outputs, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kind = OUT.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = n < outputs
    lines = tl.minimum(n, outputs - 1).to(tl.int64) * width
    m = tl.arange(0, BLOCK_M)
    real = m < tokens
    # Each warp has a part of the inputs: sums of few outputs and tokens are one long chain of additions otherwise.
    k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    sums = tl.zeros([PARTS, BLOCK_N, BLOCK_M], tl.float32)
    up_sums = tl.zeros([PARTS, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, width, PARTS * BLOCK_K, num_stages=STAGES):
        at = start + k
        inside = at < width
        seen = inside[:, :, None] & real[None, None, :]
        x = tl.load(X + at[:, :, None] + m.to(tl.int64)[None, None, :] * width, mask=seen, other=0.0)
        named = inside[:, None, :] & some[None, :, None]
        offset = at[:, None, :] + lines[None, :, None]
        sums = tl.dot(tl.load(GATE + offset, mask=named, other=0.0), x, sums, input_precision="ieee")
        up_sums = tl.dot(tl.load(UP + offset, mask=named, other=0.0), x, up_sums, input_precision="ieee")
    gate = tl.sum(sums, 0).to(kind).to(tl.float32)
    out = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * tl.sum(up_sums, 0).to(kind).to(tl.float32)
    place = m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(OUT + place, out.to(kind), mask=real[None, :] & some[:, None])


def gated_of_few_triton(
    x: Tensor, gate: Tensor, up: Tensor, *, tile: tuple[int, int, int, int] | None = None
) -> Tensor:
    """See ``gated_of_few``; ``tile`` is outputs and inputs that a warp takes at once, stages and warps."""
    outputs, width = gate.shape
    block_m = max(16, triton.next_power_of_2(len(x)))
    block_n, block_k, stages, warps = tile or (16, (128 if block_m <= 32 else 64) // x.element_size(), 3, 4)
    out = x.new_empty(len(x), outputs)
    _gated_kernel[(triton.cdiv(outputs, block_n),)](
        x, gate, up, out, len(x), outputs, width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PARTS=warps,
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _turned(SOURCE, COS, SIN, at, place, there, d, DIM: tl.constexpr):
    """Heads ``[lines, PADDED]`` of a source, each pair of channels rotated by the angles of the line's place."""
    inside = there[:, None] & (d < DIM)[None, :]
    x = tl.load(SOURCE + at[:, None] + d[None, :], mask=inside, other=0.0)
    if COS is not None:
        kind = x.dtype
        partner = tl.load(SOURCE + at[:, None] + (d ^ 1)[None, :], mask=inside, other=0.0).to(tl.float32)
        angle = place.to(tl.int64)[:, None] * (DIM // 2) + (d // 2)[None, :]
        cos = tl.load(COS + angle, mask=inside, other=0.0)
        sin = tl.load(SIN + angle, mask=inside, other=0.0)
        x = (x.to(tl.float32) * cos + partner * tl.where(d % 2 == 0, -sin, sin)).to(kind)
    return x


@triton.jit(do_not_specialize=["begin", "tokens"])
def _slots_kernel(
    QKV, COS, SIN, WORDS, KEYS, VALUES, OUT, scale, begin, tokens, slots, heads, heads_k, conditions,
    GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, LINE_OF: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head_k = tl.program_id(1)
    tile = tl.program_id(2)
    kind = KEYS.dtype.element_ty
    d = tl.arange(0, PADDED)
    cache = (row * heads_k + head_k) * slots * DIM
    if OVERLAP:
        gdc_launch_dependents()
        # No launch nearby writes what was cached before this step.
        for start in range(0, begin * DIM, 256 * LINE_OF):
            near = tl.minimum(start + tl.arange(0, 256) * LINE_OF, begin * DIM - 1)
            _prefetch(KEYS + cache + near)
            _prefetch(VALUES + cache + near)
        gdc_wait()
    source = QKV + row * tokens * (heads + 2 * heads_k) * DIM
    t = tl.arange(0, BLOCK_T)
    new = t < tokens
    at_k = (t * (heads + 2 * heads_k) + heads + head_k) * DIM
    k = _turned(source, COS, SIN, at_k, begin + t, new, d, DIM)
    fresh = new[:, None] & (d < DIM)[None, :]
    v = tl.load(source + (at_k + heads_k * DIM)[:, None] + d[None, :], mask=fresh, other=0.0)
    if tile == 0:
        kept = cache + (begin + t)[:, None] * DIM + d[None, :]
        tl.store(KEYS + kept, k, mask=fresh)
        tl.store(VALUES + kept, v, mask=fresh)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < tokens * GROUPS
    token, head = m // GROUPS, head_k * GROUPS + m % GROUPS
    q = _turned(source, COS, SIN, (token * (heads + 2 * heads_k) + head) * DIM, begin + token, real, d, DIM)
    # New tokens see each other, so that there is a highest logit from here on.
    logits = tl.where(new[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
    top = tl.max(logits, 1)
    weights = tl.exp2(logits - top[:, None])
    total = tl.sum(weights, 1)
    sums = tl.dot(weights.to(kind), v, input_precision="ieee")
    for start in tl.range(0, begin, BLOCK_N, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_N)
        seen = at < begin
        if WORDS is not None:
            word = tl.load(WORDS + row * conditions + at, mask=at < conditions, other=True)
            seen = seen & word
        old = seen[:, None] & (d < DIM)[None, :]
        offset = cache + at[:, None] * DIM + d[None, :]
        old_k = tl.load(KEYS + offset, mask=old, other=0.0)
        old_v = tl.load(VALUES + offset, mask=old, other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(old_k), input_precision="ieee") * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(shares, 1)
        sums = sums * fade[:, None] + tl.dot(shares.to(kind), old_v, input_precision="ieee")
        top = higher
    out = ((row * tokens + token) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(OUT + out, (sums / total[:, None]).to(kind), mask=real[:, None] & (d < DIM)[None, :])


def attend_slots_triton(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    begin: int,
    scale: float,
    words: Tensor | None,
    *,
    tile: tuple[int, int, int] = (64, 3, 4),
    overlap: bool | None = None,
) -> Tensor:
    """See ``attend_slots``; ``tile`` is cached slots that a program takes at once, stages and warps."""
    rows, heads_k, slots, dim = keys.shape
    tokens, heads = qkv.shape[1], qkv.shape[2] // dim - 2 * heads_k
    groups = heads // heads_k
    overlap = launches_overlap(qkv.device) if overlap is None else overlap
    out = qkv.new_empty(rows, tokens, heads * dim)
    block_m = min(64, max(16, triton.next_power_of_2(tokens * groups)))
    block_n, stages, warps = tile
    cos, sin = rope or (None, None)
    _slots_kernel[(rows, heads_k, triton.cdiv(tokens * groups, block_m))](
        qkv, cos, sin, words, keys, values, out, scale * LOG2E, begin,
        tokens, slots, heads, heads_k, 0 if words is None else words.shape[1], GROUPS=groups, DIM=dim,
        PADDED=max(16, triton.next_power_of_2(dim)), BLOCK_M=block_m,
        BLOCK_T=max(16, triton.next_power_of_2(tokens)), BLOCK_N=block_n, LINE_OF=LINE // qkv.element_size(),
        STAGES=stages, OVERLAP=overlap, num_warps=warps, **dependent(overlap),
    )  # fmt: skip
    return out
