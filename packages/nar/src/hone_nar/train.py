"""Train the tiny host: NAR and the raster model in turns, a step each, so that both get as many.

One command makes it as it ships: ``hone-nar train-host``.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Better, Run
from hone_core.training import HOST, Training, TrainReport, average_into, finish_host, rate_at
from torch import Tensor, nn

from .config import TrainHostConfig
from .data import Digits
from .flashar import FlashARForImageGeneration
from .grading import bits
from .host import Host, Model, draw_digits, load_host, save_host

__all__ = ["GATES", "Learner", "Making", "grade_host", "train_host"]

GATES = {"nar_accuracy": 0.8, "raster_accuracy": 0.8}
"""Share of drawn digits that read as what was asked for."""


class Learner:
    """One model of digits in training.

    Args:
        model: On its device; trained in place.
        lr: Peak rate.
        ema: Decay of the averaged weights.
        drop: Share of classes that are dropped.
        loss: ``mixture`` or ``separate``; of FlashAR ``flashar``, in two stages: its new parts learn first, the rest
            after a fifth of the training, at a fifth of the rate.
    """

    def __init__(self, model: Model, *, lr: float, ema: float, drop: float = 0.1, loss: str = "mixture") -> None:
        self.model, self.lr, self.ema, self.drop, self.loss = model, lr, ema, drop, loss
        self.average: Model = copy.deepcopy(model).requires_grad_(False).eval()
        new = set(model.new_names()) if isinstance(model, FlashARForImageGeneration) else None
        groups: list[dict[str, Any]] = []
        for late in (False, True):
            chosen = [p for name, p in model.named_parameters() if late == (new is not None and name not in new)]
            for decay, part in ((0.05, [p for p in chosen if p.ndim > 1]), (0.0, [p for p in chosen if p.ndim < 2])):
                if part:
                    groups.append({"params": part, "weight_decay": decay, "late": late})
        fused = next(model.parameters()).device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=fused)

    @property
    def parts(self) -> dict[str, Any]:
        """What an exact continuation needs."""
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer}

    def step(self, batch: Digits, done: float, number: int, *, drop: Tensor) -> Tensor:
        """One update; the loss in nats per token.

        Args:
            batch: Digits.
            done: Share of the training that is over.
            number: Of the model's updates so far.
            drop: ``[B]`` uniforms in [0, 1).
        """
        self.model.train()
        found = self.model(batch.tokens, batch.labels, drop=drop < self.drop, loss=self.loss)
        assert found.loss is not None
        self.optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = rate_at(done, rise=0.04, first=0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * ((0.2 if done >= 0.2 else 0.0) if group["late"] else 1.0)
        self.optimizer.step()
        decay = min(self.ema, (1 + number) / (10 + number))
        average_into(self.average, self.model, decay)
        return found.loss.detach()


def seeded_step(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator on the CPU of some numbers; the device's own is seeded alike, for dropout."""
    # Python's hash of a tuple is its version's own, and the same for -1 and -2.
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    (torch.cuda.manual_seed if device.type == "cuda" else torch.manual_seed)(seed)
    return generator


def take_step(learner: Learner, train: Digits, batch: int, done: float, *numbers: int) -> Tensor:
    """An update on random digits; what is random in it depends on ``numbers``, the last of which counts updates."""
    device = train.tokens.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        generator = seeded_step(device, *numbers)
        picked = torch.randint(len(train), (batch,), generator=generator)
        drop = torch.rand(batch, generator=generator)
        part = Digits(train.tokens[picked.to(device)], train.labels[picked.to(device)])
        return learner.step(part, done, numbers[-1], drop=drop.to(device))


class Making:
    """A host in training, and everything that an exact continuation needs.

    Args:
        cfg: The run.
        device: Where.
        path: File of the resumable state.
    """

    def __init__(self, cfg: TrainHostConfig, device: torch.device, path: Path) -> None:
        self.cfg = cfg
        self.host = Host.untrained(replace(cfg.host, data=cfg.data), cfg.seed, dropout=cfg.dropout).to(device)
        self.data = self.host.task.examples("train").to(device)
        self.learners = [
            Learner(model, lr=cfg.lr, ema=cfg.ema, drop=cfg.drop) for model in (self.host.nar, self.host.raster)
        ]
        parts = {
            f"{name} {part}": value
            for name, learner in zip(("nar", "raster"), self.learners, strict=True)
            for part, value in learner.parts.items()
        }
        self.training = Training(cfg, path, parts)

    def train(self) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; yield what is to be logged after each step, or None."""
        cfg, training = self.cfg, self.training
        training.start()
        while training.spent() < 1:
            turn = training.step % 2
            loss = take_step(
                self.learners[turn], self.data, cfg.batch, training.spent(), cfg.seed, turn, training.step // 2
            )
            training.step += 1
            yield {"loss": float(loss), "raster": float(turn)} if training.due() else None

    def result(self) -> Host:
        """The host with averaged weights."""
        nar, raster = (learner.average for learner in self.learners)
        return Host(self.host.config, nar, raster)


@torch.no_grad()
def grade_host(host: Host, images: int) -> dict[str, float]:
    """Of each model: bits per token of held-out digits, and accuracy and distance of drawn ones."""
    task = host.task
    test = task.examples("test").to(host.device)
    labels = torch.arange(images) % task.classes
    found = {}
    models: tuple[tuple[str, Model], ...] = (("nar", host.nar), ("raster", host.raster))
    for name, model in models:
        drawn = draw_digits(model, labels, range(images))
        found[f"{name}_bits"] = float(bits(model.nll, test).mean())
        found[f"{name}_accuracy"] = float(task.accuracy(drawn, labels).float().mean())
        found[f"{name}_distance"] = task.distance(drawn)
    return found


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade a host; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    making = Making(cfg, device, run.artifacts / "checkpoint.pt")
    making.training.resume()
    making.training.follow(making.train(), run)
    path = save_host(making.result(), run.artifacts / HOST)
    grades = grade_host(load_host(device, path=path), cfg.eval_images)
    held_out = len(making.host.task.examples("test"))
    for name, value in grades.items():
        better: Better = "higher" if name.endswith("accuracy") else "lower"
        unit = "bits per token" if name.endswith("bits") else ""
        count = held_out if name.endswith("bits") else cfg.eval_images
        run.row(name, value, unit=unit, better=better, n=count, split="test")
    details = {
        "graded": f"bits of {held_out} held-out {cfg.data}; {cfg.eval_images} drawn without guidance",
        "parameters": making.host.parameters,
    }
    return finish_host(run, making.training, grades, gates=GATES, details=details)
