"""Training of NAR and LlamaGen on stored codes: ``train``, in one process or several (accelerate, FSDP2).

What a step does depends on its number alone, see ``hone_video.training``: images and their order, views, dropped
classes and dropout.

Source: the release's ``train_c2i.py`` (optimiser, rates, the loss on the mixture, a random view of ten).
Differs: EMA is on unless told; ``warm_start`` is ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from hone_core.runs import Report, Run
from hone_video.training import Group, Loop, Part, seeded
from torch import Tensor

from .checkpoints import SIZES, load_published
from .codes import Codes, open_codes
from .config import TrainConfig
from .models import warm_start
from .transformer import LlamaGenForImageGeneration, NARForImageGeneration

__all__ = ["TrainedReport", "check", "rate", "train"]

MODEL = "model"
"""Where a run's artifacts hold what was trained."""
TINY = {"dim": 64, "n_layer": 2, "n_head": 4, "multiple_of": 64}


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """What a run trained.

    Attributes:
        model: Folder for ``from_pretrained``.
    """

    model: Path

    @classmethod
    def of(cls, run: Run) -> TrainedReport:
        """Return the report of a run whose weights are exported."""
        return cls(path=run.path, rows=tuple(run.rows), model=run.artifacts / MODEL)

    def __str__(self) -> str:
        values = {row.metric: row.value for row in self.rows}
        return (
            f"model    {self.model}\nloss     {values['loss']:.4g} nats per token, mean of the last tenth of "
            f"{values['steps']:.0f} steps\nresults  {self.path / 'results.json'}"
        )


def rate(done: float, milestones: tuple[float, ...], factor: float) -> float:
    """Share of the peak rate at a share of the training: falls by a factor at each milestone."""
    return factor ** sum(done >= milestone for milestone in milestones)


def options_of(cfg: TrainConfig, codes: Codes) -> tuple[type[Any], dict[str, Any]]:
    """Class and options of the model that fits the codes.

    Raises:
        ValueError: There is no such model, or its grid, codebook or classes are others than the codes'.
    """
    kinds = (NARForImageGeneration, LlamaGenForImageGeneration)
    names = [name for name, (kind, options) in SIZES.items() if kind in kinds and "num_classes" not in options]
    if cfg.model not in ("tiny", *names):
        raise ValueError(f"model must be of tiny, {', '.join(names)}; got {cfg.model!r}")
    cls, options = (NARForImageGeneration, TINY) if cfg.model == "tiny" else SIZES[cfg.model]
    grid = codes.grid or cfg.grid
    if tuple(cfg.grid) != tuple(grid):
        raise ValueError(f"the codes are of a grid of {grid[0]} x {grid[1]}; got --grid {cfg.grid[0]} {cfg.grid[1]}")
    if codes.choices is not None and codes.choices != cfg.codebook:
        raise ValueError(f"the codes are of a codebook of {codes.choices} entries; got --codebook {cfg.codebook}")
    if codes.classes is not None and codes.classes > cfg.classes:
        raise ValueError(f"the codes are of {codes.classes} classes; got --classes {cfg.classes}")
    views, _ = codes.item(0)
    if views.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"the codes hold {views.shape[1]} tokens an image; a grid of {grid[0]} x {grid[1]} has others")
    found = {"grid": tuple(grid), "vocab_size": cfg.codebook, "num_classes": cfg.classes, "dropout": cfg.dropout}
    return cls, {**options, **found}


def check(cfg: TrainConfig) -> TrainConfig:
    """Hold model and codes together; no weight is read.

    Raises:
        CheckpointError: Codes or weights to begin with are missing.
        ValueError: See ``options_of``; or a raster model is asked for what only NAR has.
    """
    cls, _ = options_of(cfg, open_codes(cfg.data))
    if cls is LlamaGenForImageGeneration and (cfg.raster is not None or cfg.loss == "separate"):
        raise ValueError("a raster model has one head: leave --raster and --loss separate out")
    for file in (cfg.start, cfg.raster):
        if file is not None and not file.exists():
            raise CheckpointError(f"there are no weights at {file}")
    return cfg


def begin_with(cfg: TrainConfig, codes: Codes) -> Any:
    """The model in training mode, with random weights or those that are given."""
    cls, options = options_of(cfg, codes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.loop.seed)
        if cfg.raster is not None:
            model: Any = warm_start(load_published(LlamaGenForImageGeneration(**options), cfg.raster))
        else:
            model = cls(**options)
            if cfg.start is not None:
                load_published(model, cfg.start)
    return model.train()


def draw(cfg: TrainConfig, codes: Codes, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, tokens]``, labels and dropped classes ``[B]`` of a part, on the CPU."""
    tokens, labels, drop = [], [], []
    for index, generator in zip(part.items(len(codes)), part.generators("view"), strict=True):
        views, label = codes.item(index)
        tokens.append(views[int(torch.randint(len(views), (1,), generator=generator))])
        labels.append(label)
        drop.append(float(torch.rand(1, generator=generator)) < cfg.drop)
    return torch.stack(tokens), torch.tensor(labels), torch.tensor(drop)


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train, and write the averaged weights as safetensors; a stopped run goes on where it was.

    Raises:
        CheckpointError: Codes or weights are missing, or the folder's checkpoint is of other parameters.
        ValueError: See ``check``.
        RuntimeError: The loss is not finite.
    """
    check(cfg)
    codes = open_codes(cfg.data)
    loop = Loop(cfg.loop, run, bf16={"auto": None, "bfloat16": True, "float32": False}[cfg.dtype])
    model = begin_with(cfg, codes)
    group = Group(lr=cfg.loop.lr, ema=cfg.loop.ema, weight_decay=cfg.loop.weight_decay, betas=(0.9, 0.95), eps=1e-8)
    loop.prepare(model, {"model": group})
    _spare_vectors(group)
    loop.resume()

    def update() -> dict[str, float]:
        group.lr = cfg.loop.lr * rate(loop.step / cfg.loop.steps, cfg.milestones, cfg.factor)
        total = 0.0
        for part in loop.parts():
            tokens, labels, drop = (each.to(loop.device) for each in draw(cfg, codes, part))
            # Dropout of a part is that of its samples, whatever ran before.
            torch.manual_seed(seeded(part.seed, "dropout", part.samples[0]).initial_seed())
            loss = loop.model(tokens, labels, drop=drop, loss=cfg.loss).loss
            total += loop.backward(loss, part)
        norm = loop.apply("model")
        return {"loss": total, "norm": norm, "lr": group.lr}

    loop.follow(update)
    weights = loop.weights("model")
    if run.processes.main:
        cls, options = options_of(cfg, codes)
        with torch.device("meta"):
            trained = (NARForImageGeneration if cfg.raster is not None else cls)(**options)
        trained.load_state_dict(weights, assign=True)
        trained.save_pretrained(run.artifacts / MODEL)
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [line["loss"] for line in lines][-max(1, len(lines) // 10) :]
        run.row("loss", sum(losses) / len(losses), unit="nats", better="lower", n=len(losses), variant=cfg.loss)
        run.row("steps", loop.step, better="none")
    return TrainedReport.of(run)


def _spare_vectors(group: Group) -> None:
    """Weight decay for matrices and tables alone."""
    options = group.optimizer.param_groups[0]
    vectors = [p for p in options["params"] if p.ndim < 2]
    options["params"] = [p for p in options["params"] if p.ndim > 1]
    group.optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
