"""The folders of HumanML3D and KIT-ML, as their authors' scripts write them.

    new_joint_vecs/NAME.npy   features [rows, 263 or 251]
    texts/NAME.txt            lines "caption#word/TAG word/TAG ...#start#end", seconds, 0.0 and 0.0 for all of it
    train.txt, val.txt, test.txt   names

The sets may not be passed on: they are made from AMASS, which has to be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .motion_files import read_numbers
from .skeletons import HUMANML3D, Skeleton

__all__ = ["LEAST", "LONGEST", "Clip", "checked_features", "read_clips", "read_texts"]

LEAST = 40
"""Rows of a clip at least; 24 for KIT-ML."""
LONGEST = 200
"""Rows from which on a clip is left out, as in the release."""


@dataclass(frozen=True)
class Clip:
    """A motion, or a part of one that has captions of its own.

    Attributes:
        name: Of the file, with the part's rows.
        features: ``[rows, width]``.
        captions: What it shows.
        music: ``[rows / 4, 35]`` pooled features of what is danced to; None without.
    """

    name: str
    features: Float[Tensor, "rows width"]
    captions: tuple[str, ...]
    music: Float[Tensor, "tokens 35"] | None = None


def read_texts(path: Path) -> list[tuple[str, float, float]]:
    """Captions of a file with start and end in seconds; both 0 where it is of the whole motion.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line is of another form, or a caption is empty; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.strip().split("#")
        if not line.strip():
            continue
        try:
            caption, _, start, end = parts
            begin, stop = float(start), float(end)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected caption#words#start#end; got {line[:60]!r}") from error
        if not caption.strip():
            raise ValueError(f"{path}, line {number}: the caption is empty")
        # The release writes nan for an end that is not known: the whole motion.
        found.append((caption.strip(), begin if begin == begin else 0.0, stop if stop == stop else 0.0))
    if not found:
        raise ValueError(f"{path} holds no caption")
    return found


def checked_features(features: Tensor, path: Path, skeleton: Skeleton) -> Float[Tensor, "rows width"]:
    """Features of a file, as they came.

    Raises:
        ValueError: They have another width or are not finite; the message names file and row.
    """
    if features.ndim != 2 or features.shape[1] != skeleton.width:
        raise ValueError(f"{path}: expected [rows, {skeleton.width}] for {skeleton.name}; got {list(features.shape)}")
    bad = ~torch.isfinite(features).all(-1)
    if bool(bad.any()):
        raise ValueError(f"{path}, row {int(bad.nonzero()[0])}: a feature is not finite")
    return features


def read_clips(folder: Path, split: str, skeleton: Skeleton = HUMANML3D) -> list[Clip]:
    """Clips of a split, from 40 rows (24 for KIT-ML) up to ``LONGEST``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Features have another width or are not finite, or a text is damaged; the message names file and row.
    """
    least = LEAST if skeleton is HUMANML3D else 24
    names = folder / f"{split}.txt"
    if not names.is_file():
        raise FileNotFoundError(f"there is no {names}; expected a folder of {skeleton.name} with {split}.txt in it")
    found = []
    for name in names.read_text(encoding="utf-8").split():
        path = folder / "new_joint_vecs" / f"{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}, which {names.name} lists")
        features = checked_features(read_numbers(path).float(), path, skeleton)
        whole = []
        for caption, start, end in read_texts(folder / "texts" / f"{name}.txt"):
            if start == end == 0:
                whole.append(caption)
                continue
            first, last = int(start * 20), int(end * 20)
            part = features[first:last]
            if least <= len(part) < LONGEST:
                found.append(Clip(f"{name}[{first}:{last}]", part, (caption,)))
        if whole and least <= len(features) < LONGEST:
            found.append(Clip(name, features, tuple(whole)))
    if not found:
        raise ValueError(f"{names} leads to no clip of {least} to {LONGEST - 1} rows")
    return found
