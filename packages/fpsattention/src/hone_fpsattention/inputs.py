"""What a verb needs, looked for before its run folder is made and before torch is imported."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hone_core.hosts import open_host
from hone_video.host_config import PACKAGE
from hone_video.host_config import HostConfig as DenseHostConfig

from .config import (
    CalibrateConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    HostConfig,
    ReproduceConfig,
    TrainConfig,
)
from .schedule import Schedule

__all__ = ["find_calibrated", "find_host", "find_hosts", "find_video"]

Hosted = TypeVar("Hosted", CalibrateConfig, DemoConfig, EvalConfig, ReproduceConfig, TrainConfig)
Compared = TypeVar("Compared", DemoConfig, EvalConfig)


def find_host(cfg: Hosted) -> Hosted:
    """The settings with their dense host by its absolute path.

    Raises:
        CheckpointError: It is not there, or is of another package.
    """
    if cfg.host is None:
        return cfg
    open_host(DenseHostConfig, PACKAGE, cfg.host)
    return replace(cfg, host=Path(os.path.abspath(cfg.host)))


def find_hosts(cfg: Compared) -> Compared:
    """Likewise, with their tuned host too."""
    cfg = find_host(cfg)
    if cfg.tuned is None:
        return cfg
    open_host(HostConfig, "hone-fpsattention", cfg.tuned)
    return replace(cfg, tuned=Path(os.path.abspath(cfg.tuned)))


def find_video(cfg: GenerateConfig) -> GenerateConfig:
    """The settings, once the pipeline and the schedule are known to be there.

    Raises:
        CheckpointError: The pipeline is not there, not whole, or of an unsupported class.
        OSError, ValueError: The schedule cannot be read, or is none.
    """
    if cfg.schedule is not None:
        Schedule.load(cfg.schedule)
        cfg = replace(cfg, schedule=Path(os.path.abspath(cfg.schedule)))
    _find_pipeline(cfg.video.model, local_files_only=cfg.video.local_files_only)
    return cfg


def find_calibrated(cfg: CalibrateConfig) -> CalibrateConfig:
    """The settings, once host or pipeline is known to be there.

    Raises:
        CheckpointError: It is not.
    """
    if cfg.video.model is None:
        return find_host(cfg)
    _find_pipeline(cfg.video.model, local_files_only=cfg.video.local_files_only)
    return cfg


def _find_pipeline(model: str | None, *, local_files_only: bool) -> None:
    from hone_video.pipelines import find_pipeline

    assert model is not None
    find_pipeline(model, local_files_only=local_files_only)
