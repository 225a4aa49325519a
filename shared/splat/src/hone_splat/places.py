"""Where files lie that a command names: looked for before torch is imported, which takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hone_core.errors import CheckpointError

from .training_config import FitConfig

__all__ = ["SUFFIXES", "check_files", "find_cloud", "find_colmap", "find_transforms", "holding", "read_chunk_index"]
__all__ += ["read_evaluation_index"]

SUFFIXES = (".ply", ".splat", ".spz")
"""Of files of splats."""


def find_cloud(path: str | Path) -> Path:
    """Where a file of one scene's splats lies.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its suffix is none of these.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return path


def find_colmap(folder: str | Path, images: str | Path | None = None) -> tuple[Path, str, str | Path]:
    """Where a COLMAP model lies, and its pictures.

    Args:
        folder: Holds ``cameras``, ``images`` and, if any, ``points3D``, itself or in ``sparse/0`` or ``sparse``.
        images: Where the pictures lie; ``images`` beside the model if None.

    Returns:
        Folder of the model, suffix of its files, and folder of the pictures.

    Raises:
        FileNotFoundError: There is no model, or no folder of pictures.
    """
    folder = Path(folder)
    places = [folder, folder / "sparse" / "0", folder / "sparse"]
    found = [
        (place, suffix)
        for place in places
        for suffix in (".bin", ".txt")
        if (place / f"cameras{suffix}").is_file() and (place / f"images{suffix}").is_file()
    ]
    if not found:
        shown = ", ".join(str(place) for place in places) if folder.is_dir() else f"{folder}, which is no folder"
        raise FileNotFoundError(
            f"no COLMAP model: cameras and images (.bin or .txt) were sought in {shown}. Name the folder that COLMAP "
            "wrote; of pictures alone, colmap automatic_reconstructor makes such a model"
        )
    place, suffix = found[0]
    if images is None:
        near = [folder / "images", place / "images", place.parent / "images", place.parent.parent / "images"]
        near = [*dict.fromkeys(near)]
        images = next((one for one in near if one.is_dir()), None)
        if images is None:
            raise FileNotFoundError(
                f"no pictures of the COLMAP model in {place}: a folder {' or '.join(map(str, near))} was sought. "
                f"{holding(folder)}. Move or link the pictures to {near[0]}, or name their folder where there is an "
                "argument images"
            )
    return place, suffix, images


def find_transforms(path: str | Path) -> Path:
    """Where a ``transforms.json`` lies.

    Args:
        path: The file, or its folder.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "transforms.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: expected the transforms.json of nerfstudio or Blender, or its folder. Of pictures "
            "alone, nerfstudio's ns-process-data makes one"
        )
    return path


def holding(folder: Path, most: int = 6) -> str:
    """What lies in a folder, in words."""
    names = sorted(one.name + "/" * one.is_dir() for one in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{more}"


def read_chunk_index(folder: Path) -> dict[str, str]:
    """Scene to chunk, of a folder of chunks.

    Raises:
        FileNotFoundError: It holds no ``index.json``.
        ValueError: The index is no index.
    """
    index = _read_json(folder / "index.json")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{folder / 'index.json'}: expected an object of scene names to file names")
    return index


def read_evaluation_index(path: str | Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Context and target views of each scene; scenes without are left out, as the releases do.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no evaluation index, or a scene has fewer than two contexts or no target.
    """
    data = _read_json(Path(path))
    found = {}
    for key, entry in data.items() if isinstance(data, dict) else [("", data)]:
        if entry is None:
            continue
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), list) for name in ("context", "target")):
            raise ValueError(f"{path}: {key!r}: expected context and target views, or null")
        context, target = (tuple(int(i) for i in entry[name]) for name in ("context", "target"))
        if len(context) < 2 or not target:
            raise ValueError(f"{path}: {key}: expected two contexts and a target at least; got {context} and {target}")
        found[key] = context, target
    return found


def check_files(cfg: FitConfig, *others: Path) -> None:
    """Look for chunks and weights.

    Args:
        cfg: Of the training.
        others: Files or folders that a method needs beside them.

    Raises:
        FileNotFoundError: There are no chunks.
        CheckpointError: Weights to begin with, those of VGG-16, or one of ``others`` are missing.
    """
    if not read_chunk_index(cfg.chunks):
        raise FileNotFoundError(f"{cfg.chunks} holds no scene; expected chunks with an index.json that names some")
    for file in (cfg.start, cfg.vgg if cfg.lpips else None, *others):
        if file is not None and not file.exists():
            raise CheckpointError(f"there are no weights at {file}")


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is no JSON: {error}") from error
