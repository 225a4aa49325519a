"""The verb ``tune``: launch settings of a kernel against each other, beside what ships; values first, then time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hone_core.runs import Run

from hone_kernels.attention import tune as attention_tune
from hone_kernels.attention_fp8 import tune as fp8_tune
from hone_kernels.block_scores import tune as scores_tune
from hone_kernels.config import TuneConfig
from hone_kernels.gpu import the_gpu
from hone_kernels.rows import TimesReport

__all__ = ["prepare", "tune"]

_KERNELS: dict[str, tuple[Mapping[str, Any], Callable[..., None]]] = {
    "attention": (attention_tune.SHAPES, attention_tune.triton),
    "attention_gluon": (attention_tune.SHAPES, attention_tune.gluon),
    "attention_fp8": (fp8_tune.SHAPES, fp8_tune.triton),
    "block_scores": (scores_tune.SHAPES, scores_tune.triton),
}


def prepare(cfg: TuneConfig) -> TuneConfig:
    """Check the shapes.

    Raises:
        ValueError: The kernel is not tuned on one.
    """
    known, _ = _KERNELS[cfg.kernel]
    if unknown := [name for name in cfg.shapes if name not in known]:
        raise ValueError(f"{cfg.kernel} has no shape {', '.join(unknown)}; there are {', '.join(known)}")
    return cfg


def tune(cfg: TuneConfig, run: Run) -> TimesReport:
    """Time every candidate; a row's ``variant`` is its settings.

    Args:
        cfg: What to try.
        run: The run, entered.

    Raises:
        UnsupportedHardwareError: There is no CUDA device.
        RuntimeError: A value is wrong; no time is reported then.
    """
    known, work = _KERNELS[cfg.kernel]
    chosen = {name: known[name] for name in cfg.shapes or [name for name in known if name != "small"]}
    with torch.cuda.device(the_gpu(run.device)):
        torch.manual_seed(cfg.seed)
        work(run, chosen, candidates=cfg.candidates, rounds=cfg.rounds, seed=cfg.seed)
    return TimesReport.of(run)
