"""Files of splats by their suffix."""

from __future__ import annotations

from pathlib import Path

from .files import read_ply, read_splat, write_ply, write_splat
from .gaussians import Gaussians
from .spz import read_spz, write_spz

__all__ = ["SUFFIXES", "read_cloud", "write_cloud"]

READERS = {".ply": read_ply, ".splat": read_splat, ".spz": read_spz}
WRITERS = {".ply": write_ply, ".splat": write_splat, ".spz": write_spz}
SUFFIXES = tuple(READERS)


def read_cloud(path: str | Path) -> Gaussians:
    """Read one scene's cloud.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its suffix is none of these, or it is damaged.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return READERS[path.suffix](path)


def write_cloud(gaussians: Gaussians, path: str | Path) -> Path:
    """Write one scene's cloud; returns the path.

    Raises:
        ValueError: The suffix is none of these, or a file cannot hold the cloud.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    return WRITERS[path.suffix](gaussians, path)
