"""The paper's claims on the tiny host: what rounding, window, schedule and scales each cost, and what training buys.

Arms, each on the same prompts and noise, over seeds:

    A   dense
    B1  E4M3 alone, B2 the window alone, B both: training-free
    C   both, trained on the rectified-flow loss (the paper's), C' on the dense host's velocity (ours)
    E   one window at every step in place of the schedule, at a density as near as there is: training-free, and trained
    G   scales per tensor, tile and token, in E4M3 alone: training-free

Rules, fixed beforehand. Training rescues if a trained arm's interval reaches within 2 points of A's mean while B's does
not. The schedule matters if the intervals of its accuracy and of the constant window's are apart, at equal training.
Granularity matters if the intervals of the PSNR to dense of two granularities are apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Report, Row, Run
from hone_video.clips import random_labels
from hone_video.host import Host, load_host
from hone_video.means import write_mean
from torch import Tensor

from .calibration import candidate_regimes
from .config import PRESETS, FPSAttentionConfig, Loss, Regime, ReproduceConfig, TrainConfig
from .evaluate import Outcome, Variant, compare, mean_density
from .train import Tuning, glyphs_of
from .windows import density

__all__ = ["ARMS", "ReproduceReport", "constant_window", "reproduce", "verdicts"]

ARMS = {
    "dense": "A   dense",
    "e4m3": "B1  E4M3 alone",
    "window": "B2  window alone",
    "both": "B   both, training-free",
    "flow": "C   both, trained on flow",
    "distillation": "C'  both, trained on dense velocity",
    "constant": "E   constant window, training-free",
    "constant distillation": "E   constant window, trained",
    "tensor": "G   E4M3 alone, scale per tensor",
    "tile": "G   E4M3 alone, scale per tile",
    "token": "G   E4M3 alone, scale per token",
}
"""Name -> what it is."""

MARGIN = 0.02
"""Points of accuracy that a rescued arm may miss of dense."""


@dataclass(frozen=True, kw_only=True)
class ReproduceReport(Report):
    """Arms over seeds; as text, a table and verdicts."""

    def __str__(self) -> str:
        cells: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            cells.setdefault(row.variant, {})[row.metric] = row
        lines = [f"{'arm':<36} {'digit and direction':>19}  {'PSNR to dense, dB':>20}  density"]
        for name, found in cells.items():
            right, near = found["accuracy"], found["psnr"]
            low, high = right.interval or (right.value, right.value)
            below, above = near.interval or (near.value, near.value)
            likeness = "-" if name == "dense" else f"{near.value:.2f} ({below:.2f} to {above:.2f})"
            lines.append(
                f"{ARMS[name]:<36} {f'{right.value:.0%} ({low:.0%} to {high:.0%})':>19}  {likeness:>20}  "
                f"{found['density'].value:.3f}"
            )
        lines += ["", *verdicts(cells)]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def verdicts(cells: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """What the rules say, in words.

    Args:
        cells: Arm -> metric -> row.
    """

    def ends(arm: str, metric: str) -> tuple[float, float]:
        row = cells[arm][metric]
        return row.interval or (row.value, row.value)

    goal = cells["dense"]["accuracy"].value - MARGIN
    broken = ends("both", "accuracy")[1] < goal
    rescued = [arm for arm in ("flow", "distillation") if ends(arm, "accuracy")[1] >= goal]
    if not broken:
        first = "training-free is within 2 points of dense already: there is nothing to rescue"
    else:
        by = " and ".join(ARMS[arm].split("  ")[-1].strip() for arm in rescued)
        first = f"rescued: {by}" if rescued else "not rescued: no trained arm comes within 2 points of dense"
    staged, constant = ends("distillation", "accuracy"), ends("constant distillation", "accuracy")
    apart = staged[0] > constant[1] or constant[0] > staged[1]
    better = "the schedule" if staged[0] > constant[1] else "the constant window"
    kinds = ("tensor", "tile", "token")
    bounds = [ends(kind, "psnr") for kind in kinds]
    differs = max(low for low, _ in bounds) > min(high for _, high in bounds)
    return [
        f"Does joint training rescue E4M3 and window? {first}.",
        f"Does step-awareness matter at equal density? {f'Yes: {better} is better' if apart else 'No'}.",
        f"Does scale granularity matter? {'Yes' if differs else 'No'}.",
    ]


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Train and compare the arms with every seed.

    A seed's outcomes are stored once it is done, and each training keeps its checkpoint: a run that was cut off goes on
    where it stopped.

    Args:
        cfg: Prompts, seeds and steps.
        run: The run, entered.

    Raises:
        CheckpointError: There is no such host.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    found: dict[str, dict[str, list[Tensor]]] = {}
    densities: dict[str, float] = {}
    with progress_bar(cfg.seeds, desc="seeds", quiet=run.quiet) as bar:
        for seed in range(cfg.seeds):
            file = run.artifacts / f"seed{seed}.json"
            if not file.exists():
                atomic_write_json(file, _one_seed(host, cfg, run, seed))
            for arm, values in json.loads(file.read_text(encoding="utf-8")).items():
                densities[arm] = values.pop("density")
                for metric, numbers in values.items():
                    found.setdefault(arm, {}).setdefault(metric, []).append(torch.tensor(numbers))
            bar.update()
    for arm, metrics in found.items():
        for metric, parts in metrics.items():
            write_mean(run, metric, torch.cat(parts), unit="dB" if metric == "psnr" else "", variant=arm)
        run.row("density", densities[arm], better="lower", variant=arm)
    return ReproduceReport.of(run)


def _one_seed(host: Host, cfg: ReproduceConfig, run: Run, seed: int) -> dict[str, dict[str, list[float] | float]]:
    """Arm -> metric -> a number per clip, and its density."""
    staged = PRESETS[cfg.preset].config
    same = staged.constant(constant_window(host, staged))
    parts = staged.parts()
    variants = {"dense": Variant(host, None)} | {name: Variant(host, config) for name, config in parts.items()}
    trainings: dict[str, tuple[FPSAttentionConfig, Loss]] = {
        "flow": (staged, "flow"),
        "distillation": (staged, "distillation"),
        "constant distillation": (same, "distillation"),
    }
    for name, (attention, loss) in trainings.items():
        variants[name] = Variant(_tuned(host, cfg, run, seed, name, attention, loss), attention)
    variants["constant"] = Variant(host, same)
    for kind in ("tensor", "tile", "token"):
        variants[kind] = Variant(host, staged.constant(Regime(scales=kind)))
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(1000 + seed))
    outcomes = compare({name: variants[name] for name in ARMS}, labels, batch=cfg.batch, seed=seed, quiet=True)
    return {name: _numbers(outcome) for name, outcome in outcomes.items()}


def _tuned(
    host: Host, cfg: ReproduceConfig, run: Run, seed: int, name: str, attention: FPSAttentionConfig, loss: Loss
) -> Host:
    training = TrainConfig(
        attention=attention, loss=loss, seed=seed, steps=cfg.train_steps, batch=cfg.train_batch, glyphs=cfg.glyphs
    )
    tuning = Tuning(training, host, run.artifacts / f"seed{seed}-{name.replace(' ', '-')}.pt")
    tuning.training.resume()
    tuning.training.follow(tuning.train(glyphs_of(cfg.glyphs, host.device)), run)
    return tuning.result()


def _numbers(outcome: Outcome) -> dict[str, list[float] | float]:
    values: dict[str, Tensor] = {"psnr": outcome.psnr, "ssim": outcome.ssim, "accuracy": outcome.grades["accuracy"]}
    values |= {f"{task}_accuracy": outcome.grades[task] for task in ("digit", "direction", "color", "speed")}
    return {name: value.tolist() for name, value in values.items()} | {"density": outcome.density}


def constant_window(host: Host, staged: FPSAttentionConfig) -> Regime:
    """The window that at every step reads as much as the schedule does on average, or the next less."""
    goal = mean_density(host, staged)
    choices = candidate_regimes(host.config.grid, staged.tile)

    def share(regime: Regime) -> float:
        return density(host.config.grid, staged.tile, regime.window, border=staged.border).tokens

    fitting = [regime for regime in choices if share(regime) <= goal + 1e-9]
    if not fitting:
        raise ValueError(f"no window reads as little as the schedule does on average, {goal:.3g}; take another preset")
    return max(fitting, key=share)
