"""Which tokens of a block the prober looks at, and the block scores it gets from them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, cast

import torch
from hone_core.tensors import plain_tensors
from hone_kernels.block_scores import block_scores
from jaxtyping import Float, Int
from torch import Tensor

from .config import BladeConfig, Offsets

__all__ = ["hash_numbers", "probe", "sample_index", "sample_offsets"]

Side = Literal["q", "k"]


def probe(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    cfg: BladeConfig,
    *,
    layer: int | Tensor = 0,
    scale: float | None = None,
) -> Float[Tensor, "batch heads blocks blocks"]:
    """Importance of every key block for every query block, rows summing to 1. Not differentiable.

    Args:
        q: Queries in curve order, after QK-norm and rotary embedding.
        k: Keys, likewise.
        cfg: ``score``, ``samples``, ``offsets``, ``seed``, ``block``, ``scoring_backend``.
        layer: Which layer draws the samples; under ``torch.compile`` a tensor ``[]`` on the CPU lets layers share a
            graph.
        scale: Factor on the logits; ``dim ** -0.5`` if None.

    Source: Algorithm 1 (efficient prober); ``score`` names the variants.
    """
    index = []
    sides: tuple[tuple[Side, Tensor], ...] = (("q", q), ("k", k))
    for side, x in sides:
        if cfg.score == "mean":
            index.append(sample_index(x.shape[2], cfg.block, cfg.block, "strided", device=x.device))
        elif cfg.offsets == "random":
            index.append(_random_index(q.shape[0], q.shape[1], x.shape[2], cfg.block, cfg.samples, x.device))
        else:
            index.append(
                sample_index(
                    x.shape[2], cfg.block, cfg.samples, cfg.offsets,
                    seed=cfg.seed, layer=layer, side=side, device=x.device,
                )
            )  # fmt: skip
    rounded = cfg.score == "official"
    return block_scores(q, k, *index, kind=cfg.score, scale=scale, rounded=rounded, backend=cfg.scoring_backend)


def sample_offsets(
    valid: int,
    samples: int,
    method: Offsets,
    *,
    block: int,
    seed: int = 0,
    layer: int = 0,
    side: Side = "q",
    device: torch.device | str = "cpu",
) -> Int[Tensor, " samples"]:
    """Positions inside one block that stand for it: distinct, ascending, the same on every device.

    Args:
        valid: Tokens the block has, 1 to ``block``.
        samples: How many to take.
        method: ``"seeded"`` ranks the positions by a hash of seed, layer, side and position; ``"strided"`` takes the
            middles of ``samples`` equal stretches.
        block: Tokens of a full block; a short block ranks its own positions as the full one does.
        seed: Of ``"seeded"``.
        layer: Likewise.
        side: Likewise; queries and keys draw independently.
        device: Where the result is wanted.

    Returns:
        int64; where the block has fewer tokens than samples, all of its tokens and then -1.
    """
    at = torch.arange(block, device=device)
    if method == "strided":
        rank = at if valid <= samples else (2 * at[:samples] + 1) * valid // (2 * samples)
    else:
        rank = hash_numbers(at, seed, layer, side).masked_fill(at >= valid, torch.iinfo(torch.int64).max).argsort()
    taken = rank[: min(samples, valid)].sort().values
    return torch.nn.functional.pad(taken, (0, samples - len(taken)), value=-1)


def hash_numbers(at: Tensor, *keys: int | str | Tensor) -> Tensor:
    """Well-mixed 63-bit numbers of the entries and the keys, by integer arithmetic that every device does alike."""
    state: int | Tensor = 0
    for key in keys:
        number = ord(key) if isinstance(key, str) else key
        # The low 63 bits: the same from Python's unbounded integers and from int64, which wraps.
        state = (state ^ number) * 0x5851F42D4C957F2D & 0x7FFFFFFFFFFFFFFF
    x = at ^ state
    for factor in (0x2545F4914F6CDD1D, 0x1B03738712FAD5C9):
        x = x * factor  # wraps
        x = x ^ (x >> 31 & 0x1FFFFFFFF)
    return x & 0x7FFFFFFFFFFFFFFE


def sample_index(
    tokens: int,
    block: int,
    samples: int,
    method: Offsets,
    *,
    seed: int = 0,
    layer: int | Tensor = 0,
    side: Side = "q",
    device: torch.device | str = "cpu",
) -> Int[Tensor, "1 1 blocks samples"]:
    """Token positions that stand for each block: the same offsets in every block, own ones in a short last block.

    Args:
        tokens: Length of the sequence.
        block: Tokens in a block.
        samples: See ``sample_offsets``; so are the rest.
        method: ``"seeded"`` or ``"strided"``.
        seed: Of ``"seeded"``.
        layer: Likewise.
        side: Likewise.
        device: Where the result is wanted.

    Returns:
        int32, ascending; -1 is no token. Shared by batch elements and heads, computed once and kept: do not write into
        it.

    Differs: the release draws anew at each call, per batch element and head, from torch's generator
        (``offsets="random"``), so that a video depends on what ran before; and it fills the last block with copies of
        the last token.
    """
    if method == "random":
        raise ValueError("offsets 'random' are drawn at each call and have no fixed index; take 'seeded' or 'strided'")
    device = torch.device(device)
    if method == "strided":
        # The same in every layer, so kept once.
        seed, layer, side = 0, 0, "q"
    if torch.compiler.is_compiling():
        number = layer if isinstance(layer, Tensor) else torch.tensor(layer)
        return _sample_index_op(tokens, block, samples, method, seed, number, side, device)
    return _sample_index(tokens, block, samples, method, seed, int(layer), side, device)


@lru_cache(maxsize=1024)
def _sample_index(
    tokens: int, block: int, samples: int, method: Offsets, seed: int, layer: int, side: Side, device: torch.device
) -> Tensor:
    with plain_tensors():
        start = torch.arange(0, tokens, block, device="cpu").unsqueeze(-1)
        draw: dict[str, Any] = {"block": block, "seed": seed, "layer": layer, "side": side}
        full = start[:-1] + sample_offsets(block, samples, method, **draw)
        last = sample_offsets(tokens - int(start[-1]), samples, method, **draw)
        index = torch.cat([full, torch.where(last < 0, -1, start[-1] + last).unsqueeze(0)])
        return index.to(device, torch.int32)[None, None]


@torch.library.custom_op("hone_blade::sample_index", mutates_args=())
def _sample_index_op(
    tokens: int, block: int, samples: int, method: str, seed: int, layer: Tensor, side: str, device: torch.device
) -> Tensor:
    """For ``torch.compile``, which may overwrite what an op returns."""
    # The schema of an op knows strings only.
    how, of = cast(Offsets, method), cast(Side, side)
    return _sample_index(tokens, block, samples, how, seed, int(layer), of, device).clone()


@_sample_index_op.register_fake
def _(
    tokens: int, block: int, samples: int, method: str, seed: int, layer: Tensor, side: str, device: torch.device
) -> Tensor:
    return torch.empty((1, 1, (tokens + block - 1) // block, samples), dtype=torch.int32, device=device)


def _random_index(
    batch: int, heads: int, tokens: int, block: int, samples: int, device: torch.device
) -> Int[Tensor, "batch heads blocks samples"]:
    """The release's draw: new offsets per call, batch element and head, from torch's generator of the device."""
    offsets = torch.rand(batch, heads, 1, block, device=device).topk(samples).indices
    start = torch.arange(0, tokens, block, device=device).unsqueeze(-1)
    return (start + offsets).clamp(max=tokens - 1).to(torch.int32)
