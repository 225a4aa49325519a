"""The paper's claims on the tiny host: what rounding, window, schedule and scales each cost, and what training buys.

Arms are drawn from the same prompts and noise, over seeds (see ``config.ARMS``; the letters are the plan's), and set
beside each other clip by clip. Intervals are of a bootstrap over seeds and, within each, over clips: a training is one
draw of its seed. What decides was fixed beforehand, see ``verdicts``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.jobs import run_jobs
from hone_core.progress import progress_bar
from hone_core.runs import Better, Report, Row, Run
from hone_video.clips import random_labels
from hone_video.means import GRADES, grade_metric
from hone_video.prompts import describe
from hone_video.sheets import contact_sheet, describe_clips
from torch import Tensor

from .arms import SHOWN, Job, arms_of, guided_host, work
from .config import ARMS, ReproduceConfig
from .plots import INK, arms_chart

__all__ = ["DIFFERENCES", "ReproduceReport", "reproduce", "verdicts"]

DIFFERENCES = (
    *((arm, "dense") for arm in ("e4m3", "window", "both", "flow", "distillation")),
    ("flow", "both"),
    ("distillation", "both"),
    ("schedule", "constant"),
    ("schedule-trained", "constant-trained"),
    ("tensor", "tile"),
    ("token", "tile"),
)
"""Arms that are subtracted, clip by clip."""

MARGIN = 0.02
"""Share of clips that a rescued arm may have right less often than dense."""

MARGIN_DB = 0.5
"""PSNR to dense below which granularities count as equal."""

METRICS: dict[str, tuple[str, Better]] = {
    **dict.fromkeys(GRADES, ("", "higher")),
    "psnr": ("dB", "higher"),
    "ssim": ("", "higher"),
    "flow_loss": ("", "lower"),
}
"""What a job's file has of each clip: unit and direction."""


@dataclass(frozen=True, kw_only=True)
class ReproduceReport(Report):
    """Arms over seeds; as text, a table, differences and verdicts."""

    def __str__(self) -> str:
        cells: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            cells.setdefault(row.variant, {})[row.metric] = row
        lines = [f"{'arm':<50} {'digit and direction':>20} {'PSNR to dense':>13} {'flow loss':>9} {'density':>7}"]
        for arm, text in ARMS.items():
            if arm in cells:
                found = cells[arm]
                likeness = f"{found['psnr'].value:.2f} dB" if "psnr" in found else "-"
                lines.append(
                    f"{f'{arm}: {text}':<50} {_share(found['accuracy']):>20} {likeness:>13} "
                    f"{found['flow_loss'].value:>9.4f} {found['density'].value:>7.3f}"
                )
        shown = {name: found for name, found in cells.items() if "accuracy_difference" in found}
        if shown:
            lines += ["", f"{'difference':<36} {'digit and direction':>26} {'flow loss':>30} {'PSNR, dB':>24}"]
        for name, found in shown.items():
            psnr = _signed(found["psnr_difference"], 1, ".2f") if "psnr_difference" in found else "-"
            right = _signed(found["accuracy_difference"], 100, ".1f", "%")
            lines.append(f"{name:<36} {right:>26} {_signed(found['flow_loss_difference'], 1, '.4f'):>30} {psnr:>24}")
        return "\n".join([*lines, "", *verdicts(self.rows), f"results  {self.path / 'results.json'}"])


def _ends(row: Row) -> tuple[float, float]:
    return row.interval or (row.value, row.value)


def _share(row: Row) -> str:
    low, high = _ends(row)
    return f"{row.value:.0%} ({low:.0%} to {high:.0%})"


def _signed(row: Row, scale: float, digits: str, unit: str = "") -> str:
    value, low, high = (f"{scale * x:+{digits}}{unit}" for x in (row.value, *_ends(row)))
    return f"{value} ({low} to {high})"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the differences say, in words. The rules were fixed before anything was trained.

    1. *Rescue*. An arm holds dense where the 95 % interval of its difference in digits and directions right lies above
       -2 points, is below it where the interval does, and else is undecided. Training rescues if the untrained "both"
       is below dense and the trained one holds it; it helps if the trained one is better than the untrained.
    2. *Step-awareness*, at equal density: the schedule trained beside one window trained, by digits and directions
       right: a difference counts where its interval excludes 0. The held-out loss and the untrained pair are said too.
    3. *Granularity*, in E4M3 alone: it does not matter if a scale per tensor and one per token have a PSNR to dense
       within half a dB of that of one per tile, intervals included; it does if one interval lies outside.

    Args:
        rows: Of a run; a claim whose arms did not run gets no verdict.
    """
    found = {(row.metric, row.variant): _ends(row) for row in rows}

    def ends(first: str, second: str, metric: str = "accuracy") -> tuple[float, float]:
        return found[f"{metric}_difference", f"{first} - {second}"]

    def ran(*arms: str) -> bool:
        return all(("accuracy", arm) in found for arm in arms)

    lines = []
    trained = [arm for arm in ("flow", "distillation") if ran(arm, "both")]
    if trained:
        states = {arm: _holds(ends(arm, "dense")) for arm in ("e4m3", "window", "both", *trained) if ran(arm)}
        lines.append("beside dense: " + "; ".join(f"{ARMS[arm]} {state}" for arm, state in states.items()))
        answers = []
        for arm in trained:
            low, high = ends(arm, "both")
            helps = f"it is {_WORDS[(low > 0) - (high < 0)]} than without training" if low > 0 or high < 0 else _NONE
            answer = {"holds": "yes", "is below": "no", "is undecided": "undecided"}[states[arm]]
            answers.append(f"{ARMS[arm]}: {answer}; {helps}")
        question = "does joint training rescue E4M3 and window? "
        if states["both"] == "is below":
            lines.append(question + ". ".join(answers))
        else:
            lines.append(question + f"without training it {states['both']}: nothing is shown to be broken")
    pairs = {"trained": ("schedule-trained", "constant-trained"), "untrained": ("schedule", "constant")}
    said = []
    for name, pair in pairs.items():
        if ran(*pair):
            right, loss = ends(*pair), ends(*pair, "flow_loss")
            on_loss = _WORDS[(loss[1] < 0) - (loss[0] > 0)]
            said.append(f"{name}, {_WORDS[(right[0] > 0) - (right[1] < 0)]} on digit and direction, {on_loss} on loss")
    if said:
        lines.append("is the schedule better than one window, at equal density? " + "; ".join(said))
    kinds = [kind for kind in ("tensor", "token") if ran(kind, "tile")]
    if kinds:
        bounds = [ends(kind, "tile", "psnr") for kind in kinds]
        if any(low > MARGIN_DB or high < -MARGIN_DB for low, high in bounds):
            answer = "yes"
        elif all(low > -MARGIN_DB and high < MARGIN_DB for low, high in bounds):
            answer = f"no: less than {MARGIN_DB:g} dB"
        else:
            answer = "undecided"
        lines.append(f"does the granularity of scales matter (per {', per '.join(kinds)} beside per tile)? {answer}")
    return lines


_WORDS = {1: "better", 0: "no difference found", -1: "worse"}
_NONE = "no difference to no training found"


def _holds(ends: tuple[float, float]) -> str:
    if ends[0] >= -MARGIN:
        return "holds"
    return "is below" if ends[1] < -MARGIN else "is undecided"


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Train, draw and grade the arms with every seed, and compare them.

    Args:
        cfg: Arms, prompts, seeds and steps.
        run: The run, entered. Its artifacts hold a file per arm and seed; a run that was cut off goes on with the rest,
            and with the checkpoints of the trainings that it was at.

    Raises:
        CheckpointError: There is no such host.
        RuntimeError: The dense host misses its gate.
    """
    device, folder = str(resolve_device(run.device)), run.artifacts
    host = guided_host(cfg)
    arms = arms_of(cfg, host)
    chosen = [arm for arm in ARMS if arm in (*cfg.arms, "dense") or not cfg.arms]
    # Dense first, whose clips the others need; then what takes longest.
    chosen.sort(key=lambda arm: (arm != "dense", arms[arm].loss is None))
    jobs = [Job(arm, seed) for arm in chosen for seed in range(cfg.seeds)]
    with progress_bar(len(jobs), desc="arms", quiet=run.quiet) as bar:
        left = [job for job in jobs if not job.file(folder).is_file()]
        bar.update(len(jobs) - len(left))
        do = partial(run_jobs, partial(work, cfg, folder), workers=cfg.workers, device=device)
        for _ in do([job for job in left if job.arm == "dense"]):
            bar.update()
        _check_gate(cfg, [torch.load(job.file(folder), weights_only=True) for job in jobs if job.arm == "dense"])
        for _ in do([job for job in left if job.arm != "dense"]):
            bar.update()
    found = {job: torch.load(job.file(folder), weights_only=True) for job in jobs}
    _write_rows(run, cfg, found)
    for ending in ("png", "svg"):
        arms_chart(run.rows, run.figures / f"arms.{ending}")
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(1000))[:SHOWN]
    shown = {arm: found[Job(arm, 0)] for arm in ARMS if arm in chosen}
    clips = {arm: values["shown"].float() / 255 for arm, values in shown.items()}
    captions = {arm: describe_clips(host.classifier, clips[arm], shown[arm]["accuracy"]) for arm in clips}
    looks = {arm: (f"{arm}: {ARMS[arm]}", INK) for arm in clips}
    contact_sheet(clips, [describe(row) for row in labels], captions, run.figures / "arms_clips.png", looks=looks)
    return ReproduceReport.of(run)


def _check_gate(cfg: ReproduceConfig, dense: Sequence[Mapping[str, Tensor]]) -> None:
    reached = {name: min(float(values[name].mean()) for values in dense) for name in ("digit", "direction")}
    if min(reached.values()) < cfg.gate:
        raise RuntimeError(
            f"the dense host must get {cfg.gate:.0%} of digits and directions right before its arms mean anything; "
            "with its worst seed it got " + " and ".join(f"{value:.0%} ({name})" for name, value in reached.items())
        )


def _write_rows(run: Run, cfg: ReproduceConfig, found: Mapping[Job, Mapping[str, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(cfg.seeds, (2000, cfg.seeds, 1), generator=generator)
    clips = torch.randint(cfg.prompts, (2000, cfg.seeds, cfg.prompts), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)

    def row(metric: str, values: Tensor, variant: str, unit: str, better: Better) -> None:
        low, high = values[seeds, clips].mean((1, 2)).quantile(ends).tolist()
        spread = float(values.mean(1).std()) if cfg.seeds > 1 else None
        options: dict[str, Any] = {"interval": (low, high), "spread": spread, "n": values.numel()}
        run.row(metric, float(values.mean()), unit=unit, better=better, variant=variant, **options)

    arms = {job.arm for job in found}
    values = {
        (arm, name): torch.stack([found[Job(arm, seed)][name].double() for seed in range(cfg.seeds)])
        for arm in arms
        for name in METRICS
    }
    for arm in (arm for arm in ARMS if arm in arms):
        for name, (unit, better) in METRICS.items():
            if arm != "dense" or unit != "dB":
                row(grade_metric(name) if name in GRADES else name, values[arm, name], arm, unit, better)
        run.row("density", float(found[Job(arm, 0)]["density"]), better="lower", variant=arm)
    for first, second in DIFFERENCES:
        if first in arms and second in arms:
            for name in ("accuracy", "flow_loss", *(["psnr"] if second != "dense" else [])):
                change = values[first, name] - values[second, name]
                row(f"{name}_difference", change, f"{first} - {second}", METRICS[name][0], "none")
