"""What steps, guidance and sparse attention each save and cost, from the teacher's 50 guided steps to the student.

Every rung of the ladder changes one thing of the one above it. What it saves is counted in network calls and in
attention's work; times, which mean something at real sizes, are those of ``hone-blade bench``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Row, Run
from hone_video.clips import random_labels
from hone_video.grader import grade
from hone_video.host import Host, load_host
from hone_video.means import GRADES, write_grades, write_mean
from torch import Tensor

from . import plots
from .config import TEACHER_STEPS, BladeConfig, ReproduceConfig
from .distill import rollout_clips, student_host
from .evaluate import attention_gflop
from .models import attach

__all__ = ["Rung", "compare_rungs", "describe_rungs", "is_decomposition", "rungs"]


@dataclass(frozen=True)
class Rung:
    """One way to draw.

    Attributes:
        name: Of it.
        change: What is other than in the rung before.
        draw: Clips of labels, from the noise of a seed.
        evaluations: Of the network at each step.
        attention: Sparse attention, or None for dense.
        student: Whether the student's weights draw.
    """

    name: str
    change: str
    draw: Callable[[Host, Tensor, int], Tensor]
    evaluations: list[int]
    attention: BladeConfig | None = None
    student: bool = False


def rungs(cfg: ReproduceConfig, host: Host, attention: BladeConfig) -> list[Rung]:
    """The ladder; without a student it ends at the teacher's sparse steps.

    Args:
        cfg: Objective, for the rollout's steps and eta, and the student.
        host: The teacher.
        attention: Of the sparse rungs.
    """
    tdm, few = cfg.students.tdm, cfg.students.tdm.student_steps

    def own(**options: Any) -> Callable[[Host, Tensor, int], Tensor]:
        def draw(host: Host, labels: Tensor, seed: int) -> Tensor:
            return host.sample(host.encode_labels(labels), host.noise(len(labels), seed), **options).cpu()

        return draw

    def rollout(host: Host, labels: Tensor, seed: int) -> Tensor:
        return rollout_clips(host, labels, tdm, seed=seed, batch=len(labels))

    def teacher(name: str, change: str, **options: Any) -> Rung:
        return Rung(name, change, own(**options), host.evaluations(**options))

    found = [
        teacher(f"{TEACHER_STEPS} guided steps", "", steps=TEACHER_STEPS),
        teacher(f"{TEACHER_STEPS} steps", "no guidance", steps=TEACHER_STEPS, guidance=1.0),
        teacher(f"{few} steps", "fewer steps", steps=few, guidance=1.0),
        Rung(f"{few} steps of the rollout", "the rollout as sampler", rollout, [1] * few),
        Rung(f"{few} sparse steps", "sparse attention", rollout, [1] * few, attention),
    ]
    if cfg.student is not None:
        found.append(Rung(f"student, {few} sparse steps", "distilled weights", rollout, [1] * few, attention, True))
        found.append(Rung(f"student, {few} dense steps", "dense attention", rollout, [1] * few, None, True))
    return found


def compare_rungs(cfg: ReproduceConfig, run: Run) -> None:
    """Draw every rung with every seed; write rows, and the figure as PNG and SVG.

    Args:
        cfg: Prompts, seeds, student.
        run: The run, entered. Its artifacts hold a file per rung and seed; a run that was cut off goes on after them.

    Raises:
        CheckpointError: There is no such host or student, or the student states no attention.
    """
    device = resolve_device(run.device)
    host = load_host(device, path=cfg.host)
    attention = cfg.students.comparison.configs(host.config.tokens)["asa_g"]
    pupil = None
    if cfg.student is not None:
        pupil = load_host(device, path=cfg.host)
        attention = student_host(pupil, cfg.student)
    assert attention is not None
    ladder = rungs(cfg, host, attention)
    found: dict[str, dict[str, list[float]]] = {}
    with progress_bar(len(ladder) * cfg.seeds, desc="rungs", quiet=run.quiet) as bar:
        for index, rung in enumerate(ladder):
            mine: dict[str, list[float]] = {}
            for seed in range(cfg.seeds):
                file = run.artifacts / f"rung-{index}-{seed}.json"
                if not file.is_file():
                    drawer = pupil if rung.student else host
                    assert drawer is not None
                    atomic_write_json(file, _draw(rung, drawer, cfg, seed))
                for name, values in json.loads(file.read_text(encoding="utf-8")).items():
                    mine.setdefault(name, []).extend(values)
                bar.update()
            found[rung.name] = mine
    _write_rows(run, host, ladder, found)
    for ending in ("png", "svg"):
        plots.ladder_chart(run.rows, run.figures / f"decomposition.{ending}")


def _draw(rung: Rung, host: Host, cfg: ReproduceConfig, seed: int) -> dict[str, list[float]]:
    """Grades of each clip, and density."""
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(5000 + seed))
    grades: dict[str, list[float]] = {task: [] for task in GRADES}
    density = 1.0
    with nullcontext() if rung.attention is None else attach(host.transformer, rung.attention) as handle:
        if handle is not None:
            with handle.record() as stats:
                rung.draw(host, labels[:1], seed)
            density = torch.stack([row.stats.density.mean() + row.stats.pooled for row in stats]).mean().item()
        for at in range(0, cfg.prompts, cfg.batch):
            clips = rung.draw(host, labels[at : at + cfg.batch], 1000 * seed + at)
            for task, values in grade(host.classifier, clips, labels[at : at + cfg.batch]).items():
                if task in grades:
                    grades[task] += values.double().tolist()
    return {**grades, "density": [density]}


def _write_rows(run: Run, host: Host, ladder: Sequence[Rung], found: dict[str, dict[str, list[float]]]) -> None:
    before = None
    for rung in ladder:
        values = found[rung.name]
        where: dict[str, Any] = {"variant": rung.name, "labels": {"change": rung.change or "none"}}
        density = sum(values["density"]) / len(values["density"])
        flops = attention_gflop(host, rung.attention, density=density, evaluations=rung.evaluations)
        run.row("nfe", sum(rung.evaluations), better="lower", **where)
        run.row("attention_gflop", flops, unit="GFLOP", better="lower", **where)
        run.row("density", density, better="lower", **where)
        write_grades(run, {task: torch.tensor(values[task]) for task in GRADES}, **where)
        right = torch.tensor(values["accuracy"])
        if before is not None:
            write_mean(run, "accuracy_change", right - before, better="none", **where)
        before = right


def is_decomposition(rows: Sequence[Row]) -> bool:
    """Whether the rows are of this comparison."""
    return any(row.metric == "accuracy_change" for row in rows)


def describe_rungs(rows: Sequence[Row]) -> str:
    """The ladder as a table."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.variant, {})[row.metric] = row
    lines = [f"{'':<28} {'calls':>5} {'attn GFLOP':>10} {'digit and direction':>19}  change"]
    for name, values in cells.items():
        right = values["accuracy"]
        low, high = right.interval or (right.value, right.value)
        change = ""
        if "accuracy_change" in values:
            moved = values["accuracy_change"]
            assert moved.interval is not None
            change = (
                f"{moved.labels['change']}: {moved.value:+.1%} ({moved.interval[0]:+.1%} to {moved.interval[1]:+.1%})"
            )
        lines.append(
            f"{name:<28} {values['nfe'].value:>5.0f} "
            f"{values['attention_gflop'].value:>10.1f} {f'{right.value:.0%} ({low:.0%} to {high:.0%})':>19}  {change}"
        )
    if not any(name.startswith("student") for name in cells):
        lines.append("no student: pass the lora.safetensors of hone-blade distill with --lora")
    return "\n".join(lines)
