"""What a verb needs, looked for before its run folder is made and before torch is imported."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hone_core.hosts import open_host
from hone_core.processes import Processes
from hone_video.host_config import PACKAGE, PACKAGED
from hone_video.host_config import HostConfig as DenseHostConfig
from hone_video.listings import read_cache, read_clips
from hone_video.pipeline_index import find_pipeline

from .config import (
    BenchConfig,
    CalibrateConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    HostConfig,
    InspectConfig,
    ReproduceConfig,
    TrainConfig,
    TrainHostConfig,
)
from .schedule import Schedule
from .tuned import need_peft, read_tuned

__all__ = [
    "check_launch",
    "find_calibrated",
    "find_evaluated",
    "find_finetuned",
    "find_host",
    "find_hosts",
    "find_inspected",
    "find_video",
]

Hosted = TypeVar("Hosted", CalibrateConfig, DemoConfig, EvalConfig, InspectConfig, ReproduceConfig, TrainHostConfig)
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


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """The settings, once hosts, or pipeline and prompts, are known to be there.

    Raises:
        CheckpointError: They are not.
        ValueError: The videos cannot be graded here.
    """
    if cfg.protocol == "clips":
        return find_hosts(cfg)
    from hone_video.vbench import find_suite

    found = find_video(cfg.videos(find_suite(cfg.vbench, limit=cfg.prompts).expanded))
    info = cfg.vbench.vbench_info
    info = None if info is None else Path(os.path.abspath(info))
    return replace(cfg, schedule=found.schedule, tuned=found.tuned, vbench=replace(cfg.vbench, vbench_info=info))


def find_video(cfg: GenerateConfig) -> GenerateConfig:
    """The settings, once pipeline, schedule and what was tuned are known to be there and to fit together.

    Raises:
        CheckpointError: The pipeline is not there, not whole, or of an unsupported class.
        OSError, ValueError: The schedule cannot be read, or does not fit; the windows leave nothing out; or the model
            cannot make this size.
    """
    # What needs no look at the model comes before torch is imported.
    if cfg.schedule is not None:
        Schedule.load(cfg.schedule)
    if cfg.tuned is not None:
        read_tuned(cfg.tuned)
    find_pipeline(str(cfg.video.model), local_files_only=cfg.video.local_files_only)
    from .sample import check_video

    check_video(cfg)
    schedule, tuned = (None if path is None else Path(os.path.abspath(path)) for path in (cfg.schedule, cfg.tuned))
    return replace(cfg, schedule=schedule, tuned=tuned)


def find_finetuned(cfg: TrainConfig) -> TrainConfig:
    """The settings, once pipeline, schedule and videos are known to be there and to fit together.

    Raises:
        CheckpointError: The pipeline is not there, not whole, or of an unsupported class.
        MissingExtraError: A LoRA is to be trained, and peft is not installed.
        OSError, ValueError: Schedule or videos cannot be read, or do not fit the model.
    """
    if cfg.lora_rank:
        need_peft("LoRA training")
    data = cfg.data
    if data.videos is not None:
        read_clips(data.videos, caption=data.caption)
    else:
        assert data.cache is not None
        read_cache(data.cache)
    if cfg.schedule is not None:
        Schedule.load(cfg.schedule)
    find_pipeline(cfg.model, local_files_only=cfg.local_files_only)
    from .finetune import open_cache, schedule_of

    schedule_of(cfg)
    if data.videos is None:
        open_cache(cfg)
    paths = {name: getattr(data, name) for name in ("videos", "cache")}
    found: dict[str, Any] = {
        name: None if path is None else Path(os.path.abspath(path)) for name, path in paths.items()
    }
    schedule = None if cfg.schedule is None else Path(os.path.abspath(cfg.schedule))
    return replace(cfg, data=replace(data, **found), schedule=schedule)


def find_calibrated(cfg: CalibrateConfig) -> CalibrateConfig:
    """The settings, once host or pipeline is known to be there, and something to choose from.

    Raises:
        CheckpointError: It is not.
        ValueError: The model cannot make this size, a window is larger than the grid, or nothing keeps to the budget.
    """
    if cfg.video.model is None:
        cfg = find_host(cfg)
        from .calibrate import check_host_choices

        check_host_choices(cfg, open_host(DenseHostConfig, PACKAGE, cfg.host or PACKAGED).config)
        return cfg
    find_pipeline(cfg.video.model, local_files_only=cfg.video.local_files_only)
    from .calibrate import check_choices
    from .sample import outline

    check_choices(cfg, outline(cfg.video))
    return cfg


def check_launch(cfg: BenchConfig) -> BenchConfig:
    """The settings, once as many processes are known to run as their parts are for.

    Raises:
        ValueError: Several were launched for parts of one, or the reverse.
    """
    count = Processes.of_launcher().count
    if ("parallel" in cfg.parts) != (count > 1):
        raise ValueError(
            f"parts=('parallel',) is what several processes do, as torchrun --nproc-per-node=2 starts them; got "
            f"{cfg.parts} in {count}"
        )
    return cfg


def find_inspected(cfg: InspectConfig) -> InspectConfig:
    """The settings, once host or pipeline, and what goes with it, are known to be there.

    Raises:
        CheckpointError: They are not.
        OSError, ValueError: The schedule cannot be read, or is none.
    """
    if cfg.video.model is not None:
        found = find_video(cfg.pipeline)
        return replace(cfg, schedule=found.schedule, tuned=found.tuned)
    cfg = find_host(cfg)
    if cfg.tuned is not None:
        open_host(HostConfig, "hone-fpsattention", cfg.tuned)
        cfg = replace(cfg, tuned=Path(os.path.abspath(cfg.tuned)))
    return cfg
