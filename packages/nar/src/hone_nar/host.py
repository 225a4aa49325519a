"""The tiny host: a NAR and a raster LlamaGen of as many blocks that draw digits, or clips of a moving shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from hone_core import hosts
from hone_core.hosts import HostFacts, ModuleHost
from hone_visual_ar.sampling import Sampling
from torch import Tensor

from .config import HostConfig, Mix
from .generation import Decoding, generate
from .tasks import TASKS, Task
from .transformer import LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration

__all__ = [
    "PACKAGE",
    "PACKAGED",
    "Host",
    "digit_model",
    "draw_digits",
    "load_host",
    "save_host",
]

PACKAGE = "hone-nar"
PACKAGED = hosts.packaged_host(PACKAGE)
"""The host that ships with the package."""

Model = NARForImageGeneration | NARForVideoGeneration | LlamaGenForImageGeneration


def digit_model(kind: str, config: HostConfig, *, dropout: float = 0.0) -> Model:
    """A model of digits: ``nar``, ``raster``, or ``one-head``, which draws diagonals with a single head.

    All have as many blocks. Of clips, ``nar`` draws planes by three heads, and ``raster`` row by row and frame after
    frame, as one tall picture.

    Raises:
        ValueError: There is no such kind.
    """
    task = TASKS[config.data]
    kinds = ("nar", "raster", "one-head") if len(task.grid) == 2 else ("nar", "raster")
    if kind not in kinds:
        raise ValueError(f"kind must be {' or '.join([', '.join(kinds[:-1]), kinds[-1]])}; got {kind!r}")
    options = {
        "dim": config.dim, "n_head": config.heads, "vocab_size": task.levels, "num_classes": task.classes,
        "multiple_of": 64, "dropout": dropout,
    }  # fmt: skip
    tall = (prod(task.grid[:-1]), task.grid[-1])
    blocks = config.layers + len(task.grid) - 1
    if kind == "raster":
        return LlamaGenForImageGeneration(n_layer=blocks, grid=tall, **options)
    if kind == "one-head":
        return LlamaGenForImageGeneration(n_layer=blocks, grid=task.grid, diagonal=True, **options)
    cls = NARForImageGeneration if len(task.grid) == 2 else NARForVideoGeneration
    return cls(n_layer=config.layers, grid=task.grid, **options)


@dataclass
class Host(ModuleHost):
    """A trained host.

    Attributes:
        config: Architecture.
        nar: Draws diagonals.
        raster: Draws one token after the other.
        facts: How it was made; None for one without.
    """

    package: ClassVar[str] = PACKAGE
    architecture: ClassVar[type[HostConfig]] = HostConfig
    config: HostConfig
    nar: NARForImageGeneration | NARForVideoGeneration
    raster: LlamaGenForImageGeneration
    facts: HostFacts | None = None

    @property
    def task(self) -> Task:
        """What it draws."""
        return TASKS[self.config.data]

    @classmethod
    def untrained(cls, config: HostConfig | None = None, seed: int = 0, *, dropout: float = 0.0) -> Host:
        """Random weights; the global generator stays."""
        config = config or HostConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nar, raster = (digit_model(kind, config, dropout=dropout) for kind in ("nar", "raster"))
        assert isinstance(nar, NARForImageGeneration | NARForVideoGeneration)
        assert isinstance(raster, LlamaGenForImageGeneration)
        return cls(config, nar, raster)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Prefix in the stored file to module."""
        return {"nar.": self.nar, "raster.": self.raster}

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.nar.tok_embeddings.weight.device


def draw_digits(
    model: Model,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    guidance: float = 1.0,
    greedy: bool = False,
    kind: Mix | None = None,
    on_step: Callable[[Decoding, int], None] | None = None,
) -> Tensor:
    """Draw tokens ``[B, tokens]`` of classes ``[B]``; the arguments are those of ``generate``."""
    labels = labels.to(model.tok_embeddings.weight.device)
    condition = model.condition(labels, guided=guidance != 1)
    sampling = Sampling(guidance=guidance, greedy=greedy)
    return generate(model, condition, seeds=seeds, sampling=sampling, kind=kind, on_step=on_step)


load_host, save_host = Host.load, Host.save
