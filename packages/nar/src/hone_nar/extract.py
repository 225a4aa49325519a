"""Images in folders, one for each class, to codes that a model is trained on.

Source: the release's ``extract_codes_c2i.py``: ten crops of an image that is a tenth larger.
Differs: images are fitted by one bicubic resampling; codes lie in a file for each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from torch import Tensor

from .checkpoints import build, load_published
from .codes import class_file, write_class, write_index
from .config import ExtractConfig
from .tokenizer import LlamaGenVQModel

__all__ = ["ExtractReport", "extract", "find_images", "views_of"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
        return f"codes    {self.codes}\n{'':8} {values['images']:.0f} images of {values['classes']:.0f} classes"


def find_images(folder: Path) -> dict[str, list[Path]]:
    """Image files of each class, by the names of the folders, sorted.

    Raises:
        CheckpointError: There is no folder, no class in it, or a class without an image.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder of images at {folder}")
    found = {
        part.name: sorted(file for file in part.rglob("*") if file.suffix.lower() in SUFFIXES)
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    empty = [name for name, files in found.items() if not files]
    if not found or empty:
        what = f"no image of class {', '.join(empty[:3])}" if empty else "no folder of a class"
        raise CheckpointError(f"{folder} holds {what}; expected one for each class, of {', '.join(SUFFIXES)} files")
    return found


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


def check(cfg: ExtractConfig) -> ExtractConfig:
    """Look for images and tokenizer; no weight is read.

    Raises:
        CheckpointError: One of them is missing.
    """
    find_images(cfg.images)
    if not cfg.vae.exists():
        raise CheckpointError(f"there is no tokenizer at {cfg.vae}; name vq_ds16_c2i.pt or a saved folder")
    return cfg


def extract(cfg: ExtractConfig, run: Run) -> ExtractReport:
    """Write codes of every class; one that is done is not repeated.

    Raises:
        CheckpointError: Images or tokenizer are missing or damaged.
        ValueError: The size is no multiple of the tokenizer's stride.
    """
    found = find_images(cfg.images)
    device = resolve_device(run.device)
    vae: Any
    if cfg.vae.is_dir() and (cfg.vae / "config.json").is_file():
        vae = LlamaGenVQModel.from_pretrained(cfg.vae)
    else:
        vae = load_published(build("vq_ds16"), cfg.vae)
    vae = vae.to(device, resolve_dtype(cfg.dtype, device)).eval()
    if cfg.size % vae.stride:
        raise ValueError(f"size must be a multiple of {vae.stride}; got {cfg.size}")
    side = cfg.size // vae.stride
    with torch.no_grad(), progress_bar(sum(map(len, found.values())), desc="images", quiet=run.quiet) as bar:
        for number, files in enumerate(found.values()):
            if class_file(run.artifacts, number).is_file():
                bar.update(len(files))
                continue
            codes = []
            for file in files:
                codes.append(vae.encode(views_of(file, cfg.size, cfg.crops).to(device)).flatten(1).cpu())
                bar.update()
            write_class(run.artifacts, number, torch.stack(codes))
    write_index(run.artifacts, grid=(side, side), choices=vae.choices, classes=list(found))
    run.row("images", sum(map(len, found.values())), better="none")
    run.row("classes", len(found), better="none")
    return ExtractReport.of(run)
