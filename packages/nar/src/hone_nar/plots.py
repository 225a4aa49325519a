"""Pictures: digits side by side, and how they grow pass by pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hone_core.io import atomic_path
from hone_core.plots import Sheet, to_pixels
from torch import Tensor

__all__ = ["growth", "sheet", "unfinished"]

_SCALE, _LEFT, _TOP, _GAP = 7, 150, 34, 8
_EMPTY = (0.80, 0.84, 0.90)


def unfinished(image: Tensor, drawn: Tensor) -> Tensor:
    """Colour picture ``[3, h, w]`` of a grey one ``[1, h, w]``, places that are not drawn yet in pale blue.

    Args:
        image: In [0, 1].
        drawn: ``[h, w]`` bool.
    """
    empty = torch.tensor(_EMPTY)[:, None, None].expand(3, *image.shape[1:])
    return torch.where(drawn, image.expand(3, -1, -1), empty)


def sheet(images: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], path: Path) -> None:
    """Rows of digits: variant to ``[N, 3, h, w]`` in [0, 1]; the lines of a caption stand beside its row."""
    _page(images, captions).save(path)


def _page(images: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], title: str = "") -> Sheet:
    count, _, high, wide = next(iter(images.values())).shape
    cell, tall = wide * _SCALE + _GAP, high * _SCALE + _GAP
    page = Sheet(_LEFT + count * cell, _TOP + len(images) * (tall + _GAP))
    page.text(6, 16, title, bold=True)
    for row, (name, pictures) in enumerate(images.items()):
        top = _TOP + row * (tall + _GAP)
        page.text(6, top + 10, name, bold=True)
        for line, words in enumerate(captions.get(name, ())):
            page.text(6, top + 27 + 14 * line, words, size=11)
        for column in range(count):
            page.image(_LEFT + column * cell, top, to_pixels(pictures[column]), scale=_SCALE)
    return page


def growth(frames: Mapping[str, Sequence[Tensor]], path: Path, *, milliseconds: int = 120) -> None:
    """An animated GIF: what is there after each pass.

    Args:
        frames: Variant to pictures ``[N, 3, h, w]`` after each pass; one that is done stays.
        path: Of the GIF.
        milliseconds: Of a pass.
    """
    from PIL import Image

    last = max(map(len, frames.values()))
    pages = []
    for at in range(last):
        shown = {name: each[min(at, len(each) - 1)] for name, each in frames.items()}
        captions = {
            name: (f"pass {min(at + 1, len(each))} of {len(each)}", *(("done",) if at + 1 >= len(each) else ()))
            for name, each in frames.items()
        }
        pages.append(Image.fromarray(_page(shown, captions).draw()))
    with atomic_path(path) as scratch, scratch.open("wb") as file:
        durations = [milliseconds] * (last - 1) + [2500]
        pages[0].save(file, "GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0)
