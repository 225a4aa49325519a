"""Figures of a sweep from its rows alone, in the paper's axes, and sheets of clips with answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone_core.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PINK,
    RED,
    SKY,
    Sheet,
    drawing,
    enlargement,
    error_bars,
    finish,
    to_pixels,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

__all__ = ["clip_sheet", "plot", "sweep_chart"]

COLORS = {"LV": RED, "VT": BLUE, "VS": GREEN, "VV": PINK, "VT-strict": SKY}
LINES = (INK, ORANGE, SKY, GREEN, PINK, BLUE, RED, GREY)
SHEET_PX, TEXT_PX, LINE_PX, GAP_PX = 1400, 400, 22, 6
"""Width of a sheet of clips, of the text beside them, height of a line of it, and what lies between two frames."""


def plot(*, run: Path | None = None, save: Path | None = None, title: str = "") -> str:
    """Draw a sweep's results in the paper's axes.

    Args:
        run: Folder of an eval or demo run, or its results.json.
        save: PNG or SVG to write (default: figures/sweep.png in the folder).
        title: Above the picture.

    Raises:
        ValueError: No run is named, or it is not finished.
    """
    from hone_core.runs import load_results

    if run is None:
        raise ValueError("which run? Give --run, the folder of an eval or demo run")
    folder = run if run.is_dir() else run.parent
    results = load_results(run)
    if results.get("status", "done") != "done":
        raise ValueError(f"{run} is not finished; resume it with the command that started it, then plot")
    return str(sweep_chart(results["rows"], save or folder / "figures" / "sweep.png", title=title))


def sweep_chart(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> Path:
    """Draw what a sweep found: two-stage curve, kinds in all layers, windows, windows by category.

    Layers are counted from 1 in the picture, as in the paper.

    Args:
        rows: As ``results.json`` holds them.
        path: PNG or SVG to write.
        title: Above everything.

    Raises:
        ValueError: The results hold no configuration of a sweep.
    """
    rows = [row for row in rows if row.get("labels", {}).get("setting")]
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
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with drawing(path, 4.7 * across, 3.3 * down + 0.3) as figure:
        places = figure.subplots(down, across, squeeze=False).flatten()
        for axes, draw in zip(places, panels, strict=False):
            draw(axes, rows)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        count = max(row["n"] for row in rows)
        finish(figure, title=title, note=f"{count} questions, bars and bands: 95 %")
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
        axes.plot(*zip(*points, strict=True), marker="o", lw=width, color=color, label=split)
    axes.axhline(1, color=INK, lw=0.5, ls=":")
    axes.set_xlabel("layer ratio (text reads video in the layers up to here)")
    axes.set_ylabel("performance ratio")
    axes.set_title("LV-K after layer i")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")


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
                    error = error_bars(row["value"], row.get("interval"), scale=100)
                    label = split if at == 0 else None
                    x = at - 0.4 + (place + 0.5) * width
                    axes.bar(x, 100 * row["value"], width, color=color, label=label, yerr=error, error_kw={"lw": 0.6})
    axes.axhline(0, color=INK, lw=0.5)
    axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
    axes.set_ylabel("accuracy change, points")
    axes.set_title("in all layers")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(splits), columnspacing=1, handlelength=1)


def _windows(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy change of windows, one line per kind."""
    from matplotlib.ticker import MaxNLocator

    found = [row for row in _pick(rows, "accuracy_change", "window") if row["split"] == "all"]
    for kind in dict.fromkeys(row["labels"]["kind"] for row in found):
        points = sorted(
            (row["labels"]["last"] + 1, 100 * row["value"], *(100 * end for end in row["interval"]))
            for row in found
            if row["labels"]["kind"] == kind
        )
        x, y, low, high = zip(*points, strict=True)
        color = COLORS.get(kind, INK)
        axes.plot(x, y, marker="o", color=color, label=f"{kind}-K")
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.axhline(0, color=INK, lw=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("last layer of the window, from 1")
    axes.set_ylabel("accuracy change, points")
    axes.set_title("in a window of layers")
    axes.legend(loc="lower right")


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
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_yticks(range(len(table)), [f"{kind} {split}" for kind in kinds for split in splits])
    axes.set_xticks(range(len(lasts)), [str(last + 1) for last in lasts])
    axes.set_xlabel("last layer of the window, from 1")
    axes.set_title("by kind of question, points")
    axes.figure.colorbar(picture, ax=axes, fraction=0.04)


def clip_sheet(clips: Sequence[Tensor], lines: Sequence[Sequence[str]], path: Path, *, title: str = "") -> Path:
    """Draw clips as strips of frames, with text beside each.

    Args:
        clips: ``[frames, 3, height, width]`` bytes each, of one size.
        lines: Text lines of each; one that begins with "!" is drawn in red.
        path: PNG to write.
        title: Above everything.
    """
    frames, _, height, width = clips[0].shape
    scale = max(enlargement(min(height, width)), ((SHEET_PX - TEXT_PX) // frames - GAP_PX) // width)
    left, top = 2 * GAP_PX, 48
    text = left + frames * (width * scale + GAP_PX) + 2 * GAP_PX
    wrapped = [[part for line in each for part in _wrapped(line)] for each in lines]
    tall = [max(height * scale, LINE_PX * len(each)) for each in wrapped]
    sheet = Sheet(text + TEXT_PX, top + sum(tall) + 3 * GAP_PX * len(clips))
    sheet.text(left, top / 2, title, size=16, bold=True)
    for clip, each, high in zip(clips, wrapped, tall, strict=True):
        for index, frame in enumerate(clip):
            sheet.image(left + index * (width * scale + GAP_PX), top, to_pixels(frame), scale=scale)
        for place, words in enumerate(each):
            sheet.text(text, top + LINE_PX * (place + 0.5), words, bold=place == 0)
        top += high + 3 * GAP_PX
    return sheet.save(path)


def _wrapped(line: str) -> list[str]:
    """Lines that fit beside the clips, each with the mark of the whole."""
    mark = "!" if line.startswith("!") else ""
    return [mark + part for part in wrap(line.removeprefix("!"), TEXT_PX - 2 * GAP_PX)]
