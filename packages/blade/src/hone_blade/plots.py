"""Pictures of a comparison: a contact sheet, a video, and a chart drawn from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hone_core.io import atomic_path
from hone_core.plots import BLUE, GREEN, GREY, INK, PINK, RED, Sheet, drawing, error_bars, finish, to_pixels
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["accuracy_chart", "contact_sheet", "write_video"]

COLORS = {"dense": GREY, "asa": BLUE, "asa_g": GREEN, "window": RED, "random": PINK}
TITLES = {"dense": "dense", "asa": "ASA", "asa_g": "ASA_G", "window": "window", "random": "random"}


def contact_sheet(
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    path: Path,
    *,
    title: str = "",
    frames: int = 3,
    scale: int = 3,
) -> Path:
    """Draw a PNG with a row per prompt, a column per variant and a few frames of each clip.

    Args:
        clips: variant -> ``[N, 3, F, H, W]`` in [0, 1].
        prompts: ``N`` of them.
        captions: variant -> a line under each clip; a line that starts with an exclamation mark is drawn as a fault.
        path: PNG to write.
        title: above everything.
        frames: shown of each clip, evenly spaced, first and last included.
        scale: screen pixels per pixel.
    """
    first = next(iter(clips.values()))
    picks = torch.linspace(0, first.shape[2] - 1, frames).round().long()
    grid = _Grid(first.shape[-1] * scale * frames, first.shape[-2] * scale, caption=20, title=title)
    sheet = grid.sheet(list(clips), prompts)
    for column, (name, value) in enumerate(clips.items()):
        for row, caption in enumerate(captions[name]):
            x, y = grid.corner(column, row)
            strip = torch.cat(list(value[row][:, picks].unbind(1)), -1)
            sheet.image(x, y, to_pixels(strip), scale=scale)
            sheet.text(x, y + grid.height + 10, caption, size=12)
    return sheet.save(path)


def write_video(
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
    path: Path,
    *,
    title: str = "",
    scale: int = 4,
    fps: int = 8,
    loops: int = 3,
) -> Path:
    """Write an MP4 with a row per prompt and a column per variant.

    Args:
        clips: variant -> ``[N, 3, F, H, W]`` in [0, 1].
        prompts: ``N`` of them.
        path: MP4 to write.
        title: above everything.
        scale: screen pixels per pixel.
        fps: frames per second.
        loops: how often the clips are shown.
    """
    import imageio

    first = next(iter(clips.values()))
    grid = _Grid(first.shape[-1] * scale, first.shape[-2] * scale, caption=0, title=title)
    still = grid.sheet(list(clips), prompts).draw()
    pictures: list[NDArray[np.uint8]] = []
    for frame in range(first.shape[2]):
        picture = still.copy()
        for column, value in enumerate(clips.values()):
            for row in range(len(prompts)):
                x, y = grid.corner(column, row)
                pixels = to_pixels(value[row, :, frame]).repeat(scale, 0).repeat(scale, 1)
                picture[y : y + grid.height, x : x + grid.width] = pixels
        pictures.append(picture)
    with (
        atomic_path(path) as partial,
        imageio.get_writer(
            partial, fps=fps, codec="libx264", quality=8, pixelformat="yuv420p", macro_block_size=2
        ) as writer,
    ):
        for picture in pictures * loops:
            writer.append_data(picture)  # type: ignore[attr-defined]  # of the writer that an mp4 gets
    return path


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


class _Grid:
    """Places of a labelled grid, in pixels: variants are its columns, prompts its rows.

    Args:
        width: of a cell.
        height: of a cell.
        caption: room for a line under each cell.
        title: above everything.
    """

    GAP, TOP, TITLE, LINE = 6, 26, 26, 22

    def __init__(self, width: int, height: int, *, caption: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.top = self.TOP + (self.TITLE if title else 0)
        self.row = self.LINE + height + caption + self.GAP

    def corner(self, column: int, row: int) -> tuple[int, int]:
        """Top left pixel (x, y) of a cell."""
        return self.GAP + column * (self.width + self.GAP), self.top + row * self.row + self.LINE

    def sheet(self, names: Sequence[str], prompts: Sequence[str]) -> Sheet:
        """The labels, without a cell's content."""
        right, bottom = self.corner(len(names), len(prompts))
        sheet = Sheet(right, bottom - self.LINE + self.GAP)
        if self.title:
            sheet.text(self.GAP, self.TITLE / 2 + 2, self.title, size=14)
        for column, name in enumerate(names):
            x = self.corner(column, 0)[0] + self.width / 2
            color = COLORS.get(name, INK)
            sheet.text(
                x, self.top - self.TOP / 2, TITLES.get(name, name), size=14, bold=True, color=color, centered=True
            )
        for row, prompt in enumerate(prompts):
            sheet.text(self.GAP, self.corner(0, row)[1] - self.LINE / 2, prompt)
        return sheet
