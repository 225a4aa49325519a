"""The demo: a trained Video-LLM answers questions on generated clips, whole and with parts of its attention blocked.

Runs on the packaged tiny host on a two-core CPU and downloads nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_text
from hone_core.runs import Report, Run
from hone_core.timing import measure
from hone_lm.choices import choice_inputs, choice_prompt
from hone_lm.decoders import find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from hone_lm.question_sets import Item
from hone_lm.video import Clip

from . import plots
from .config import QUESTIONS, DemoConfig, KnockoutConfig
from .data import generated_items
from .evaluate import BASELINE, SweepReport, configurations, is_right, read_answers, sweep
from .flops import DecoderShape, prefill_flops
from .host import Host, load_host
from .models import attach
from .recommend import Recipe, choose
from .sample import exit_gap

__all__ = ["DemoReport", "demo", "time_recipe"]

RECIPE = "recipe.txt"

TIMED_ITEMS, TIMED_TURNS = 32, 20
"""Prompts of a timed prefill, and turns that each variant gets after two that warm up."""


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, the tables.

    Attributes:
        sweep: the sweep's report.
        recipe: the recommendation as text.
        timing: one line on what it saves.
        chart: layer-by-category picture.
        sheet: clips with the answers under each knockout.
    """

    sweep: SweepReport
    recipe: str
    timing: str
    chart: Path
    sheet: Path

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows are written."""
        recipe, _, timing = (run.artifacts / RECIPE).read_text(encoding="utf-8").rpartition("\n")
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            sweep=SweepReport.of(run),
            recipe=recipe,
            timing=timing,
            chart=run.figures / "sweep.png",
            sheet=run.figures / "clips.png",
        )

    def __str__(self) -> str:
        files = {"picture": self.chart, "clips": self.sheet, "results": self.path / "results.json"}
        named = (f"{name:<8} {file}" for name, file in files.items())
        return "\n".join([str(self.sweep), "", self.recipe, self.timing, *named])


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Sweep, draw, recommend and time."""
    host = load_host(resolve_device(run.device), path=cfg.host)
    items = generated_items(cfg.items, host.config.clip, seed=1000 + cfg.seed)
    sweep(host.model, host.processor, items, cfg.sweep, run)
    answers, _ = read_answers(run.path)
    layers = host.config.layers
    found = configurations(cfg.sweep, layers)
    recipe = choose(answers, found, num_layers=layers, max_drop=cfg.max_drop, seed=cfg.seed)
    timing = time_recipe(host, items[:TIMED_ITEMS], recipe, run)
    atomic_write_text(run.artifacts / RECIPE, f"{recipe}\n{timing}")
    rows = [asdict(row) for row in run.rows]
    plots.sweep_chart(rows, run.figures / "sweep.png", title="tiny host, generated clips")
    _sheet(items, answers, layers, run.figures / "clips.png")
    return DemoReport.of(run)


@torch.no_grad()
def time_recipe(host: Host, items: Sequence[Item], recipe: Recipe, run: Run) -> str:
    """Time a prefill as it is and under a recipe, and check that the exit changes nothing that LV-K does not."""
    prompts = [choice_prompt(host.processor, item.question, item.options, style="text") for item in items]
    inputs = choice_inputs(host.processor, prompts, _clips(items))
    inputs = {name: value.to(host.device) for name, value in inputs.items()}
    saves = recipe.exit is not None or recipe.window > 0
    configs = {BASELINE: None} | ({recipe.config.label: recipe.config} if saves else {})
    times: dict[str, list[float]] = {name: [] for name in configs}
    # They alternate, so that other load on the machine falls on both alike.
    for turn in range(2 + TIMED_TURNS):
        for name, config in configs.items():
            with nullcontext() if config is None else attach(host.model, config):
                once = measure(
                    lambda: host.model(**inputs, logits_to_keep=1), warmup=0, repeats=1, device=host.device
                ).ms_p50
            if turn >= 2:
                times[name].append(once)
    shown = {}
    for name, each in times.items():
        low, middle, high = (statistics.quantiles(each, n=10, method="inclusive")[place] for place in (1, 4, 7))
        shown[name] = f"{middle:.0f} ms [{low:.0f}, {high:.0f}]"
        spread = statistics.stdev(each)
        run.row("prefill", middle, unit="ms", better="lower", n=len(each), spread=spread, variant=name)
    text = f"prefill of {len(items)} prompts {shown[BASELINE]}"
    if not saves:
        return f"{text}; nothing to save within the budget"
    bound = _bound(host, find_layouts(host.model, inputs), recipe)
    run.row("flop_bound", bound, better="none", variant=recipe.config.label)
    text += (
        f", {shown[recipe.config.label]} with {recipe.config.label} (medians, 20th and 80th percentiles); the "
        f"decoder's operations allow {bound:.2f} times as fast"
    )
    gap = exit_gap(host.model, inputs, KnockoutConfig(exit=recipe.exit))
    if gap is not None:
        run.row("exit_gap", gap, better="lower", n=len(items), variant=f"exit {recipe.exit}")
        text += f"; logits of exit and LV-K differ by at most {gap:.1e}"
    return text


def _bound(host: Host, layouts: Sequence[TokenLayout], recipe: Recipe) -> float:
    """Operations of the decoder as it is over those under a recipe."""
    shape = DecoderShape.of(find_decoder(host.model).config)
    totals = []
    for exit, window in ((None, 0), (recipe.exit, recipe.used_window)):
        total = 0.0
        for layout in layouts:
            prefix = int(layout.real[: layout.spans["video"][0]].sum())
            frames, each = layout.num_frames, layout.tokens_per_frame[0]
            suffix = int(layout.real.sum()) - prefix - frames * each
            total += prefill_flops(
                shape, prefix=prefix, frames=frames, tokens_per_frame=each, suffix=suffix, exit=exit, window=window
            ).total
        totals.append(total)
    return totals[0] / totals[1]


def _clips(items: Sequence[Item]) -> list[Clip]:
    return [item.clip for item in items if item.clip is not None]


def _sheet(items: Sequence[Item], answers: dict[str, Any], layers: int, path: Path) -> Path:
    """A clip of each kind with what the model says under each knockout."""
    shown = {kind: next(item for item in items if item.category == kind) for kind in QUESTIONS}
    everywhere = f"0-{layers - 1}"
    labels = [BASELINE] + [f"global2 {kind} {everywhere}" for kind in ("LV", "VT", "VS")]
    lines = []
    for item in shown.values():
        answer = answers[item.id]
        text = [item.question, f"right: {item.options[item.answer]}"]
        for label in labels:
            p = answer["results"][label]["p"]
            best = max(range(len(p)), key=p.__getitem__)
            mark = "" if is_right(answer, label) else "!"
            name = label if label == BASELINE else label.split()[1] + "-K in all layers"
            text.append(f"{mark}{name}: {item.options[best]} ({p[best]:.0%})")
        lines.append(text)
    clips = [clip.frames for clip in _clips(list(shown.values()))]
    return plots.clip_sheet(clips, lines, path, title="What the tiny host answers; red is wrong")
