"""What a verb needs, looked for before its run folder is made.

Files are looked for before torch and diffusers are imported, and everything else that can be wrong before weights are
read.
"""

from __future__ import annotations

from hone_core.errors import CheckpointError
from hone_core.hosts import open_host

from .config import DemoConfig, EvalConfig, HostConfig, TrainConfig
from .places import PACKAGE, check_benchmark, check_codes, check_start, find_drawn, find_extracted, host_of

__all__ = ["find_drawn", "find_extracted", "find_graded", "find_host", "find_trained"]


def find_host(cfg: DemoConfig) -> DemoConfig:
    """Look for the host.

    Raises:
        CheckpointError: There is none.
    """
    open_host(HostConfig, PACKAGE, cfg.host or host_of(cfg.data))
    return cfg


def find_trained(cfg: TrainConfig) -> TrainConfig:
    """Hold model and codes together; no weight is read, and of the codes the first image's alone.

    Raises:
        CheckpointError: Codes or weights to begin with are missing.
        ValueError: As ``hone_nar.finetune.check_trained``.
    """
    check_start(cfg)
    from .finetune import check_trained

    check_trained(cfg)
    return cfg


def find_graded(cfg: EvalConfig) -> EvalConfig:
    """Look for the host, or a saved model and codes, which are held against its config; no weight is read.

    Raises:
        CheckpointError: There is none, or codes are out of range.
        ValueError: The codes are of texts and no encoder is named, or the other way round, or of another kind of model;
            or as ``check_benchmark``.
    """
    if cfg.protocol != "host":
        check_benchmark(cfg)
    elif cfg.model is not None and cfg.data is not None:
        if not (cfg.model / "config.json").is_file():
            raise CheckpointError(f"{cfg.model} holds no saved model; expected what train writes")
        check_codes(cfg.data)
        from .evaluate import fitting

        fitting(cfg, cfg.model, cfg.data)
    else:
        open_host(HostConfig, PACKAGE, cfg.host)
    return cfg
