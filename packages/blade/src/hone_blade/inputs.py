"""What a verb needs, looked for before its run folder is made and before torch is imported."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hone_core.errors import CheckpointError
from hone_core.hosts import open_host
from hone_core.io import read_prompts
from hone_video.host_config import PACKAGE, HostConfig

from .config import (
    DemoConfig,
    DistillConfig,
    EncodeConfig,
    EvalConfig,
    GenerateConfig,
    InspectConfig,
    PipelineDistillConfig,
    ReproduceConfig,
    TrainHostConfig,
)

__all__ = [
    "find_distilled",
    "find_encoded",
    "find_evaluated",
    "find_host",
    "find_init",
    "find_inspected",
    "find_student",
]
__all__ += ["find_video_inputs"]

Hosted = TypeVar("Hosted", DemoConfig, DistillConfig, EvalConfig, InspectConfig, ReproduceConfig)


def find_host(cfg: Hosted) -> Hosted:
    """The settings with their tiny host by its absolute path.

    Raises:
        CheckpointError: It is not there, or is none of this package.
    """
    return cfg if cfg.host is None else replace(cfg, host=_checkpoint(cfg.host))


Shown = TypeVar("Shown", DemoConfig, ReproduceConfig)


def find_student(cfg: Shown) -> Shown:
    """Likewise, and with its student.

    Raises:
        CheckpointError: One of them is not there.
    """
    cfg = find_host(cfg)
    if cfg.lora is None:
        return cfg
    if not cfg.lora.is_file():
        raise CheckpointError(f"{cfg.lora} does not exist; expected a lora.safetensors made by hone-blade distill")
    return replace(cfg, lora=Path(os.path.abspath(cfg.lora)))


def find_init(cfg: TrainHostConfig) -> TrainHostConfig:
    """Likewise of the host that training starts from."""
    return cfg if cfg.start is None else replace(cfg, start=_checkpoint(cfg.start))


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """The settings, once the host, or pipeline and prompts, are known to be there.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``find_host`` and ``find_video_inputs``; or the videos cannot
            be graded here.
    """
    if cfg.protocol == "clips":
        return find_host(cfg)
    from hone_video.vbench import find_suite

    find_video_inputs(cfg.videos(find_suite(cfg.vbench, limit=cfg.prompts).expanded))
    info = cfg.vbench.vbench_info
    info = None if info is None else Path(os.path.abspath(info))
    return replace(cfg, vbench=replace(cfg.vbench, vbench_info=info))


def find_video_inputs(cfg: GenerateConfig) -> GenerateConfig:
    """The settings with their prompts read, once everything that they name is known to be there.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``hone_blade.sample.find_inputs``.
    """
    cfg.read_prompts()
    from .sample import find_inputs

    return find_inputs(cfg).config


def find_inspected(cfg: InspectConfig) -> InspectConfig:
    """The settings, once host or pipeline is known to be there.

    Raises:
        CheckpointError, ValueError: As ``find_host`` and ``find_video_inputs``.
    """
    if cfg.model is None:
        return find_host(cfg)
    find_video_inputs(cfg.pipeline)
    return cfg


def find_encoded(cfg: EncodeConfig) -> EncodeConfig:
    """The settings, once pipeline and prompts are known to be there.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``hone_blade.pipelines.clips_of``.
    """
    if cfg.prompt_file is not None:
        read_prompts(cfg.prompt_file)  # before torch is imported
    from .pipelines import clips_of

    clips_of(cfg)
    prompt_file, images = (None if x is None else Path(os.path.abspath(x)) for x in (cfg.prompt_file, cfg.image_folder))
    return replace(cfg, prompt_file=prompt_file, image_folder=images)


def find_distilled(cfg: PipelineDistillConfig) -> PipelineDistillConfig:
    """The settings, once everything that they name is known to be there and to fit together.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``hone_blade.pipelines.plan_of``.
    """
    from .pipelines import plan_of

    plan_of(cfg)
    prompt_file, cache = (None if x is None else Path(os.path.abspath(x)) for x in (cfg.prompt_file, cfg.cache))
    return replace(cfg, prompt_file=prompt_file, cache=cache)


def _checkpoint(path: Path) -> Path:
    open_host(HostConfig, PACKAGE, path)
    return Path(os.path.abspath(path))
