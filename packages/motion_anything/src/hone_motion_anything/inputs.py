"""What a verb needs, looked for before its run folder is made.

Files are looked for before torch is imported, and everything else that can be wrong before weights are read.
"""

from __future__ import annotations

from typing import TypeVar

from hone_core.hosts import open_host

from .config import (
    ConvertConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    HostConfig,
    ReproduceConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = ["find_asked", "find_converted", "find_host", "find_trained"]

PACKAGE = "hone-motion-anything"
Hosted = TypeVar("Hosted", DemoConfig, EvalConfig, ReproduceConfig)


def find_host(cfg: Hosted) -> Hosted:
    """Look for the host, and at the words of a demo.

    Raises:
        CheckpointError: There is no host.
        ValueError: A text is empty, or of a word that the host does not know.
    """
    open_host(HostConfig, PACKAGE, cfg.host)
    if isinstance(cfg, DemoConfig):
        from .grammar import text_ids

        text_ids(cfg.texts)
    return cfg


def find_asked(cfg: GenerateConfig) -> GenerateConfig:
    """Look at texts, music, motion and host.

    Raises:
        ValueError: A text is empty or unknown, the music too short, the motion not what was said.
        FileNotFoundError: A file is missing.
        CheckpointError: There is no host.
    """
    for path in (cfg.music, cfg.edit):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
    open_host(HostConfig, PACKAGE, cfg.host)
    from .grammar import text_ids
    from .sample import read_edited, read_track

    if cfg.texts:
        text_ids(cfg.texts)
    read_track(cfg)
    read_edited(cfg)
    return cfg


def find_converted(cfg: ConvertConfig) -> ConvertConfig:
    """Look at the names before anything is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A format is not known.
    """
    if not cfg.source.is_file():
        raise FileNotFoundError(f"there is no {cfg.source}")
    if cfg.model is None:
        from .motion_files import READS, WRITES

        if cfg.source.suffix not in READS:
            raise ValueError(
                f"{cfg.source}: expected a file that ends in {', '.join(READS)}, or --model for a checkpoint"
            )
        if f".{cfg.to}" not in WRITES:
            raise ValueError(f"--to must be one of {', '.join(w[1:] for w in WRITES)}; got {cfg.to}")
        return cfg
    from .checkpoints import MANIFESTS

    if cfg.model not in MANIFESTS:
        raise ValueError(f"no published model {cfg.model!r}; they are {', '.join(MANIFESTS)}")
    return cfg


def find_trained(cfg: TrainConfig) -> TrainConfig:
    """Look for what is needed, before motions are read.

    Raises:
        FileNotFoundError: The folder has no list of names.
        CheckpointError: There is no tokenizer.
    """
    if not (cfg.data / "train.txt").is_file():
        raise FileNotFoundError(
            f"there is no {cfg.data / 'train.txt'}; expected a folder of HumanML3D, or of text, music and dance"
        )
    if cfg.stage == "transformer":
        open_host(TokenizerConfig, PACKAGE, cfg.tokenizer)
        assert cfg.text_encoder is not None
        if not cfg.text_encoder.is_dir():
            raise FileNotFoundError(f"there is no folder {cfg.text_encoder} with CLIP's text model")
    return cfg
