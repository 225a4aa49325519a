"""Clips side by side: a sheet of a few frames, and a video. Prompts are rows, variants columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hone_core.io import atomic_path
from hone_core.plots import Sheet, to_pixels, wrap
from torch import Tensor

from .grader import ClipClassifier, estimate_motion
from .prompts import DIRECTIONS, FIELDS, VOCABULARY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["contact_sheet", "describe_clips", "write_video"]


def describe_clips(classifier: ClipClassifier, clips: Tensor, right: Tensor, psnr: Tensor | None = None) -> list[str]:
    """What a viewer reads under each clip: what the graders saw, and how far from dense it is.

    Args:
        classifier: Reads digits.
        clips: ``[N, 3, F, H, W]`` in [0, 1].
        right: ``[N]``, whether it shows what was asked for; a line of one that does not is a fault.
        psnr: ``[N]`` dB to the dense clips; None for those.
    """
    digits, _ = classifier.classify(clips.to(next(classifier.parameters()).device))
    motion = estimate_motion(clips)
    lines = []
    for index, value in enumerate(digits.tolist()):
        way = list(DIRECTIONS)[int(motion.direction[index])] if motion.seen[index] else "no digit"
        fine = bool(right[index])
        fidelity = "" if psnr is None else f", {float(psnr[index]):.1f} dB"
        word = VOCABULARY[FIELDS[0]][value]
        lines.append(f"{'' if fine else '!'}reads {word}, {way}{'' if fine else ' (wrong)'}{fidelity}")
    return lines


def contact_sheet(
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    path: Path,
    *,
    looks: Mapping[str, tuple[str, str]],
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
        looks: variant -> (title, colour) of its column.
        title: above everything.
        frames: shown of each clip, evenly spaced, first and last included.
        scale: screen pixels per pixel.
    """
    first = next(iter(clips.values()))
    picks = torch.linspace(0, first.shape[2] - 1, frames).round().long()
    size = first.shape[-1] * scale * frames, first.shape[-2] * scale
    grid = _Grid(*size, caption=20, title=title, looks=[looks[name] for name in clips])
    sheet = grid.sheet(prompts)
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
    looks: Mapping[str, tuple[str, str]],
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
        looks: variant -> (title, colour) of its column.
        title: above everything.
        scale: screen pixels per pixel.
        fps: frames per second.
        loops: how often the clips are shown.
    """
    import imageio

    first = next(iter(clips.values()))
    size = first.shape[-1] * scale, first.shape[-2] * scale
    grid = _Grid(*size, caption=0, title=title, looks=[looks[name] for name in clips])
    still = grid.sheet(prompts).draw()
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


class _Grid:
    """Places of a labelled grid, in pixels: variants are its columns, prompts its rows.

    Args:
        width: of a cell.
        height: of a cell.
        caption: room for a line under each cell.
        title: above everything.
        looks: (title, colour) of each column; a title that is wider than its cell is broken into lines.
    """

    GAP, TOP, TITLE, LINE, SIZE = 6, 26, 26, 22, 14

    def __init__(self, width: int, height: int, *, caption: int, title: str, looks: Sequence[tuple[str, str]]) -> None:
        self.width, self.height, self.title = width, height, title
        self.heads = [(wrap(words, width, size=self.SIZE, bold=True), color) for words, color in looks]
        self.top = self.TOP + (max(len(lines) for lines, _ in self.heads) - 1) * self.LINE
        self.top += self.TITLE if title else 0
        self.row = self.LINE + height + caption + self.GAP

    def corner(self, column: int, row: int) -> tuple[int, int]:
        """Top left pixel (x, y) of a cell."""
        return self.GAP + column * (self.width + self.GAP), self.top + row * self.row + self.LINE

    def sheet(self, prompts: Sequence[str]) -> Sheet:
        """The labels, without a cell's content."""
        right, bottom = self.corner(len(self.heads), len(prompts))
        sheet = Sheet(right, bottom - self.LINE + self.GAP)
        if self.title:
            sheet.text(self.GAP, self.TITLE / 2 + 2, self.title, size=self.SIZE)
        for column, (lines, color) in enumerate(self.heads):
            x = self.corner(column, 0)[0] + self.width / 2
            for up, line in enumerate(reversed(lines)):
                y = self.top - self.TOP / 2 - up * self.LINE
                sheet.text(x, y, line, size=self.SIZE, bold=True, color=color, centered=True)
        for row, prompt in enumerate(prompts):
            sheet.text(self.GAP, self.corner(0, row)[1] - self.LINE / 2, prompt)
        return sheet
