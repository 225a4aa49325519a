"""Where photographs and weights lie that a command names; nothing here loads torch."""

from __future__ import annotations

from hone_core.errors import CheckpointError
from hone_core.hosts import open_host
from hone_core.io import tensor_names
from hone_splat.places import find_colmap, find_transforms

from .config import ARMS, DoctorConfig, EvalConfig, HostConfig, RenderConfig, ViewConfig

__all__ = ["PACKAGE", "find_capture", "find_weights", "trained_on_chunks"]

PACKAGE = "hone-zpressor"


def find_capture(cfg: DoctorConfig | RenderConfig | ViewConfig) -> None:
    """Look for the photographs that a command names.

    Raises:
        FileNotFoundError: They are not there.
        ValueError: It names none.
    """
    if cfg.colmap is not None:
        find_colmap(cfg.colmap, cfg.images)
    elif cfg.transforms is not None:
        find_transforms(cfg.transforms)
    else:
        file = "a file by splat, or " if isinstance(cfg, ViewConfig) else ""
        given = "neither" if cfg.images is None else f"images {cfg.images} alone, and pictures have no cameras"
        raise ValueError(
            f"name {file}your photographs by one of colmap (folder of a COLMAP model) and transforms (a "
            f"transforms.json of nerfstudio or Blender); got {given}. Where you have pictures alone, find their "
            "cameras first, by colmap automatic_reconstructor or nerfstudio's ns-process-data"
        )


def trained_on_chunks(cfg: RenderConfig | EvalConfig | ViewConfig) -> bool:
    """Whether the tiny host's weights are what ``train`` left, and not ``train-host``, which describes its own.

    Raises:
        CheckpointError: They are no safetensors file.
    """
    file = cfg.checkpoint
    if file is None or not file.is_file() or file.with_suffix(".json").exists():
        return False
    # Those of train-host begin with the arm; without its sidecar such a file is not whole.
    return not any(name.startswith(tuple(f"{arm}." for arm in ARMS)) for name in tensor_names(file))


def find_weights(cfg: RenderConfig | EvalConfig | ViewConfig) -> None:
    """Look for the weights that a command names.

    Raises:
        CheckpointError: There are none.
    """
    if cfg.model == "tiny" and not trained_on_chunks(cfg):
        open_host(HostConfig, PACKAGE, cfg.checkpoint)
    elif cfg.checkpoint is None or not cfg.checkpoint.is_file():
        given = "none was named" if cfg.checkpoint is None else f"there is no {cfg.checkpoint}"
        raise CheckpointError(f"weights of {cfg.model} are not packaged, and {given}: give --checkpoint FILE")
