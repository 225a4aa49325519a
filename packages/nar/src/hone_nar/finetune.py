"""Training of NAR, LlamaGen and FlashAR on stored codes: ``train``, in one process or several (accelerate, FSDP2).

What a step does depends on its number alone, see ``hone_video.training``: images and their order, views, dropped
conditions and dropout. What is trained follows from the codes: images of classes, images with texts, or clips.

Source: the releases' ``train_c2i.py`` and ``train_t2i_webdata.py`` (optimiser, rates, the loss on the mixture, a random
    view of ten), NAR-videos' ``larp_ar.yaml``; FlashAR's two stages: arXiv 2605.09430.
Differs: EMA is on unless told; ``warm_start`` is ours. In FlashAR's first stage gradients of the backbone are made and
    not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_dtype
from hone_core.runs import Report, Run
from hone_video.training import Group, Loop, Part, seeded
from torch import Tensor, nn

from .checkpoints import SIZES, load_published
from .codes import Codes, open_codes
from .config import TrainConfig
from .flashar import FlashARForImageGeneration, post_train_start
from .models import warm_start
from .places import check_start
from .texts import TextReader, condition_of, text_channels
from .transformer import LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration

__all__ = ["TrainedReport", "check_trained", "rate", "train"]

MODEL = "model"
"""Where a run's artifacts hold what was trained."""
TINY = {"dim": 64, "n_layer": 2, "n_head": 4, "multiple_of": 64}
"""Of ``tiny``, ``tiny-raster`` and ``tiny-flashar``."""
TINIES: dict[str, type[Any]] = {
    "tiny": NARForImageGeneration, "tiny-raster": LlamaGenForImageGeneration, "tiny-flashar": FlashARForImageGeneration
}  # fmt: skip
IMAGE_KINDS = (NARForImageGeneration, LlamaGenForImageGeneration, FlashARForImageGeneration)


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


def rate(done: float, cfg: TrainConfig) -> float:
    """Share of the peak rate at a share of the training: falls by a factor at each milestone, or as a cosine."""
    if cfg.schedule == "cosine":
        return cfg.least + (1 - cfg.least) * (1 + math.cos(math.pi * done)) / 2
    return cfg.factor ** sum(done >= milestone for milestone in cfg.milestones)


def names_for(codes: Codes) -> list[str]:
    """Models that are trained on such codes."""
    if codes.grid is not None and len(codes.grid) == 3:
        found = [name for name, (kind, _) in SIZES.items() if kind is NARForVideoGeneration]
        return ["tiny", *found]
    text = [name for name, (kind, options) in SIZES.items() if kind in IMAGE_KINDS and "num_classes" in options]
    classes = [name for name, (kind, options) in SIZES.items() if kind in IMAGE_KINDS and name not in text]
    return [*TINIES, *(text if codes.texts else classes)]


def options_of(cfg: TrainConfig, codes: Codes) -> tuple[type[Any], dict[str, Any]]:
    """Class and options of the model that fits the codes.

    Raises:
        CheckpointError: There is no such text encoder.
        ValueError: There is no such model, or its grid, codebook or classes are others than the codes'.
    """
    names = names_for(codes)
    if cfg.model not in names:
        raise ValueError(f"model must be of {', '.join(names)}, as the codes are; got {cfg.model!r}")
    grid = codes.grid or cfg.grid
    if tuple(cfg.grid) != tuple(grid):
        sides, given = " x ".join(map(str, grid)), " ".join(map(str, cfg.grid))
        raise ValueError(f"the codes are of a grid of {sides}; got --grid {given}")
    if codes.choices is not None and codes.choices != cfg.codebook:
        raise ValueError(f"the codes are of a codebook of {codes.choices} entries; got --codebook {cfg.codebook}")
    if codes.classes is not None and codes.classes > cfg.classes:
        raise ValueError(f"the codes are of {codes.classes} classes; got --classes {cfg.classes}")
    if codes.texts != (cfg.text_encoder is not None):
        raise ValueError(
            "the codes are of images with texts; name --text-encoder, as google/flan-t5-xl"
            if codes.texts
            else "the codes are of classes; leave --text-encoder out"
        )
    if len(grid) == 3:
        cls, options = (NARForVideoGeneration, TINY) if cfg.model == "tiny" else SIZES[cfg.model]
    else:
        cls, options = (TINIES[cfg.model], TINY) if cfg.model in TINIES else SIZES[cfg.model]
    found: dict[str, Any] = {"grid": tuple(grid), "vocab_size": cfg.codebook, "dropout": cfg.dropout}
    if cfg.text_encoder is not None:
        channels = text_channels(cfg.text_encoder)
        if cfg.model not in TINIES and channels != 2048:
            raise ValueError(f"{cfg.model} reads texts of 2048 channels; {cfg.text_encoder} gives {channels}")
        found |= {"num_classes": None, "caption_dim": channels}
    else:
        found["num_classes"] = cfg.classes
    return cls, {**options, **found}


def check_trained(cfg: TrainConfig) -> None:
    """Hold model and codes together; no weight is read, and of the codes the first image's alone.

    Raises:
        CheckpointError: Codes or weights to begin with are missing.
        ValueError: See ``options_of``; or weights or a loss are asked for that this model does not take.
    """
    check_start(cfg)
    codes = open_codes(cfg.data)
    cls, options = options_of(cfg, codes)
    tokens = math.prod(options["grid"])
    views, _ = codes.item(0)
    if views.shape[1] != tokens:
        sides = " x ".join(map(str, options["grid"]))
        raise ValueError(f"the codes hold {views.shape[1]} tokens an image; a grid of {sides} has others")
    if cls is LlamaGenForImageGeneration and (cfg.raster is not None or cfg.loss != "mixture"):
        raise ValueError("a raster model has one head: leave --raster and --loss out")
    if cls is NARForVideoGeneration and cfg.raster is not None:
        raise ValueError("there is no raster model of clips; leave --raster out")
    if cls is FlashARForImageGeneration and cfg.raster is None and cfg.start is None:
        raise ValueError("FlashAR is trained after a raster model: name its weights, --raster FILE")
    if cls is not FlashARForImageGeneration and cfg.loss == "flashar":
        raise ValueError(f"--loss flashar is FlashAR's, with --model flashar_l and the like; got {cfg.model}")


def begin_with(cfg: TrainConfig, codes: Codes) -> Any:
    """The model in training mode, with random weights or those that are given."""
    cls, options = options_of(cfg, codes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.loop.seed)
        if cfg.raster is not None:
            raster = load_published(LlamaGenForImageGeneration(**options), cfg.raster)
            flash = cls is FlashARForImageGeneration
            model: Any = post_train_start(raster, seed=cfg.loop.seed) if flash else warm_start(raster)
        else:
            model = cls(**options)
            if cfg.start is not None:
                load_published(model, cfg.start)
    return model.train()


def draw(cfg: TrainConfig, codes: Codes, part: Part) -> tuple[Tensor, list[int | str], Tensor]:
    """Tokens ``[B, tokens]``, classes or texts, and dropped conditions ``[B]`` of a part, on the CPU."""
    tokens, labels, drop = [], [], []
    for index, generator in zip(part.items(len(codes)), part.generators("view"), strict=True):
        views, label = codes.item(index)
        tokens.append(views[int(torch.randint(len(views), (1,), generator=generator))])
        labels.append(label)
        drop.append(float(torch.rand(1, generator=generator)) < cfg.drop)
    return torch.stack(tokens), labels, torch.tensor(drop)


def groups_of(cfg: TrainConfig, model: Any) -> dict[str, Group]:
    """All parameters in one group; of FlashAR, the new parts and the backbone, which learns slowly and later."""
    shared: dict[str, Any] = {
        "ema": cfg.loop.ema, "weight_decay": cfg.loop.weight_decay, "betas": (0.9, 0.95), "eps": 1e-8
    }  # fmt: skip
    if not isinstance(model, FlashARForImageGeneration):
        return {"model": Group(lr=cfg.loop.lr, **shared)}
    new = set(model.new_names())
    return {
        "new": Group(lr=cfg.loop.lr, select=lambda name: name in new, **shared),
        "backbone": Group(lr=cfg.loop.lr * cfg.backbone_rate, select=lambda name: name not in new, **shared),
    }


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train, and write the averaged weights as safetensors; a stopped run goes on where it was.

    Every code is looked at first.

    Raises:
        CheckpointError: Codes or weights are missing, a code or class is out of range, or the folder's checkpoint is of
            other parameters.
        ValueError: See ``check_trained``.
        RuntimeError: The loss is not finite.
    """
    check_trained(cfg)
    codes = open_codes(cfg.data)
    _, options = options_of(cfg, codes)
    codes.check(tokens=math.prod(options["grid"]), choices=cfg.codebook, classes=options["num_classes"])
    loop = Loop(cfg.loop, run, bf16={"auto": None, "bfloat16": True, "float32": False}[cfg.dtype])
    model = begin_with(cfg, codes)
    kind, config = type(model), {name: value for name, value in model.config.items() if not name.startswith("_")}
    # The text that stands for none is kept and not trained.
    kept = {name: value.detach().clone() for name, value in model.named_buffers()}
    reader = None
    if cfg.text_encoder is not None:
        dtype = resolve_dtype("auto", loop.device)
        reader = TextReader.load(cfg.text_encoder, model.cls_token_num, loop.device, dtype)
    groups = groups_of(cfg, model)
    spared = _spared(cfg, model)
    loop.prepare(model, groups)
    for group in groups.values():
        _spare(group, spared)
    loop.resume()
    slowly = groups.get("backbone")

    def update() -> dict[str, float]:
        done = loop.step / cfg.loop.steps
        share = rate(done, cfg)
        total = 0.0
        for part in loop.parts():
            tokens, labels, drop = draw(cfg, codes, part)
            given = condition_of(labels, reader, loop.device)
            # Dropout of a part is that of its samples, whatever ran before.
            torch.manual_seed(seeded(part.seed, "dropout", part.samples[0]).initial_seed())
            found = loop.model(
                tokens.to(loop.device), **given, drop=drop.to(loop.device), loss=cfg.loss, prefixes=cfg.prefixes
            )
            total += loop.backward(found.loss, part)
        values = {"loss": total, "lr": cfg.loop.lr * share}
        for name, group in groups.items():
            if group is slowly and done < cfg.first_stage:
                group.optimizer.zero_grad(set_to_none=True)
                continue
            group.lr = cfg.loop.lr * share * (cfg.backbone_rate if group is slowly else 1.0)
            values["norm" if name == "model" else f"norm of {name}"] = loop.apply(name)
        return values

    loop.follow(update)
    weights = {name: value for part in groups for name, value in loop.weights(part).items()}
    if run.processes.main:
        with torch.device("meta"):
            trained = kind(**config)
        trained.load_state_dict(weights | {name: value.cpu() for name, value in kept.items()}, assign=True)
        trained.save_pretrained(run.artifacts / MODEL)
        run.row_of_end("loss", unit="nats", variant=cfg.loss)
        run.row("steps", loop.step, better="none")
    return TrainedReport.of(run)


def _spared(cfg: TrainConfig, model: nn.Module) -> set[str]:
    """Names of parameters without weight decay: vectors, and where linear layers alone decay, all but those."""
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    if cfg.decayed == "matrices":
        return vectors
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return vectors | {name for name, _ in model.named_parameters() if name not in linear}


def _spare(group: Group, names: set[str]) -> None:
    """Weight decay for the other parameters alone."""
    options = group.optimizer.param_groups[0]
    found = {id(parameter): name for name, parameter in group.parameters.items()}
    spared = [p for p in options["params"] if found[id(p)] in names]
    options["params"] = [p for p in options["params"] if found[id(p)] not in names]
    group.optimizer.add_param_group({"params": spared, "weight_decay": 0.0})
