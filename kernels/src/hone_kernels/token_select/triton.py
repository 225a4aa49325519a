"""Token selection in Triton: one program per sample, which bisects on the bits of the scores instead of sorting them.

A sample's scores are walked through tile by tile, some three dozen times; after the first they come from the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import TOLERANCE

__all__ = ["select_tokens_triton"]


@triton.jit
def _bits(X, REAL, PROTECTED, at, tokens, RACING: tl.constexpr):
    """Bits of scores, as which floats from 0 compare; -1 where no token is or, racing, a protected one."""
    there = tl.load(REAL + at, mask=at < tokens, other=0) != 0
    if RACING:
        there = there & (tl.load(PROTECTED + at, mask=at < tokens, other=0) == 0)
    x = tl.abs(tl.load(X + at, mask=there, other=0.0))  # drops the sign of a zero
    return tl.where(there, x.to(tl.int32, bitcast=True), -1)


@triton.jit
def _note(BITS, X, REAL, PROTECTED, tokens, RACING: tl.constexpr, BN: tl.constexpr):
    """Write the bits down, to be walked through with one load each."""
    tl.debug_barrier()  # nobody reads the last ones any more
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        tl.store(BITS + at, _bits(X, REAL, PROTECTED, at, tokens, RACING), mask=at < tokens)
    tl.debug_barrier()


@triton.jit
def _counts(BITS, tokens, a, b, c, BN: tl.constexpr):
    """How many bits are at least a, b and c, which ascend."""
    one = tl.zeros([BN], tl.int32)
    two = tl.zeros([BN], tl.int32)
    three = tl.zeros([BN], tl.int32)
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        bits = tl.load(BITS + at, mask=at < tokens, other=-1)
        one += (bits >= a).to(tl.int32)
        two += (bits >= b).to(tl.int32)
        three += (bits >= c).to(tl.int32)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def _sums(BITS, tokens, a, b, c, BN: tl.constexpr):
    """Sums of the scores whose bits are at least a, b and c, none of them negative."""
    one = tl.zeros([BN], tl.float64)
    two = tl.zeros([BN], tl.float64)
    three = tl.zeros([BN], tl.float64)
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        bits = tl.load(BITS + at, mask=at < tokens, other=-1)
        x = tl.cast(tl.maximum(bits, 0), tl.float32, bitcast=True).to(tl.float64)
        one += tl.where(bits >= a, x, 0.0)
        two += tl.where(bits >= b, x, 0.0)
        three += tl.where(bits >= c, x, 0.0)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def _select_kernel(
    RANK, MASS, P, BUDGET, REAL, PROTECTED, KEEP, INDEX, COUNT, tokens, TOL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    RANK += b * tokens
    REAL += b * tokens
    PROTECTED += b * tokens
    KEEP += b * tokens
    INDEX += b * tokens  # holds bits before it holds what it is for
    num_real = 0
    racing = 0
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        there = tl.load(REAL + at, mask=at < tokens, other=0) != 0
        own = there & (tl.load(PROTECTED + at, mask=at < tokens, other=0) != 0)
        num_real += tl.sum(there.to(tl.int32), 0)
        racing += tl.sum((there & (own == 0)).to(tl.int32), 0)
    num_protected = num_real - racing
    most = 0x7FFFFFFF  # of no number
    if MASS is not None:
        MASS += b * tokens
        _note(INDEX, MASS, REAL, PROTECTED, tokens, False, BN)
        share = tl.load(P + b).to(tl.float64)
        all_mass, large, _ = _sums(INDEX, tokens, 0, 1 << 30, most, BN)
        target = (share - TOL) * all_mass
        # The largest mass t with sum(mass >= t) >= target: all above t are needed, and so many of those that equal it.
        # Two bits at a time.
        cut = tl.where(large >= target, 1 << 30, 0)
        for step in range(15):
            shift = 28 - 2 * step
            one, two, three = _sums(INDEX, tokens, cut | (1 << shift), cut | (2 << shift), cut | (3 << shift), BN)
            reached = (one >= target).to(tl.int32) + (two >= target).to(tl.int32) + (three >= target).to(tl.int32)
            cut = cut | (reached << shift)
        beyond = tl.minimum(cut, most - 1) + 1
        reached, _, _ = _sums(INDEX, tokens, beyond, most, most, BN)
        level, above, _ = _counts(INDEX, tokens, cut, beyond, most, BN)
        value = tl.cast(cut, tl.float32, bitcast=True).to(tl.float64)
        equal = tl.ceil((target - reached) / tl.where(value > 0, value, 1.0)).to(tl.int32)
        equal = tl.minimum(tl.maximum(equal, 1), level - above)
        wanted = tl.where(target > 0, above + equal, 1)
        wanted = tl.where(share >= 1, num_real, tl.minimum(wanted, num_real))
    else:
        wanted = tl.minimum(tl.load(BUDGET + b).to(tl.int32), num_real)
    wanted = tl.maximum(wanted, num_protected)
    # The rest-th largest rank among the others; of those that equal it, the earlier ones.
    rest = wanted - num_protected
    _note(INDEX, RANK, REAL, PROTECTED, tokens, True, BN)
    large, _, _ = _counts(INDEX, tokens, 1 << 30, most, most, BN)
    cut = tl.where(large >= rest, 1 << 30, 0)
    for step in range(15):
        shift = 28 - 2 * step
        one, two, three = _counts(INDEX, tokens, cut | (1 << shift), cut | (2 << shift), cut | (3 << shift), BN)
        cut = cut | (((one >= rest).to(tl.int32) + (two >= rest).to(tl.int32) + (three >= rest).to(tl.int32)) << shift)
    above, _, _ = _counts(INDEX, tokens, tl.minimum(cut, most - 1) + 1, most, most, BN)
    room = rest - above
    tl.debug_barrier()  # nobody reads the bits any more
    kept = 0
    ties = 0
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        there = at < tokens
        own = (tl.load(REAL + at, mask=there, other=0) != 0) & (tl.load(PROTECTED + at, mask=there, other=0) != 0)
        bits = _bits(RANK, REAL, PROTECTED, at, tokens, True)
        tie = bits == cut
        place = ties + tl.cumsum(tie.to(tl.int32), 0)
        keep = own | (bits > cut) | (tie & (place <= room))
        slot = kept + tl.cumsum(keep.to(tl.int32), 0)
        tl.store(INDEX + slot - 1, at, mask=keep)
        tl.store(KEEP + at, keep, mask=there)
        ties += tl.sum(tie.to(tl.int32), 0)
        kept += tl.sum(keep.to(tl.int32), 0)
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        tl.store(INDEX + at, 0, mask=(at >= kept) & (at < tokens))
    tl.store(COUNT + b, kept)


def select_tokens_triton(
    rank: Tensor, mass: Tensor | None, p: Tensor | None, budget: Tensor | None, real: Tensor, protected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``select_tokens``."""
    rank, real, protected = rank.contiguous(), real.contiguous(), protected.contiguous()
    mass, p, budget = (None if x is None else x.contiguous() for x in (mass, p, budget))
    batch, tokens = rank.shape
    keep = torch.empty((batch, tokens), dtype=torch.bool, device=rank.device)
    index = torch.empty((batch, tokens), dtype=torch.int32, device=rank.device)
    count = torch.empty(batch, dtype=torch.int32, device=rank.device)
    tile = min(1024, max(512, triton.next_power_of_2(tokens)))
    _select_kernel[(batch,)](
        rank, mass, p, budget, real, protected, keep, index, count, tokens,
        TOL=TOLERANCE, BN=tile, num_warps=tile // 128,
    )  # fmt: skip
    return keep, index, count
