"""What a verb needs, looked for before its run folder is made and before torch is imported."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hone_core.hosts import open_host
from hone_video.host_config import PACKAGE, HostConfig

from .config import DemoConfig, EvalConfig, ReproduceConfig, TrainConfig, TunedHostConfig

__all__ = ["find_host", "find_hosts"]

Hosted = TypeVar("Hosted", DemoConfig, EvalConfig, ReproduceConfig, TrainConfig)
Compared = TypeVar("Compared", DemoConfig, EvalConfig)


def find_host(cfg: Hosted) -> Hosted:
    """The settings with their dense host by its absolute path.

    Raises:
        CheckpointError: It is not there, or is of another package.
    """
    if cfg.host is None:
        return cfg
    open_host(HostConfig, PACKAGE, cfg.host)
    return replace(cfg, host=Path(os.path.abspath(cfg.host)))


def find_hosts(cfg: Compared) -> Compared:
    """Likewise, with their tuned host too."""
    cfg = find_host(cfg)
    if cfg.tuned is None:
        return cfg
    open_host(TunedHostConfig, "hone-fpsattention", cfg.tuned)
    return replace(cfg, tuned=Path(os.path.abspath(cfg.tuned)))
