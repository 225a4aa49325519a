"""What a training is given: a folder's list of videos or images, and of what is encoded already. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone_core.errors import CheckpointError
from hone_core.io import read_lines

__all__ = ["CACHE_SCHEMA", "Clip", "cache_item", "read_cache", "read_clips"]

CACHE_SCHEMA = 1
"""Version of ``cache.json``."""


@dataclass(frozen=True, slots=True)
class Clip:
    """What is trained on: a prompt, and its video, or the image that a video begins with, if there are any."""

    text: str
    file: Path | None = None


def read_clips(folder: str | Path, *, caption: str = "text") -> list[Clip]:
    """Videos of a folder with their captions, as ``metadata.jsonl`` lists them.

    Args:
        folder: Holds the videos and the list, of lines like ``{"file_name": "a.mp4", "text": "a red cat runs"}``.
        caption: Name of the captions.

    Raises:
        FileNotFoundError: There is no list, or a video of it is missing.
        ValueError: A line is no JSON object with a file name and a caption of text, or there is none.
    """
    listing = Path(folder) / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(
            f"{folder} holds no metadata.jsonl; expected a line per video, "
            f'{{"file_name": "a.mp4", "{caption}": "what it shows"}}'
        )
    clips = []
    for number, line in enumerate(read_lines(listing), 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file_name", caption)):
            raise ValueError(f"{where}: expected file_name and {caption}, both text; got {line[:80]}")
        file = Path(folder) / entry["file_name"]
        if not file.is_file():
            raise FileNotFoundError(f"{where}: there is no {file}")
        clips.append(Clip(entry[caption], file))
    if not clips:
        raise ValueError(f"{listing} lists no video")
    return clips


def cache_item(index: int) -> str:
    """The file of an item of a cache."""
    return f"{index:06d}.safetensors"


def read_cache(path: str | Path) -> dict[str, Any]:
    """What ``cache.json`` says of a folder that ``hone_video.caching.fill_cache`` filled; no tensor is read.

    Raises:
        CheckpointError: It is no cache, or is not filled.
    """
    path = Path(path)
    try:
        header = json.loads((path / "cache.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = [f"; {file.parent} is one" for file in sorted(path.glob("artifacts/*/cache.json"))]
        raise CheckpointError(f"{path} is no folder of encoded prompts: {error}{next(iter(inside), '')}") from error
    if header.get("schema") != CACHE_SCHEMA:
        raise CheckpointError(f"{path} is of another version; fill a new folder")
    files = ["null.safetensors", *map(cache_item, range(len(header["items"])))]
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise CheckpointError(f"{path} is not filled: {len(missing)} files missing, such as {missing[0]}")
    return header
