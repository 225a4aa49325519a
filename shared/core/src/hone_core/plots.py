"""One look for the figures of every package: dark ink on white, colours that colour-blind people tell apart.

Charts are drawn inside ``drawing``; sheets of images (clips, renders) are laid out in pixels with ``Sheet``. Both write
whole files and know nothing of pyplot's global state. matplotlib is imported on first use and comes with the package
that draws.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone_core.io import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

__all__ = ["BLUE", "FAULT", "GREEN", "GREY", "INK", "ORANGE", "PALETTE", "PAPER", "PINK", "RED", "SKY"]
__all__ += ["Sheet", "drawing", "enlargement", "error_bars", "error_line", "finish", "to_pixels", "wrap"]

INK, PAPER, FAULT = "#1b1f24", "#ffffff", "#b00020"
"""Text and lines; background; what went wrong."""
GREY, BLUE, GREEN, RED, PINK, ORANGE, SKY = (
    "#4c566a",
    "#0072b2",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
"""Grey for the baseline, the others after Okabe and Ito."""
PALETTE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY)
"""Order in which lines without a colour of their own take them."""

FRAME_PX = 96
"""Least side of an image on a sheet, below which a person sees little."""

_DPI = 100
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.labelsize"), 8),
    **dict.fromkeys(("axes.titlesize", "figure.titlesize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "lines.markersize": 3,
    # The same data give the same file.
    "svg.hashsalt": "hone",
}


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context, rcdefaults, rcsetup

    with rc_context():
        # What a user's own matplotlibrc holds is not ours to publish.
        rcdefaults()
        with rc_context({**_STYLE, "axes.prop_cycle": rcsetup.cycler(color=PALETTE)}):
            yield


@contextmanager
def drawing(path: str | Path, width: float, height: float) -> "Iterator[Figure]":
    """Draw a chart in the house style and write it when the block ends without an error.

    Args:
        path: PNG, SVG or PDF to write.
        width: Inches.
        height: Inches.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), dpi=_DPI)
        yield figure
        with atomic_path(path) as partial:
            figure.savefig(partial, dpi=150, metadata={"Date": None} if partial.suffix == ".svg" else None)


def finish(figure: "Figure", *, title: str = "", note: str = "") -> None:
    """Set the title and a small note at the bottom right (what was counted, what the bars are), and fit the rest."""
    if title:
        figure.suptitle(title)
    if note:
        figure.text(0.99, 0.01, note, ha="right", va="bottom", fontsize=7)
    figure.tight_layout(rect=(0, 0.04 if note else 0, 1, 1))


def error_bars(value: float, interval: Sequence[float] | None, *, scale: float = 1.0) -> list[list[float]]:
    """The ``yerr`` of one bar.

    Args:
        value: What the bar shows.
        interval: (low, high) around it; None draws no length.
        scale: Of the axis, such as 100 for points.
    """
    low, high = interval or (value, value)
    return [[scale * max(0.0, value - low)], [scale * max(0.0, high - value)]]


def error_line(
    axes: Any, points: Sequence[tuple[float, float, Sequence[float]]], *, style: str, color: str, label: str
) -> None:
    """A line through values with their intervals, both axes in percent.

    Args:
        axes: To draw in.
        points: Place, value and interval of each, as shares; in any order.
        style: Of matplotlib, such as ``o-``.
        color: Of line and bars.
        label: In the legend.
    """
    import numpy as np

    places, values, intervals = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    bars = [error_bars(value, interval, scale=100) for value, interval in zip(values, intervals, strict=True)]
    axes.errorbar(
        [100 * place for place in places],
        [100 * value for value in values],
        yerr=np.concatenate(bars, 1),
        fmt=style,
        color=color,
        label=label,
        elinewidth=0.8,
    )


def to_pixels(image: Any) -> "NDArray[np.uint8]":
    """Bytes ``[height, width, 3]`` of an image as models hold it.

    Args:
        image: Tensor or array ``[3, height, width]``, bytes or numbers in [0, 1].

    Raises:
        ValueError: It has another shape.
    """
    import numpy as np

    data = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if data.ndim != 3 or data.shape[0] != 3:
        raise ValueError(f"image must be [3, height, width]; got {list(data.shape)}")
    if data.dtype != np.uint8:
        data = (data.clip(0, 1) * 255).round().astype(np.uint8)
    return data.transpose(1, 2, 0)


def enlargement(side: int, least: int = FRAME_PX) -> int:
    """Screen pixels per pixel, so that an image with this shorter side is at least ``least`` wide and high."""
    return max(1, -(-least // side))


def wrap(text: str, width: int, *, size: int = 13, bold: bool = False) -> list[str]:
    """Break a text into lines that fit a width, between words.

    Args:
        text: Words; a single one that is too long stays whole.
        width: Pixels.
        size: Height of the letters in pixels, as for ``Sheet.text``.
        bold: Heavier, likewise.
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _text_width(longer, size, bold) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@lru_cache(maxsize=4096)
def _text_width(text: str, size: int, bold: bool) -> float:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    with _style():
        renderer = RendererAgg(1, 1, _DPI)
        font = FontProperties(size=size * 72 / _DPI, weight="bold" if bold else "normal")
        return renderer.get_text_width_height_descent(text, font, ismath=False)[0]


class Sheet:
    """A picture laid out in pixels: matplotlib writes the text, images keep their pixels exactly.

    Args:
        width: Pixels; the picture is made even, as video codecs want it.
        height: Pixels, likewise.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width + width % 2, height + height % 2
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._images: list[tuple[int, int, NDArray[np.uint8]]] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 13,
        color: str = INK,
        bold: bool = False,
        centered: bool = False,
    ) -> None:
        """Write a line.

        Args:
            x: Left end, or the middle where ``centered``.
            y: Middle of the line, from the top.
            words: Text; one that begins with "!" is a fault, and drawn in its colour without the mark.
            size: Height of the letters in pixels.
            color: Of the text.
            bold: Heavier.
            centered: Around ``x``.
        """
        style = {
            "fontsize": size * 72 / _DPI,
            "color": FAULT if words.startswith("!") else color,
            "fontweight": "bold" if bold else "normal",
            "ha": "center" if centered else "left",
        }
        self._texts.append((x, y, words.removeprefix("!"), style))

    def image(self, x: int, y: int, pixels: "ArrayLike", *, scale: int = 1) -> None:
        """Put an image, as ``to_pixels`` gives it, with its top left corner at ``(x, y)``.

        Raises:
            ValueError: It does not fit on the sheet.
        """
        import numpy as np

        data = np.asarray(pixels).repeat(scale, 0).repeat(scale, 1)
        if x < 0 or y < 0 or x + data.shape[1] > self.width or y + data.shape[0] > self.height:
            raise ValueError(
                f"an image of {data.shape[1]} x {data.shape[0]} pixels at ({x}, {y}) does not fit on a sheet of "
                f"{self.width} x {self.height}"
            )
        self._images.append((x, y, data))

    def draw(self) -> "NDArray[np.uint8]":
        """The picture, bytes ``[height, width, 3]``."""
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with _style():
            figure = Figure(figsize=(self.width / _DPI, self.height / _DPI), dpi=_DPI)
            for x, y, words, style in self._texts:
                # A dollar sign in a prompt is no formula.
                figure.text(x / self.width, 1 - y / self.height, words, va="center", parse_math=False, **style)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        for x, y, data in self._images:
            picture[y : y + data.shape[0], x : x + data.shape[1]] = data
        return picture

    def save(self, path: str | Path) -> Path:
        """Write a PNG; returns the path."""
        from matplotlib.image import imsave

        with atomic_path(path) as partial:
            imsave(partial, self.draw(), format="png")
        return Path(path)
