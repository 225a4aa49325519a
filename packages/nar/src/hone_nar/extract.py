"""Images or videos in folders to codes that a model is trained on.

Source: the release's ``extract_codes_c2i.py``: ten crops of an image that is a tenth larger.
Differs: images are fitted by one bicubic resampling; codes lie in a file for each class. Clips are windows of a video
    that follow each other, where the release draws a window at random in training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from torch import Tensor

from .checkpoints import build, load_published
from .codes import class_file, write_class, write_index, write_texts
from .config import ExtractConfig
from .larp import LARPTokenizer
from .places import find_extracted, parts_of
from .tokenizer import LlamaGenVQModel

__all__ = ["ExtractReport", "clips_of", "extract", "views_of"]


@dataclass(frozen=True, kw_only=True)
class ExtractReport(Report):
    """Result of ``extract``; as text, the folder.

    Attributes:
        codes: The folder to pass to ``train --data``.
    """

    codes: Path

    @classmethod
    def of(cls, run: Run) -> ExtractReport:
        """Return the report of a run whose codes are written."""
        return cls(path=run.path, rows=tuple(run.rows), codes=run.artifacts)

    def __str__(self) -> str:
        values = {row.metric: row.value for row in self.rows}
        what = f" of {values['classes']:.0f} classes" if "classes" in values else " with texts"
        return f"codes    {self.codes}\n{'':8} {values['images']:.0f} images{what}"


def views_of(file: Path, size: int, crops: str) -> Tensor:
    """Views ``[views, 3, size, size]`` of an image in [-1, 1].

    Args:
        file: Image.
        size: Side in pixels.
        crops: ``center``, or ``ten``: corners and centre of an image a tenth larger, and each mirrored.

    Raises:
        CheckpointError: The file is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    large = size if crops == "center" else int(1.1 * size)
    try:
        with Image.open(file) as opened:
            fitted = ImageOps.fit(opened.convert("RGB"), (large, large), Image.Resampling.BICUBIC)
    except OSError as error:
        raise CheckpointError(f"{file} is no image that can be read ({error})") from error
    image = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1
    if crops == "center":
        return image[None]
    rest, middle = large - size, (large - size) // 2
    places = ((0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle))
    five = torch.stack([image[:, y : y + size, x : x + size] for y, x in places])
    return torch.cat([five, five.flip(-1)])


def clips_of(file: Path, frames: int, size: int, crops: str) -> Tensor:
    """Windows ``[N, views, 3, frames, size, size]`` of a video in [0, 1], at its own rate, one after the other.

    Args:
        file: Of a format that ffmpeg reads.
        frames: Of a window; what is left at the end is not used.
        size: Side in pixels, of the middle of the picture.
        crops: ``center``, or ``ten``, which adds the mirrored one.

    Raises:
        CheckpointError: It cannot be read, or is shorter than a window.
    """
    import imageio_ffmpeg
    import numpy as np

    try:
        with contextlib.closing(imageio_ffmpeg.read_frames(str(file))) as reader:
            wide, high = next(reader)["size"]
            read = [torch.from_numpy(np.frombuffer(data, np.uint8).reshape(high, wide, 3).copy()) for data in reader]
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise CheckpointError(f"{file} cannot be read as a video ({str(error)[-300:]})") from error
    if len(read) < frames:
        raise CheckpointError(f"{file} has {len(read)} frames; a clip has {frames}. Leave it out")
    video = torch.stack(read[: len(read) // frames * frames]).permute(0, 3, 1, 2).float() / 255
    side = min(video.shape[2:])
    top, left = ((length - side) // 2 for length in video.shape[2:])
    video = video[:, :, top : top + side, left : left + side]
    if side != size:
        video = F.interpolate(video, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    windows = video.unflatten(0, (-1, frames)).transpose(1, 2)
    views = [windows] if crops == "center" else [windows, windows.flip(-1)]
    return torch.stack(views, 1)


def _tokenizer(cfg: ExtractConfig) -> Any:
    cls, name = (LARPTokenizer, "larp_l_long") if cfg.kind == "clips" else (LlamaGenVQModel, "vq_ds16")
    config = cfg.vae / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    if kind is None:
        # The release's own folder of LARP has a config without a class.
        return load_published(build(name), cfg.vae)
    if kind != cls.__name__:
        raise CheckpointError(f"{cfg.vae} holds a {kind}; {cfg.kind} need a {cls.__name__}")
    return cls.from_pretrained(cfg.vae)


def _encoder(cfg: ExtractConfig, vae: Any, device: torch.device) -> tuple[tuple[int, ...], Callable[[Path], Tensor]]:
    """The grid, and what makes codes ``[N, views, tokens]`` of a file."""
    if cfg.kind == "clips":
        _, frames, side, _ = vae.shape
        if math.prod(cfg.grid) != vae.config.tokens:
            raise ValueError(f"the tokenizer gives {vae.config.tokens} tokens; got --grid of {math.prod(cfg.grid)}")

        def of_clips(file: Path) -> Tensor:
            clips = clips_of(file, frames, side, cfg.crops)
            return torch.stack([vae.encode(views.to(device)).cpu() for views in clips])

        return cfg.grid, of_clips
    if cfg.size % vae.stride:
        raise ValueError(f"size must be a multiple of {vae.stride}; got {cfg.size}")
    side = cfg.size // vae.stride
    return (side, side), lambda file: vae.encode(views_of(file, cfg.size, cfg.crops).to(device)).flatten(1).cpu()[None]


def _check_listing(run: Run, found: list[tuple[str, list[tuple[Path, str]]]]) -> None:
    """Refuse to go on with other files than those that a stopped run began with: classes are numbered by them."""
    listed = json.dumps([[name, [[str(file), text] for file, text in files]] for name, files in found])
    digest, stored = {"sha256": hashlib.sha256(listed.encode()).hexdigest()}, run.path / "listing.json"
    if not stored.is_file():
        atomic_write_json(stored, digest)
    elif json.loads(stored.read_text(encoding="utf-8")) != digest:
        raise CheckpointError(
            f"files or texts were added, removed or changed since {run.path} was begun, and what is there is numbered "
            "by them; choose another --out"
        )


def extract(cfg: ExtractConfig, run: Run) -> ExtractReport:
    """Write codes of every class or part; one that is done is not repeated.

    Raises:
        CheckpointError: Images or tokenizer are missing or damaged, the tokenizer is of another kind, or a stopped run
            goes on with other files.
        ValueError: The size is no multiple of the tokenizer's stride, or the grid is not of its tokens.
    """
    find_extracted(cfg)
    found = parts_of(cfg)
    device = resolve_device(run.device)
    vae = _tokenizer(cfg)
    vae = vae.to(device, resolve_dtype(cfg.dtype, device)).eval()
    grid, encode = _encoder(cfg, vae, device)
    _check_listing(run, found)
    images = 0
    with torch.no_grad(), progress_bar(sum(len(files) for _, files in found), desc="images", quiet=run.quiet) as bar:
        for number, (_, files) in enumerate(found):
            done = class_file(run.artifacts, number)
            if done.is_file():
                bar.update(len(files))
                images += _count(done)
                continue
            codes = []
            for file, _ in files:
                codes.append(encode(file))
                bar.update()
            part = torch.cat(codes)
            images += len(part)
            if cfg.kind == "texts":
                write_texts(run.artifacts, number, part, [text for _, text in files])
            else:
                write_class(run.artifacts, number, part)
    classes = None if cfg.kind == "texts" else [name for name, _ in found]
    write_index(run.artifacts, grid=grid, choices=vae.choices, classes=classes, shards=len(found))
    run.row("images", images, better="none")
    if classes is not None:
        run.row("classes", len(found), better="none")
    return ExtractReport.of(run)


def _count(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        return stored.get_slice("codes").get_shape()[0]
