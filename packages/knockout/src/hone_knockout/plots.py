"""Figures from ``results.json`` alone, in the paper's axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone_core.io import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["clip_sheet", "sweep_chart"]

INK, PAPER = "#222222", "#ffffff"
COLORS = {"LV": "#d55e00", "VT": "#0072b2", "VS": "#009e73", "VV": "#cc79a7", "VT-strict": "#56b4e9"}
LINES = ("#222222", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#999999")


def sweep_chart(results: Mapping[str, Any], path: Path, *, title: str = "") -> Path:
    """Draw what a sweep found: two-stage curve, kinds in all layers, windows, windows by category.

    Layers are counted from 1 in the picture, as in the paper.

    Args:
        results: As ``hone_core.runs.load_results`` gives it.
        path: PNG or SVG to write.
        title: Above everything.

    Raises:
        ValueError: The results hold no configuration of a sweep.
    """
    rows = [row for row in results["rows"] if row.get("labels", {}).get("setting")]
    settings = {row["labels"]["setting"] for row in rows}
    panels: list[Any] = []
    if "global1" in settings:
        panels.append(_two_stage)
    if "global2" in settings:
        panels.append(_kinds)
    if "window" in settings:
        panels += [_windows, _by_category]
    if not panels:
        raise ValueError("expected rows of a sweep (settings global1, global2 or window); found none")
    figure = _figure(4.3 * len(panels), 3.5)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, rows)
        if draw is not _by_category:
            axes.spines[["top", "right"]].set_visible(False)
    count = max(row["n"] for row in rows)
    figure.suptitle(title, fontsize=10, color=INK)
    figure.text(0.99, 0.01, f"{count} questions, bars and bands: 95 %", ha="right", fontsize=7, color=INK)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150)
    return path


def _pick(rows: Sequence[Mapping[str, Any]], metric: str, setting: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["metric"] == metric and row["labels"]["setting"] == setting]


def _two_stage(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Performance ratio over layer ratio, one line per category."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    for split, color in zip(splits, LINES, strict=False):
        points = sorted(
            (row["labels"]["layer_ratio"], row["value"])
            for row in _pick(rows, "performance_ratio", "global1")
            if row["split"] == split
        )
        points.append((1.0, 1.0))
        width = 2.2 if split == "all" else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=width, color=color, label=split)
    axes.axhline(1, color=INK, lw=0.5, ls=":")
    axes.set_xlabel("layer ratio (text reads video in the layers up to here)")
    axes.set_ylabel("performance ratio")
    axes.set_title("LV-K after layer i", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=6, frameon=False)


def _kinds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy change of each kind in all layers, by category."""
    found = _pick(rows, "accuracy_change", "global2")
    kinds = list(dict.fromkeys(row["labels"]["kind"] for row in found))
    splits = list(dict.fromkeys(row["split"] for row in found))
    width = 0.8 / len(splits)
    for place, (split, color) in enumerate(zip(splits, LINES, strict=False)):
        for at, kind in enumerate(kinds):
            for row in found:
                if (row["split"], row["labels"]["kind"]) == (split, kind):
                    low, high = row.get("interval") or (row["value"], row["value"])
                    error = [[100 * max(0.0, row["value"] - low)], [100 * max(0.0, high - row["value"])]]
                    label = split if at == 0 else None
                    x = at - 0.4 + (place + 0.5) * width
                    axes.bar(x, 100 * row["value"], width, color=color, label=label, yerr=error, error_kw={"lw": 0.6})
    axes.axhline(0, color=INK, lw=0.5)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=7)
    axes.set_ylabel("accuracy change, points")
    axes.set_title("in all layers", fontsize=9)
    axes.legend(fontsize=6, frameon=False)


def _windows(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy change of windows, one line per kind."""
    found = [row for row in _pick(rows, "accuracy_change", "window") if row["split"] == "all"]
    for kind in dict.fromkeys(row["labels"]["kind"] for row in found):
        points = sorted(
            (row["labels"]["last"] + 1, 100 * row["value"], *(100 * v for v in row.get("interval", (0, 0))))
            for row in found
            if row["labels"]["kind"] == kind
        )
        x, y, low, high = zip(*points, strict=True)
        color = COLORS.get(kind, INK)
        axes.plot(x, y, marker="o", ms=3, color=color, label=f"{kind}-K")
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.axhline(0, color=INK, lw=0.5)
    axes.set_xlabel("last layer of the window, from 1")
    axes.set_ylabel("accuracy change, points")
    axes.set_title("in a window of layers", fontsize=9)
    axes.legend(fontsize=6, frameon=False)


def _by_category(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy change of LV-K and VT-K windows, a row per kind and category."""
    found = _pick(rows, "accuracy_change", "window")
    kinds = [k for k in dict.fromkeys(row["labels"]["kind"] for row in found) if k in ("LV", "VT")]
    splits = [s for s in dict.fromkeys(row["split"] for row in found) if s != "all"] or ["all"]
    lasts = sorted({row["labels"]["last"] for row in found})
    values = {(row["labels"]["kind"], row["split"], row["labels"]["last"]): 100 * row["value"] for row in found}
    table = [[values.get((kind, split, last), 0.0) for last in lasts] for kind in kinds for split in splits]
    picture = axes.imshow(table, cmap="RdBu", vmin=-60, vmax=60, aspect="auto")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            if len(lasts) <= 12:
                ink = PAPER if abs(value) > 40 else INK
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_yticks(range(len(table)), [f"{kind} {split}" for kind in kinds for split in splits], fontsize=6)
    axes.set_xticks(range(len(lasts)), [str(last + 1) for last in lasts], fontsize=6)
    axes.set_xlabel("last layer of the window, from 1")
    axes.set_title("by kind of question, points", fontsize=9)
    axes.figure.colorbar(picture, ax=axes, fraction=0.04).ax.tick_params(labelsize=6)


def clip_sheet(
    clips: Sequence[Tensor], lines: Sequence[Sequence[str]], path: Path, *, title: str = "", scale: int = 2
) -> Path:
    """Draw clips as strips of frames, with text under each.

    Args:
        clips: ``[frames, 3, height, width]`` bytes each.
        lines: Text lines of each; one that begins with "!" is drawn in red.
        path: PNG to write.
        title: Above everything.
        scale: Screen pixels per pixel.
    """
    deepest = max(len(text) for text in lines)
    frames, _, height, width = clips[0].shape
    wide, strip, line = frames * (width * scale + 4), height * scale, 15
    high = 28 + len(clips) * (strip + line * deepest + 14)
    figure = _figure(wide / 100, high / 100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.axis("off")
    axes.text(4, 14, title, fontsize=7, va="center", color=INK)
    for row, (clip, text) in enumerate(zip(clips, lines, strict=True)):
        top = 28 + row * (strip + line * deepest + 14)
        for index in range(frames):
            left = index * (width * scale + 4)
            axes.imshow(
                clip[index].permute(1, 2, 0).numpy(),
                extent=(left, left + width * scale, top + strip, top),
                interpolation="nearest",
                aspect="auto",
            )
        for place, words in enumerate(text):
            color = "#b00020" if words.startswith("!") else INK
            at = top + strip + line * (place + 0.6)
            axes.text(4, at, words.removeprefix("!"), fontsize=6, va="center", color=color)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=100)
    return path


def _figure(width: float, height: float) -> Figure:
    """Return a figure that no global state of pyplot knows, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, facecolor=PAPER)
