"""What a clip of one moving digit shows, in words: labels, prompts, and its size. Imports no torch."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "DIRECTIONS",
    "FIELDS",
    "NUM_WORDS",
    "SPEEDS",
    "VOCABULARY",
    "ClipConfig",
    "describe",
    "parse_prompt",
]

FIELDS = ("digit", "color", "direction", "speed", "background")
"""Order of the label columns."""

DIGITS = tuple("0123456789")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.22, 0.20),
    "green": (0.25, 0.90, 0.30),
    "blue": (0.25, 0.50, 1.0),
    "yellow": (1.0, 0.88, 0.20),
    "magenta": (1.0, 0.30, 0.95),
    "cyan": (0.25, 0.95, 0.95),
    "white": (1.0, 1.0, 1.0),
}
"""Name -> RGB in [0, 1]. Every color has a channel >= 0.9, which no background reaches."""

DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}
"""Name -> sign of the velocity along (x, y); clockwise from right, 45 degrees apart."""

SPEEDS: dict[str, float] = {"slow": 1 / 3, "medium": 2 / 3, "fast": 1.0}
"""Name -> pixels per frame along each moving axis."""

BACKGROUNDS = ("plain", "textured")

VOCABULARY: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "color": tuple(COLORS),
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "background": BACKGROUNDS,
}
NUM_WORDS = sum(len(words) for words in VOCABULARY.values())

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FILLERS = frozenset(
    {"a", "an", "the", "digit", "number", "moving", "going", "moves", "on", "over", "background", "and"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Size of a clip.

    Raises:
        ValueError: if the fastest digit would leave the frame.
    """

    frames: int = 16
    height: int = 32
    width: int = 32
    glyph_px: int = 16
    """Side of the digit in pixels."""

    def __post_init__(self) -> None:
        travel = max(SPEEDS.values()) * (self.frames - 1)
        slack = min(self.height, self.width) - self.glyph_px
        if self.frames < 2 or travel > slack:
            raise ValueError(
                f"a clip needs at least 2 frames, and (frames - 1) * {max(SPEEDS.values()):g} px of room beside the "
                f"digit; got frames={self.frames} and {slack} px. Use fewer frames or a larger frame."
            )


def describe(labels: Iterable[int]) -> str:
    """Return the prompt of one row of labels, such as ``a red 7 moving left, slow, plain``."""
    digit, color, direction, speed, background = (
        VOCABULARY[field][int(value)] for field, value in zip(FIELDS, labels, strict=True)
    )
    return f"a {color} {digit} moving {direction}, {speed}, {background}"


def parse_prompt(prompt: str) -> list[int]:
    """Read the labels of a prompt such as ``a red 7 moving up-left, slow, textured``.

    Words may come in any order; digits may be spelled out; the background is ``plain`` unless named.

    Args:
        prompt: the text.

    Returns:
        Five label indices in the order of ``FIELDS``.

    Raises:
        ValueError: on an unknown word, a field named twice, or a field that is missing.
    """
    lookup: Mapping[str, tuple[str, int]] = {
        word: (field, index) for field, words in VOCABULARY.items() for index, word in enumerate(words)
    } | {name: ("digit", index) for index, name in enumerate(_DIGIT_NAMES)}
    text = re.sub(r"\b(up|down)[\s-]+(left|right)\b", r"\1-\2", prompt.lower())
    found: dict[str, int] = {}
    for word in re.findall(r"[^\s,.;:!]+", text):
        if word in _FILLERS:
            continue
        if word not in lookup:
            known = "; ".join(f"{field}: {' '.join(words)}" for field, words in VOCABULARY.items())
            raise ValueError(f"unknown word {word!r} in the prompt {prompt!r}. The tiny host knows {known}")
        field, index = lookup[word]
        if found.setdefault(field, index) != index:
            raise ValueError(f"the prompt {prompt!r} names two values for {field}; give one")
    found.setdefault("background", 0)
    missing = [field for field in FIELDS if field not in found]
    if missing:
        raise ValueError(
            f"the prompt {prompt!r} does not say the {' and the '.join(missing)}; "
            "write it like 'a red 7 moving left, slow'"
        )
    return [found[field] for field in FIELDS]
