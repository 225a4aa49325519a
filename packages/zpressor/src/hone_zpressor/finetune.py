"""Training of a host with ZPressor on chunks: ``train``, see ``hone_splat.training`` for the loop.

Source: the release's ``train.sh`` and ``dl3dv.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from hone_core.runs import Report, Run
from hone_splat.chunks import ChunkSet
from hone_splat.hosts import HostOutput
from hone_splat.published import build_published, load_published
from hone_splat.training import Drawn, fit
from torch import Tensor

from .config import HOSTS, TrainConfig
from .method import information_loss
from .models import attach, tiny

__all__ = ["TrainedReport", "prepare", "train"]

WEIGHTS = "host.safetensors"
"""Where a run's artifacts hold the trained weights, with the published names."""


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """What a training left.

    Attributes:
        weights: For ``--checkpoint`` of ``render`` and ``eval``.
    """

    weights: Path

    @classmethod
    def of(cls, run: Run) -> TrainedReport:
        """Return the report of a finished run."""
        return cls(path=run.path, rows=tuple(run.rows), weights=run.artifacts / WEIGHTS)

    def __str__(self) -> str:
        values = {row.metric: row.value for row in self.rows}
        return (
            f"weights  {self.weights}\n{'':8} {values['steps']:.0f} steps in {values['seconds']:.0f} s\n"
            f"results  {self.path / 'results.json'}"
        )


def prepare(cfg: TrainConfig) -> TrainConfig:
    """Look for chunks and weights.

    Raises:
        FileNotFoundError: There are no chunks.
        CheckpointError: Weights to begin with, or of VGG-16, are missing.
    """
    if not ChunkSet(cfg.chunks).index:
        raise FileNotFoundError(f"{cfg.chunks} holds no scene")
    for file in (cfg.start, cfg.vgg if cfg.lpips else None):
        if file is not None and not file.is_file():
            raise CheckpointError(f"there are no weights at {file}")
    return cfg


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
    host, limits = _host(cfg), HOSTS[cfg.model]

    def term(output: HostOutput, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        found = information_loss(output.features)
        return cfg.information * found, {"information": found.detach()}

    def export() -> Path:
        return save_safetensors({k: v.cpu() for k, v in host.state_dict().items()}, run.artifacts / WEIGHTS)

    size = cfg.size or limits.size
    fit(cfg, host, run, near=limits.near, far=limits.far, size=size, term=term, export=export)
    return TrainedReport.of(run)
