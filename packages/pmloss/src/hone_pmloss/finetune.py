"""Training of a published host on chunks with PM-Loss: ``train``, see ``hone_splat.training`` for the loop.

Source: ``scripts/train.sh`` of the release; what it does otherwise by mistake is not repeated, see the README.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Run
from hone_splat.depthsplat import DepthSplat
from hone_splat.hosts import HostOutput
from hone_splat.published import build_published, load_published
from hone_splat.training import Drawn, TrainedReport, fit
from torch import Tensor

from .cache import CachedTeacher
from .config import TrainConfig
from .models import PMLoss, tiny
from .teachers import DepthTeacher, PrecomputedTeacher, Shots, Teacher, name_views
from .vggt import VGGTTeacher

__all__ = ["train"]


def _host(cfg: TrainConfig) -> Any:
    if cfg.start is not None:
        host, compressor = load_published(cfg.start, cfg.model)
        if compressor is not None:
            raise CheckpointError(f"{cfg.start} holds ZPressor too, which hone-zpressor train goes on with")
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            host = tiny(seed=cfg.seed) if cfg.model == "tiny" else build_published(cfg.model)
    if isinstance(host, DepthSplat) and host.config.generation == "oct":
        # As released: each view is compared with all others in training, and with the nearest two where it is drawn.
        host.config = replace(host.config, nearest=None)
    return host


def _teacher(cfg: TrainConfig, device: Any) -> Teacher:
    teacher: Teacher
    if cfg.teacher == "vggt":
        teacher = VGGTTeacher.load(Path(cfg.points), device=device)
    elif cfg.teacher == "depth":
        teacher = DepthTeacher.load(cfg.points, metres_per_unit=cfg.metres_per_unit, device=device)
    else:
        teacher = PrecomputedTeacher(Path(cfg.points))
    return teacher if cfg.cache is None else CachedTeacher(teacher, cfg.cache)


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train, and write the weights; a stopped run goes on where it was.

    Raises:
        CheckpointError: Weights are missing or of another model, or the folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
        ValueError: A scene is too short or damaged.
    """
    host = _host(cfg)
    asked: list[PMLoss] = []

    def term(output: HostOutput, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        means = output.gaussians.means
        if not cfg.pm.weight:
            return means.new_zeros(()), {}
        if not asked:
            asked.append(PMLoss(_teacher(cfg, means.device), cfg.pm))
        named = name_views(drawn.context, [Shots(drawn.name, drawn.frames)])
        found = asked[0](means, named, anchors=output.anchors)
        logged = {"pm": found.raw.mean(), "capped": found.capped.double().mean()}
        return cfg.pm.weight * found.loss.mean(), logged

    return fit(cfg, host, run, term=term)
