"""Token selection in Triton: one program per sample, which bisects on the bits of the scores instead of sorting them.

A sample's scores are gone through some three dozen times. Of up to ``_WHOLE`` tokens they are held in registers; more
are walked through in tiles of ``_TILE``, and come from the L1 cache after the first time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hone_kernels.launch import dependent, launches_overlap

from .reference import TOLERANCE

__all__ = ["select_tokens_triton"]

_WHOLE, _TILE = 8192, 4096


@triton.jit
def _bits(X, REAL, PROTECTED, at, tokens, RACING: tl.constexpr):
    """Bits of scores, as which floats from 0 compare; -1 where no token is or, racing, a protected one."""
    there = tl.load(REAL + at, mask=at < tokens, other=0) != 0
    if RACING:
        there = there & (tl.load(PROTECTED + at, mask=at < tokens, other=0) == 0)
    x = tl.abs(tl.load(X + at, mask=there, other=0.0))  # drops the sign of a zero
    return tl.where(there, x.to(tl.int32, bitcast=True), -1)


@triton.jit
def _note(BITS, X, REAL, PROTECTED, tokens, RACING: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr):
    """All bits; or write them down, to be walked through with one load each."""
    bits = _bits(X, REAL, PROTECTED, tl.arange(0, BN), tokens, RACING)
    if not WHOLE:
        tl.debug_barrier()  # nobody reads the last ones any more
        for start in range(0, tokens, BN):
            at = start + tl.arange(0, BN)
            tl.store(BITS + at, _bits(X, REAL, PROTECTED, at, tokens, RACING), mask=at < tokens)
        tl.debug_barrier()
    return bits


@triton.jit
def _totals(one, two, three):
    """Sums of three vectors, in one reduction."""
    first, second = tl.split(tl.sum(tl.join(tl.join(one, two), tl.join(three, three)), 0))
    a, b = tl.split(first)
    c, _ = tl.split(second)
    return a, b, c


@triton.jit
def _counts(BITS, bits, tokens, a, b, c, BN: tl.constexpr, WHOLE: tl.constexpr):
    """How many bits are at least a, b and c, which ascend."""
    one = (bits >= a).to(tl.int32)
    two = (bits >= b).to(tl.int32)
    three = (bits >= c).to(tl.int32)
    if not WHOLE:
        for start in range(BN, tokens, BN):
            at = start + tl.arange(0, BN)
            more = tl.load(BITS + at, mask=at < tokens, other=-1)
            one += (more >= a).to(tl.int32)
            two += (more >= b).to(tl.int32)
            three += (more >= c).to(tl.int32)
    return _totals(one, two, three)


@triton.jit
def _sums(BITS, bits, tokens, a, b, c, BN: tl.constexpr, WHOLE: tl.constexpr):
    """Sums of the scores whose bits are at least a, b and c, none of them negative."""
    x = tl.cast(tl.maximum(bits, 0), tl.float32, bitcast=True).to(tl.float64)
    one = tl.where(bits >= a, x, 0.0)
    two = tl.where(bits >= b, x, 0.0)
    three = tl.where(bits >= c, x, 0.0)
    if not WHOLE:
        for start in range(BN, tokens, BN):
            at = start + tl.arange(0, BN)
            more = tl.load(BITS + at, mask=at < tokens, other=-1)
            x = tl.cast(tl.maximum(more, 0), tl.float32, bitcast=True).to(tl.float64)
            one += tl.where(more >= a, x, 0.0)
            two += tl.where(more >= b, x, 0.0)
            three += tl.where(more >= c, x, 0.0)
    return _totals(one, two, three)


@triton.jit
def _select_kernel(
    RANK, MASS, P, BUDGET, REAL, PROTECTED, KEEP, INDEX, COUNT, tokens,
    TOL: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    RANK += b * tokens
    REAL += b * tokens
    PROTECTED += b * tokens
    KEEP += b * tokens
    INDEX += b * tokens  # holds bits before it holds what it is for, where they are many
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
        bits = _note(INDEX, MASS, REAL, PROTECTED, tokens, False, BN, WHOLE)
        share = tl.load(P + b).to(tl.float64)
        all_mass, large, _ = _sums(INDEX, bits, tokens, 0, 1 << 30, most, BN, WHOLE)
        target = (share - TOL) * all_mass
        # The largest mass t with sum(mass >= t) >= target: all above t are needed, and so many of those that equal it.
        # Two bits at a time.
        cut = tl.where(large >= target, 1 << 30, 0)
        for step in range(15):
            shift = 28 - 2 * step
            one, two, three = _sums(
                INDEX, bits, tokens, cut | (1 << shift), cut | (2 << shift), cut | (3 << shift), BN, WHOLE
            )
            reached = (one >= target).to(tl.int32) + (two >= target).to(tl.int32) + (three >= target).to(tl.int32)
            cut = cut | (reached << shift)
        beyond = tl.minimum(cut, most - 1) + 1
        reached, _, _ = _sums(INDEX, bits, tokens, beyond, most, most, BN, WHOLE)
        level, above, _ = _counts(INDEX, bits, tokens, cut, beyond, most, BN, WHOLE)
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
    bits = _note(INDEX, RANK, REAL, PROTECTED, tokens, True, BN, WHOLE)
    large, _, _ = _counts(INDEX, bits, tokens, 1 << 30, most, most, BN, WHOLE)
    reaching = tl.where(large >= rest, large, racing)
    cut = tl.where(large >= rest, 1 << 30, 0)
    step = 0
    # Where just so many reach the cut, its other bits decide nothing.
    while (step < 15) & (reaching != rest):
        shift = 28 - 2 * step
        one, two, three = _counts(
            INDEX, bits, tokens, cut | (1 << shift), cut | (2 << shift), cut | (3 << shift), BN, WHOLE
        )
        cut = cut | (((one >= rest).to(tl.int32) + (two >= rest).to(tl.int32) + (three >= rest).to(tl.int32)) << shift)
        reaching = tl.where(one >= rest, one, reaching)
        reaching = tl.where(two >= rest, two, reaching)
        reaching = tl.where(three >= rest, three, reaching)
        step += 1
    above, _, _ = _counts(INDEX, bits, tokens, tl.minimum(cut, most - 1) + 1, most, most, BN, WHOLE)
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
    whole, overlap = tokens <= _WHOLE, launches_overlap(rank.device)
    tile = max(512, triton.next_power_of_2(tokens)) if whole else _TILE
    _select_kernel[(batch,)](
        rank, mass, p, budget, real, protected, keep, index, count, tokens,
        TOL=TOLERANCE, BN=tile, WHOLE=whole, OVERLAP=overlap, num_warps=max(4, tile // (512 if whole else 256)),
        **dependent(overlap),
    )  # fmt: skip
    return keep, index, count
