"""BLADE's adaptive block-sparse attention (arXiv 2508.10774): probe, select, attend.

A video is cut into blocks of consecutive tokens along a space-filling curve (``hone_video.orders``). A few tokens of
every block are compared (``prober``); each query block keeps the key blocks that matter to it (``select_blocks``);
softmax attention runs over those (ASA) and, in the same softmax, over mean-pooled tokens of the whole sequence (ASA_G).
Selection has no gradient; attention and pooling have exact ones.

Everywhere ``q, k, v`` hold the video tokens first, in curve order, and then the text tokens, if text is in the
sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import hone_kernels.block_select as block_select
import torch
import torch.nn.functional as F
from hone_core.tensors import plain_tensors
from hone_kernels.attention import BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.block_select import SelectedBlocks
from hone_kernels.group_means import group_means
from hone_kernels.launch import eager
from hone_kernels.precision import without_autocast
from jaxtyping import Float
from torch import Tensor

from .config import FACTORS, Backend, BladeConfig
from .prober import probe
from .pyramid import pyramid_attention, pyramid_density, pyramid_factors
from .static import static_scores

__all__ = [
    "Stats",
    "adaptive_sparse_attention",
    "mass_recall",
    "pool_tokens",
    "runs_dense",
    "select_blocks",
    "sparse_layout",
]


@dataclass(frozen=True)
class Stats:
    """What one call of sparse attention did; reading a value waits for the device, computing it did not.

    Attributes:
        density: float32 ``[B, H]``, query-key pairs computed over all pairs, ASA_G's pooled keys not counted; a pair of
            blocks that the pyramid reads at factor r counts ``1 / r``.
        pooled: Pooled keys over keys: what ASA_G adds to the density.
        clamped: float32 ``[B, H]``, share of query blocks (those without text) whose threshold asked for more than the
            upper clamp: at 1 the method is a plain top-k. Of the pyramid, share of pairs that the similarity cap made
            finer.
        recall: float32 ``[B, H]`` or None, share of dense attention's probability that lies on kept pairs, at whatever
            factor.
        levels: float32 ``[B, H, 4]``, share of the pairs of blocks that the pyramid reads at factors 1, 2, 4, 8; None
            for other masks.
    """

    density: Float[Tensor, "batch heads"]
    pooled: float
    clamped: Float[Tensor, "batch heads"]
    recall: Float[Tensor, "batch heads"] | None = None
    levels: Float[Tensor, "batch heads 4"] | None = None


def runs_dense(cfg: BladeConfig, tokens: int, layer: int | Tensor) -> bool:
    """Whether this layer at this length is left dense (``mask``, ``min_tokens``, ``dense_layers``)."""
    return cfg.mask == "dense" or tokens < cfg.min_tokens or layer in cfg.dense_layers


def adaptive_sparse_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    cfg: BladeConfig,
    text_tokens: int = 0,
    layer: int | Tensor = 0,
    grid: tuple[int, int, int] | None = None,
    scale: float | None = None,
    return_stats: bool = False,
    recall: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """ASA, or ASA_G where ``cfg.pool`` is set: attention over the blocks that the prober keeps, and over pooled keys.

    Args:
        q: Queries, after QK-norm and rotary embedding: video in curve order, then text.
        k: Keys, likewise.
        v: Values, likewise.
        cfg: The method's settings; ``dense_steps`` is the caller's business, who knows the step.
        text_tokens: Text tokens at the end of the sequence; 0 where text has its own cross-attention.
        layer: Which layer this is: it draws its own samples.
        grid: Video tokens along (frames, height, width); needed for ``mask="window"`` only.
        scale: Factor on the logits; ``dim ** -0.5`` if None.
        return_stats: Whether to return ``Stats`` too.
        recall: Whether these shall hold the recall, which costs a dense attention.

    Returns:
        ``out`` like q, or ``(out, stats)``.

    Source: Algorithm 1 and the ASA_G equation, which the authors compute as two attentions merged by their log-sum-exp;
        one softmax over both sets of keys is the same function.
    Differs: the gradient is exact. The release's kernel drops the part that flows through the log-sum-exp of its merge.
    """
    _check(q, k, v, text_tokens)
    if runs_dense(cfg, k.shape[2], layer):
        out = _dense(q, k, v, scale)
        ones = torch.ones(q.shape[:2], dtype=torch.float32, device=q.device)
        return (out, Stats(ones, 0.0, torch.zeros_like(ones), ones if recall else None)) if return_stats else out

    if cfg.mask == "pyramid":
        factors, capped = _pyramid(q, k, cfg=cfg, text_tokens=text_tokens, layer=layer, scale=scale)
        out = pyramid_attention(q, k, v, factors, cfg, scale=scale)
        if not return_stats:
            return out
        stats = Stats(
            density=pyramid_density(factors, k.shape[2], cfg.block),
            pooled=0.0,
            clamped=capped,
            recall=mass_recall(q, k, _read(factors, q, k, cfg), scale=scale, backend=cfg.backend) if recall else None,
            levels=torch.stack([(factors == factor).float().mean((-1, -2)) for factor in FACTORS], dim=-1),
        )
        return out, stats
    kept = _kept_blocks(q, k, cfg=cfg, text_tokens=text_tokens, layer=layer, grid=grid, scale=scale)
    layout = _layout(kept, q, k, cfg)
    pooled = None
    if cfg.pool:
        text = 0 if cfg.pool_text else text_tokens
        pooled = pool_tokens(k, v, cfg.pool, text_tokens=text, exact=cfg.pool_exact, backend=cfg.scoring_backend)
    out = block_sparse_attention(q, k, v, layout, scale=scale, pooled=pooled, backend=cfg.backend)
    if not return_stats:
        return out
    text_blocks = _text_blocks(q.shape[2], text_tokens, cfg)
    stats = Stats(
        density=_density(layout).expand(q.shape[:2]),
        pooled=0.0 if pooled is None else pooled.k.shape[2] / k.shape[2],
        clamped=kept.clamped[..., : kept.clamped.shape[-1] - text_blocks].float().mean(-1).expand(q.shape[:2]),
        recall=mass_recall(q, k, layout, scale=scale, backend=cfg.backend) if recall else None,
    )
    return out, stats


@without_autocast
def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def sparse_layout(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    cfg: BladeConfig,
    text_tokens: int = 0,
    layer: int | Tensor = 0,
    grid: tuple[int, int, int] | None = None,
    scale: float | None = None,
) -> BlockLayout:
    """The block pairs that ``adaptive_sparse_attention`` would compute, at whatever factor; arguments as there."""
    _check(q, k, k, text_tokens)
    if runs_dense(cfg, k.shape[2], layer):
        return BlockLayout.dense(q.shape[2], k.shape[2], block_q=cfg.block, block_k=cfg.block, device=q.device)
    if cfg.mask == "pyramid":
        return _read(_pyramid(q, k, cfg=cfg, text_tokens=text_tokens, layer=layer, scale=scale)[0], q, k, cfg)
    kept = _kept_blocks(q, k, cfg=cfg, text_tokens=text_tokens, layer=layer, grid=grid, scale=scale)
    return _layout(kept, q, k, cfg)


@torch.no_grad()
def _pyramid(
    q: Tensor, k: Tensor, *, cfg: BladeConfig, text_tokens: int, layer: int | Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Pool factors of all pairs of blocks, and the share that the similarity cap changed."""
    scores = probe(q, k, cfg, layer=layer, scale=scale)
    return pyramid_factors(scores, k, cfg, text_blocks=_text_blocks(k.shape[2], text_tokens, cfg))


def _read(factors: Tensor, q: Tensor, k: Tensor, cfg: BladeConfig) -> BlockLayout:
    """The pairs that are not skipped."""
    return BlockLayout.from_mask(factors > 0, q.shape[2], k.shape[2], block_q=cfg.block, block_k=cfg.block)


@torch.no_grad()
def _kept_blocks(
    q: Tensor,
    k: Tensor,
    *,
    cfg: BladeConfig,
    text_tokens: int,
    layer: int | Tensor,
    grid: tuple[int, int, int] | None,
    scale: float | None,
) -> SelectedBlocks:
    if cfg.mask == "adaptive":
        scores = probe(q, k, cfg, layer=layer, scale=scale)
        if cfg.score == "official" and q.dtype.itemsize == 2:
            scores = scores.to(q.dtype)  # which they are rounded to
    else:
        scores = static_scores(cfg, k.shape[2], text_tokens, grid=grid, heads=q.shape[1], layer=layer, device=q.device)
    return select_blocks(scores, cfg, text_blocks=_text_blocks(k.shape[2], text_tokens, cfg))


def select_blocks(
    scores: Float[Tensor, "batch heads blocks blocks"], cfg: BladeConfig, *, text_blocks: int = 0
) -> SelectedBlocks:
    """The key blocks each query block keeps, from its scores.

    Rank a row's scores; keep the fewest whose sum reaches ``cfg.mass`` of the row's total; clamp their number to
    ``[min_density, max_density]`` of the row. With ``selection="topk"``, and for the static masks, keep the upper
    clamp.

    Args:
        scores: Not negative. Those of 16 bits are summed up in 16 bits, by torch whatever the backend.
        cfg: ``mass``, ``inclusive``, ``min_density``, ``max_density``, ``selection``, ``keep_diagonal``.
        text_blocks: So many last blocks read, and are read by, every block.

    Returns:
        ``(kv_idx, kv_num, clamped)``, see ``hone_kernels.block_select``.

    Source: the paper's mask, "smallest set with cumulative score >= tau"; clamps and text blocks are the release's.
    Differs: ``inclusive=False`` is the release, which keeps one block fewer than the threshold needs. Its text blocks
        are the last two, whatever the length of the text. Ties, of which its score has many, fall as the rounding
        to 16 bits lets them; in wider dtypes they are spread over the row.
    """
    low, high = cfg.keep_bounds(scores.shape[-1])
    narrow = scores.dtype.itemsize == 2
    return block_select.select_blocks(
        scores,
        min_keep=low,
        max_keep=high,
        mass=cfg.mass if cfg.selection == "threshold" and cfg.mask == "adaptive" else None,
        inclusive=cfg.inclusive,
        keep_diagonal=cfg.keep_diagonal,
        forced=text_blocks,
        spread_ties=cfg.mask == "adaptive" and not narrow,
        backend="reference" if narrow else cfg.scoring_backend,
    )


def pool_tokens(
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim"],
    n: int,
    *,
    text_tokens: int = 0,
    exact: bool = True,
    backend: Backend = "auto",
) -> PooledKV:
    """Global tokens of ASA_G: means of n consecutive keys and values, which weigh as n by ``ln n`` on their logits.

    Args:
        k: Keys in curve order, after rotary embedding.
        v: Values.
        n: Tokens in a group.
        text_tokens: Tokens at the end that are left out.
        exact: Whether a short last group counts with its true size; if not, copies of the last token fill it up.
        backend: Of ``hone_kernels.group_means``.

    Source: K_aug = [K, MeanPool_n(K)], likewise V, with ``+ ln n`` on the pooled logits.
    """
    tokens = k.shape[2] - text_tokens
    if tokens < 1:
        raise ValueError(f"there must be video tokens to pool; got {k.shape[2]} tokens of which {text_tokens} are text")
    means = group_means(k, v, n, tokens=tokens, exact=exact, backend=backend)
    whole, rest = tokens // n, tokens % n
    groups = (n, whole, (rest if exact else n) if rest else 0, _wide(k.dtype))
    plain = eager(k, v) and not (k.is_cuda and torch.cuda.is_current_stream_capturing())
    return PooledKV(*means, _kept_bias(*groups, k.device) if plain else _bias(*groups, k.device))


def _bias(n: int, whole: int, last: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Logarithms of what groups count as: ``whole`` ones of n, and behind them, if it is not 0, one of ``last``."""
    bias = torch.full((1, 1, whole), math.log(n), dtype=dtype, device=device)
    return torch.cat([bias, bias.new_full((1, 1, 1), math.log(last))], dim=2) if last else bias


@lru_cache(maxsize=64)
def _kept_bias(n: int, whole: int, last: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, which a kernel can keep its own form of: do not write into it."""
    with plain_tensors():
        # From the host, so that it is there on every stream.
        return _bias(n, whole, last, dtype, "cpu").to(device)


@torch.no_grad()
def mass_recall(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    layout: BlockLayout,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch heads"]:
    """Share of dense attention's probability on the listed pairs, averaged over queries; in [0, 1].

    A row's share is ``exp(lse_listed - lse_all)``, so no probability matrix is formed.
    """
    dense = BlockLayout.dense(
        layout.tokens_q, layout.tokens_k, block_q=layout.block_q, block_k=layout.block_k, device=q.device
    )
    listed, full = (
        block_sparse_attention(q, k, k, which, scale=scale, return_lse=True, backend=backend)[1]
        for which in (layout, dense)
    )
    return (listed - full).exp().mean(-1).clamp(max=1).float()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, text_tokens: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim]; got {list(x.shape)}")
        if not x.numel():
            raise ValueError(f"{name} must not be empty; got {list(x.shape)}. Skip the call where there is nothing")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"sparse self-attention needs as many queries as keys; got {q.shape[2]} and {k.shape[2]}. Leave "
            "cross-attention dense"
        )
    if k.shape != v.shape:
        raise ValueError(
            f"k and v must have the same shape; got {list(k.shape)} and {list(v.shape)}. Pass the values of these keys"
        )
    if not 0 <= text_tokens < q.shape[2]:
        raise ValueError(f"text_tokens must lie in [0, {q.shape[2]}), the length of the sequence; got {text_tokens}")


def _text_blocks(tokens: int, text_tokens: int, cfg: BladeConfig) -> int:
    """Blocks that hold a text token and are to be kept everywhere."""
    if not text_tokens or not cfg.force_text:
        return 0
    return -(-tokens // cfg.block) - (tokens - text_tokens) // cfg.block


def _layout(kept: SelectedBlocks, q: Tensor, k: Tensor, cfg: BladeConfig) -> BlockLayout:
    return BlockLayout(kept.kv_num, kept.kv_idx, q.shape[2], k.shape[2], cfg.block, cfg.block, check=False)


def _density(layout: BlockLayout) -> Float[Tensor, "batch heads"]:
    sizes = layout.key_counts()[0].double()  # queries and keys share their blocks
    pairs = torch.einsum("bhij,i,j->bh", layout.to_mask().double(), sizes, sizes)
    return (pairs / sizes.sum() ** 2).float()
