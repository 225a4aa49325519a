"""Calibrate a schedule: measure candidates while the model samples, search, write the file and a heat map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.environment import environment
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_video.grids import Grid
from hone_video.host import load_host, make_scheduler
from hone_video.host_config import HostConfig
from hone_video.prompts import parse_prompt

from .calibration import Errors, attach_probe, candidate_regimes, check_search, gather_errors, search
from .config import PRESETS, CalibrateConfig, FPSAttentionConfig, Regime
from .models import describe_model, preset_for, scheduler_shift
from .plots import error_map
from .sample import default_preset, draw, open_pipeline, video_grid
from .schedule import Schedule, step_regimes
from .windows import density

__all__ = ["CalibrateReport", "calibrate", "check_choices", "check_host_choices"]


@dataclass(frozen=True, kw_only=True)
class CalibrateReport(Report):
    """What was found.

    Attributes:
        file: The schedule.
        plot: Signal-to-noise ratio of the chosen regimes by step and layer.
    """

    file: Path
    plot: Path

    @classmethod
    def of(cls, run: Run) -> CalibrateReport:
        """Return the report of a run whose schedule is written."""
        file, plot = run.artifacts / "schedule.json", run.figures / "errors.png"
        return cls(path=run.path, rows=tuple(run.rows), file=file, plot=plot)

    def __str__(self) -> str:
        schedule = Schedule.load(self.file)
        found = {row.metric: row.value for row in self.rows if row.variant == "schedule"}
        lines = [f"{schedule.model}, {schedule.steps} steps of {schedule.sampler}, {schedule.grid} tokens"]
        edges = (0.0, *schedule.config.boundaries, 1.0)
        for i, regime in enumerate(schedule.config.regimes):
            lines.append(f"  {edges[i]:4.0%} to {edges[i + 1]:4.0%} of the steps: {describe_regime(regime)}")
        lines.append(
            f"mean density {found['density']:.3f} of tiles (budget {schedule.budget:g}), error "
            f"{found['relative_error']:.3g} of the attention's power"
        )
        return "\n".join([*lines, f"schedule {self.file}", f"plot     {self.plot}"])


def describe_regime(regime: Regime) -> str:
    """In words."""
    window = "all tiles" if regime.window is None else "window " + "x".join(map(str, regime.window))
    return f"{window}, {'E4M3, scales per ' + regime.scales if regime.e4m3 else 'unrounded'}"


def calibrate(cfg: CalibrateConfig, run: Run) -> CalibrateReport:
    """Measure, search, and write the schedule.

    Rows: ``cosine``, ``mse`` and ``snr`` (dB) of each candidate over steps and layers, its ``density``, and
    ``density`` and ``relative_error`` of the schedule.

    Args:
        cfg: What to measure, and the budget.
        run: The run, entered.

    Raises:
        CheckpointError: The host or pipeline is not there or not whole.
        ValueError: A window is larger than the grid, an attention is not finite, or nothing keeps to the budget.
    """
    device = resolve_device(run.device)
    source = _tiny(cfg, device) if cfg.video.model is None else _pipeline(cfg, open_pipeline(cfg.video, device))
    model, base, grid, sampler, steps, sample = source
    candidates, densities = _choices(cfg, base, grid, steps)
    rows = []
    progress = progress_bar(len(cfg.video.prompts) * steps, desc="measuring", quiet=run.quiet)
    with attach_probe(model, base) as handle, progress as bar:
        for index in range(len(cfg.video.prompts)):
            handle.reset()
            with torch.no_grad(), handle.record(candidates=candidates) as found:
                sample(index, bar.update)
            rows += found
    errors = gather_errors(rows)
    best = search(errors.relative, candidates, densities, base, budget=cfg.budget, regimes=cfg.regimes)
    _write_rows(run, errors, candidates, densities)
    run.row("density", best.density, better="lower", variant="schedule")
    run.row("relative_error", best.error, better="lower", variant="schedule")
    schedule = Schedule(
        config=best.config,
        model=describe_model(model),
        sampler=sampler,
        steps=steps,
        grid=grid,
        budget=cfg.budget,
        provenance=f"{run.command or 'hone-fpsattention calibrate'}, commit {environment()['commit'] or 'unknown'}",
    )
    report = CalibrateReport.of(run)
    schedule.save(report.file)
    chosen = [candidates.index(regime) for regime in best.config.regimes]
    at = [chosen[i] for i in step_regimes(best.config, steps)]
    error_map(errors.snr_db[torch.arange(steps), :, at], report.plot)
    return report


Source = tuple[Any, FPSAttentionConfig, Grid, str, int, Callable[[int, Callable[[], None]], object]]
"""Model or pipeline, settings, grid, sampler, steps, and what samples one prompt."""


def _tiny_base(cfg: CalibrateConfig, host: HostConfig) -> FPSAttentionConfig:
    return replace(PRESETS[cfg.preset or "tiny"].config, shift=host.shift).constant(0)


def _tiny(cfg: CalibrateConfig, device: torch.device) -> Source:
    host = load_host(device, path=cfg.host)
    base = _tiny_base(cfg, host.config)
    sampler = type(make_scheduler(host.config.solver, host.config.shift)).__name__

    def sample(index: int, done: Callable[[], None]) -> object:
        text = host.encode_labels(torch.tensor([parse_prompt(cfg.video.prompts[index])]))
        noise = host.noise(index + 1, cfg.video.seed)[index:]
        return host.sample(text, noise, on_step=lambda *_: done())

    return host.transformer, base, host.config.grid, sampler, host.config.steps, sample


def _choices(
    cfg: CalibrateConfig, base: FPSAttentionConfig, grid: Grid, steps: int
) -> tuple[tuple[Regime, ...], list[float]]:
    """What a regime may be, and the density of each."""
    candidates = candidate_regimes(
        grid, base.tile, windows=cfg.windows, scales=cfg.scales, e4m3=cfg.e4m3, border=base.border
    )
    densities = [density(grid, base.tile, regime.window, border=base.border).tiles for regime in candidates]
    check_search(densities, steps=steps, budget=cfg.budget, regimes=cfg.regimes)
    return candidates, densities


def check_choices(cfg: CalibrateConfig, pipe: Any) -> None:
    """Refuse a search that cannot find anything, before anything is measured.

    Args:
        cfg: With a pipeline.
        pipe: That pipeline, with or without its weights.

    Raises:
        ValueError: A window is larger than the grid, there are fewer steps than regimes, or nothing keeps to the
            budget.
    """
    _, base, grid, _, steps, _ = _pipeline(cfg, pipe)
    _choices(cfg, base, grid, steps)


def check_host_choices(cfg: CalibrateConfig, host: HostConfig) -> None:
    """Likewise of the tiny host, by its architecture.

    Raises:
        ValueError: As ``check_choices``.
    """
    _choices(cfg, _tiny_base(cfg, host), host.grid, host.steps)


def _pipeline(cfg: CalibrateConfig, pipe: Any) -> Source:
    shift = scheduler_shift(pipe.scheduler)
    base = preset_for(cfg.preset or default_preset(type(pipe).__name__), shift).constant(0)

    def sample(index: int, done: Callable[[], None]) -> object:
        return draw(pipe, cfg.video, index, output_type="latent", step_done=done)

    return pipe, base, video_grid(pipe, cfg.video), type(pipe.scheduler).__name__, cfg.video.steps, sample


def _write_rows(run: Run, errors: Errors, candidates: tuple[Regime, ...], densities: list[float]) -> None:
    for i, (regime, share) in enumerate(zip(candidates, densities, strict=True)):
        name = describe_regime(regime)
        n = errors.mse[..., i].numel()
        run.row("cosine", float(errors.cosine[..., i].mean()), better="higher", n=n, variant=name)
        run.row("mse", float(errors.mse[..., i].mean()), better="lower", n=n, variant=name)
        run.row("snr", float(errors.snr_db[..., i].mean()), unit="dB", better="higher", n=n, variant=name)
        run.row("density", share, better="lower", variant=name)
