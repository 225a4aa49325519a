"""Images from prompts, with a saved Infinity pipeline.

What can be wrong with prompts, size and settings is found from the folder's configs, before a weight is read. Each
image is written whole or not at all, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_visual_ar.pipelines import InfinityPipeline, check_prompts
from hone_visual_ar.schedules import infinity_schedule

from .config import PRESETS, GenerateConfig
from .models import attach

__all__ = ["GenerateReport", "check_inputs", "generate"]


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """Result of ``generate``; as text, the files.

    Attributes:
        images: In the order of the prompts.
    """

    images: tuple[Path, ...]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a run whose images are there."""
        return cls(path=run.path, rows=tuple(run.rows), images=tuple(sorted(run.artifacts.glob("*.png"))))

    def __str__(self) -> str:
        return "\n".join(map(str, self.images))


def check_inputs(cfg: GenerateConfig) -> None:
    """Hold prompts, size and settings against the folder's configs; no weight is read.

    Raises:
        CheckpointError: The folder holds no saved Infinity pipeline.
        ValueError: A prompt is too long, or size, start scale or detector do not exist.
    """
    schedule = infinity_schedule(cfg.pixels, cfg.aspect)
    try:
        kind = json.loads((cfg.model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        model = json.loads((cfg.model / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{cfg.model} holds no saved pipeline; make it with from_published and save_pretrained of InfinityPipeline"
        ) from error
    if kind != "InfinityPipeline":
        raise CheckpointError(f"{cfg.model} holds a {kind}; expected an InfinityPipeline")
    settings = None if cfg.dense else PRESETS[cfg.preset].config
    if settings is not None:
        if schedule.resolve(settings.start_scale) < 1:
            raise ValueError(f"start_scale must leave a scale before it; got {settings.start_scale}")
        if settings.detector is not None and settings.detector >= model["depth"]:
            raise ValueError(f"this model has {model['depth']} blocks; got detector {settings.detector}")
    check_prompts(cfg.model, cfg.prompts, model["text_maxlen"])


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Draw one image of each prompt into the run's ``artifacts``.

    Raises:
        CheckpointError, ValueError: As ``check_inputs``, before weights are read.
    """
    check_inputs(cfg)
    files = [run.artifacts / f"{number:05}.png" for number in range(len(cfg.prompts))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if not missing:
        return GenerateReport.of(run)
    device = resolve_device(run.device)
    dtype = resolve_dtype(cfg.dtype, device)
    pipe = InfinityPipeline.from_pretrained(
        cfg.model, dtype={"transformer": dtype, "text_encoder": dtype}, local_files_only=True
    ).to(device)
    with ExitStack() as stack:
        if not cfg.dense:
            stack.enter_context(attach(pipe.transformer, cfg.preset))
        bar = stack.enter_context(progress_bar(len(missing), desc="images", quiet=run.quiet))
        for begin in range(0, len(missing), cfg.batch):
            part = missing[begin : begin + cfg.batch]
            images = pipe(
                [cfg.prompts[number] for number in part],
                pixels=cfg.pixels,
                aspect=cfg.aspect,
                guidance_scale=cfg.guidance,
                temperature=cfg.temperature,
                seeds=[cfg.seed + number for number in part],
            ).images
            for number, image in zip(part, images, strict=True):
                with atomic_path(files[number]) as scratch:
                    image.save(scratch)
            bar.update(len(part))
    return GenerateReport.of(run)
