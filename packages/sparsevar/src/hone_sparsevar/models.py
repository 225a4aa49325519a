"""How SparseVAR enters a next-scale model: a policy of its generation loop, ``attach`` and its handle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hone_core.handles import CallState, Handle, resolve
from hone_visual_ar.generation import Generation, Policy
from hone_visual_ar.infinity import Infinity
from hone_visual_ar.schedules import ScaleSchedule
from hone_visual_ar.tokenizers import BSQVAE
from hone_visual_ar.transformer import NextScaleTransformer, Observe
from torch import Tensor

from .config import PRESETS, SparseVARConfig
from .fused import draw_fused, fuses_draws, run_fused
from .method import (
    anchor_of,
    by_slot,
    change_map,
    interpolate_kept,
    kept_count,
    resize_map,
    select,
    select_above,
    slots,
    update_map,
)
from .peers import EarlyStop, FastVARStyle, SkipUncond

__all__ = ["SparsePolicy", "SparseState", "SparseVARHandle", "attach", "fit", "tiny", "variant_of"]


@dataclass(kw_only=True)
class SparseState:
    """What SparseVAR keeps of one generation.

    Attributes:
        start: First sparse scale.
        detector: Block whose change is the map.
        map: ``[B, h, w]`` at the last scale that ran.
        hidden: ``[R, L, C]`` output of the last block there, for ``fill="prev"``.
        chance: ``[B, L]`` scores of each sparse scale, for ``score="random"``.
        kept: ``[B, n]`` positions that ran, of each sparse scale.
        scores: ``[B, h, w]`` what they were chosen by.
    """

    start: int
    detector: int
    map: Tensor | None = None
    hidden: Tensor | None = None
    chance: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)


def fit(settings: SparseVARConfig, depth: int, schedule: ScaleSchedule) -> tuple[int, int]:
    """First sparse scale and detector of a model of ``depth`` blocks.

    Raises:
        ValueError: There is no such scale or block, or no scale before it to be measured.
    """
    # As many as there are scales: none is sparse.
    scales = len(schedule)
    start = scales if settings.start_scale == scales else schedule.resolve(settings.start_scale)
    if start < 1:
        raise ValueError(f"start_scale must leave a scale before it to be measured; got {settings.start_scale}")
    return start, _detector(settings, depth)


def _detector(settings: SparseVARConfig, depth: int) -> int:
    detector = depth // 2 if settings.detector is None else settings.detector
    if detector >= depth:
        raise ValueError(f"this model has {depth} blocks, 0 to {depth - 1}; got detector {detector}")
    return detector


class SparsePolicy(Policy):
    """SparseVAR as the generation loop asks it.

    Args:
        config: Settings.
        maps: Scale to ``[h, w]`` scores in place of measured ones, which are measured all the same: for timing with
            random weights.
    """

    def __init__(self, config: SparseVARConfig, *, maps: dict[int, Tensor] | None = None) -> None:
        self.config, self.maps = config, maps

    def begin(self, run: Generation) -> SparseState:
        """See the base class."""
        cfg, scales = self.config, len(run.schedule)
        start, detector = fit(cfg, len(run.model.layers), run.schedule)
        if cfg.backend != "torch" and not isinstance(run.model, Infinity):
            raise ValueError(f"fused kernels are for Infinity; got {type(run.model).__name__}. Take backend='torch'")
        state = SparseState(start=start, detector=detector)
        if cfg.score == "random":
            device = run.latent.device
            # Seeds of their own: torch's generator reads 32 bits of one, and an image's draws come from its seed.
            own = [np.random.SeedSequence((cfg.seed % 2**64, seed % 2**64)).generate_state(1) for seed in run.seeds]
            makers = [torch.Generator().manual_seed(int(state[0])) for state in own]
            for scale in range(start, scales):
                drawn = [torch.rand(run.schedule.tokens(scale), generator=maker) for maker in makers]
                state.chance[scale] = torch.stack(drawn).to(device)
        return state

    def capacity(self, schedule: ScaleSchedule) -> int:
        """Where lengths are static, what is left out has no place in the cache either."""
        cfg = self.config
        if cfg.select == "threshold" or cfg.kv == "fill" or cfg.start_scale == len(schedule):
            return super().capacity(schedule)
        start = schedule.resolve(cfg.start_scale)
        kept = (kept_count(schedule.grids[k], cfg.window, cfg.ratio) for k in range(start, len(schedule) - 1))
        return schedule.start(start) + sum(kept)

    def scale(self, run: Generation, scale: int, state: SparseState) -> Tensor:
        """See the base class."""
        if scale < state.start:
            return self._dense(run, scale, state)
        cfg, grid = self.config, run.schedule.grids[scale]
        x = run.embed(scale)
        anchors = None if cfg.window is None else anchor_of(grid, cfg.window, x.device)
        score = self._score(run, scale, state, x)
        if cfg.select == "topk":
            idx = select(score, kept_count(grid, cfg.window, cfg.ratio), anchors)
        else:
            idx = select_above(score, cfg.threshold, cfg.bucket, anchors)
        state.kept[scale], state.scores[scale] = idx, score.unflatten(1, grid)
        slot, runs = slots(idx, len(x[0]), anchors)
        twice = (lambda t: torch.cat([t, t])) if run.condition.guided else (lambda t: t)
        rows = twice(idx)
        measured: list[Tensor] = []
        observe = self._observe(run, state, measured)
        spread = twice(slot) if cfg.kv == "fill" else None
        if cfg.backend == "torch":
            kept = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
            hidden = run.run(kept, scale, positions=rows, spread=spread, observe=observe)
        else:
            detector = None if observe is None else state.detector
            hidden, change = run_fused(
                run, x, scale, rows, spread=spread, detector=detector, metric=cfg.metric, backend=cfg.backend
            )
            measured += [] if change is None else [change]
        if measured and state.map is not None:
            state.map = update_map(resize_map(state.map, grid), idx, measured[0])
        return self._refill(run, scale, state, hidden, idx, slot, runs)

    def _observe(self, run: Generation, state: SparseState, into: list[Tensor]) -> Observe | None:
        """Measure the detector's change on the conditional rows."""
        if self.config.score in ("random", "distance"):
            return None
        images, metric = run.condition.images, self.config.metric

        def observe(number: int, before: Tensor, after: Tensor) -> None:
            if number == state.detector:
                into.append(change_map(before[:images], after[:images], metric))

        return observe

    def _dense(self, run: Generation, scale: int, state: SparseState) -> Tensor:
        measured: list[Tensor] = []
        last = scale == state.start - 1
        hidden = run.run(run.embed(scale), scale, observe=self._observe(run, state, measured) if last else None)
        if measured:
            state.map = measured[0].unflatten(1, run.schedule.grids[scale])
        if last and self.config.fill == "prev":
            state.hidden = hidden
        return run.codes(run.logits(hidden, scale), scale)

    def _score(self, run: Generation, scale: int, state: SparseState, x: Tensor) -> Tensor:
        kind, grid, images = self.config.score, run.schedule.grids[scale], run.condition.images
        if kind == "random":
            return state.chance[scale]
        if kind == "distance":
            tokens = x[:images]
            return (tokens - tokens.mean(1, keepdim=True)).square().sum(-1)
        assert state.map is not None
        score = resize_map(state.map, grid).flatten(1)
        if self.maps is not None:
            score = self.maps[scale].flatten().expand(images, -1)
        return -score if kind == "inverse" else score

    def _refill(
        self, run: Generation, scale: int, state: SparseState, hidden: Tensor, idx: Tensor, slot: Tensor, runs: Tensor
    ) -> Tensor:
        cfg, grid = self.config, run.schedule.grids[scale]
        if cfg.fill == "prev":
            assert state.hidden is not None
            old = state.hidden.transpose(1, 2).unflatten(2, run.schedule.grids[scale - 1])
            full = F.interpolate(old, size=grid, mode="area").flatten(2).transpose(1, 2)
            rows = torch.cat([idx, idx]) if run.condition.guided else idx
            state.hidden = full.scatter(1, rows[..., None].expand(-1, -1, full.shape[-1]), hidden)
            return run.codes(run.logits(state.hidden, scale), scale)
        if cfg.fill == "anchor" and cfg.backend != "torch" and fuses_draws(run):
            return draw_fused(run, hidden, scale, slot, cfg.backend)
        logits = run.logits(hidden, scale)
        if cfg.fill == "anchor":
            return run.codes(by_slot(logits, slot), scale)
        if cfg.fill == "bilinear":
            assert cfg.window is not None
            return run.codes(interpolate_kept(logits, idx, grid, cfg.window), scale)
        codes = run.embed_indices(run.sample(logits, scale, positions=idx))
        kept = by_slot(codes, slot)
        if cfg.fill == "anchor_code":
            return kept
        if cfg.fill == "zero":
            other = torch.zeros_like(kept)
        else:
            assert cfg.window is not None
            smooth = cfg.fill == "expected_bilinear"
            there = interpolate_kept(logits, idx, grid, cfg.window) if smooth else by_slot(logits, slot)
            other = run.tokenizer.mean_code(there.float().softmax(-1))
        return torch.where(runs[..., None], kept, other)


class _Attached(Policy):
    """The policy on a model, which its handle can switch off for a thread."""

    def __init__(self, policy: SparsePolicy) -> None:
        self.policy, self.call = policy, CallState[None]()

    def _now(self) -> Policy:
        return Policy() if self.call.disabled else self.policy

    def capacity(self, schedule: ScaleSchedule) -> int:
        return self._now().capacity(schedule)

    def begin(self, run: Generation) -> SparseState | None:
        return self._now().begin(run)

    def scale(self, run: Generation, scale: int, state: SparseState | None) -> Tensor | None:
        # A generation goes on as it began, whatever the handle says by now; a dense one has no state.
        return Policy().scale(run, scale, None) if state is None else self.policy.scale(run, scale, state)


class SparseVARHandle(Handle[SparseVARConfig]):
    """SparseVAR on a model; ``detach()`` takes it off."""

    def __init__(self, config: SparseVARConfig, model: NextScaleTransformer, policy: _Attached) -> None:
        super().__init__(config, [model])
        self._model, self._policy = model, policy

    @property
    def attached(self) -> bool:
        """Whether the model's generation asks this handle's policy."""
        return self._model.policy is self._policy

    def detach(self) -> None:
        """See the base class."""
        if self.attached:
            self._model.policy = None

    def _states(self) -> Iterable[CallState[Any]]:
        return (self._policy.call,)


def attach(model: NextScaleTransformer, config: str | SparseVARConfig = "infinity-0.6") -> SparseVARHandle:
    """Put SparseVAR on a model: whatever ``generate`` draws with it from now on leaves flat regions out.

    Args:
        model: Infinity or VAR; or something that holds one as ``transformer``, such as a pipeline.
        config: Name of a preset, or settings.

    Raises:
        TypeError: ``model`` is no next-scale transformer.
        ValueError: There is no such preset or block.
        RuntimeError: A method is attached already.
    """
    settings = resolve(config, PRESETS, SparseVARConfig)
    found = getattr(model, "transformer", model)
    if not isinstance(found, NextScaleTransformer):
        raise TypeError(f"expected Infinity or VAR, or a pipeline of one; got {type(model).__name__}")
    _detector(settings, len(found.layers))
    if found.policy is not None:
        raise RuntimeError("a method is attached to this model already; call its handle's detach() first")
    policy = _Attached(SparsePolicy(settings))
    found.policy = policy
    return SparseVARHandle(settings, found, policy)


TINY: dict[str, Any] = {
    "depth": 2, "width": 64, "num_heads": 2, "chunks": 1, "code_dim": 4, "text_channels": 128, "text_maxlen": 16
}  # fmt: skip
TINY_SCHEDULE = ScaleSchedule(tuple((side, side) for side in (1, 2, 4, 6, 8)))


def tiny(seed: int = 0) -> tuple[Infinity, BSQVAE, ScaleSchedule]:
    """A small Infinity with random weights, its tokenizer, and scales up to 8 x 8; the global generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Infinity(**TINY)
        tokenizer = BSQVAE(latent_dim=4, channels=32, multipliers=(1, 1), blocks=1)
    return model.eval(), tokenizer.eval(), TINY_SCHEDULE


def _without_anchors(settings: SparseVARConfig) -> float:
    """Ratio that keeps as many tokens where there are no anchors."""
    return settings.ratio if settings.window is None else settings.ratio * (1 - 1 / settings.window**2)


def variant_of(name: str, settings: SparseVARConfig) -> Policy:
    """The policy of a variant's name, see ``config.VARIANTS``."""
    if name == "dense":
        return Policy()
    kind, _, count = name.rpartition("-")
    if kind == "early-stop":
        return EarlyStop(int(count))
    if kind == "skip-uncond":
        return SkipUncond(int(count))
    if name == "fastvar":
        return FastVARStyle(ratio=settings.ratio, start_scale=settings.start_scale)
    changes: dict[str, Any] = {
        "sparse": {},
        "no-anchors": {"window": None, "fill": "zero", "ratio": _without_anchors(settings)},
        "kv-fill": {"kv": "fill"},
        "threshold": {"select": "threshold"},
    }
    if name in ("random", "inverse", "distance"):
        changes[name] = {"score": name}
    return SparsePolicy(replace(settings, **changes.get(name, {"fill": name})))
