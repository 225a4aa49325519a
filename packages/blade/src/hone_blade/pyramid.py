"""Pyramid Sparse Attention (arXiv 2512.04025), by BLADE's authors: unimportant blocks are read coarsely, not skipped.

Every pair of blocks has a pool factor: 1 reads the keys as they are, r = 2, 4 or 8 reads the means of r consecutive
keys and values, which weigh as r by ``ln r`` on their logits, and 0 skips the pair. All of it is one softmax.

One kernel computes it, which gathers blocks of few means into full tiles (``hone_kernels.pyramid_attention``).
"""

from __future__ import annotations

import hone_kernels.pyramid_attention as kernels
import torch
import torch.nn.functional as F
from hone_kernels.precision import without_autocast
from jaxtyping import Float, Int
from torch import Tensor

from .config import FACTORS, BladeConfig

__all__ = ["pyramid_attention", "pyramid_density", "pyramid_factors", "similarity_cap"]


@torch.no_grad()
def pyramid_factors(
    scores: Float[Tensor, "batch heads blocks blocks"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    cfg: BladeConfig,
    *,
    text_blocks: int = 0,
) -> tuple[Int[Tensor, "batch heads blocks blocks"], Float[Tensor, "batch heads"]]:
    """The pool factor of every pair of blocks, 0 where it is skipped.

    A row's blocks are ranked by score, its own block first with ``cfg.keep_diagonal``. With ``selection="threshold"`` a
    block is read at the finest factor whose bound in ``cfg.levels`` is above the share of the scores ranked before it;
    with ``"topk"`` the bounds count blocks. The best block is read even where the bounds skip it, at the finest factor
    that they allow. A short last block, and text, is read as it is.

    Args:
        scores: Not negative.
        k: Keys in curve order, which the similarity cap looks at.
        cfg: ``levels``, ``similarity``, ``selection``, ``inclusive``, ``min_density``, ``keep_diagonal``.
        text_blocks: So many last blocks are read, and read, at factor 1.

    Returns:
        Factors int32, and the share of a head's pairs which the similarity cap made finer.

    Source: Algorithm 2 of the paper; ``similarity`` and the floor under factor 1 are the release's.
    Differs: Algorithm 2 compares the sum *with* the block, by which a block that alone exceeds the last bound is
        skipped; ``inclusive=False`` is that, but for the best block, without which a row could be empty. The release's
        floor is a block more, and it rounds counts up to whole tiles of its kernel.
    """
    num = scores.shape[-1]
    rank = scores
    if cfg.keep_diagonal:
        own = torch.eye(num, dtype=torch.bool, device=scores.device)
        rank = scores.masked_fill(own, torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(num, device=scores.device)
    if cfg.selection == "threshold":
        total = scores.sum(-1, keepdim=True, dtype=torch.float64)
        after = scores.gather(-1, order).double().cumsum(-1)
        before = F.pad(after[..., :-1], (1, 0))
        reads = [
            torch.ones_like(after, dtype=torch.bool) if bound >= 1
            else before < bound * total if cfg.inclusive
            else after <= bound * total
            for bound in cfg.levels
        ]  # fmt: skip
        if cfg.levels[0] > 0:
            reads[0] = reads[0] | (place < cfg.keep_bounds(num)[0])
    else:
        reads = [(place < int(num * bound + 1e-9)).expand_as(scores) for bound in cfg.levels]
    ranked = torch.zeros_like(order, dtype=torch.int32)
    for factor, read in reversed(list(zip(FACTORS, reads, strict=True))):
        ranked = ranked.masked_fill(read, factor)
    finest = next(factor for factor, bound in zip(FACTORS, cfg.levels, strict=True) if bound > 0)
    ranked = ranked.masked_fill((place == 0) & (ranked == 0), finest)
    factors = torch.zeros_like(ranked).scatter_(-1, order, ranked)
    capped = scores.new_zeros(scores.shape[:2], dtype=torch.float32)
    if cfg.similarity:
        cap = similarity_cap(k, cfg).repeat_interleave(scores.shape[1] // k.shape[1], dim=1).unsqueeze(2)
        lowered = (factors > cap).sum((-1, -2))
        capped = (lowered / (factors > 0).sum((-1, -2))).float()
        factors = torch.minimum(factors, cap)
    if k.shape[2] % cfg.block:
        factors[..., -1].clamp_(max=1)
    if text_blocks:
        factors[..., -text_blocks:] = 1
        factors[..., -text_blocks:, :] = 1
    return factors, capped


@torch.no_grad()
def similarity_cap(
    k: Float[Tensor, "batch kv_heads tokens dim"], cfg: BladeConfig
) -> Int[Tensor, "batch kv_heads blocks"]:
    """The coarsest factor at which each key block may be read: its groups' first and last keys have to be alike.

    That is the largest r whose mean cosine, over aligned groups of r keys, is above ``cfg.similarity``; else 1. A
    smaller r need not pass. A short last block has 1.

    Source: the release's ``sim`` cap.
    """
    whole = k.shape[2] // cfg.block
    keys = k[:, :, : whole * cfg.block].unflatten(2, (whole, cfg.block)).float()
    cap = torch.ones(keys.shape[:3], dtype=torch.int32, device=k.device)
    for factor, least in zip(FACTORS[1:], cfg.similarity, strict=True):
        groups = keys.unflatten(3, (-1, factor))
        alike = F.cosine_similarity(groups[..., 0, :], groups[..., -1, :], dim=-1).mean(-1)
        cap = cap.masked_fill(alike > least, factor)
    return F.pad(cap, (0, -(-k.shape[2] // cfg.block) - whole), value=1)


def pyramid_density(
    factors: Int[Tensor, "batch heads blocks blocks"], tokens: int, block: int
) -> Float[Tensor, "batch heads"]:
    """Query-key products over those of dense attention: a pair of blocks at factor r counts ``1 / r``."""
    sizes = (tokens - torch.arange(0, tokens, block, device=factors.device)).clamp(max=block).double()
    share = torch.where(factors > 0, 1 / factors.clamp(min=1).double(), 0.0)
    return (torch.einsum("bhij,i,j->bh", share, sizes, sizes) / tokens**2).float()


@without_autocast
def pyramid_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    factors: Int[Tensor, "batch heads blocks blocks"],
    cfg: BladeConfig,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Softmax attention in which every pair of blocks is read at its factor; gradients reach q, k and v exactly.

    Args:
        q: Queries in curve order.
        k: Keys, likewise; they are pooled here, hence after rotary embedding.
        v: Values, likewise.
        factors: Of each pair, as ``pyramid_factors`` gives them: at most 1 in the column of a short last block.
        cfg: ``block`` and ``backend``.
        scale: Factor on the logits; ``dim ** -0.5`` if None.

    Differs: the release's newer kernel merges two blocks whatever their size, which is wrong where a pooled block has
        less than half of its tile; and it fills a short last block with copies that count. Here blocks are exact.
    """
    return kernels.pyramid_attention(q, k, v, factors, block=cfg.block, scale=scale, backend=cfg.backend, check=False)
