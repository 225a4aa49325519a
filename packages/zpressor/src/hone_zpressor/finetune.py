"""Training of a host with ZPressor on chunks: ``train``, see ``hone_splat.training`` for the loop.

Source: the release's ``train.sh`` and ``dl3dv.yaml``.
"""

from __future__ import annotations

from typing import Any

import torch
from hone_core.runs import Run
from hone_splat.hosts import HostOutput
from hone_splat.published import build_published, load_published
from hone_splat.training import Drawn, TrainedReport, fit
from torch import Tensor

from .config import TrainConfig
from .method import information_loss
from .models import attach, tiny

__all__ = ["train"]


def _host(cfg: TrainConfig) -> Any:
    """The host with its compressor."""
    weights = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if cfg.model == "tiny":
            host = tiny(seed=cfg.seed)
        elif cfg.start is None:
            host = build_published(cfg.model)
        else:
            host, weights = load_published(cfg.start, cfg.model)
        attach(host, cfg.zpressor, weights=weights)
    return host


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train, and write the weights; a stopped run goes on where it was.

    Raises:
        CheckpointError: Weights are missing or of another model, or the folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
        ValueError: A scene is too short or damaged.
    """
    host = _host(cfg)

    def term(output: HostOutput, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        found = information_loss(output.features)
        return cfg.information * found, {"information": found.detach()}

    return fit(cfg, host, run, term=term)
