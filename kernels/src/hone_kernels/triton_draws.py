"""A draw from a row of logits in Triton, as one program that holds the row does it; ``draws`` says what is right."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["draw_row", "weighted_row"]


@triton.jit
def weighted_row(FIRST, SECOND, THIRD, place, at, size, w0, w1, w2, ROWS: tl.constexpr):
    """Weighted sum of one to three rows that begin at ``place``, in float32; one of weight 0 is not read."""
    x = w0 * tl.load(FIRST + place + at, mask=at < tl.where(w0 != 0.0, size, 0), other=0.0).to(tl.float32)
    if ROWS > 1:
        x += w1 * tl.load(SECOND + place + at, mask=at < tl.where(w1 != 0.0, size, 0), other=0.0).to(tl.float32)
    if ROWS > 2:
        x += w2 * tl.load(THIRD + place + at, mask=at < tl.where(w2 != 0.0, size, 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def _likeliest(x, keep):
    """The ``keep`` largest of x, none above 0, and all that tie with the last of them."""
    # Below zero the bits of a float, but the sign, grow as it falls: of them the keep-th smallest, bit by bit.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    cut = 0
    for bit in range(31):
        trial = cut | (1 << (30 - bit))
        cut = tl.where(tl.sum((bits < trial).to(tl.int32), 0) < keep, trial, cut)
    return bits <= cut


@triton.jit
def draw_row(x, at, UNIFORM, keep, temperature, CUT: tl.constexpr, PADDED: tl.constexpr):
    """The first token at which the running sum of masses passes the uniform's share of it all.

    x is 0 at the likeliest and minus infinity where no token is; with CUT only the ``keep`` likeliest may come.
    """
    if CUT:
        x = tl.where(_likeliest(x, keep), x, -float("inf"))
    mass = tl.exp(x / temperature)
    below = tl.cumsum(mass, 0)
    share = tl.load(UNIFORM) * tl.max(below, 0)  # loaded late, since a row may fill the registers
    # A running sum that is added up in parallel may fall by a rounding, so that a token has to have a mass of its own.
    # Where the share is rounded up to all, it is the last that has: after all others, the later first.
    place = tl.where(below > share, at, 2 * PADDED - at)
    place = tl.min(tl.where(mass > 0.0, place, 2 * PADDED), 0)
    return tl.where(place < PADDED, place, 2 * PADDED - place)
