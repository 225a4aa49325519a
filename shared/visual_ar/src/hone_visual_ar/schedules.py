"""Scales of next-scale models: which grids an image is drawn through. Imports no torch.

Source: `ratio2hws` of the Infinity release; patch numbers of VAR and HART.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ASPECTS", "HART_1024", "PIXELS", "VAR_256", "VAR_512", "ScaleSchedule", "infinity_schedule"]

Grid = tuple[int, int]

PIXELS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Image sizes of Infinity, and how many scales each has."""

_TALL: dict[float, str] = {
    1.000: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.250: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.500: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.750: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.000: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.500: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.000: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _grids(text: str) -> tuple[Grid, ...]:
    return tuple((int(h), int(w)) for h, w in (grid.split("x") for grid in text.split()))


_BY_ASPECT: dict[float, tuple[Grid, ...]] = {}
for _aspect, _text in _TALL.items():
    _BY_ASPECT[_aspect] = _grids(_text)
    if _aspect != 1.0:
        _BY_ASPECT[int(1 / _aspect * 1000) / 1000] = tuple((w, h) for h, w in _grids(_text))

ASPECTS = tuple(sorted(_BY_ASPECT))
"""Height over width of the images that Infinity has schedules for."""


@dataclass(frozen=True, slots=True)
class ScaleSchedule:
    """Token grids, from the first scale to the last.

    Attributes:
        grids: (height, width) in tokens of each scale.
        rope_grid: Grid whose coordinates rotary embeddings count in; that of the last scale if None.

    Raises:
        ValueError: There is no scale, a side is not positive, or a scale is smaller than the one before.
    """

    grids: tuple[Grid, ...]
    rope_grid: Grid | None = None

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("a schedule needs at least one scale")
        for (h0, w0), (h, w) in zip(((1, 1), *self.grids), self.grids, strict=False):
            if h < max(1, h0) or w < max(1, w0):
                raise ValueError(f"scales must be positive and never shrink; got {(h, w)} after {(h0, w0)}")

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def last(self) -> Grid:
        """Grid of the last scale, on which the latent is summed up."""
        return self.grids[-1]

    def tokens(self, scale: int) -> int:
        """Tokens of a scale."""
        height, width = self.grids[scale]
        return height * width

    def start(self, scale: int) -> int:
        """Position in the whole sequence of a scale's first token."""
        return sum(self.tokens(k) for k in range(scale))

    @property
    def total(self) -> int:
        """Tokens of all scales."""
        return self.start(len(self))

    def resolve(self, scale: int) -> int:
        """Number of a scale that may count from the end.

        Raises:
            ValueError: There is no such scale.
        """
        count = len(self)
        if not -count <= scale < count:
            raise ValueError(f"this schedule has {count} scales, 0 to {count - 1}; got scale {scale}")
        return scale % count


def infinity_schedule(pixels: str = "1M", aspect: float = 1.0) -> ScaleSchedule:
    """Schedule of a published size of Infinity.

    Args:
        pixels: A size in ``PIXELS``.
        aspect: Height over width, one of ``ASPECTS``. Nothing is rounded to the nearest.

    Raises:
        ValueError: There is no such size, or no schedule for this aspect ratio.
    """
    if pixels not in PIXELS:
        raise ValueError(f"pixels must be one of {', '.join(PIXELS)}; got {pixels!r}")
    if aspect not in _BY_ASPECT:
        raise ValueError(
            f"Infinity has no schedule of height / width {aspect:g}; it has {', '.join(f'{a:g}' for a in ASPECTS)}"
        )
    grids = _BY_ASPECT[aspect]
    return ScaleSchedule(grids[: PIXELS[pixels]], rope_grid=grids[-1])


def _square(*sides: int) -> ScaleSchedule:
    return ScaleSchedule(tuple((side, side) for side in sides))


VAR_256 = _square(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""VAR d16 to d30."""
VAR_512 = _square(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""VAR d36."""
HART_1024 = _square(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
"""HART at 1024 px; its first scale is read as text."""
