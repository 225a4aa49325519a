"""Images or clips as stored codes: what ``extract`` writes and ``train`` reads.

A folder holds ``codes.json`` (grid, entries of the codebook, names of the classes) and safetensors files: ``codes``
``[N, views, tokens]``, several views of each image, such as ten crops. There is a file for each class; of images with
texts, files of some images each, with their texts beside them. The release's folders of a ``.npy`` file for each image
are read too.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, save_safetensors
from torch import Tensor

from .places import INDEX, check_codes

__all__ = ["Codes", "Shard", "class_file", "open_codes", "write_class", "write_index", "write_texts"]


def write_index(
    folder: Path, *, grid: Sequence[int], choices: int, classes: Sequence[str] | None = None, shards: int = 0
) -> None:
    """Say what a folder holds: classes, or a number of files of images with texts."""
    facts = {"grid": list(grid), "choices": choices, "classes": None if classes is None else list(classes)}
    atomic_write_json(folder / INDEX, facts | ({} if classes is not None else {"shards": shards}))


def class_file(folder: Path, number: int) -> Path:
    """Where the codes of a class lie, or those of one part of images with texts."""
    return folder / f"{number:05}.safetensors"


def write_class(folder: Path, number: int, codes: Tensor) -> None:
    """Write codes ``[N, views, tokens]`` of a class, whole or not at all."""
    save_safetensors({"codes": codes.to(torch.int32)}, class_file(folder, number))


def write_texts(folder: Path, number: int, codes: Tensor, texts: Sequence[str]) -> None:
    """Write codes ``[N, views, tokens]`` and the N texts of their images; the codes last, which say that both stand."""
    atomic_write_json(class_file(folder, number).with_suffix(".json"), list(texts))
    write_class(folder, number, codes)


@dataclass(frozen=True)
class Shard:
    """A file of codes.

    Attributes:
        name: For messages.
        count: Images or clips in it.
        read: Codes ``[views, tokens]`` of one, and its class or text.
    """

    name: str
    count: int
    read: Callable[[int], tuple[Tensor, int | str]]


@dataclass(frozen=True)
class Codes:
    """Stored codes, read image by image.

    Attributes:
        grid: Sides of the grid, last axis fastest; None where the folder does not say.
        choices: Entries of the codebook; None likewise.
        classes: How many there are; None likewise, and of texts.
        texts: Whether images have texts in place of classes.
        shards: Where they are.
    """

    grid: tuple[int, ...] | None
    choices: int | None
    classes: int | None
    texts: bool
    shards: tuple[Shard, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.count for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self.shards else 0

    def item(self, index: int) -> tuple[Tensor, int | str]:
        """Codes ``[views, tokens]`` of an image, and its class or text."""
        at = bisect_right(self._ends, index)
        return self.shards[at].read(index - self._ends[at] + self.shards[at].count)

    def check(self, *, tokens: int, choices: int, classes: int | None, limit: int | None = None) -> None:
        """Read all of them, or the first ones, and refuse what a model cannot take.

        Args:
            tokens: Of the model's grid.
            choices: Entries of its codebook.
            classes: Of the model; None for one of texts.
            limit: How many are looked at; None: all.

        Raises:
            CheckpointError: Codes or a class are out of range, or there are more or fewer tokens; with the file.
        """
        left = len(self) if limit is None else limit
        for shard in self.shards:
            for at in range(min(shard.count, left)):
                views, label = shard.read(at)
                where = f"{shard.name}, image {at}"
                if views.ndim != 2 or views.shape[1] != tokens or not len(views):
                    raise CheckpointError(f"{where}: expected views of {tokens} tokens; got {list(views.shape)}")
                low, high = int(views.min()), int(views.max())
                if low < 0 or high >= choices:
                    raise CheckpointError(
                        f"{where}: codes must lie in 0 to {choices - 1}; got {low if low < 0 else high}. They are of "
                        "another tokenizer, or damaged"
                    )
                if classes is not None and not (isinstance(label, int) and 0 <= label < classes):
                    raise CheckpointError(f"{where}: classes are 0 to {classes - 1}; got {label!r}")
            left -= shard.count
            if left <= 0:
                return


def open_codes(folder: Path) -> Codes:
    """Look at a folder of codes; none is read.

    Raises:
        CheckpointError: There is none, it is empty, or it is damaged.
    """
    check_codes(folder)
    if not (folder / INDEX).is_file():
        return _release(folder)
    try:
        data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        grid, choices, names = tuple(map(int, data["grid"])), int(data["choices"]), data["classes"]
        count = int(data["shards"]) if names is None else len(names)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} does not say what is there ({error}); extract again") from error
    shards = []
    for number in range(count):
        file = class_file(folder, number)
        if not file.is_file():
            what = "" if names is None else f", class {names[number]}"
            raise CheckpointError(f"{folder} lacks {file.name}{what}; run hone-nar extract to its end")
        shards.append(_shard(file, number if names is not None else None))
    found = Codes(grid, choices, None if names is None else count, names is None, tuple(shards))
    if not len(found):
        raise CheckpointError(f"{folder} holds no image")
    return found


def _shard(file: Path, label: int | None) -> Shard:
    from safetensors import SafetensorError, safe_open

    try:
        reader = safe_open(str(file), framework="pt").get_slice("codes")
    except SafetensorError as error:
        raise CheckpointError(f"{file} holds no codes ({error}); remove it and run hone-nar extract again") from error
    count = reader.get_shape()[0]
    if label is not None:
        return Shard(str(file), count, lambda at: (reader[at].long(), label))
    beside = file.with_suffix(".json")
    try:
        texts = json.loads(beside.read_text(encoding="utf-8"))
        fits = len(texts) == count and all(isinstance(text, str) for text in texts)
    except (OSError, ValueError, TypeError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{beside} does not hold {count} texts; remove {file.name} and run hone-nar extract again"
        )
    return Shard(str(file), count, lambda at: (reader[at].long(), texts[at]))


def _release(folder: Path) -> Codes:
    import numpy as np

    codes, labels = (min(folder.glob(f"*_{what}")) for what in ("codes", "labels"))
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

    return Codes(None, None, None, False, (Shard(str(codes), len(files), read),))
