"""Pipelines of diffusers that hold a video transformer: loaded, with or without weights, and their sizes checked."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from hone_core.errors import CheckpointError

from .pipeline_index import PIPELINES, pipeline_parts

__all__ = [
    "check_size",
    "load_pipeline",
    "load_transformer",
    "make_scheduler",
    "pipeline_on_meta",
    "with_flow_shift",
]

log = logging.getLogger(__name__)


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
