"""Token selection in Triton: one program per sample, which bisects on the bits of the scores instead of sorting them.

A sample's scores are walked through tile by tile, a few dozen times; after the first they come from the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import TOLERANCE

__all__ = ["select_tokens_triton"]


@triton.jit
def _load_bits(X, REAL, PROTECTED, at, tokens, RACING: tl.constexpr):
    """Scores and their bits, as which floats from 0 compare; -1 where no token is or, racing, a protected one."""
    there = tl.load(REAL + at, mask=at < tokens, other=0) != 0
    if RACING:
        there = there & (tl.load(PROTECTED + at, mask=at < tokens, other=0) == 0)
    x = tl.abs(tl.load(X + at, mask=there, other=0.0))  # drops the sign of a zero
    return x, tl.where(there, x.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(X, REAL, PROTECTED, tokens, least, RACING: tl.constexpr, BN: tl.constexpr):
    """How many bits are at least ``least``."""
    count = tl.zeros([BN], tl.int32)
    for start in range(0, tokens, BN):
        _, bits = _load_bits(X, REAL, PROTECTED, start + tl.arange(0, BN), tokens, RACING)
        count += (bits >= least).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _sum(X, REAL, tokens, least, BN: tl.constexpr):
    """Sum of the scores whose bits are at least ``least``."""
    total = tl.zeros([BN], tl.float64)
    for start in range(0, tokens, BN):
        x, bits = _load_bits(X, REAL, REAL, start + tl.arange(0, BN), tokens, False)
        total += tl.where(bits >= least, x.to(tl.float64), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _select_kernel(
    RANK, MASS, P, BUDGET, REAL, PROTECTED, KEEP, INDEX, COUNT, tokens, TOL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    RANK += b * tokens
    REAL += b * tokens
    PROTECTED += b * tokens
    KEEP += b * tokens
    INDEX += b * tokens
    num_real = 0
    racing = 0
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        there = tl.load(REAL + at, mask=at < tokens, other=0) != 0
        own = there & (tl.load(PROTECTED + at, mask=at < tokens, other=0) != 0)
        num_real += tl.sum(there.to(tl.int32), 0)
        racing += tl.sum((there & (own == 0)).to(tl.int32), 0)
    num_protected = num_real - racing
    if MASS is not None:
        MASS += b * tokens
        share = tl.load(P + b).to(tl.float64)
        target = (share - TOL) * _sum(MASS, REAL, tokens, 0, BN)
        # The largest mass t with sum(mass >= t) >= target: all above t are needed, and so many of those that equal it.
        cut = 0
        for bit in range(31):
            trial = cut | (1 << (30 - bit))
            cut = tl.where(_sum(MASS, REAL, tokens, trial, BN) >= target, trial, cut)
        beyond = tl.minimum(cut, 0x7FFFFFFE) + 1
        reached = _sum(MASS, REAL, tokens, beyond, BN)
        above = _count(MASS, REAL, REAL, tokens, beyond, False, BN)
        level = _count(MASS, REAL, REAL, tokens, cut, False, BN)
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
    cut = 0
    for bit in range(31):
        trial = cut | (1 << (30 - bit))
        cut = tl.where(_count(RANK, REAL, PROTECTED, tokens, trial, True, BN) >= rest, trial, cut)
    room = rest - _count(RANK, REAL, PROTECTED, tokens, tl.minimum(cut, 0x7FFFFFFE) + 1, True, BN)
    kept = 0
    ties = 0
    for start in range(0, tokens, BN):
        at = start + tl.arange(0, BN)
        there = at < tokens
        own = (tl.load(REAL + at, mask=there, other=0) != 0) & (tl.load(PROTECTED + at, mask=there, other=0) != 0)
        _, bits = _load_bits(RANK, REAL, PROTECTED, at, tokens, True)
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
    tile = min(2048, max(512, triton.next_power_of_2(tokens)))
    _select_kernel[(batch,)](
        rank, mass, p, budget, real, protected, keep, index, count, tokens,
        TOL=TOLERANCE, BN=tile, num_warps=tile // 128,
    )  # fmt: skip
    return keep, index, count
