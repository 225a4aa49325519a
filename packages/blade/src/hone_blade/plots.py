"""Pictures of a comparison: a contact sheet, a video, and a chart drawn from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hone_core.io import atomic_path
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_chart", "contact_sheet", "enlarge", "write_video"]

INK = "#1b1f24"
PAPER = "#ffffff"
COLORS = {"dense": "#4c566a", "asa": "#0072b2", "asa_g": "#009e73", "window": "#d55e00", "random": "#cc79a7"}
"""Colour-blind safe (Okabe and Ito)."""

TITLES = {"dense": "dense", "asa": "ASA", "asa_g": "ASA_G", "window": "window", "random": "random"}


def enlarge(frames: Tensor, scale: int) -> Tensor:
    """Repeat pixels, so that a person sees them as they are.

    Args:
        frames: ``[..., H, W]``.
        scale: copies of each pixel along both axes.
    """
    return frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def contact_sheet(
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
    captions: Mapping[str, Sequence[str]],
    path: Path,
    *,
    title: str = "",
    frames: int = 4,
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
    strips = {name: enlarge(torch.cat(list(value[:, :, picks].unbind(2)), -1), scale) for name, value in clips.items()}
    width, height = first.shape[-1] * scale * frames, first.shape[-2] * scale
    canvas = _Canvas(list(clips), prompts, cell=(width, height), caption_px=20, title=title)
    for name in strips:
        for row in range(len(prompts)):
            canvas.caption(name, row, captions[name][row])
    picture = canvas.draw()
    for name, strip in strips.items():
        for row in range(len(prompts)):
            canvas.paste(picture, name, row, strip[row])
    from matplotlib.image import imsave

    with atomic_path(path) as partial:
        imsave(partial, picture.permute(1, 2, 0).numpy(), format="png")
    return path


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
    size = (first.shape[-1] * scale, first.shape[-2] * scale)
    canvas = _Canvas(list(clips), prompts, cell=size, caption_px=0, title=title)
    still = canvas.draw()
    pictures = []
    for frame in range(first.shape[2]):
        picture = still.clone()
        for name, value in clips.items():
            for row in range(len(prompts)):
                canvas.paste(picture, name, row, enlarge(value[row, :, frame], scale))
        pictures.append((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    with (
        atomic_path(path) as partial,
        imageio.get_writer(
            partial, fps=fps, codec="libx264", quality=8, pixelformat="yuv420p", macro_block_size=2
        ) as writer,
    ):
        for picture in pictures * loops:
            writer.append_data(picture)
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
    figure = _figure(7.2, 2.9)
    task, fidelity = figure.subplots(1, 2)
    for index, name in enumerate(names):
        row = values["accuracy", name]
        low, high = row["interval"]
        error = [[max(0.0, row["value"] - low)], [max(0.0, high - row["value"])]]
        task.bar(index, row["value"], color=COLORS[name], width=0.7, yerr=error, capsize=3, ecolor=INK)
        if name != "dense":
            fidelity.bar(index, values["psnr", name]["value"], color=COLORS[name], width=0.7)
    task.set_ylim(0, 1.05)
    task.set_ylabel("digit and direction right")
    fidelity.set_ylabel("PSNR to dense, dB")
    for axes, shown in ((task, names), (fidelity, names[1:])):
        axes.set_xticks([names.index(name) for name in shown], [TITLES[name] for name in shown])
        axes.spines[["top", "right"]].set_visible(False)
    count = values["accuracy", names[0]]["n"]
    densities = [values["density", name]["value"] for name in names if name != "dense" and ("density", name) in values]
    reached = list(dict.fromkeys(f"{x:.3g}" for x in sorted(densities)))
    shown = f", attention density {' to '.join(dict.fromkeys((reached[0], reached[-1])))}" if reached else ""
    note = f"{count} clips{shown}, bars: 95 %"
    figure.text(0.99, 0.01, note, ha="right", va="bottom", fontsize=7, color=INK)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150)
    return path


class _Canvas:
    """Labelled grid of cells: matplotlib writes the text once, clips are pasted as exact pixels.

    Args:
        names: variants, the columns.
        prompts: the rows.
        cell: (width, height) of a cell in pixels.
        caption_px: room for a line under each cell.
        title: above everything.
    """

    GAP, TOP, TITLE, LINE = 6, 26, 26, 20

    def __init__(
        self, names: Sequence[str], prompts: Sequence[str], *, cell: tuple[int, int], caption_px: int, title: str
    ) -> None:
        self.names, self.prompts, self.cell, self.caption_px, self.title = list(names), prompts, cell, caption_px, title
        self.captions: list[tuple[str, int, str]] = []
        top = self.TOP + (self.TITLE if title else 0)
        self.row_px = self.LINE + cell[1] + caption_px + self.GAP
        width = self.GAP + len(self.names) * (cell[0] + self.GAP)
        height = top + len(prompts) * self.row_px + self.GAP
        self.top = top
        self.size = width + width % 2, height + height % 2  # video codecs want even sides

    def caption(self, name: str, row: int, text: str) -> None:
        """Remember the line under a cell."""
        self.captions.append((name, row, text))

    def draw(self) -> Tensor:
        """Return the picture without clips, ``[3, height, width]`` in [0, 1]."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        width, height = self.size
        figure = _figure(width / 100, height / 100, dpi=100)

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / width, 1 - y / height, text, va="center", **({"color": INK, "fontsize": 8} | style))

        if self.title:
            write(self.GAP, self.TITLE / 2 + 2, self.title, fontsize=9)
        for name in self.names:
            x, _ = self.corner(name, 0)
            style = {"fontsize": 10, "fontweight": "bold", "color": COLORS.get(name, INK)}
            write(x + self.cell[0] / 2, self.top - self.TOP / 2, TITLES.get(name, name), ha="center", **style)
        for row, prompt in enumerate(self.prompts):
            write(self.GAP, self.corner(self.names[0], row)[1] - self.LINE / 2, prompt)
        for name, row, text in self.captions:
            x, y = self.corner(name, row)
            fault = text.startswith("!")
            style = {"color": "#b00020" if fault else INK, "fontsize": 7}
            write(x, y + self.cell[1] + self.caption_px / 2, text.removeprefix("!"), **style)
        agg = FigureCanvasAgg(figure)
        agg.draw()
        pixels = torch.frombuffer(bytearray(agg.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)
        return pixels[..., :3].permute(2, 0, 1).float() / 255

    def corner(self, name: str, row: int) -> tuple[int, int]:
        """Top left pixel (x, y) of a cell."""
        x = self.GAP + self.names.index(name) * (self.cell[0] + self.GAP)
        return x, self.top + row * self.row_px + self.LINE

    def paste(self, picture: Tensor, name: str, row: int, pixels: Tensor) -> None:
        """Put ``[3, h, w]`` into a cell, in place."""
        x, y = self.corner(name, row)
        picture[:, y : y + self.cell[1], x : x + self.cell[0]] = pixels


def _figure(width: float, height: float, dpi: int = 100) -> Figure:
    """Return a figure that no global state of pyplot knows, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor=PAPER)
