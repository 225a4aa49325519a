"""Images from prompts or classes, with a saved pipeline.

What can be wrong with prompts, size and settings is found from the folder's configs, before a weight is read. Each
image is written whole or not at all, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_visual_ar.generation import Policy
from hone_visual_ar.pipelines import InfinityPipeline, VARPipeline, check_prompts
from hone_visual_ar.schedules import ScaleSchedule, infinity_schedule

from .config import GenerateConfig, ImageConfig, SparseVARConfig
from .models import fit, variant_of

__all__ = ["GenerateReport", "Wanted", "check_classes", "check_inputs", "draw_images", "drawer", "generate", "prepare"]


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
    config = _config(model, "InfinityPipeline")
    fit(settings, config["depth"], schedule)
    check_prompts(model, prompts, config["text_maxlen"])


def check_classes(model: Path, classes: Sequence[int], image: ImageConfig, settings: SparseVARConfig) -> None:
    """Hold classes and settings against the folder's config; no weight is read.

    Raises:
        CheckpointError: The folder holds no saved VAR pipeline.
        ValueError: There is no such class, start scale or detector, or a size is asked for.
    """
    if (image.pixels, image.aspect) != (ImageConfig().pixels, ImageConfig().aspect):
        raise ValueError("a VAR draws images of the size that it was trained at; leave pixels and aspect out")
    config = _config(model, "VARPipeline")
    wrong = [number for number in classes if not 0 <= number < config["num_classes"]]
    if wrong:
        raise ValueError(f"this model draws classes 0 to {config['num_classes'] - 1}; got {wrong[0]}")
    fit(settings, config["depth"], ScaleSchedule(tuple((side, side) for side in config["patch_nums"])))
    if settings.backend != "torch":
        raise ValueError("fused kernels are for Infinity; take --backend torch")


def _config(model: Path, wanted: str) -> dict[str, Any]:
    """Config of the transformer of a saved pipeline."""
    try:
        kind = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        config = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{model} holds no saved pipeline; make it with from_published and save_pretrained of {wanted}"
        ) from error
    if kind != wanted:
        raise CheckpointError(f"{model} holds a {kind}; expected a saved {wanted}, which takes what was given")
    return config


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One image to draw.

    Attributes:
        prompt: What it shows: words, or the number of a class.
        seed: Its own.
        file: Where it goes.
    """

    prompt: str | int
    seed: int
    file: Path


def drawer(model: Path, image: ImageConfig, device: str, *, classes: bool = False) -> Callable[..., Any]:
    """The pipeline of a folder on a device, how it draws filled in: called with what is drawn, seeds and policy."""
    place = resolve_device(device)
    dtype = resolve_dtype(image.dtype, place)
    kind = VARPipeline if classes else InfinityPipeline
    parts = {"transformer": dtype} if classes else {"transformer": dtype, "text_encoder": dtype}
    options: dict[str, Any] = {"temperature": image.temperature}
    if image.guidance is not None:
        options["guidance_scale"] = image.guidance
    if not classes:
        options |= {"pixels": image.pixels, "aspect": image.aspect}
    return partial(kind.from_pretrained(model, dtype=parts, local_files_only=True).to(place), **options)


def draw_images(
    model: Path, wanted: Sequence[Wanted], image: ImageConfig, policy: Policy, run: Run, *, batch: int
) -> None:
    """Draw what is not there yet, by whole batches: by ``threshold`` an image depends on its company.

    Args:
        model: Folder of the pipeline.
        wanted: Images.
        image: How they are drawn.
        policy: What of a scale runs.
        run: The run, entered.
        batch: Images at a time.
    """
    batches = [wanted[begin : begin + batch] for begin in range(0, len(wanted), batch)]
    missing = [part for part in batches if not all(item.file.is_file() for item in part)]
    if not missing:
        return
    pipe = drawer(model, image, run.device, classes=isinstance(wanted[0].prompt, int))
    with progress_bar(sum(map(len, missing)), desc="images", quiet=run.quiet) as bar:
        for part in missing:
            images = pipe([item.prompt for item in part], seeds=[item.seed for item in part], policy=policy).images
            for item, drawn in zip(part, images, strict=True):
                item.file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(item.file) as scratch:
                    drawn.save(scratch, quality=95)
            bar.update(len(part))


def prepare(cfg: GenerateConfig) -> GenerateConfig:
    """Look at the folder's configs.

    Raises:
        CheckpointError, ValueError: As ``check_inputs`` and ``check_classes``.
        ValueError: The variant does not take the settings, or is not for VAR.
    """
    variant_of(cfg.variant, cfg.settings)
    if cfg.classes and cfg.variant == "fastvar":
        raise ValueError("variant fastvar is for Infinity, which draws prompts; a VAR's classes take another")
    if cfg.classes:
        check_classes(cfg.model, cfg.classes, cfg.image, cfg.settings)
    else:
        check_inputs(cfg.model, cfg.prompts, cfg.image, cfg.settings)
    return cfg


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Draw one image of each prompt or class into the run's ``artifacts``.

    Raises:
        CheckpointError, ValueError: As ``prepare``, before weights are read.
    """
    prepare(cfg)
    prompts: tuple[str | int, ...] = cfg.prompts or cfg.classes
    wanted = [
        Wanted(prompt=prompt, seed=cfg.seed + number, file=run.artifacts / f"{number:05}.png")
        for number, prompt in enumerate(prompts)
    ]
    draw_images(cfg.model, wanted, cfg.image, variant_of(cfg.variant, cfg.settings), run, batch=cfg.batch)
    return GenerateReport.of(run)
