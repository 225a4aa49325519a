"""Pictures of the verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from hone_core.plots import drawing, error_bars, finish
from numpy.typing import NDArray

__all__ = ["curve", "sheet"]


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


def curve(
    lines: Mapping[str, Mapping[int, tuple[float, tuple[float, float]]]], path: Path, *, title: str, across: str
) -> Path:
    """PSNR with its interval over a number of views, a line per arm."""
    with drawing(path, 6.0, 4.0) as figure:
        axis = figure.subplots()
        for name, points in lines.items():
            places = sorted(points)
            values = [points[place][0] for place in places]
            bars = np.concatenate([np.asarray(error_bars(*points[place])) for place in places], axis=1)
            axis.errorbar(places, values, bars, label=name, marker="o", capsize=3)
        axis.set_xlabel(across)
        axis.set_ylabel("PSNR, dB")
        axis.legend()
        finish(figure, title=title)
    return path
