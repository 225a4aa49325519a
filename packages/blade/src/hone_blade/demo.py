"""The demo: the same prompts and noise dense, with BLADE's attention, and with static masks of equal density.

Where there is a distilled student, also that one in 8 sparse steps without guidance beside its teacher in 50 guided
dense ones. Runs on the packaged tiny host in about two minutes on an idle two-core CPU and downloads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch
from hone_video.grader import grade
from hone_video.host import Host, load_host
from hone_video.means import write_grades
from hone_video.prompts import describe, parse_prompt
from hone_video.sheets import contact_sheet, describe_clips, write_video

from . import plots
from .config import TDM_PRESETS, TEACHER_STEPS, DemoConfig
from .distill import rollout_clips, student_host
from .evaluate import Outcome, attention_gflop, compare, comparison_table, means, write_rows
from .models import attach

__all__ = ["DemoReport", "demo"]

NOTE = (
    "On a CPU and at this size (1,024 tokens) sparse attention is not expected to be faster: attention is a small\n"
    "part of the network, and the CPU backend is the reference, which computes every pair and masks it. What a\n"
    "block-sparse kernel leaves out shows in the last column; times at real sizes come from `hone-blade bench`."
)

FEW = 4
"""Prompts, the first ones, that teacher and student draw: 50 guided steps take most of the demo's time."""
SPLIT = "distilled"
"""Split of the rows of teacher and student."""

NO_STUDENT = (
    "Few steps are not shown: no distilled student is packaged for this host. `hone-blade distill` makes one; pass\n"
    "its lora.safetensors with --lora."
)


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, the table.

    Attributes:
        video: MP4 of all clips side by side.
        sheet: PNG of a few frames of each.
        clips: per variant.
        variants: name -> metric -> mean.
    """

    video: Path
    sheet: Path
    clips: int
    variants: dict[str, dict[str, float]]

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a run whose rows are written."""
        variants, clips = means(run)
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            video=run.artifacts / "demo.mp4",
            sheet=run.figures / "contact_sheet.png",
            clips=clips,
            variants=variants,
        )

    def __str__(self) -> str:
        return "\n".join(
            [
                comparison_table(self.variants, self.clips),
                NOTE,
                "",
                *_student_lines(self),
                "",
                f"video          {self.video}",
                f"contact sheet  {self.sheet}",
                f"results        {self.path / 'results.json'}",
            ]
        )


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Sample, compare, draw and write the rows.

    Args:
        cfg: prompts and density.
        run: the run, entered.

    Raises:
        CheckpointError: there is no such host.
        ValueError: the comparison does not fit the host; nothing has been sampled then.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    labels = torch.tensor([parse_prompt(prompt) for prompt in cfg.prompts[: cfg.limit]])
    outcomes = compare(
        host,
        labels,
        cfg.comparison,
        batch=len(labels),
        stats_every=cfg.stats_every,
        quiet=run.quiet,
    )
    write_rows(run, outcomes)
    clips = {name: outcome.clips for name, outcome in outcomes.items()}
    prompts = [describe(row) for row in labels]
    title = f"same prompts and noise; sparse columns compute {_reached(outcomes, cfg.comparison.density)}"
    captions = {
        name: describe_clips(
            host.classifier, outcome.clips, outcome.grades["accuracy"], None if name == "dense" else outcome.psnr
        )
        for name, outcome in outcomes.items()
    }
    report = DemoReport.of(run)
    contact_sheet(clips, prompts, captions, report.sheet, looks=plots.LOOKS, title=title)
    write_video(clips, prompts, report.video, looks=plots.LOOKS, title=title)
    if cfg.student is not None:
        _distilled(cfg, cfg.student, host, labels[:FEW], run)
    return DemoReport.of(run)


def _distilled(cfg: DemoConfig, student: Path, host: Host, labels: torch.Tensor, run: Run) -> None:
    """Draw with the teacher in many steps and with the student in few, and write their rows and pictures."""
    tdm, count, seed = TDM_PRESETS["tiny"].config, len(labels), cfg.comparison.seed
    text, noise = host.encode_labels(labels), host.noise(count, seed)
    host.sample(text, noise, steps=1)  # warm
    with (
        progress_bar(TEACHER_STEPS, desc="the teacher's steps", quiet=run.quiet) as bar,
        Stopwatch(host.device) as many,
    ):
        made = host.sample(text, noise, steps=TEACHER_STEPS, on_step=lambda step, steps: bar.update())
        clips = {"teacher": made.cpu()}
    settings = student_host(host, student)
    with attach(host.transformer, settings) as handle:
        with handle.record() as stats:
            rollout_clips(host, labels[:1], tdm, seed=seed)
        with Stopwatch(host.device) as few:
            clips["student"] = rollout_clips(host, labels, tdm, seed=seed, batch=count)
    host.transformer.delete_adapters("student")
    density = torch.stack([row.stats.density.mean() + row.stats.pooled for row in stats]).mean().item()
    costs = {
        "teacher": (many.seconds, host.evaluations(steps=TEACHER_STEPS), 1.0, None),
        "student": (few.seconds, [1] * tdm.student_steps, density, settings),
    }
    captions = {}
    for name, (seconds, calls, share, attention) in costs.items():
        where: dict[str, Any] = {"variant": name, "split": SPLIT}
        gflop = attention_gflop(host, attention, density=share, evaluations=calls)
        run.row("nfe", sum(calls), better="lower", **where)
        run.row("seconds", seconds / count, unit="s", better="lower", n=count, **where)
        run.row("density", share, better="lower", **where)
        run.row("attention_gflop", gflop, unit="GFLOP", better="lower", **where)
        grades = grade(host.classifier, clips[name], labels)
        write_grades(run, grades, **where)
        captions[name] = describe_clips(host.classifier, clips[name], grades["accuracy"])
    prompts = [describe(row) for row in labels]
    looks = {
        name: (f"{plots.LOOKS[name][0]} ({sum(calls)} calls)", plots.LOOKS[name][1])
        for name, (_, calls, _, _) in costs.items()
    }
    title = "same prompts; the right one was distilled from the left one without any video"
    contact_sheet(clips, prompts, captions, run.figures / "distilled.png", looks=looks, title=title, frames=4)
    # Two columns are narrow: at this scale the longest prompt stands above them.
    write_video(clips, prompts, run.artifacts / "distilled.mp4", looks=plots.LOOKS, scale=6)


def _student_lines(report: DemoReport) -> list[str]:
    cells: dict[str, dict[str, float]] = {}
    for row in report.rows:
        if row.split == SPLIT:
            cells.setdefault(row.variant, {})[row.metric] = row.value
    if not cells:
        return [NO_STUDENT]
    lines = [f"{'':<28} {'calls':>5} {'s/clip':>7} {'density':>7} {'digit':>6} {'direction':>9} {'attn GFLOP':>10}"]
    for name, values in cells.items():
        digit, direction = (f"{values[f'{task}_accuracy']:.0%}" for task in ("digit", "direction"))
        lines.append(
            f"{plots.LOOKS[name][0]:<28} {values['nfe']:>5.0f} {values['seconds']:>7.2f} {values['density']:>7.3f} "
            f"{digit:>6} {direction:>9} {values['attention_gflop']:>10.1f}"
        )
    folder = report.path
    return [*lines, f"clips          {folder / 'artifacts' / 'distilled.mp4'}, {folder / 'figures' / 'distilled.png'}"]


def _reached(outcomes: Mapping[str, Outcome], asked: float) -> str:
    """The share of pairs that the sparse variants computed, and the one asked for where that is another."""
    shares = sorted(outcome.density for name, outcome in outcomes.items() if name != "dense")
    low, high, wanted = (f"{100 * share:.3g}%" for share in (shares[0], shares[-1], asked))
    shown = low if low == high else f"{low} to {high}"
    return f"{shown} of the query-key pairs" + ("" if shown == wanted else f" ({wanted} asked for)")
