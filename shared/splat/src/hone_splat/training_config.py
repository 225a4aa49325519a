"""Settings of a training on chunks; nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from hone_core.config import check_least, flag
from hone_core.training import check_budget

from .ranges import HOSTS

__all__ = ["FitConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """Training of a host on chunks, one scene per process and step; by itself as PM-Loss was released for DL3DV."""

    model: str = "depthsplat-oct-pmloss-256x448"
    """Host, a published one, or tiny for the architecture of the tiny host."""
    chunks: Path
    """Folder of training chunks with index.json: RealEstate10K, DL3DV, or your photographs by hone-zpressor convert."""
    start: Path | None = None
    """Checkpoint of the model to begin with (default: random weights)."""
    vgg: Path | None = None
    """VGG-16's weights as torchvision publishes them, which LPIPS is made of."""
    lpips: float = 0.05
    """Weight of LPIPS beside the mean squared error; 0 where there are no weights."""
    size: tuple[int, int] | None = None
    """Height and width that pictures are cut to (default: the model's own)."""
    context: tuple[int, int] = (2, 6)
    """Least and largest number of context views, drawn for each scene."""
    targets: int = 8
    """Views that the losses look at, drawn from the span of the context views; one may be such a view."""
    gap: tuple[int, int] = (20, 50)
    """Frames that the most context views span, drawn from this range; fewer span a part of it."""
    flip: float = 0.5
    """Share of scenes that are mirrored."""
    draws: int | None = None
    """Draws of views that each scene has, so that what is kept of them serves again (default: a new one each time)."""
    lr: float = 2e-4
    """Peak learning rate of AdamW, one cycle of a cosine."""
    lr_pretrained: float = 2e-6
    """Likewise, of the monocular prior."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip: float = 0.5
    """Largest norm of a gradient."""
    rise: float = 0.01
    """Share of the training until the peak."""
    drop_error: float | None = 0.2
    """Squared error of a channel from which it is left out of the mean; None for never."""
    skip_loss: float | None = 0.1
    """Loss of the pictures above which a step after the first 301 counts a hundred millionth; None for never."""
    steps: int = 100_001
    """Optimiser steps."""
    minutes: float = field(default=math.inf, metadata=flag(hidden=True))
    """No bound: the rate follows the steps."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 600.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    seed: int = 0
    """Of the order of scenes and of their views."""

    def __post_init__(self) -> None:
        check_budget(self, "targets", "lr", "lr_pretrained", "clip")
        check_least(self, 1, "draws")
        check_least(self, 0, "weight_decay", "lpips")
        for name in ("drop_error", "skip_loss"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, as it leaves out what is larger, or None; got {value}")
        if self.model not in HOSTS:
            raise ValueError(f"no host {self.model!r}; there are {', '.join(HOSTS)}")
        if self.model == "tiny" and self.start is not None:
            raise ValueError("the tiny host has no checkpoint to begin with here: leave --start out")
        if not 2 <= self.context[0] <= self.context[1] or not self.context[1] - 1 <= self.gap[0] <= self.gap[1]:
            raise ValueError(f"expected 2 <= context, and context - 1 <= gap; got {self.context} and {self.gap}")
        if not 0 <= self.flip <= 1 or not 0 < self.rise < 1:
            raise ValueError(f"flip must lie in [0, 1], rise in (0, 1); got {self.flip} and {self.rise}")
        if self.lpips and self.vgg is None:
            raise ValueError("LPIPS needs VGG-16's published weights: give --vgg FILE, or leave it out by --lpips 0")
