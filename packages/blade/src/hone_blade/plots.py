"""The chart of a comparison, drawn from ``results.json``, and what its variants look like everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hone_core.plots import BLUE, GREEN, GREY, INK, PINK, RED, drawing, error_bars, finish

__all__ = ["LOOKS", "accuracy_chart"]

COLORS = {"dense": GREY, "asa": BLUE, "asa_g": GREEN, "window": RED, "random": PINK}
TITLES = {"dense": "dense", "asa": "ASA", "asa_g": "ASA_G", "window": "window", "random": "random"}
LOOKS = {name: (title, COLORS[name]) for name, title in TITLES.items()}
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
