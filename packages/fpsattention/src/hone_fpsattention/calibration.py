"""Choosing a schedule on one's own model: what each regime would cost where, and the best one under a budget.

While the model samples with its own attention, every layer also computes what each candidate would have given for the
same queries, keys and values. From the errors of all steps an exact search picks the regimes and the boundaries between
them that lose least at a given mean density.

Source: the paper chooses by cosine similarity, mean squared error and signal-to-noise ratio of each step against the
    16-bit model, and does not say how it searches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hone_kernels.precision import without_autocast
from hone_video.attachment import Method
from hone_video.grids import Grid
from hone_video.handle import LayerStats, VideoHandle, attach_method
from jaxtyping import Float
from torch import Tensor

from .config import Border, FPSAttentionConfig, Regime, Scales, Size
from .method import fps_attention
from .models import plan_for
from .tiles import tile_counts
from .windows import covers, density

__all__ = ["Errors", "Found", "attach_probe", "candidate_regimes", "check_search", "gather_errors", "search"]


@dataclass(frozen=True, eq=False)
class Errors:
    """How far each candidate's attention is from the model's own.

    Attributes:
        cosine: ``[steps, layers, candidates]`` cosine of the angle between the two, over all tokens and heads.
        mse: Mean squared difference.
        snr_db: Power of the model's own over that of the difference, in dB; 200 where they are equal.
    """

    cosine: Float[Tensor, "steps layers candidates"]
    mse: Float[Tensor, "steps layers candidates"]
    snr_db: Float[Tensor, "steps layers candidates"]

    @property
    def relative(self) -> Float[Tensor, "steps candidates"]:
        """Squared error over power, mean over layers: what ``search`` adds up."""
        return (10 ** (-self.snr_db / 10)).mean(1)


def candidate_regimes(
    grid: Grid,
    tile: Size,
    *,
    windows: Sequence[Size] = (),
    scales: Sequence[Scales] = ("tile",),
    e4m3: bool = True,
    border: Border = "shift",
) -> tuple[Regime, ...]:
    """Regimes to choose from at a grid, sparsest first, no two of the same effect.

    Args:
        grid: Video tokens along (frames, height, width).
        tile: Tokens of a tile along each.
        windows: Tiles along each axis; empty for 1, 3 and all on each.
        scales: What shares a scale.
        e4m3: Whether they round.
        border: What a window does at the border.

    Raises:
        ValueError: A window is larger than the grid along an axis, by more than the tile that makes it odd.
    """
    counts = tile_counts(grid, tile)
    whole = tuple(n + 1 - n % 2 if border == "shift" else 2 * n - 1 for n in counts)
    for window in windows:
        if any(w > most for w, most in zip(window, whole, strict=True)):
            raise ValueError(
                f"window {window} is larger than the grid of {counts} tiles of {tile}; expected at most {whole}, which "
                "reads it whole"
            )
    if not windows:
        windows = [
            tuple(size)  # type: ignore[misc]
            for size in itertools.product(*(sorted({1, min(3, most), most}) for most in whole))
        ]
    found: dict[tuple[Any, ...], Regime] = {}
    for window, kind in itertools.product(windows, scales if e4m3 else scales[:1]):
        reach = tuple(min(w, most) // 2 for w, most in zip(window, whole, strict=True))
        dense = covers(grid, tile, window, border)
        found.setdefault((reach, kind), Regime(window=None if dense else window, scales=kind, e4m3=e4m3))
    return tuple(sorted(found.values(), key=lambda regime: density(grid, tile, regime.window, border=border).tiles))


class _Probe(Method):
    """The model's own attention, on tokens in tile order, and what candidates would make of it."""

    name = "the calibration of FPSAttention"

    def __init__(self, config: FPSAttentionConfig) -> None:
        self.config = config
        self.order, self.tile = "tile", config.tile

    def plan(self, step: int, timestep: float | None) -> int:
        return 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Tensor:
        return _own(q, k, v)

    def measure(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: int,
        layer: int | Tensor,
        grid: Grid,
        text_tokens: int,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        out = _own(q, k, v)
        rows = []
        for regime in options["candidates"]:
            where = plan_for(regime, self.config, grid, text_tokens, q.device)
            rows.append(_sums(fps_attention(q, k, v, plan=where, cfg=self.config), out))
        return out, torch.stack(rows)


@without_autocast
def _own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sums(out: Tensor, own: Tensor) -> Float[Tensor, " sums"]:
    """Products, powers, squared differences and their number, which add up over calls."""
    a, b = out.flatten().double(), own.flatten().double()
    return torch.stack([a @ b, a @ a, b @ b, (a - b).square().sum(), a.new_tensor(float(len(a)))])


def attach_probe(model_or_pipeline: Any, config: FPSAttentionConfig) -> VideoHandle[FPSAttentionConfig]:
    """Attach what measures candidates: ``with handle.record(candidates=...) as rows``, and sample inside.

    Args:
        model_or_pipeline: As for ``hone_fpsattention.models.attach``.
        config: Tile, block, border, ``smooth_k`` and backend that the candidates share.
    """
    return attach_method(model_or_pipeline, _Probe(config), VideoHandle)


def gather_errors(rows: Sequence[LayerStats]) -> Errors:
    """Errors by step and layer from what ``record`` collected, over calls and videos.

    Layers of a second transformer count after those of the first; each step is that of the one which ran.

    Raises:
        ValueError: There is nothing, or an attention was not finite.
    """
    if not rows:
        raise ValueError("nothing was recorded; sample inside the block of record()")
    steps, layers = 1 + max(row.step for row in rows), 1 + max(row.layer for row in rows)
    total = torch.zeros((steps, layers, *rows[0].stats.shape), dtype=torch.float64)
    for row in rows:
        total[row.step, row.layer] += row.stats.cpu()
    if not bool(total.isfinite().all()):
        step, layer = (int(n) for n in (~total.isfinite()).flatten(2).any(-1).nonzero()[0])
        raise ValueError(
            f"attention is not finite from step {step}, layer {layer}; the model's activations overflow. Take dtype "
            "float32 or bfloat16"
        )
    if bool((total[..., 4] == 0).any()):
        raise ValueError("a layer was not recorded at some step; record whole videos, with every layer attached")
    dot, power, own, difference, count = total.unbind(-1)
    floor = own * 1e-20
    return Errors(
        cosine=dot / (power * own).clamp(min=1e-300).sqrt(),
        mse=difference / count,
        snr_db=10 * (own.clamp(min=1e-300) / difference.clamp(min=1e-300).maximum(floor)).log10(),
    )


@dataclass(frozen=True)
class Found:
    """What the search chose.

    Attributes:
        config: With regimes and boundaries.
        choice: Number of each regime's candidate.
        density: Mean over the steps, of tiles.
        error: Mean over the steps of the relative error.
    """

    config: FPSAttentionConfig
    choice: tuple[int, ...]
    density: float
    error: float


def check_search(densities: Sequence[float], *, steps: int, budget: float, regimes: int) -> None:
    """Refuse a search that cannot find anything; arguments and errors as ``search``."""
    if not 1 <= regimes <= steps:
        raise ValueError(f"regimes must lie in [1, {steps}], the denoising steps; got {regimes}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget is a mean density in (0, 1]; got {budget}")
    if min(densities) > budget:
        raise ValueError(
            f"no candidate keeps to budget {budget:g}: the sparsest has density {min(densities):.4g}. Raise the "
            "budget, or add smaller windows"
        )


def search(
    error: Float[Tensor, "steps candidates"],
    candidates: Sequence[Regime],
    densities: Sequence[float],
    base: FPSAttentionConfig,
    *,
    budget: float,
    regimes: int = 3,
) -> Found:
    """The regimes and boundaries of least total error whose mean density keeps to a budget: exact, over all of them.

    Args:
        error: Of each candidate at each step, not negative.
        candidates: What a regime may be.
        densities: Of each candidate, of tiles.
        base: Settings to put the regimes into.
        budget: Most mean density over the steps, in (0, 1].
        regimes: Parts of the trajectory; neighbours of one choice become one.

    Raises:
        ValueError: Sizes do not fit, or no choice keeps to the budget.
    """
    steps, count = error.shape
    if len(candidates) != count or len(densities) != count:
        raise ValueError(
            f"expected a regime and a density for each of {count} candidates; got {len(candidates)} and "
            f"{len(densities)}"
        )
    check_search(densities, steps=steps, budget=budget, regimes=regimes)
    cost = error.double().cpu()
    dense = torch.tensor(densities, dtype=torch.float64)
    before = torch.cat([cost.new_zeros((1, count)), cost.cumsum(0)])  # total up to a step
    best: tuple[float, float, tuple[int, ...], tuple[int, ...]] | None = None
    for cuts in itertools.combinations(range(1, steps), regimes - 1):
        edges = (0, *cuts, steps)
        losses, shares = torch.zeros(()), torch.zeros(())
        for low, high in itertools.pairwise(edges):
            # One axis per regime.
            losses = losses.unsqueeze(-1) + (before[high] - before[low])
            shares = shares.unsqueeze(-1) + dense * (high - low)
        # A sum of shares may be off by its last bit.
        losses = losses.masked_fill(shares > budget * steps * (1 + 1e-12), math.inf)
        at = int(losses.argmin())
        value = float(losses.flatten()[at])
        share = float(shares.flatten()[at])
        if math.isfinite(value) and (best is None or (value, share) < best[:2]):
            choice = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), losses.shape))
            best = (value, share, cuts, choice)
    if best is None:
        raise ValueError("every candidate's error is infinite or no number; look at the errors that were gathered")
    value, share, cuts, choice = best
    kept = [i for i in range(regimes) if i == 0 or choice[i] != choice[i - 1]]
    config = replace(
        base,
        regimes=tuple(candidates[choice[i]] for i in kept),
        boundaries=tuple(cuts[i - 1] / steps for i in kept if i),
    )
    return Found(config, tuple(choice[i] for i in kept), share / steps, value / steps)
