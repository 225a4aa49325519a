"""Before a verb's run begins: its inputs are looked for and its config made complete.

Files are looked for before torch is imported, and everything else that can be wrong before weights are read.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hone_core.config import load_config
from hone_core.hosts import open_host
from hone_core.runs import load_results
from hone_lm.addresses import find_checkpoint

from .config import DemoConfig, EvalConfig, GenerateConfig, HostConfig, RecommendConfig, ReproduceConfig
from .sources import absolute_model, absolute_source, read_questions, source_layers, source_of_run

__all__ = ["find_host", "find_hosts", "find_question", "find_run", "find_source"]


def find_host(cfg: DemoConfig) -> DemoConfig:
    """Look for the host."""
    return cfg if cfg.host is None else replace(cfg, host=_look_for_host(cfg.host))


def find_hosts(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look for every host."""
    return replace(cfg, hosts=tuple(map(_look_for_host, cfg.hosts)))


def find_question(cfg: GenerateConfig) -> GenerateConfig:
    """Look for everything that can be wrong before the weights are read, and for files before anything is imported.

    Raises:
        FileNotFoundError: There is no such video.
        ValueError: The question, its options or what is attached do not fit the model.
    """
    if not cfg.video.exists():
        raise FileNotFoundError(f"there is no video {cfg.video}")
    find_checkpoint(cfg.model)
    from hone_lm.video import check_video, read_video
    from transformers import AutoConfig, AutoProcessor

    from .models import check_model
    from .sample import check_question

    check_video(cfg.video)
    check_model(cfg.model, cfg.attached(check_model(cfg.model)))
    clip = read_video(cfg.video, num_frames=cfg.frames, start=cfg.start, end=cfg.end)
    check_question(AutoConfig.from_pretrained(cfg.model), AutoProcessor.from_pretrained(cfg.model), cfg, clip)
    return replace(cfg, model=absolute_model(cfg.model), video=Path(os.path.abspath(cfg.video)))


def find_source(cfg: EvalConfig) -> EvalConfig:
    """Look for questions and videos, and whether the sweep fits the model.

    Raises:
        FileNotFoundError: A file or folder is not there.
        ValueError: No video can be read, or a window is wider than the decoder.
    """
    source = cfg.source
    for path, what in ((source.data, "question file"), (source.videos, "folder of videos")):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no {what} {path}")
    if source.host is not None:
        _look_for_host(source.host)
    if source.model is not None:
        find_checkpoint(source.model)
    cfg = replace(cfg, source=absolute_source(source))
    if source.model is None and cfg.style == "letter":
        cfg = replace(cfg, style="text", shuffle=False)
    from .evaluate import configurations

    read_questions(cfg.source, cfg.seed)
    configurations(cfg, source_layers(cfg.source))
    return cfg


def find_run(cfg: RecommendConfig) -> RecommendConfig:
    """Look for the run, for its model, and for its questions if they are to be asked again.

    Raises:
        FileNotFoundError: It is no run folder, or what it names is not there any more.
        ValueError: It is a run of another verb.
    """
    if not (cfg.run / "config.json").is_file():
        raise FileNotFoundError(f"{cfg.run} is no run folder; expected one that hone-knockout eval wrote")
    if (verb := load_results(cfg.run)["verb"]) != "eval":
        raise ValueError(f"{cfg.run} is a run of {verb}; expected one that hone-knockout eval wrote")
    # Another directory is no other run.
    cfg = replace(cfg, run=Path(os.path.abspath(cfg.run)))
    source = load_config(EvalConfig, cfg.run / "config.json").source
    source_of_run(cfg.run, source, model_alone=not cfg.verify)
    return cfg


def _look_for_host(path: Path) -> Path:
    """The host's place, absolute.

    Raises:
        CheckpointError: There is none.
    """
    return Path(os.path.abspath(open_host(HostConfig, "hone-knockout", path).path))
