"""Pictures: what each layer kept of a mosaic, and accuracy against the token ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hone_core.plots import BLUE, GREEN, GREY, INK, ORANGE, PALETTE, PINK, drawing, error_line, finish

if TYPE_CHECKING:
    from hone_core.runs import Row

    from .grading import Outcome

__all__ = ["arms_chart", "curve", "heat_maps", "kept_maps", "line_of"]

STYLES = {
    "top-p": (BLUE, "o-"),
    "top-k": (ORANGE, "^:"),
    "random": (GREY, "s--"),
    "FastV": (PINK, "v-."),
    "VisionZip": (GREEN, "d--"),
}
MARKERS = "osv^DPX*<>p"
DASHES = ("-", "--", ":")


def curve(lines: Mapping[str, Sequence[Outcome]], dense: Outcome, path: Path, *, title: str = "") -> Path:
    """Accuracy against the mean token ratio.

    Args:
        lines: Name in ``STYLES`` to an outcome per point.
        dense: The dense model.
        path: PNG to write.
        title: Over the picture.
    """
    with drawing(path, 5.2, 3.4) as figure:
        axes = figure.subplots()
        for name, outcomes in lines.items():
            if not outcomes:
                continue
            color, style = STYLES[name]
            points = [(o.tau, o.accuracy, o.interval) for o in outcomes]
            error_line(axes, points, style=style, color=color, label=name)
        axes.axhline(100 * dense.accuracy, color=INK, linewidth=0.6, linestyle=(0, (1, 3)))
        axes.annotate("dense", (axes.get_xlim()[0], 100 * dense.accuracy), va="bottom", fontsize=7)
        axes.set_xlabel("tokens kept, mean over layers, %")
        axes.set_ylabel("accuracy, %")
        axes.legend(loc="center left")
        finish(figure, title=title, note="bars: 95 % bootstrap intervals over questions")
    return path


def heat_maps(shown: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> Path:
    """A mosaic per row: the picture, then what each layer kept of it at the first of its thresholds.

    A token is kept or dropped: how much attention it has is not shown.

    Args:
        shown: ``image`` (rows of numbers in [0, 1]), ``question``, ``answer``, and ``keep``: per layer a square of 0
            and 1 per visual token.
        path: PNG to write.
        title: Over the picture.
    """
    layers = len(shown[0]["keep"])
    with drawing(path, 1.1 * (layers + 1), 1.25 * len(shown) + 0.5) as figure:
        grid = figure.subplots(len(shown), layers + 1, squeeze=False)
        for axes, row in zip(grid, shown, strict=True):
            image = np.asarray(row["image"])
            axes[0].imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes[0].set_ylabel(f"{row['question']}\n{row['answer']}", fontsize=7)
            for layer, keep in enumerate(row["keep"]):
                squares = np.kron(np.asarray(keep), np.ones((image.shape[0] // len(keep),) * 2))
                axes[layer + 1].imshow(np.where(squares > 0, image, 0.0), cmap="gray_r", vmin=0, vmax=1)
                axes[layer + 1].imshow(
                    np.ma.masked_where(squares > 0, squares), cmap="Blues", vmin=-1, vmax=3, interpolation="nearest"
                )
                axes[layer + 1].set_title(f"{layer}: {100 * np.mean(keep):.0f} %", fontsize=7)
            for one in axes:
                one.set_xticks([])
                one.set_yticks([])
        finish(figure, title=title, note="by layer: kept of the picture, blue is dropped; not how much attention")
    return path


def kept_maps(
    maps: Sequence[Sequence[Sequence[Sequence[int]]]],
    frames: Sequence[int],
    layers: Sequence[int],
    path: Path,
    *,
    title: str,
) -> Path:
    """A frame per row, a layer per column: which of its tokens were kept, not how much attention they have.

    Args:
        maps: By frame and layer, rows of 0 and 1 per visual token.
        frames: Their numbers.
        layers: Likewise.
        path: PNG to write.
        title: Over the picture.
    """
    with drawing(path, 1.1 * len(layers) + 0.6, 1.2 * len(frames) + 0.5) as figure:
        grid = figure.subplots(len(frames), len(layers), squeeze=False)
        for axes, frame, row in zip(grid, frames, maps, strict=True):
            axes[0].set_ylabel(f"frame {frame}", fontsize=7)
            for axis, layer, kept in zip(axes, layers, row, strict=True):
                axis.imshow(np.asarray(kept), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
                axis.set_title(f"{layer}: {100 * np.mean(kept):.0f} %", fontsize=7)
                axis.set_xticks([])
                axis.set_yticks([])
        finish(figure, title=title, note="kept or dropped, not attention")
    return path


def line_of(at: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line by its number; no two of the first 21 share a colour and dashes."""
    return {
        "color": PALETTE[at % len(PALETTE)],
        "marker": MARKERS[at % len(MARKERS)],
        "linestyle": DASHES[at // len(PALETTE) % len(DASHES)],
    }


def arms_chart(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against the token ratio of every arm of ``reproduce``, a line through its thresholds.

    Args:
        rows: Of ``accuracy`` and ``token_ratio``.
        path: PNG to write.
    """
    values = {(row.metric, row.variant, row.split): 100 * row.value for row in rows}
    arms = dict.fromkeys(row.variant for row in rows if row.metric == "accuracy")
    with drawing(path, 6.4, 4.0) as figure:
        axes = figure.subplots()
        for at, arm in enumerate(arms):
            splits = [s for m, v, s in values if m == "accuracy" and v == arm and (s.startswith("p ") or s == "dense")]
            points = sorted((values["token_ratio", arm, s], values["accuracy", arm, s]) for s in splits)
            axes.plot(*zip(*points, strict=True), **line_of(at), label=arm, markersize=4, linewidth=0.9)
        axes.set_xlabel("tokens kept, mean over layers, %")
        axes.set_ylabel("accuracy, %")
        axes.legend(fontsize=6, ncols=2, handlelength=4)
        finish(figure, note="a point per threshold and the dense model, means over hosts")
    return path
