"""Pictures of the verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from hone_core.plots import drawing, error_bars, finish
from numpy.typing import NDArray

__all__ = ["ARMS", "curves", "sheet"]


def sheet(rows: Mapping[str, Sequence[NDArray[np.floating]]], path: Path, *, title: str) -> Path:
    """Rows of pictures ``[H, W, 3]`` in [0, 1], each row with its name."""
    columns = max(map(len, rows.values()))
    with drawing(path, 1.5 * columns + 1.0, 1.6 * len(rows) + 0.4) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
            line[0].set_ylabel(name)
        finish(figure, title=title)
    return path


ARMS = {
    "host": "host, all views",
    "zpressor": "ZPressor",
    "anchors": "anchors alone",
    "overlap": "ZPressor, anchors by overlap",
    "random": "ZPressor, random anchors",
}


def curves(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, tuple[float, float]]]]], path: Path, *, title: str
) -> Path:
    """PSNR with its interval over the number of views: a panel per host, a line per arm.

    Args:
        panels: Host to arm to views to the value and its interval.
        path: To write.
        title: Of the figure.
    """
    with drawing(path, 3.0 * len(panels) + 2.4, 3.2) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (host, lines) in zip(axes, panels.items(), strict=True):
            for place, (name, points) in enumerate(lines.items()):
                views = sorted(points)
                # Side by side, since arms that are equally good would hide each other.
                across = [view + 0.7 * (place - (len(lines) - 1) / 2) for view in views]
                bars = np.concatenate([np.asarray(error_bars(*points[view])) for view in views], axis=1)
                values = [points[view][0] for view in views]
                axis.errorbar(across, values, bars, label=ARMS[name], marker="o", markersize=3, capsize=2, linewidth=1)
            axis.set_xticks(sorted({view for points in lines.values() for view in points}))
            axis.set(xlabel="views given", title=host)
        axes[0].set_ylabel("PSNR, dB")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        finish(figure, title=title)
    return path
