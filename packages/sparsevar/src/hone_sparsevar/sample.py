"""Images from prompts, with a saved Infinity pipeline.

What can be wrong with prompts, size and settings is found from the folder's configs, before a weight is read. Each
image is written whole or not at all, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_visual_ar.generation import Policy
from hone_visual_ar.pipelines import InfinityPipeline, check_prompts
from hone_visual_ar.schedules import infinity_schedule

from .config import GenerateConfig, ImageConfig, SparseVARConfig
from .models import fit, variant_of

__all__ = ["GenerateReport", "Wanted", "check_inputs", "draw_images", "generate", "load_pipeline"]


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


def check_inputs(model: Path, prompts: Sequence[str], image: ImageConfig, settings: SparseVARConfig) -> None:
    """Hold prompts, size and settings against the folder's configs; no weight is read.

    Raises:
        CheckpointError: The folder holds no saved Infinity pipeline.
        ValueError: A prompt is too long, or size, start scale or detector do not exist.
    """
    schedule = infinity_schedule(image.pixels, image.aspect)
    try:
        kind = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        config = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{model} holds no saved pipeline; make it with from_published and save_pretrained of InfinityPipeline"
        ) from error
    if kind != "InfinityPipeline":
        raise CheckpointError(f"{model} holds a {kind}; expected an InfinityPipeline")
    fit(settings, config["depth"], schedule)
    check_prompts(model, prompts, config["text_maxlen"])


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One image to draw.

    Attributes:
        prompt: What it shows.
        seed: Its own.
        file: Where it goes.
    """

    prompt: str
    seed: int
    file: Path


def load_pipeline(model: Path, image: ImageConfig, device: str) -> InfinityPipeline:
    """The pipeline of a folder, on a device."""
    place = resolve_device(device)
    dtype = resolve_dtype(image.dtype, place)
    return InfinityPipeline.from_pretrained(
        model, dtype={"transformer": dtype, "text_encoder": dtype}, local_files_only=True
    ).to(place)


def draw_images(
    model: Path, wanted: Sequence[Wanted], image: ImageConfig, policy: Policy, run: Run, *, batch: int
) -> None:
    """Draw what is not there yet; each file is written whole or not at all.

    Args:
        model: Folder of the pipeline.
        wanted: Images.
        image: How they are drawn.
        policy: What of a scale runs.
        run: The run, entered.
        batch: Images at a time.
    """
    missing = [item for item in wanted if not item.file.is_file()]
    if not missing:
        return
    pipe = load_pipeline(model, image, run.device)
    with progress_bar(len(missing), desc="images", quiet=run.quiet) as bar:
        for begin in range(0, len(missing), batch):
            part = missing[begin : begin + batch]
            images = pipe(
                [item.prompt for item in part],
                pixels=image.pixels,
                aspect=image.aspect,
                guidance_scale=image.guidance,
                temperature=image.temperature,
                seeds=[item.seed for item in part],
                policy=policy,
            ).images
            for item, drawn in zip(part, images, strict=True):
                item.file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(item.file) as scratch:
                    drawn.save(scratch, quality=95)
            bar.update(len(part))


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Draw one image of each prompt into the run's ``artifacts``.

    Raises:
        CheckpointError, ValueError: As ``check_inputs``, before weights are read.
    """
    check_inputs(cfg.model, cfg.prompts, cfg.image, cfg.settings)
    wanted = [
        Wanted(prompt=prompt, seed=cfg.seed + number, file=run.artifacts / f"{number:05}.png")
        for number, prompt in enumerate(cfg.prompts)
    ]
    draw_images(cfg.model, wanted, cfg.image, variant_of(cfg.variant, cfg.settings), run, batch=cfg.batch)
    return GenerateReport.of(run)
