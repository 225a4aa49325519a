"""All blocks of a pass over few tokens in one launch: one program a multiprocessor, which wait for each other.

What a product takes is then no launch: each program has its share of the weights on its way, and in its registers,
while the others still work on what comes before; and it asks for its share of the product after that besides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton import LOG2E, _prefetch, _turned

__all__ = ["blocks_of_few_triton", "shares"]

BLOCK_K = 64
"""Inputs of a part that are read at once: a line of memory."""
KEYS = 256
"""Cached slots that a program takes at once."""


@triton.jit
def _address(TABLE, layer, which: tl.constexpr, kind: tl.constexpr):
    pointer = tl.load(TABLE + layer * 9 + which).to(tl.pointer_type(kind))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _arrive(COUNT, PROGRAMS: tl.constexpr):
    """Say that what this program had to store is stored."""
    if PROGRAMS > 1:
        tl.debug_barrier()
        tl.atomic_add(COUNT, 1, sem="release")


@triton.jit
def _wait(COUNT, target, PROGRAMS: tl.constexpr):
    """Wait until all programs have arrived ``target / PROGRAMS`` times: one thread looks, the others wait for it."""
    if PROGRAMS > 1:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .u32 seen;
            mov.u32 seen, %tid.x;
            setp.ne.u32 p, seen, 0;
            @p bra DONE;
            LOOK: ld.acquire.gpu.global.u32 seen, [$1];
            setp.lt.u32 p, seen, $2;
            @p bra LOOK;
            DONE: mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [COUNT.to(tl.int64), target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()


@triton.jit
def _none():
    return ()


@triton.jit
def _with(chunks, one):
    return chunks + (one,)  # noqa: RUF005 (Triton knows no starred element)


@triton.jit
def _inputs(c, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Inputs ``[PARTS, BLOCK_K]`` of a chunk."""
    return (c * PARTS + tl.arange(0, PARTS))[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _lines(
    X, first, count, c, WIDTH: tl.constexpr, LINES: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Chunk c ``[PARTS, LINES, BLOCK_K]`` of lines from ``first`` on, zero beyond the first ``count``."""
    line = tl.arange(0, LINES)
    k = _inputs(c, PARTS, BLOCK_K)
    seen = (line < count)[None, :, None]
    if WIDTH % (PARTS * BLOCK_K) != 0:
        seen = seen & (k < WIDTH)[:, None, :]
    return tl.load(X + first * WIDTH + line[None, :, None] * WIDTH + k[:, None, :], mask=seen, other=0.0)


@triton.jit
def _tile(turn, OUTPUTS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """First output of this program at a turn, and how many; all programs have alike, as far as that goes."""
    TURNS: tl.constexpr = (OUTPUTS + PROGRAMS * BLOCK - 1) // (PROGRAMS * BLOCK)
    SHARE: tl.constexpr = (OUTPUTS + PROGRAMS * TURNS - 1) // (PROGRAMS * TURNS)
    first = (turn * PROGRAMS + tl.program_id(0)) * SHARE
    return first, tl.maximum(tl.minimum(SHARE, OUTPUTS - first), 0)


@triton.jit
def _weights(
    W, turn, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's weights at a turn, as chunks."""
    first, count = _tile(turn, OUTPUTS, PROGRAMS, BLOCK)
    chunks = _none()
    for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
        chunks = _with(chunks, _lines(W, first, count, c, WIDTH, BLOCK, PARTS, BLOCK_K))
    return chunks


@triton.jit
def _ask(W, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Have this program's weights brought nearer."""
    if PROGRAMS > 1:
        LINE_OF: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth
        for turn in tl.static_range((OUTPUTS + PROGRAMS * BLOCK - 1) // (PROGRAMS * BLOCK)):
            first, count = _tile(turn, OUTPUTS, PROGRAMS, BLOCK)
            for start in range(0, count * WIDTH, 256 * LINE_OF):
                near = start + tl.arange(0, 256) * LINE_OF
                # Lines beyond the last are the last one again.
                _prefetch(W + first * WIDTH + tl.minimum(near, count * WIDTH - 1))


@triton.jit
def _normed(
    X, tokens, norm, eps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Tokens after their norm, as chunks; ``norm`` has the chunks of its weight."""
    chunks = _none()
    squares = tl.zeros([BLOCK_M], tl.float32)
    for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
        chunks = _with(chunks, _lines(X, 0, tokens, c, WIDTH, BLOCK_M, PARTS, BLOCK_K))
    for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
        wide = chunks[c].to(tl.float32)
        squares += tl.sum(tl.sum(wide * wide, 2), 0)
    scale = tl.rsqrt(squares / WIDTH + eps)[None, :, None]
    out = _none()
    kind = chunks[0].dtype
    for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
        scaled = (chunks[c].to(tl.float32) * scale).to(kind).to(tl.float32)
        out = _with(out, (scaled * norm[c][:, None, :].to(tl.float32)).to(kind))
    return out


@triton.jit
def _norm_weight(NORM, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    chunks = _none()
    for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
        k = _inputs(c, PARTS, BLOCK_K)
        chunks = _with(chunks, tl.load(NORM + k, mask=k < WIDTH, other=0.0))
    return chunks


@triton.jit
def _times(x, w, sums):
    return tl.dot(x, tl.permute(w, (0, 2, 1)), sums, input_precision="ieee")


@triton.jit
def _summed(
    X, tokens, W, w, RESIDUAL, OUT, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """``OUT = RESIDUAL + X @ W.T``; ``w`` has the weights of the first turn."""
    CHUNKS: tl.constexpr = (WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)
    TURNS: tl.constexpr = (OUTPUTS + PROGRAMS * BLOCK - 1) // (PROGRAMS * BLOCK)
    kind = OUT.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    for turn in tl.static_range(TURNS):
        first, count = _tile(turn, OUTPUTS, PROGRAMS, BLOCK)
        n = tl.arange(0, BLOCK)
        seen = (m < tokens)[:, None] & (n < count)[None, :]
        place = m[:, None] * OUTPUTS + first + n[None, :]
        before = tl.load(RESIDUAL + place, mask=seen, other=0.0)
        sums = tl.zeros([PARTS, BLOCK_M, BLOCK], tl.float32)
        x = _none()
        for c in tl.static_range(min(AHEAD, CHUNKS)):
            x = _with(x, _lines(X, 0, tokens, c, WIDTH, BLOCK_M, PARTS, BLOCK_K))
        following = _none()
        for c in tl.static_range(CHUNKS):
            if c + AHEAD < CHUNKS:
                x = _with(x, _lines(X, 0, tokens, c + AHEAD, WIDTH, BLOCK_M, PARTS, BLOCK_K))
            sums = _times(x[c], w[c], sums)
            if turn + 1 < TURNS:
                later, more = _tile(turn + 1, OUTPUTS, PROGRAMS, BLOCK)
                following = _with(following, _lines(W, later, more, c, WIDTH, BLOCK, PARTS, BLOCK_K))
        out = tl.sum(sums, 0).to(kind).to(tl.float32) + before.to(tl.float32)
        tl.store(OUT + place, out.to(kind), mask=seen)
        w = following


@triton.jit
def _old(CACHE, start, begin, PARTS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr):
    """Slots ``[PARTS, KEYS / PARTS, DIM]`` from ``start`` on, zero from ``begin`` on."""
    at = start + tl.arange(0, PARTS)[:, None] * (KEYS // PARTS) + tl.arange(0, KEYS // PARTS)[None, :]
    d = tl.arange(0, DIM)
    return tl.load(CACHE + at[:, :, None] * DIM + d[None, None, :], mask=(at < begin)[:, :, None], other=0.0)


@triton.jit
def _attend(
    QKV, COS, SIN, WORDS, keys, values, OUT, scale, begin, tokens, unit, slots, conditions, old_k, old_v,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of a row's head; ``old_k`` and ``old_v`` are its first slots."""
    kind = OUT.dtype.element_ty
    row = unit // HEADS
    head = unit % HEADS
    cache = tl.cast(unit, tl.int64) * slots * DIM
    d = tl.arange(0, DIM)
    t = tl.arange(0, BLOCK_T)
    new = t < tokens
    fresh = new[:, None] & (d >= 0)[None, :]
    at = ((row * tokens + t) * 3 * HEADS + head) * DIM
    q = _turned(QKV, COS, SIN, at, begin + t, new, d, DIM)
    k = _turned(QKV, COS, SIN, at + HEADS * DIM, begin + t, new, d, DIM)
    v = tl.load(QKV + (at + 2 * HEADS * DIM)[:, None] + d[None, :], mask=fresh, other=0.0)
    kept = cache + (begin + t)[:, None] * DIM + d[None, :]
    tl.store(keys + kept, k, mask=fresh)
    tl.store(values + kept, v, mask=fresh)
    # New tokens see each other, so that there is a highest logit from here on.
    logits = tl.where(new[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
    top = tl.max(logits, 1)
    weights = tl.exp2(logits - top[:, None])
    total = tl.sum(weights, 1)
    sums = tl.dot(weights.to(kind), v, input_precision="ieee")
    parts = tl.zeros([PARTS, BLOCK_T, DIM], tl.float32)
    for start in range(0, begin, KEYS):
        if start > 0:
            old_k = _old(keys + cache, start, begin, PARTS, KEYS, DIM)
            old_v = _old(values + cache, start, begin, PARTS, KEYS, DIM)
        slot = start + tl.arange(0, PARTS)[:, None] * (KEYS // PARTS) + tl.arange(0, KEYS // PARTS)[None, :]
        seen = slot < begin
        if WORDS is not None:
            seen = seen & tl.load(WORDS + row * conditions + slot, mask=slot < conditions, other=True)
        many = tl.broadcast_to(q[None, :, :], [PARTS, BLOCK_T, DIM])
        scores = tl.dot(many, tl.permute(old_k, (0, 2, 1)), input_precision="ieee") * scale
        scores = tl.where(seen[:, None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(tl.max(scores, 2), 0))
        shares = tl.exp2(scores - higher[None, :, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(tl.sum(shares, 2), 0)
        parts = tl.dot(shares.to(kind), old_v, parts * fade[None, :, None], input_precision="ieee")
        sums = sums * fade[:, None]
        top = higher
    out = (sums + tl.sum(parts, 0)) / total[:, None]
    place = ((row * tokens + t) * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(OUT + place, out.to(kind), mask=fresh)


@triton.jit(do_not_specialize=["begin", "tokens", "rows", "layers"])
def _blocks_kernel(
    X, STREAM, QKV, ATTENDED, ACTED, TABLE, COUNT, COS, SIN, WORDS, eps, scale, begin, tokens, rows, layers, slots,
    conditions, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr, N_QKV: tl.constexpr, N_OUT: tl.constexpr, N_GATE: tl.constexpr, N_DOWN: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = X.dtype.element_ty
    TURNS_QKV: tl.constexpr = (3 * WIDTH + PROGRAMS * N_QKV - 1) // (PROGRAMS * N_QKV)
    TURNS_GATE: tl.constexpr = (HIDDEN + PROGRAMS * N_GATE - 1) // (PROGRAMS * N_GATE)
    pid = tl.program_id(0)
    lines = rows * tokens
    m = tl.arange(0, BLOCK_M)
    for layer in range(layers):
        before = STREAM + (2 * layer - 1) * lines * WIDTH
        if layer == 0:
            before = X
        before = tl.multiple_of(before, 16)
        between = tl.multiple_of(STREAM + 2 * layer * lines * WIDTH, 16)
        after = tl.multiple_of(STREAM + (2 * layer + 1) * lines * WIDTH, 16)
        wqkv = _address(TABLE, layer, 1, kind)
        wo = _address(TABLE, layer, 2, kind)
        w1 = _address(TABLE, layer, 4, kind)
        w3 = _address(TABLE, layer, 5, kind)
        w2 = _address(TABLE, layer, 6, kind)
        keys = _address(TABLE, layer, 7, kind)
        values = _address(TABLE, layer, 8, kind)
        done = 5 * layer * PROGRAMS

        # Queries, keys and values.
        w = _weights(wqkv, 0, 3 * WIDTH, WIDTH, PROGRAMS, N_QKV, PARTS, BLOCK_K)
        norm = _norm_weight(_address(TABLE, layer, 0, kind), WIDTH, PARTS, BLOCK_K)
        _ask(wo, WIDTH, WIDTH, PROGRAMS, N_OUT)
        _wait(COUNT, done, PROGRAMS)
        x = _normed(before, lines, norm, eps, WIDTH, BLOCK_M, PARTS, BLOCK_K)
        for turn in tl.static_range(TURNS_QKV):
            first, count = _tile(turn, 3 * WIDTH, PROGRAMS, N_QKV)
            following = _none()
            sums = tl.zeros([PARTS, BLOCK_M, N_QKV], tl.float32)
            for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
                sums = _times(x[c], w[c], sums)
                if turn + 1 < TURNS_QKV:
                    later, more = _tile(turn + 1, 3 * WIDTH, PROGRAMS, N_QKV)
                    following = _with(following, _lines(wqkv, later, more, c, WIDTH, N_QKV, PARTS, BLOCK_K))
            n = tl.arange(0, N_QKV)
            place = m[:, None] * (3 * WIDTH) + first + n[None, :]
            tl.store(QKV + place, tl.sum(sums, 0).to(kind), mask=(m < lines)[:, None] & (n < count)[None, :])
            w = following
        _arrive(COUNT, PROGRAMS)

        # Attention, a row and a head at a time.
        _ask(w1, HIDDEN, WIDTH, PROGRAMS, N_GATE)
        _ask(w3, HIDDEN, WIDTH, PROGRAMS, N_GATE)
        # Who has none looks at no slot, and waits with the others: nobody arrives twice before all have once.
        own = tl.where(pid < rows * HEADS, begin, 0)
        old_k = _old(keys + tl.cast(pid, tl.int64) * slots * DIM, 0, own, PARTS, KEYS, DIM)
        old_v = _old(values + tl.cast(pid, tl.int64) * slots * DIM, 0, own, PARTS, KEYS, DIM)
        _wait(COUNT, done + PROGRAMS, PROGRAMS)
        if pid < rows * HEADS:
            _attend(
                QKV, COS, SIN, WORDS, keys, values, ATTENDED, scale, begin, tokens, pid, slots, conditions, old_k,
                old_v, HEADS, DIM, BLOCK_T, PARTS, KEYS,
            )  # fmt: skip
        for unit in range(pid + PROGRAMS, rows * HEADS, PROGRAMS):
            more_k = _old(keys + tl.cast(unit, tl.int64) * slots * DIM, 0, begin, PARTS, KEYS, DIM)
            more_v = _old(values + tl.cast(unit, tl.int64) * slots * DIM, 0, begin, PARTS, KEYS, DIM)
            _attend(
                QKV, COS, SIN, WORDS, keys, values, ATTENDED, scale, begin, tokens, unit, slots, conditions, more_k,
                more_v, HEADS, DIM, BLOCK_T, PARTS, KEYS,
            )  # fmt: skip
        _arrive(COUNT, PROGRAMS)

        # What attention adds.
        w = _weights(wo, 0, WIDTH, WIDTH, PROGRAMS, N_OUT, PARTS, BLOCK_K)
        _ask(w2, WIDTH, HIDDEN, PROGRAMS, N_DOWN)
        _wait(COUNT, done + 2 * PROGRAMS, PROGRAMS)
        _summed(ATTENDED, lines, wo, w, before, between, WIDTH, WIDTH, PROGRAMS, N_OUT, BLOCK_M, PARTS, BLOCK_K, AHEAD)
        _arrive(COUNT, PROGRAMS)

        # The gated layer.
        w = _weights(w1, 0, HIDDEN, WIDTH, PROGRAMS, N_GATE, PARTS, BLOCK_K)
        up = _weights(w3, 0, HIDDEN, WIDTH, PROGRAMS, N_GATE, PARTS, BLOCK_K)
        norm = _norm_weight(_address(TABLE, layer, 3, kind), WIDTH, PARTS, BLOCK_K)
        if layer + 1 < layers:
            _ask(_address(TABLE, layer + 1, 1, kind), 3 * WIDTH, WIDTH, PROGRAMS, N_QKV)
        _wait(COUNT, done + 3 * PROGRAMS, PROGRAMS)
        x = _normed(between, lines, norm, eps, WIDTH, BLOCK_M, PARTS, BLOCK_K)
        for turn in tl.static_range(TURNS_GATE):
            first, count = _tile(turn, HIDDEN, PROGRAMS, N_GATE)
            following = _none()
            following_up = _none()
            sums = tl.zeros([PARTS, BLOCK_M, N_GATE], tl.float32)
            up_sums = tl.zeros([PARTS, BLOCK_M, N_GATE], tl.float32)
            for c in tl.static_range((WIDTH + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)):
                sums = _times(x[c], w[c], sums)
                up_sums = _times(x[c], up[c], up_sums)
                if turn + 1 < TURNS_GATE:
                    later, more = _tile(turn + 1, HIDDEN, PROGRAMS, N_GATE)
                    following = _with(following, _lines(w1, later, more, c, WIDTH, N_GATE, PARTS, BLOCK_K))
                    following_up = _with(following_up, _lines(w3, later, more, c, WIDTH, N_GATE, PARTS, BLOCK_K))
            gate = tl.sum(sums, 0).to(kind).to(tl.float32)
            acted = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * tl.sum(up_sums, 0).to(kind).to(tl.float32)
            n = tl.arange(0, N_GATE)
            place = m[:, None] * HIDDEN + first + n[None, :]
            tl.store(ACTED + place, acted.to(kind), mask=(m < lines)[:, None] & (n < count)[None, :])
            w = following
            up = following_up
        _arrive(COUNT, PROGRAMS)

        # What it adds.
        w = _weights(w2, 0, WIDTH, HIDDEN, PROGRAMS, N_DOWN, PARTS, BLOCK_K)
        _wait(COUNT, done + 4 * PROGRAMS, PROGRAMS)
        _summed(ACTED, lines, w2, w, between, after, WIDTH, HIDDEN, PROGRAMS, N_DOWN, BLOCK_M, PARTS, BLOCK_K, AHEAD)
        if layer + 1 < layers:
            _arrive(COUNT, PROGRAMS)
    if PROGRAMS > 1:
        # Whoever comes last finds that nobody looks any more.
        tl.debug_barrier()
        if tl.atomic_add(COUNT, 1, sem="acq_rel") == 5 * layers * PROGRAMS - 1:
            tl.store(COUNT, 0)


def shares(outputs: int, width: int, programs: int, registers: int, parts: int) -> int:
    """Outputs that a program takes at once: 8 to 32, so many that their weights fill no more registers of a thread.

    Args:
        outputs: Of the product.
        width: Its inputs.
        programs: That share the outputs.
        registers: Of a thread, 4 bytes each, for weights of 2.
        parts: Warps of a program.
    """
    needed = triton.next_power_of_2(triton.cdiv(outputs, programs))
    chunk = parts * BLOCK_K
    room = registers * parts * 32 * 4 // (triton.cdiv(width, chunk) * chunk * 2)
    return max(8, min(32, needed, 1 << max(room, 1).bit_length() - 1))


def blocks_of_few_triton(
    x: Tensor,
    table: Tensor,
    count: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    words: Tensor | None,
    begin: int,
    *,
    heads: int,
    hidden: int,
    slots: int,
    eps: float,
    scale: float,
    programs: int,
    parts: int = 8,
    registers: int = 64,
    ahead: int | None = None,
) -> Tensor:
    """See ``BlocksOfFew``.

    Args:
        x: ``[R, n, C]``, contiguous.
        table: int64 ``[layers, 9]``, addresses of each block's norm, wqkv, wo, norm, w1, w3, w2, keys and values.
        count: int32, one zero, and zero again when the launch has ended.
        rope: As of ``attend_slots``, as the next two.
        words: Likewise.
        begin: Likewise.
        heads: Of attention.
        hidden: Width of the gated layer.
        slots: Of a cache.
        eps: Of the norms.
        scale: Of the logits.
        programs: As many as run at the same time, or fewer.
        parts: Warps of a program, each of which has a part of a product's inputs.
        registers: Of a thread that hold weights while it waits.
        ahead: Chunks of inputs that are on their way at once.
    """
    rows, tokens, width = x.shape
    lines, layers = rows * tokens, len(table)
    block_m = max(16, triton.next_power_of_2(lines))
    stream = x.new_empty(layers, 2, rows, tokens, width)
    qkv, attended, acted = x.new_empty(lines, 3 * width), x.new_empty(lines, width), x.new_empty(lines, hidden)
    cos, sin = rope or (None, None)

    def block(outputs: int, inputs: int, matrices: int = 1) -> int:
        return shares(outputs, inputs, programs, registers // matrices, parts)

    _blocks_kernel[(programs,)](
        x, stream, qkv, attended, acted, table, count, cos, sin, words, eps, scale * LOG2E, begin, tokens, rows, layers,
        slots, 0 if words is None else words.shape[1], WIDTH=width, HIDDEN=hidden, HEADS=heads, DIM=width // heads,
        PROGRAMS=programs, BLOCK_M=block_m, BLOCK_T=max(16, triton.next_power_of_2(tokens)), PARTS=parts,
        BLOCK_K=BLOCK_K, KEYS=KEYS, N_QKV=block(3 * width, width), N_OUT=block(width, width),
        N_GATE=block(hidden, width, 2), N_DOWN=block(width, hidden), AHEAD=ahead or (6 if block_m <= 16 else 3),
        num_warps=parts, num_stages=1, **({"launch_cooperative_grid": True} if programs > 1 else {}),
    )  # fmt: skip
    return stream[:, 1]
