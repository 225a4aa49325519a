"""Images of classes or prompts, or clips of classes, with a saved pipeline.

Each file is written whole or not at all, so that the same command goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import UnsupportedHardwareError
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_video.videos import save_video

from .config import GenerateConfig
from .pipelines import NARPipeline, NARVideoPipeline
from .places import find_drawn, read_pipeline

__all__ = ["GenerateReport", "generate", "graph_device", "padded"]


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """Result of ``generate``; as text, the files.

    Attributes:
        images: PNG files of images, MP4 files of clips, in the order of classes or prompts.
    """

    images: tuple[Path, ...]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a run whose images are there."""
        found = sorted(file for suffix in ("png", "mp4") for file in run.artifacts.glob(f"*.{suffix}"))
        return cls(path=run.path, rows=tuple(run.rows), images=tuple(found))

    def __str__(self) -> str:
        return "\n".join(map(str, self.images))


def graph_device(run: Run, *, graphs: bool) -> torch.device:
    """Where a run draws.

    Raises:
        UnsupportedHardwareError: Graphs are asked of what is no CUDA device.
    """
    device = resolve_device(run.device)
    if graphs and device.type != "cuda":
        raise UnsupportedHardwareError("--graphs needs a CUDA device", f"this run is on {device}", "leave it out")
    return device


def padded(part: list[int], batch: int) -> list[int]:
    """A last batch filled up with its last image: graphs are of one number of images."""
    return part + part[-1:] * (batch - len(part))


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Draw one image or clip of each class or prompt into the run's ``artifacts``.

    Raises:
        CheckpointError, ValueError: As ``find_drawn``, before weights are read.
        RuntimeError: A clip's frames are not finite.
    """
    find_drawn(cfg)
    clips = read_pipeline(cfg.model)[0] == "NARVideoPipeline"
    suffix = "mp4" if clips else "png"
    files = [run.artifacts / f"{number:05}.{suffix}" for number in range(len(cfg.classes or cfg.prompts))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if not missing:
        return GenerateReport.of(run)
    device = graph_device(run, graphs=cfg.graphs)
    dtype = resolve_dtype(cfg.dtype, device)
    cls: Any = NARVideoPipeline if clips else NARPipeline
    parts = {"transformer": dtype} if clips else {"transformer": dtype, "text_encoder": dtype}
    pipe = cls.from_pretrained(cfg.model, dtype=parts, local_files_only=True).to(device)
    options: dict[str, Any] = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    if cfg.guidance is not None:
        options["guidance_scale"] = cfg.guidance
    if cfg.graphs:
        options = {"decoding": pipe.graphs(cfg.batch, **options)}
    with progress_bar(len(missing), desc="clips" if clips else "images", quiet=run.quiet) as bar:
        for begin in range(0, len(missing), cfg.batch):
            part = missing[begin : begin + cfg.batch]
            asked = padded(part, cfg.batch) if cfg.graphs else part
            seeds = [cfg.seed + number for number in asked]
            if cfg.prompts:
                drawn = pipe(prompt=[cfg.prompts[number] for number in asked], seeds=seeds, **options)
            else:
                drawn = pipe([cfg.classes[number] for number in asked], seeds=seeds, **options)
            for number, found in zip(part, (drawn if clips else drawn.images)[: len(part)], strict=True):
                if clips:
                    save_video(found, files[number], fps=cfg.fps, what=f"clip {number}", advice="try --dtype float32")
                    continue
                with atomic_path(files[number]) as scratch:
                    found.save(scratch)
            bar.update(len(part))
    return GenerateReport.of(run)
