"""Images as stored codes: what ``extract`` writes and ``train`` reads.

A folder holds ``codes.json`` (grid, entries of the codebook, names of the classes) and a safetensors file for each
class: ``codes`` ``[N, views, tokens]``, several views of each image, such as ten crops. The release's folders of a
``.npy`` file for each image are read too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, save_safetensors
from torch import Tensor

__all__ = ["INDEX", "Codes", "open_codes", "write_class", "write_index"]

INDEX = "codes.json"


def write_index(folder: Path, *, grid: tuple[int, int], choices: int, classes: list[str]) -> None:
    """Say what a folder holds."""
    atomic_write_json(folder / INDEX, {"grid": list(grid), "choices": choices, "classes": classes})


def class_file(folder: Path, number: int) -> Path:
    """Where the codes of a class lie."""
    return folder / f"{number:05}.safetensors"


def write_class(folder: Path, number: int, codes: Tensor) -> None:
    """Write codes ``[N, views, tokens]`` of a class, whole or not at all."""
    save_safetensors({"codes": codes.to(torch.int32)}, class_file(folder, number))


@dataclass(frozen=True)
class Codes:
    """Stored codes, read image by image.

    Attributes:
        grid: Rows and columns; None where the folder does not say.
        choices: Entries of the codebook; None likewise.
        classes: How many there are; None likewise.
        parts: Of each file: how many images, and what reads codes ``[views, tokens]`` and label of one.
    """

    grid: tuple[int, int] | None
    choices: int | None
    classes: int | None
    parts: tuple[tuple[int, Any], ...]

    def __len__(self) -> int:
        return sum(count for count, _ in self.parts)

    def item(self, index: int) -> tuple[Tensor, int]:
        """Codes ``[views, tokens]`` and label of an image."""
        ends = list(accumulate(count for count, _ in self.parts))
        part = next(at for at, end in enumerate(ends) if index < end)
        return self.parts[part][1](index - ends[part] + self.parts[part][0])


def open_codes(folder: Path) -> Codes:
    """Look at a folder of codes; none is read.

    Raises:
        CheckpointError: There is none, it is empty, or it is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder of codes at {folder}; make one with hone-nar extract")
    if not (folder / INDEX).is_file():
        found = _release(folder)
        if found is None:
            raise CheckpointError(
                f"{folder} holds no codes: neither {INDEX}, as hone-nar extract writes it, nor the release's folders "
                "*_codes and *_labels"
            )
        return found
    try:
        data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        grid, choices, names = tuple(data["grid"]), int(data["choices"]), data["classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} does not say what is there ({error}); extract again") from error
    parts = []
    for number in range(len(names)):
        file = class_file(folder, number)
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, class {names[number]}; run hone-nar extract to its end")
        parts.append(_part(file, number))
    found = Codes(grid, choices, len(names), tuple(parts))
    if not len(found):
        raise CheckpointError(f"{folder} holds no image")
    return found


def _part(file: Path, label: int) -> tuple[int, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        reader = safe_open(str(file), framework="pt").get_slice("codes")
    except SafetensorError as error:
        raise CheckpointError(f"{file} holds no codes ({error}); remove it and run hone-nar extract again") from error
    return reader.get_shape()[0], lambda at: (reader[at].long(), label)


def _release(folder: Path) -> Codes | None:
    import numpy as np

    codes, labels = (next(iter(sorted(folder.glob(f"*_{what}"))), None) for what in ("codes", "labels"))
    if codes is None or labels is None:
        return None
    files = sorted((file for file in codes.glob("*.npy") if file.stem.isdecimal()), key=lambda file: int(file.stem))
    if not files:
        raise CheckpointError(f"{codes} holds no numbered .npy file")
    labelled = {file.name for file in labels.glob("*.npy")}
    lacking = [file.name for file in files if file.name not in labelled]
    if lacking:
        raise CheckpointError(f"{labels} lacks the label {lacking[0]}, and {len(lacking) - 1} more")

    def read(at: int) -> tuple[Tensor, int]:
        views = torch.from_numpy(np.load(files[at]).astype("int64"))
        return views.view(-1, views.shape[-1]), int(np.load(labels / files[at].name).item())

    return Codes(None, None, None, ((len(files), read),))
