"""The chart of a comparison, drawn from ``results.json``, and what its variants look like everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hone_core.plots import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, drawing, error_bars, finish
from hone_core.runs import Row

__all__ = ["INK", "LOOKS", "accuracy_chart", "arms_chart", "ladder_chart", "recall_chart"]

COLORS = {"dense": GREY, "asa": BLUE, "asa_g": GREEN, "psa": ORANGE, "window": RED, "random": PINK}
TITLES = {"dense": "dense", "asa": "ASA", "asa_g": "ASA_G", "psa": "PSA", "window": "window", "random": "random"}
LOOKS = {name: (title, COLORS[name]) for name, title in TITLES.items()}
LOOKS |= {"teacher": ("50 guided dense steps", GREY), "student": ("distilled: 8 sparse steps", GREEN)}
"""Title and colour of each variant's column."""


def accuracy_chart(results: Mapping[str, Any], path: Path) -> Path:
    """Draw task accuracy and PSNR of each variant from the contents of a ``results.json``.

    Args:
        results: as ``hone_core.runs.load_results`` gives it, of a ``demo`` or ``eval`` run.
        path: PNG or SVG to write.

    Raises:
        ValueError: if the results hold no comparison.
    """
    values = {(row["metric"], row["variant"]): row for row in results["rows"]}
    names = [name for name in TITLES if ("accuracy", name) in values]
    if not names:
        raise ValueError("expected rows named accuracy with the variants of a demo or eval run; found none")
    count = values["accuracy", names[0]]["n"]
    densities = [values["density", name]["value"] for name in names if name != "dense" and ("density", name) in values]
    reached = list(dict.fromkeys(f"{x:.3g}" for x in sorted(densities)))
    shown = f", attention density {' to '.join(dict.fromkeys((reached[0], reached[-1])))}" if reached else ""
    with drawing(path, 7.2, 2.9) as figure:
        task, fidelity = figure.subplots(1, 2)
        for index, name in enumerate(names):
            row = values["accuracy", name]
            error = error_bars(row["value"], row["interval"])
            task.bar(index, row["value"], color=COLORS[name], width=0.7, yerr=error, capsize=3, ecolor=INK)
            if name != "dense":
                fidelity.bar(index, values["psnr", name]["value"], color=COLORS[name], width=0.7)
        task.set_ylim(0, 1.05)
        task.set_ylabel("digit and direction right")
        fidelity.set_ylabel("PSNR to dense, dB")
        for axes, bars in ((task, names), (fidelity, names[1:])):
            axes.set_xticks([names.index(name) for name in bars], [TITLES[name] for name in bars])
        finish(figure, note=f"{count} clips{shown}, bars: 95 %")
    return path


def arms_chart(rows: Sequence[Row], path: Path) -> Path:
    """Draw task accuracy and Frechet distance of each arm of a distillation.

    Args:
        rows: of a ``reproduce`` run.
        path: PNG or SVG to write.
    """
    with drawing(path, 7.2, 2.9) as figure:
        for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "frechet"), strict=True):
            shown = [row for row in rows if row.metric == metric]
            for index, row in enumerate(shown):
                color = {"A": GREY, "B": GREY, "D": GREEN}.get(row.variant, BLUE)
                error = error_bars(row.value, row.interval) if metric == "accuracy" else None
                axes.bar(index, row.value, color=color, width=0.7, yerr=error, capsize=2, ecolor=INK)
            axes.set_xticks(range(len(shown)), [row.variant for row in shown], rotation=60)
            axes.set_ylabel("digit and direction right" if metric == "accuracy" else "Frechet distance to the teacher")
        finish(figure, note=f"{shown[0].n} clips an arm, bars: 95 % over seeds and clips")
    return path


MASKS = {"paper": BLUE, "official": ORANGE, "lse": GREEN, "mean": SKY, "window": RED, "random": PINK, "oracle": GREY}
"""Colours of what picks blocks."""


def recall_chart(rows: Sequence[Row], path: Path) -> Path:
    """Draw the recall of masks against density and samples, and by order of tokens.

    Args:
        rows: of a ``reproduce`` run of the claim ``recall``.
        path: PNG or SVG to write.
    """
    with drawing(path, 9.0, 3.2) as figure:
        panels = dict(zip(("density", "samples", "order"), figure.subplots(1, 3), strict=True))
        for panel, axes in panels.items():
            shown = [row for row in rows if row.split == panel]
            masks = list(dict.fromkeys(row.variant for row in shown))
            names = list(dict.fromkeys(str(row.labels[panel]) for row in shown))
            for index, mask in enumerate(masks):
                own = [row for row in shown if row.variant == mask]
                heights = [row.value for row in own]
                if panel == "order":
                    width = 0.8 / len(masks)
                    places = [
                        names.index(str(row.labels[panel])) + (index - (len(masks) - 1) / 2) * width for row in own
                    ]
                    axes.bar(places, heights, width, color=MASKS[mask])
                else:
                    places = [float(row.labels[panel]) for row in own]
                    style = "--" if mask == "oracle" else "-"
                    axes.plot(places, heights, style, marker="o", color=MASKS[mask], label=mask)
            axes.set_xlabel({"density": "density", "samples": "samples of a block", "order": "order of tokens"}[panel])
        panels["order"].set_xticks(range(len(names)), names, rotation=30)
        panels["samples"].set_xscale("log", base=2)
        panels["density"].set_ylabel("share of dense attention's mass")
        panels["density"].legend()
        others = {row.labels["density"] for row in rows if row.split == "order"}
        finish(figure, note=f"{shown[0].n} clips; middle and right at density {', '.join(sorted(map(str, others)))}")
    return path


def ladder_chart(rows: Sequence[Row], path: Path) -> Path:
    """Draw task accuracy, network calls and attention's work along a ladder.

    Args:
        rows: of a ``reproduce`` run of the claim ``decomposition``.
        path: PNG or SVG to write.
    """
    titles = {"accuracy": "digit and direction right", "nfe": "network calls", "attention_gflop": "attention, GFLOP"}
    with drawing(path, 9.0, 3.0) as figure:
        for axes, (metric, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
            shown = [row for row in rows if row.metric == metric]
            for index, row in enumerate(shown):
                color = GREEN if row.variant.startswith("student") else GREY
                error = error_bars(row.value, row.interval) if metric == "accuracy" else None
                axes.barh(index, row.value, color=color, height=0.7, xerr=error, capsize=2, ecolor=INK)
            axes.set_yticks(range(len(shown)), [row.variant for row in shown])
            axes.set_xlabel(title)
            if metric != "accuracy":
                axes.set_xscale("log")
        axes.invert_yaxis()
        count = next(row.n for row in rows if row.metric == "accuracy")
        finish(figure, note=f"{count} clips, bars: 95 %")
    return path
