"""Settings that every training of a pipeline's transformer has. Imports no torch, so a verb's config may import it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hone_core.config import check_least

__all__ = ["DataConfig", "LoopConfig", "LoraTargets"]

LoraTargets = Literal["attention", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long, how many at once, how fast, and what is kept on the way."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 8
    """Samples of an optimiser step, over all processes: the result does not depend on how many these are."""
    micro_batch: int = 1
    """Samples of one forward; a process accumulates gradients over as many forwards as its share of the batch takes."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    ema: float = 0.99
    """Decay of the moving average of the weights, which is what is exported; 0 for none."""
    seed: int = 0
    """Of order, noise and new weights."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping what they made."""
    log_every: int = 10
    """Steps between two logged ones."""
    checkpoint_every: int = 100
    """Steps between two checkpoints, from which a stopped run goes on exactly."""
    tensorboard: bool = False
    """Also log for TensorBoard (extra train), into the run's folder."""

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "batch", "micro_batch", "warmup_steps", "log_every", "checkpoint_every")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch must be a multiple of micro_batch; got {self.batch} and {self.micro_batch}")
        if self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr and clip must be positive and weight_decay not negative; got {self.lr}, {self.clip} and "
                f"{self.weight_decay}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), 0 for none; got {self.ema}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Videos with captions, and what they are cut to."""

    videos: Path | None = None
    """Folder of videos with a ``metadata.jsonl``, a line for each, as in Hugging Face's VideoFolder:
    ``{"file_name": "a.mp4", "text": "a red cat runs"}``."""
    caption: str = "text"
    """Name of the captions in ``metadata.jsonl``."""
    height: int = 480
    """Pixels; a video is scaled to cover height and width, and its middle is taken."""
    width: int = 832
    """Pixels."""
    frames: int = 81
    """Frames, from the start of a video, at the rate that the model was trained on."""
    cache: Path | None = None
    """Folder of encoded videos and captions, filled once (default: in the run's folder)."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def check_lora(rank: int, targets: str) -> None:
    """Refuse LoRA settings without sense; rank 0 stands for none.

    Raises:
        ValueError: The rank is negative, or the targets are unknown.
    """
    if rank < 0:
        raise ValueError(f"the LoRA's rank must be positive, or 0 to train every weight; got {rank}")
    if targets not in get_args(LoraTargets):
        raise ValueError(f"lora_targets must be one of {get_args(LoraTargets)}; got {targets!r}")
