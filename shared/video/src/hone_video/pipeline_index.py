"""Which pipelines there are, and whether one is there and whole: read from its index, before torch is imported."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hone_core.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["PIPELINES", "PipelineKind", "find_pipeline", "pipeline_parts"]


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class and what its users need to know.

    Attributes:
        name: Of the class, as ``model_index.json`` has it.
        family: Of its transformer.
        fps: Frames per second that its models were trained on.
        schedulers: Names that ``make_scheduler`` takes for it.
        float32_vae: Whether the VAE needs float32 beside a transformer of 16 bits.
        multiple: Height and width are rounded to this many pixels at least, whatever its VAE.
        frame_pairs: Whether it decodes an even number of latent frames, to more frames than were asked for.
        image: Whether its videos begin with an image.
    """

    name: str
    family: Literal["wan", "cogvideox"]
    fps: int
    schedulers: tuple[str, ...]
    float32_vae: bool = False
    multiple: int = 1
    frame_pairs: bool = False
    image: bool = False

    @property
    def pipeline(self) -> type[DiffusionPipeline]:
        """The class, imported only now: those for images have transformers warn where torchvision is missing."""
        import diffusers

        return getattr(diffusers, self.name)


_WAN = PipelineKind("WanPipeline", "wan", 16, ("unipc", "default"), float32_vae=True, multiple=16)
_COGVIDEOX = PipelineKind("CogVideoXPipeline", "cogvideox", 8, ("dpm", "default"), frame_pairs=True)
_FOR_IMAGES = (
    replace(_WAN, name="WanImageToVideoPipeline", image=True),
    replace(_COGVIDEOX, name="CogVideoXImageToVideoPipeline", image=True),
)
PIPELINES = {kind.name: kind for kind in (_WAN, _COGVIDEOX, *_FOR_IMAGES)}
"""Class name to the facts."""


def find_pipeline(model: str, *, images: bool = False, local_files_only: bool = False) -> str:
    """Class name of the pipeline in a folder or at a hub address; reads its index and loads no weights.

    Args:
        model: Folder that holds ``model_index.json``, whole, or hub address ``owner/repository``.
        images: Whether pipelines are taken too whose videos begin with an image.
        local_files_only: Never ask the hub, only its local cache.

    Raises:
        CheckpointError: There is no such pipeline, a part of the folder is missing, or ``PIPELINES`` lacks the class.
    """
    name = _read_pipeline_index(model, local_files_only=local_files_only).get("_class_name")
    taken = [known for known, kind in PIPELINES.items() if images or not kind.image]
    if name not in taken:
        raise CheckpointError(f"{model} is a {name}; expected {' or '.join(taken)}")
    return name


def pipeline_parts(model: str, *, local_files_only: bool = False) -> set[str]:
    """Names of the parts that a pipeline has, such as ``transformer_2``; arguments and errors as ``find_pipeline``."""
    index = _read_pipeline_index(model, local_files_only=local_files_only)
    return {part for part, source in index.items() if isinstance(source, list) and source[0] is not None}


def _read_pipeline_index(model: str, *, local_files_only: bool) -> dict[str, Any]:
    path = Path(model)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        raise CheckpointError(f"{model} is a file; expected the folder of a diffusers pipeline")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise CheckpointError(
            f"{model} does not exist; expected the folder of a diffusers pipeline, or a hub address owner/repository"
        )
    import huggingface_hub

    try:
        cached = huggingface_hub.hf_hub_download(model, "model_index.json", local_files_only=local_files_only)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{model} is no local folder, and the hub repository of that name could not be reached "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Download it where there is a connection "
            f"(hf download {model} --local-dir FOLDER) and pass the folder."
        ) from error
    # Of a repository that is only partly in the cache, diffusers fetches the rest.
    return _read_index(Path(cached))


def _read_index(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error


_WEIGHTS = ("*.safetensors", "*.bin")


def _read_folder(folder: Path) -> dict[str, Any]:
    """The index of a local pipeline whose parts are all there."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no model_index.json; expected the folder of a whole diffusers pipeline (transformer, vae, "
            "text_encoder, tokenizer, scheduler)"
        )
    index = _read_index(file)
    for part, source in index.items():
        if part.startswith("_") or not isinstance(source, list) or source[0] is None:
            continue
        inside = folder / part
        if not inside.is_dir():
            raise CheckpointError(f"{folder} is not whole: there is no folder {part}")
        if (inside / "config.json").is_file() and not any(file for p in _WEIGHTS for file in inside.glob(p)):
            raise CheckpointError(f"{inside} holds no weights ({' or '.join(_WEIGHTS)})")
        _check_shards(inside)
    return index


def _check_shards(folder: Path) -> None:
    for file in folder.glob("*.safetensors.index.json"):
        shards = set(_read_index(file).get("weight_map", {}).values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise CheckpointError(
                f"{folder} is not whole: {len(missing)} of {len(shards)} shards missing: {missing[0]}"
            )
