"""Prompts and videos of a training, encoded once by a pipeline's own text encoder and VAE, and kept in a folder.

``cache.json`` says of which encoder, size and items it is. Beside it lies a safetensors file per item, with ``text``
``[L, D]`` and, where there are videos, ``latents`` as the transformer takes them, without the batch; or, of an
image-to-video pipeline, what it reads of an image (see ``encode_image``); and ``null.safetensors`` with the text of the
empty prompt. A fill that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, save_safetensors
from hone_core.processes import Processes
from hone_core.progress import progress_bar
from PIL import Image
from torch import Tensor

from .images import cover, read_image
from .listings import CACHE_SCHEMA, Clip, cache_item, read_cache
from .pipeline_index import PIPELINES, find_pipeline
from .pipelines import check_size, load_pipeline, pipeline_on_meta

__all__ = ["Cache", "encode_clip", "encode_image", "encode_text", "fill_cache", "fingerprint", "read_clip"]

log = logging.getLogger(__name__)


def read_clip(file: str | Path, *, frames: int, height: int, width: int, fps: float) -> Tensor:
    """The first frames of a video, ``[3, F, H, W]`` in [-1, 1], scaled to cover the size and cut to its middle.

    Args:
        file: Of a format that ffmpeg reads.
        frames: How many.
        height: Pixels.
        width: Pixels.
        fps: Frames per second to take.

    Raises:
        ValueError: It cannot be read, or is too short.
    """
    import imageio

    try:
        reader: Any
        with imageio.get_reader(str(file), format="FFMPEG") as reader:
            rate = float(reader.get_meta_data()["fps"])
            wanted = [round(index * rate / fps) for index in range(frames)]
            found: dict[int, Any] = {}
            for index, frame in enumerate(reader):
                if index > wanted[-1]:
                    break
                found[index] = frame
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        # ffmpeg's last line has the cause; before it stands how ffmpeg was built.
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be read as a video: {cause}") from error
    if wanted[-1] not in found:
        raise ValueError(
            f"{file} is too short: {len(found)} frames at {rate:g} a second, and {frames} at {fps:g} need "
            f"{wanted[-1] + 1}. Take fewer frames, or leave it out of metadata.jsonl"
        )
    video = torch.stack([torch.from_numpy(found[index].copy()) for index in wanted])
    video = video.permute(0, 3, 1, 2).float() / 127.5 - 1  # [F, 3, H, W]
    scale = max(height / video.shape[2], width / video.shape[3])
    size = [max(least, round(scale * side)) for least, side in ((height, video.shape[2]), (width, video.shape[3]))]
    if size != list(video.shape[2:]):
        video = F.interpolate(video, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width].transpose(0, 1).contiguous()


@torch.no_grad()
def encode_text(pipe: Any, prompt: str) -> Tensor:
    """The text tokens ``[L, D]`` of a prompt, as the pipeline makes them for its transformer."""
    length = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    embeds, _ = pipe.encode_prompt(
        prompt=[prompt], do_classifier_free_guidance=False, max_sequence_length=length,
        device=next(pipe.text_encoder.parameters()).device,
    )  # fmt: skip
    return embeds[0]


@torch.no_grad()
def encode_clip(pipe: Any, video: Tensor) -> Tensor:
    """Latents of a video, as the pipeline's transformer takes them, float32, without the batch.

    Args:
        pipe: Of a class in ``PIPELINES``, with its VAE.
        video: ``[3, F, H, W]`` in [-1, 1].

    Returns:
        ``[C, F, H, W]`` of Wan, ``[F, C, H, W]`` of CogVideoX: the mode of the posterior (ours), normalised.
    """
    weight = next(pipe.vae.parameters())
    latents = pipe.vae.encode(video[None].to(weight)).latent_dist.mode().float()[0]
    config = pipe.vae.config
    if PIPELINES[type(pipe).__name__].family == "wan":
        mean, std = (
            torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std
    return (latents * config.scaling_factor).transpose(0, 1).contiguous()


@torch.no_grad()
def encode_image(
    pipe: Any, image: Image.Image, size: tuple[int, int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """What an image-to-video transformer reads of an image, by the pipeline's own code, without the batch.

    Args:
        pipe: With its VAE and, if it has one, its CLIP; of its transformer the config is enough.
        image: Of the video's size.
        size: Frames, height and width of the video.
        generator: On the CPU; CogVideoX draws the image's latents.

    Returns:
        ``condition``, channels that join the latents; and of Wan2.1 ``image`` ``[L, D]``, CLIP's tokens.
    """
    frames, height, width = size
    weight, config = next(pipe.vae.parameters()), pipe.transformer.config
    pixels = pipe.video_processor.preprocess(image, height=height, width=width).to(weight)
    _, condition = pipe.prepare_latents(
        image=pixels, batch_size=1, num_channels_latents=config.out_channels, num_frames=frames, height=height,
        width=width, dtype=weight.dtype, device=weight.device, generator=generator,
    )  # fmt: skip
    found = {"condition": condition[0]}
    if getattr(config, "image_dim", None) is not None:
        found["image"] = pipe.encode_image(image, weight.device)[0]
    return found


def fingerprint(model: str, part: str, *, local_files_only: bool = False) -> str:
    """What tells one encoder from another: a hash of its config and of the names and sizes of its weight files.

    Args:
        model: Folder or hub address of the pipeline.
        part: ``text_encoder`` or ``vae``.
        local_files_only: Never ask the hub, only its local cache.

    Raises:
        CheckpointError: The pipeline lacks the part.
    """
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        found = huggingface_hub.snapshot_download(
            model, allow_patterns=[f"{part}/*"], local_files_only=local_files_only
        )
        folder = Path(found)
    config = folder / part / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{model} has no {part}")
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted((folder / part).glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


class Cache:
    """Encoded prompts, with latents where there are videos. Made by ``fill_cache``.

    Attributes:
        path: The folder.
        header: What ``cache.json`` says.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header

    @classmethod
    def open(cls, path: str | Path, *, encoder: str | None = None) -> Cache:
        """Open a filled cache.

        Args:
            path: The folder.
            encoder: ``fingerprint`` of the text encoder that it must be of; None for any.

        Raises:
            CheckpointError: It is no cache, is not filled, or is of another encoder.
        """
        path, header = Path(path), read_cache(path)
        if encoder is not None and header["encoder"] != encoder:
            raise CheckpointError(
                f"{path} was made by another text encoder ({header['encoder']}) than this pipeline's ({encoder}); fill "
                "a new folder"
            )
        return cls(path, header)

    def __len__(self) -> int:
        return len(self.header["items"])

    def prompt(self, index: int) -> str:
        """The prompt of an item."""
        return self.header["items"][index]["text"]

    def item(self, index: int) -> dict[str, Tensor]:
        """``text`` and, if there are videos, ``latents`` of an item, or what is kept of its image, on the CPU."""
        return _read(self.path / cache_item(index))

    def null(self) -> Tensor:
        """Text tokens of the empty prompt, ``[L, D]``."""
        return _read(self.path / "null.safetensors")["text"]


def fill_cache(
    path: str | Path,
    clips: Sequence[Clip],
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int, int] | None = None,
    images: bool = False,
    processes: Processes | None = None,
    local_files_only: bool = False,
    quiet: bool = False,
) -> Cache:
    """Encode what is not encoded yet. Loads text encoder and VAE only if there is something to do.

    Args:
        path: The folder; made if need be.
        clips: With videos, all of them, or with prompts alone; of an image-to-video pipeline, with images.
        model: Folder or hub address of the pipeline.
        device: Where to encode.
        dtype: Of the text encoder, and of the text that is kept.
        size: Frames, height and width of the videos; None for prompts alone.
        images: Whether the files are images, of an image-to-video pipeline.
        processes: Those that share the work; each calls this with the same arguments.
        local_files_only: Never ask the hub, only its local cache.
        quiet: Show no progress.

    Raises:
        CheckpointError: There is no such pipeline, or the folder holds a cache of something else.
        ValueError: There is nothing to encode, a video cannot be used, or the model cannot make the size.
    """
    if not clips:
        raise ValueError("there is no prompt to encode")
    path, processes = Path(path), processes or Processes()
    name = find_pipeline(model, images=images, local_files_only=local_files_only)
    header = {
        "schema": CACHE_SCHEMA,
        "pipeline": name,
        "encoder": fingerprint(model, "text_encoder", local_files_only=local_files_only),
        "vae": None if size is None else fingerprint(model, "vae", local_files_only=local_files_only),
        "size": None if size is None else list(size),
        "items": [{"text": clip.text, "file": None if clip.file is None else clip.file.name} for clip in clips],
    }
    if processes.main and (path / "cache.json").is_file():
        before = json.loads((path / "cache.json").read_text(encoding="utf-8"))
        changed = sorted(key for key in {**before, **header} if before.get(key) != header.get(key))
        if changed:
            raise CheckpointError(
                f"{path} holds a cache of something else: it differs in {', '.join(changed)}. Take another folder"
            )
    elif processes.main:
        atomic_write_json(path / "cache.json", header)
    processes.share("cache header", True)
    files = [*map(cache_item, range(len(clips))), "null.safetensors"]
    todo = [index for index, file in enumerate(files) if not (path / file).is_file()]
    if todo:
        _encode(path, files, clips, model, name, device, dtype, size, processes, local_files_only, quiet)
    processes.wait("cache filled")
    return Cache.open(path)


def _encode(
    path: Path, files: list[str], clips: Sequence[Clip], model: str, name: str, device: torch.device,
    dtype: torch.dtype, size: tuple[int, int, int] | None, processes: Processes, local_files_only: bool, quiet: bool,
) -> None:  # fmt: skip
    away = ("transformer", "transformer_2", *(() if size else ("vae",)))
    pipe = load_pipeline(model, name, device=device, dtype=dtype, local_files_only=local_files_only, leave_out=away)
    if size is not None:
        check_size(pipe, frames=size[0], height=size[1], width=size[2])
        if PIPELINES[name].image:
            pipe.transformer = pipeline_on_meta(model, name, local_files_only=local_files_only).transformer
    log.info("encoding into %s", path)
    with progress_bar(len(files), desc="encoding", quiet=quiet) as bar:
        while (index := processes.take(f"items of {path}")) < len(files):
            bar.update()
            if (path / files[index]).is_file():
                continue
            clip = clips[index] if index < len(clips) else Clip("")
            tensors = {"text": encode_text(pipe, clip.text).to(dtype)}
            if clip.file is not None and PIPELINES[name].image:
                assert size is not None
                image = cover(read_image(clip.file), *size[1:])
                tensors |= encode_image(pipe, image, size, torch.Generator().manual_seed(index))
            elif clip.file is not None:
                assert size is not None
                frames, height, width = size
                video = read_clip(clip.file, frames=frames, height=height, width=width, fps=PIPELINES[name].fps)
                tensors["latents"] = encode_clip(pipe, video.to(device))
            broken = [key for key, value in tensors.items() if not value.isfinite().all()]
            if broken:
                raise ValueError(
                    f"the {' and the '.join(broken)} of item {index} ({clip.text[:60]!r}) are not finite; take dtype "
                    "float32 or bfloat16"
                )
            save_safetensors(tensors, path / files[index])


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Fill a new folder") from error
