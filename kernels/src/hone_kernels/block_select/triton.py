"""Block selection in Triton: one program per row, which bisects on the bits of the scores instead of sorting them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hone_kernels.launch import Notes, geometry, launch

from .reference import tie_steps

__all__ = ["select_blocks_triton"]


@triton.jit
def _select_kernel(
    SCORES, IDX, NUM, CLAMPED, num_q, num_k, width, min_keep, max_keep, forced, mass, tie_step, tie_turn,
    NKP: tl.constexpr, KEY_BITS: tl.constexpr, TOP_K: tl.constexpr, INCLUSIVE: tl.constexpr, DIAGONAL: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * num_q + i
    j = tl.arange(0, NKP)
    real = j < num_k
    x = tl.abs(tl.load(SCORES + row * num_k + j, mask=real, other=0.0))  # drops the sign of a zero
    # Non-negative floats compare as their bits do. The diagonal ranks before everything, so it leaves the race.
    bits = x.to(tl.int32, bitcast=True)
    target = tl.sum(x, 0) * mass
    first = 0
    own = j != j
    if DIAGONAL:
        own = (j == i) & real
        first = tl.sum(own.to(tl.int32), 0)
        target -= tl.sum(tl.where(own, x, 0.0), 0)
    racing = real & (own == 0)
    bits = tl.where(racing, bits, -1)
    x = tl.where(racing, x, 0.0)
    if TOP_K:
        wanted = max_keep
    else:
        # The largest score t with sum(x >= t) >= target: all above t are needed, and so many of those that equal it.
        cut = 0
        for bit in range(31):
            trial = cut | (1 << (30 - bit))
            cut = tl.where(tl.sum(tl.where(bits >= trial, x, 0.0), 0) >= target, trial, cut)
        above = tl.sum((bits > cut).to(tl.int32), 0)
        missing = target - tl.sum(tl.where(bits > cut, x, 0.0), 0)
        value = tl.max(tl.where(bits == cut, x, 0.0), 0)
        equal = tl.ceil(missing / tl.where(value > 0, value, 1.0)).to(tl.int32)
        equal = tl.minimum(tl.maximum(equal, 1), tl.sum((bits == cut).to(tl.int32), 0))
        wanted = first + tl.where(target > 0, above + equal, 0)
        wanted = tl.maximum(wanted, 1)
        if not INCLUSIVE:
            wanted -= 1
    clamped = wanted > max_keep
    rest = tl.minimum(tl.maximum(wanted, min_keep), max_keep) - first
    # The rest-th largest score; of those that equal it, the lower blocks, or those with the lower keys.
    cut = 0
    for bit in range(31):
        trial = cut | (1 << (30 - bit))
        cut = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= rest, trial, cut)
    tie = bits == cut
    room = rest - tl.sum((bits > cut).to(tl.int32), 0)
    if SPREAD:
        key = (i * tie_turn + j * tie_step) % num_k
        last_key = 0
        for bit in range(KEY_BITS):
            trial = last_key | (1 << (KEY_BITS - 1 - bit))
            last_key = tl.where(tl.sum((tie & (key < trial)).to(tl.int32), 0) < room, trial, last_key)
        keep = own | (bits > cut) | (tie & (key <= last_key) & (room > 0))
    else:
        keep = own | (bits > cut) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
    if forced > 0:
        last = i >= num_q - forced
        keep = (keep | (j >= num_k - forced) | last) & real
        clamped = clamped & (last == 0)
    at = tl.cumsum(keep.to(tl.int32), 0)
    count = tl.sum(keep.to(tl.int32), 0)
    tl.store(IDX + row * width + at - 1, j, mask=keep)
    tl.store(IDX + row * width + j, 0, mask=(j >= count) & (j < width))
    tl.store(NUM + row, count)
    tl.store(CLAMPED + row, clamped)


def select_blocks_triton(
    scores: Tensor,
    min_keep: int,
    max_keep: int,
    mass: float | None,
    inclusive: bool,
    keep_diagonal: bool,
    forced: int,
    spread_ties: bool = False,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``select_blocks``; ``notes`` is for ``launch``."""
    scores = scores.contiguous()
    batch, heads, num_q, num_k = scores.shape
    width = num_k if forced else max_keep
    idx = torch.empty((batch, heads, num_q, width), dtype=torch.int32, device=scores.device)
    num = torch.empty((batch, heads, num_q), dtype=torch.int32, device=scores.device)
    clamped = torch.empty((batch, heads, num_q), dtype=torch.bool, device=scores.device)
    if notes is not None:
        for x in (idx, num, clamped):
            notes.made(x)
    options = (min_keep, max_keep, mass, inclusive, keep_diagonal, forced, spread_ties)

    def build(scores, idx, num, clamped):
        padded = triton.next_power_of_2(num_k)
        args = (
            scores, idx, num, clamped, num_q, num_k, width, min_keep, max_keep, forced, 1.0 if mass is None else mass,
            *tie_steps(num_k),
        )  # fmt: skip
        named = dict(
            NKP=padded, KEY_BITS=padded.bit_length() - 1, TOP_K=mass is None, INCLUSIVE=inclusive,
            DIAGONAL=keep_diagonal, SPREAD=spread_ties, num_warps=1 if padded <= 1024 else 4,
        )  # fmt: skip
        return (num_q, batch * heads), args, named

    facts = geometry(scores)
    launch(_select_kernel, facts and (facts, options), (scores, idx, num, clamped), build, notes)
    return idx, num, clamped
