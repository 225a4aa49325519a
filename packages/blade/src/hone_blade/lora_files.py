"""LoRA files and trained transformers: where they are and what they say of themselves. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from hone_core.config import from_dict
from hone_core.errors import CheckpointError
from hone_video.lora import LORA_FILE

from .config import BladeConfig, Rollout

__all__ = ["CONFIG_KEY", "PART_KEY", "ROLLOUT_KEY", "STATED", "Transformer", "check_part", "few", "find_lora"]
__all__ += ["read_config", "read_header", "read_rollout", "read_student"]

Transformer = Literal["transformer", "transformer_2"]
"""Part of a pipeline."""

STATED = "blade.json"
"""Beside a transformer that was trained whole: its attention and sampling."""

CONFIG_KEY, ROLLOUT_KEY, PART_KEY = "hone_blade_config", "hone_blade_rollout", "hone_blade_transformer"
"""Of a file's header."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 4


def find_lora(path: str | Path, *, local_files_only: bool = False) -> Path:
    """The local file behind a path or hub address, fetched if need be; its content is not looked at.

    Args and Raises: As for ``load_blade_lora``.
    """
    local = Path(path)
    if local.is_dir():
        local = local / LORA_FILE
        if not local.is_file():
            others = sorted(
                str(p.relative_to(local.parent))
                for at in ("", "artifacts/")
                for p in local.parent.glob(f"{at}*.safetensors")
            )
            hint = f"; it has {few(others)}: name the file" if others else ""
            raise CheckpointError(f"{local.parent} holds no {LORA_FILE}{hint}")
    if local.suffix and local.suffix != ".safetensors" and (local.exists() or local.suffix in _PICKLES):
        raise CheckpointError(f"{local}: only .safetensors files are read, since unpickling others can run code")
    if local.is_file():
        return local
    parts = str(path).split("/")
    if len(parts) < 2 or local.is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(f"{path} does not exist; expected a safetensors file, a folder or owner/repository")
    inside = parts[2:]
    if not inside or not inside[-1].endswith(".safetensors"):
        inside.append(LORA_FILE)
    import huggingface_hub

    try:
        found = huggingface_hub.hf_hub_download(
            "/".join(parts[:2]), "/".join(inside), local_files_only=local_files_only
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no local file, and {'/'.join(inside)} of the hub repository {'/'.join(parts[:2])} could not be "
            f"fetched ({type(error).__name__}: {error}). Download it where there is a connection and pass the file."
        ) from error
    return Path(found)


def read_student(folder: str | Path) -> tuple[BladeConfig | None, Rollout | None]:
    """What a transformer that was trained whole is for; its weights are not read.

    Raises:
        CheckpointError: The folder holds none.
    """
    folder = Path(folder)
    try:
        header = json.loads((folder / STATED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no transformer of hone-blade distill-pipeline --lora-rank 0: {error}"
        ) from error
    return read_config(folder, header), read_rollout(folder, header)


def check_part(file: str | Path, part: Transformer) -> None:
    """Refuse weights that say they are for the other transformer of a pipeline of two.

    Raises:
        CheckpointError: They do.
    """
    stated = read_header(Path(file))[2].get(PART_KEY, part)
    if stated != part:
        right = "lora_2" if stated == "transformer_2" else "lora"
        raise CheckpointError(f"{file} is for the {stated} of its pipeline, not the {part}; pass it as {right}")


def read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], set[str], dict[str, str]]:
    """Shapes, dtypes and metadata, without reading the values.

    Raises:
        CheckpointError: It is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    # Of the framework, which this loads, only values would be of.
    try:
        with safe_open(file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            return shapes, {part.get_dtype() for part in slices.values()}, handle.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def read_config(file: Path, metadata: dict[str, str]) -> BladeConfig | None:
    """The attention settings that a file says it was trained with.

    Raises:
        CheckpointError: They cannot be read.
    """
    if CONFIG_KEY not in metadata:
        return None
    try:
        return from_dict(BladeConfig, json.loads(metadata[CONFIG_KEY]))
    except ValueError as error:
        raise CheckpointError(f"{file}: the attention settings in its header cannot be read: {error}") from error


def read_rollout(file: Path, metadata: dict[str, str]) -> Rollout | None:
    """The sampling that a file says it was trained for.

    Raises:
        CheckpointError: It cannot be read.
    """
    if ROLLOUT_KEY not in metadata:
        return None
    try:
        return from_dict(Rollout, json.loads(metadata[ROLLOUT_KEY]))
    except ValueError as error:
        raise CheckpointError(f"{file}: the sampling in its header cannot be read: {error}") from error


def few(items: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(items[:_SHOWN])
    return (f"{shown} and {len(items) - _SHOWN} more" if len(items) > _SHOWN else shown) or "none"
