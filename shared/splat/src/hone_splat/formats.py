"""Files of splats by their suffix."""

from __future__ import annotations

from pathlib import Path

from .files import read_ply, read_splat, write_ply, write_splat
from .gaussians import Gaussians
from .places import SUFFIXES, find_cloud
from .spz import read_spz, write_spz

__all__ = ["SUFFIXES", "read_cloud", "write_cloud"]

READERS = dict(zip(SUFFIXES, (read_ply, read_splat, read_spz), strict=True))
WRITERS = dict(zip(SUFFIXES, (write_ply, write_splat, write_spz), strict=True))


def read_cloud(path: str | Path) -> Gaussians:
    """Read one scene's cloud.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its suffix is none of these, or it is damaged.
    """
    path = find_cloud(path)
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
