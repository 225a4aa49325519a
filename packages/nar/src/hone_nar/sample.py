"""Images of classes or prompts, with a saved pipeline.

What can be wrong is found from the folder's configs, before a weight is read. Each image is written whole or not at
all, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_visual_ar.pipelines import check_prompts
from hone_visual_ar.sampling import Sampling

from .config import GenerateConfig
from .pipelines import NARPipeline

__all__ = ["GenerateReport", "check_inputs", "generate", "read_pipeline"]


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """Result of ``generate``; as text, the files.

    Attributes:
        images: In the order of classes or prompts.
    """

    images: tuple[Path, ...]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a run whose images are there."""
        return cls(path=run.path, rows=tuple(run.rows), images=tuple(sorted(run.artifacts.glob("*.png"))))

    def __str__(self) -> str:
        return "\n".join(map(str, self.images))


def read_pipeline(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class of a saved pipeline, and the config of its transformer.

    Raises:
        CheckpointError: There is none.
    """
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        return kind, json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} holds no saved pipeline; make it with from_published and save_pretrained of NARPipeline"
        ) from error


def check_inputs(cfg: GenerateConfig) -> GenerateConfig:
    """Hold classes, prompts and sampling against the folder's configs; no weight is read.

    Raises:
        CheckpointError: The folder holds no saved pipeline.
        ValueError: A class does not exist, a prompt is too long, or the model takes the other kind.
    """
    Sampling(guidance=cfg.guidance, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    kind, model = read_pipeline(cfg.model)
    if kind != "NARPipeline":
        raise CheckpointError(f"{cfg.model} holds a {kind}; expected a NARPipeline")
    classes = model["num_classes"]
    if (classes is None) == bool(cfg.classes):
        wanted, given = ("prompts", "classes") if classes is None else ("classes", "prompts")
        raise ValueError(f"this model draws {wanted}; got {given}")
    if cfg.classes:
        wrong = [number for number in cfg.classes if not 0 <= number < classes]
        if wrong:
            raise ValueError(f"classes are 0 to {classes - 1}; got {', '.join(map(str, wrong))}")
    else:
        check_prompts(cfg.model, cfg.prompts, model["cls_token_num"])
    return cfg


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Draw one image of each class or prompt into the run's ``artifacts``.

    Raises:
        CheckpointError, ValueError: As ``check_inputs``, before weights are read.
    """
    check_inputs(cfg)
    files = [run.artifacts / f"{number:05}.png" for number in range(len(cfg.classes or cfg.prompts))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if not missing:
        return GenerateReport.of(run)
    device = resolve_device(run.device)
    dtype = resolve_dtype(cfg.dtype, device)
    pipe = NARPipeline.from_pretrained(
        cfg.model, dtype={"transformer": dtype, "text_encoder": dtype}, local_files_only=True
    ).to(device)
    with progress_bar(len(missing), desc="images", quiet=run.quiet) as bar:
        for begin in range(0, len(missing), cfg.batch):
            part = missing[begin : begin + cfg.batch]
            images = pipe(
                [cfg.classes[number] for number in part] if cfg.classes else None,
                prompt=[cfg.prompts[number] for number in part] if cfg.prompts else None,
                guidance_scale=cfg.guidance,
                temperature=cfg.temperature,
                top_k=cfg.top_k,
                top_p=cfg.top_p,
                seeds=[cfg.seed + number for number in part],
            ).images
            for number, image in zip(part, images, strict=True):
                with atomic_path(files[number]) as scratch:
                    image.save(scratch)
            bar.update(len(part))
    return GenerateReport.of(run)
