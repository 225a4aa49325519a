"""Pictures: images with the tokens that ran, and quality against work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from hone_core.plots import BLUE, GREY, RED, Sheet, drawing, finish, to_pixels, wrap
from hone_core.runs import Row
from torch import Tensor

__all__ = ["frontier", "maps", "sheet"]

_CELL, _SCALE, _LEFT = 140, 2, 150


def sheet(images: Mapping[str, Tensor], captions: Mapping[str, str], prompts: Sequence[str], path: Path) -> None:
    """Rows of images: variant to ``[N, 3, H, W]`` in [0, 1]; what a caption says stands beside its row."""
    count = len(prompts)
    heads = [wrap(prompt, _CELL - 10, size=11) for prompt in prompts]
    head = 6 + 14 * max(map(len, heads))
    page = Sheet(_LEFT + count * _CELL, head + len(images) * _CELL)
    for column, lines in enumerate(heads):
        for line, words in enumerate(lines):
            page.text(_LEFT + column * _CELL, 10 + 14 * line, words, size=11)
    for row, (name, pixels) in enumerate(images.items()):
        top = head + row * _CELL
        page.text(6, top + 14, name, bold=True)
        for line, words in enumerate(wrap(captions.get(name, ""), _LEFT - 12, size=11)):
            page.text(6, top + 34 + 15 * line, words, size=11)
        for column in range(count):
            page.image(_LEFT + column * _CELL, top, to_pixels(pixels[column]), scale=_SCALE)
    page.save(path)


def kept_image(image: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image ``[3, H, W]`` in which positions that did not run are grey."""
    mask = image.new_zeros(grid[0] * grid[1])
    mask[kept] = 1.0
    full = F.interpolate(mask.view(1, 1, *grid), size=image.shape[-2:], mode="nearest")[0]
    return image * full + (1 - full) * (0.55 + 0.15 * image.mean(0, keepdim=True))


def maps(image: Tensor, scores: Mapping[int, Tensor], kept: Mapping[int, Tensor], path: Path) -> None:
    """One image, and of each sparse scale its map and the tokens that ran.

    Args:
        image: ``[3, H, W]`` in [0, 1].
        scores: Scale to ``[h, w]``.
        kept: Scale to positions.
        path: PNG to write.
    """
    with drawing(path, 2.2 * (1 + 2 * len(scores)), 2.5) as figure:
        axes = np.atleast_1d(figure.subplots(1, 1 + 2 * len(scores)))
        axes[0].imshow(to_pixels(image))
        axes[0].set_title("image")
        for at, (scale, score) in enumerate(scores.items()):
            grid = (score.shape[0], score.shape[1])
            axes[1 + 2 * at].imshow(score.cpu().numpy(), cmap="viridis")
            axes[1 + 2 * at].set_title(f"map at scale {scale}")
            axes[2 + 2 * at].imshow(to_pixels(kept_image(image, kept[scale], grid)))
            axes[2 + 2 * at].set_title(f"{len(kept[scale])} of {grid[0] * grid[1]} run")
        for axis in axes:
            axis.set_axis_off()
        finish(figure)


def frontier(rows: Sequence[Row], path: Path) -> None:
    """Frechet distance against work, a point per variant; early stops and ratios of the method are lines."""
    work = {row.variant: row.value for row in rows if row.metric == "gflops"}
    quality = {row.variant: row.value for row in rows if row.metric == "frechet"}
    with drawing(path, 6, 4) as figure:
        axis = figure.subplots()
        ratios = [name for name in quality if name.split()[0] == "sparse"]
        stops = [name for name in quality if name == "dense" or name.startswith("early-stop")]
        for line, color in ((stops, BLUE), (ratios, RED)):
            line.sort(key=lambda name: work[name])
            axis.plot([work[name] for name in line], [quality[name] for name in line], "-", color=color, linewidth=1)
        for name, value in quality.items():
            color = RED if name in ratios else BLUE if name in stops else GREY
            axis.plot(work[name], value, "o", color=color)
            axis.annotate(name, (work[name], value), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.set_xlabel("GFLOP per image")
        axis.set_ylabel("Frechet distance to real scenes (lower is better)")
        finish(figure)
