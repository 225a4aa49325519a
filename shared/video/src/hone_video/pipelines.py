"""Pipelines of diffusers that hold a video transformer: found before they are loaded, loaded, their sizes checked."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from hone_core.errors import CheckpointError

__all__ = [
    "PIPELINES",
    "PipelineKind",
    "check_size",
    "find_pipeline",
    "load_pipeline",
    "load_transformer",
    "make_scheduler",
    "pipeline_on_meta",
    "pipeline_parts",
    "with_flow_shift",
]

log = logging.getLogger(__name__)


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


def load_pipeline(
    model: str,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
    local_files_only: bool = False,
    leave_out: tuple[str, ...] = (),
    ready: Mapping[str, Any] | None = None,
) -> Any:
    """Load a pipeline that ``find_pipeline`` found.

    Args:
        model: Its folder or hub address.
        name: Its class name.
        device: Where it shall run.
        dtype: Of transformer and text encoder.
        offload: Keep on a GPU only the part that is running.
        local_files_only: Never ask the hub, only its local cache.
        leave_out: Parts that are not needed; they are None.
        ready: Parts that are loaded already, by name.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    kind = PIPELINES[name]
    dtypes: Any = dtype
    if kind.float32_vae:
        whole = ("vae", "image_encoder") if kind.image else ("vae",)
        dtypes = {"default": dtype} | dict.fromkeys(whole, torch.float32)
    log.info("loading %s from %s", name, model)
    known = inspect.signature(kind.pipeline.__init__).parameters
    given: Any = {part: None for part in leave_out if part in known} | dict(ready or {})
    try:
        with _loading_bars(log.isEnabledFor(logging.INFO)):
            pipe = kind.pipeline.from_pretrained(
                model, dtype=dtypes, local_files_only=local_files_only or Path(model).is_dir(), **given
            )
    except OSError as error:
        raise CheckpointError(f"{model} could not be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    if offload and device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def make_scheduler(name: str, pipe: Any, *, flow_shift: float | None = None) -> Any:
    """A scheduler for the pipeline, with the settings of its own one.

    Args:
        name: ``unipc`` (Wan), ``dpm`` (CogVideoX, trailing times) or ``default`` (the pipeline's own).
        pipe: The pipeline, which keeps its own.
        flow_shift: Of ``unipc``; None for that of the pipeline, else 3.

    Raises:
        ValueError: The name is another one.
    """
    own = pipe.scheduler
    if name == "unipc":
        shift = flow_shift or own.config.get("flow_shift", own.config.get("shift", 3.0))
        return UniPCMultistepScheduler.from_config(
            own.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    if name == "dpm":
        return CogVideoXDPMScheduler.from_config(own.config, timestep_spacing="trailing")
    if name == "default":
        return own
    raise ValueError(f"scheduler must be unipc, dpm or default; got {name!r}")


def with_flow_shift(scheduler: Any, shift: float) -> Any:
    """The same sampler at another timestep shift ``s``, ``sigma = s u / (1 + (s - 1) u)``.

    Args:
        scheduler: A diffusers flow scheduler; it stays as it is.
        shift: Positive; 1 is none. Wan is published with 3 for 480p and 5 for 720p.

    Raises:
        ValueError: The sampler has no such shift, or takes it from the size of the video.
    """
    config = scheduler.config
    name = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    if name not in config or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{type(scheduler).__name__} has no timestep shift of its own to set; leave out the flow shift"
        )
    return type(scheduler).from_config(config, **{name: shift})


def check_size(pipe: Any, *, height: int | None = None, width: int | None = None, frames: int | None = None) -> None:
    """Refuse what the pipeline would round.

    Args:
        pipe: Of a class in ``PIPELINES``; without its transformer, patches are not looked at.
        height: Pixels; None is the pipeline's default, like the next two.
        width: Pixels.
        frames: Frames.

    Raises:
        ValueError: The model cannot make this size.
    """
    kind = PIPELINES[type(pipe).__name__]
    patch = 1 if pipe.transformer is None else pipe.transformer.config.patch_size
    spatial = pipe.vae_scale_factor_spatial * (patch if isinstance(patch, int) else patch[-1])
    multiple = max(spatial, kind.multiple)
    for name, value in (("height", height), ("width", width)):
        if value is not None and value % multiple:
            raise ValueError(f"{name} must be a multiple of {multiple} for this model; got {value}")
    temporal = pipe.vae_scale_factor_temporal * (2 if kind.frame_pairs else 1)
    if frames is not None and frames % temporal != 1 % temporal:
        below = max(1, (frames - 1) // temporal * temporal + 1)
        raise ValueError(
            f"frames must be a multiple of {temporal} plus 1 for this model; got {frames}. Take {below} or "
            f"{below + temporal}."
        )


def pipeline_on_meta(model: str, name: str, *, local_files_only: bool = False) -> Any:
    """A pipeline with its scheduler, and with transformers and VAE that have no weights: what their configs say.

    Args:
        model: Folder or hub address of the pipeline.
        name: Its class name.
        local_files_only: Never ask the hub, only its local cache.

    Raises:
        CheckpointError: A config cannot be read.
    """
    kind = PIPELINES[name]
    there = pipeline_parts(model, local_files_only=local_files_only)
    known = inspect.signature(kind.pipeline.__init__).parameters
    local = local_files_only or Path(model).is_dir()
    transformer, vae = _TRANSFORMERS[kind.family], _VAES[kind.family]
    away = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
    parts: dict[str, Any] = {part: None for part in away if part in known}
    try:
        for part, of in (("transformer", transformer), ("transformer_2", transformer), ("vae", vae)):
            if part in known:
                config: Any = of.load_config(model, subfolder=part, local_files_only=local) if part in there else None
                with torch.device("meta"):
                    parts[part] = None if config is None else of.from_config(config)
        with _loading_bars(False):
            return kind.pipeline.from_pretrained(model, local_files_only=local, **parts)
    except OSError as error:
        raise CheckpointError(f"{model} could not be read: {error}") from error


def load_transformer(folder: str | Path, name: str, *, dtype: torch.dtype) -> Any:
    """A transformer of a pipeline class from a folder of its own.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with _loading_bars(log.isEnabledFor(logging.INFO)):
            return _TRANSFORMERS[PIPELINES[name].family].from_pretrained(str(folder), dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} could not be loaded: {error}") from error


@contextmanager
def _loading_bars(shown: bool) -> Iterator[None]:
    """Progress of diffusers and transformers while they load, where it is to be shown; it is drawn on stderr."""
    libraries: tuple[Any, ...] = (diffusers.utils.logging, transformers.utils.logging)
    silenced = [library for library in libraries if not shown and library.is_progress_bar_enabled()]
    for library in silenced:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in silenced:
            library.enable_progress_bar()


_TRANSFORMERS: dict[str, Any] = {"wan": WanTransformer3DModel, "cogvideox": CogVideoXTransformer3DModel}
_VAES: dict[str, Any] = {"wan": AutoencoderKLWan, "cogvideox": AutoencoderKLCogVideoX}
