"""Train the tiny host on the grammar: tokenizer, evaluator, then the transformer with masks by the method.

One command makes such a host: ``hone-motion-anything train-host``; ``info`` says which made the one that ships.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, average_into, finish_host, rate_at, stage_at
from torch import Tensor, nn

from .config import TrainHostConfig
from .data import Clips, generated, statistics
from .grading import grade_host
from .host import Host, load_host, save_host
from .masking import masked_loss
from .models import attach, draw_mask

__all__ = ["GATES", "Making", "contrast", "seeded", "train_host", "transformer_loss"]

GATES = {"reconstructed": 0.9, "events": 0.6, "dance_events": 0.5}
"""Least shares of motions that show what they should: after the tokenizer, generated from text, and from text and
music."""


@contextmanager
def seeded(device: torch.device, seed: int, step: int) -> Iterator[None]:
    """Dropout of a step from its number alone, so that a resumed run draws the same; the global generators stay."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(1_000_003 * seed + step)
        yield


def contrast(text: Tensor, motion: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of which motion belongs to a text and the other way round, by the squared distance.

    Args:
        text: ``[B, D]``.
        motion: ``[B, D]``.
        same: ``[B, B]`` pairs that say the same; they share the target.

    Differs: the published evaluator was trained with a margin on pairs.
    """
    target = same.float() / same.sum(1, keepdim=True)
    logits = -torch.cdist(text, motion).square()
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def transformer_loss(
    host: Host, clips: Clips, tokens: Tensor, at: Tensor, generator: torch.Generator, *, drop: float, corrupt: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one batch, and what was hidden.

    Args:
        host: With the method on its transformer, or not.
        clips: To draw from.
        tokens: ``[N, T, P]`` of all clips.
        at: ``[B]`` which.
        generator: On the host's device.
        drop: Share of rows whose text is left out, and of those whose music is.
        corrupt: Share of hidden tokens that get a wrong id.

    Returns:
        The loss; ``mask`` ``[B, T, P]``, and ``rows`` ``[B]`` where it is the method's.
    """
    ids, cells = tokens[at], clips.cells[at]
    condition = host.condition(clips.words[at], None if clips.music is None else clips.music[at])
    leave = torch.rand(2, len(at), generator=generator, device=ids.device) < drop
    valid = torch.ones_like(ids[..., 0], dtype=torch.bool)
    # What is hidden is chosen with the whole condition.
    mask, rows = draw_mask(host.transformer, ids, condition, valid, generator, cells)
    condition = condition.dropped(leave[0], leave[1])
    loss = masked_loss(host.transformer, ids, condition, valid, mask, generator, corrupt)
    return loss, {"mask": mask, "rows": rows, "cells": cells}


class Making:
    """A host in training, and everything that an exact continuation needs.

    Args:
        cfg: The run.
        device: Where.
        path: File of the resumable state.
    """

    def __init__(self, cfg: TrainHostConfig, device: torch.device, path: Path) -> None:
        self.cfg, self.device = cfg, device
        self.host = Host.untrained(cfg.host, cfg.seed).to(device)
        for quantizer in self.host.tokenizer.quantizers:
            quantizer.code_count.zero_()  # type: ignore[operator]
        attach(self.host.transformer, cfg.settings)
        self.clips = [generated(cfg.clips // 2, cfg.seed, dance=dance, device=device) for dance in (False, True)]
        mean, std = statistics(torch.cat([clips.features[:2048] for clips in self.clips]))
        self.host.tokenizer.mean.copy_(mean)
        self.host.tokenizer.std.copy_(std)
        self.tokens: Sequence[Tensor] = ()
        self.ema = copy.deepcopy(self.trained("transformer")).requires_grad_(False)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        fused = device.type == "cuda"
        self.optimizers = {
            stage: torch.optim.AdamW(
                self.trained(stage).parameters(),
                cfg.lr if stage == "transformer" else cfg.tokenizer_lr,
                betas=(0.9, 0.99),
                weight_decay=0.01,
                fused=fused,
            )
            for stage in ("tokenizer", "evaluator", "transformer")
        }
        parts: dict[str, Any] = {name.rstrip("."): module for name, module in self.host.modules.items()}
        parts |= {f"{name} optimizer": optimizer for name, optimizer in self.optimizers.items()}
        self.training = Training(cfg, path, parts | {"ema": self.ema, "generator": self.generator})

    def trained(self, stage: str) -> nn.Module:
        """Modules of a stage."""
        if stage == "transformer":
            return nn.ModuleList([self.host.transformer, self.host.reader])
        return self.host.modules[f"{stage}."]

    def stage(self, spent: float) -> tuple[str, float]:
        """Which part is trained at a share of the budget, and how far it is."""
        shares = {"tokenizer": self.cfg.tokenizer_share, "evaluator": self.cfg.evaluator_share}
        return stage_at(shares, "transformer", spent)

    def loss(self, stage: str) -> tuple[Tensor, dict[str, float]]:
        """Of one batch, and what else is logged."""
        # Standing and dancing motions by turns: a batch has one kind of condition.
        kind = self.training.step % 2
        clips = self.clips[kind]
        at = torch.randint(len(clips), (self.cfg.batch,), generator=self.generator, device=self.device)
        if stage == "tokenizer":
            loss, error = self.host.tokenizer.loss(clips.features[at], self.generator)
            return loss, {"error": float(error.detach())}
        if stage == "evaluator":
            evaluator = self.host.evaluator
            motion = self.host.tokenizer.normalise(clips.features[at])
            kinds = torch.cat([clips.scenes.kind[at], clips.scenes.dance[at, None].long()], 1)
            same = (kinds[:, None] == kinds[None]).all(-1)
            return contrast(evaluator.text(clips.words[at]), evaluator.motion(motion), same), {}
        if not self.tokens:
            self.tokens = [self.encode(clips) for clips in self.clips]
        settings = self.cfg.settings
        loss, hidden = transformer_loss(
            self.host, clips, self.tokens[kind], at, self.generator, drop=self.cfg.drop, corrupt=settings.corrupt
        )
        rows = hidden["rows"]
        if not bool(rows.any()):
            return loss, {}
        mask, cells = hidden["mask"][rows], hidden["cells"][rows]
        both = (mask & cells).sum()
        return loss, {"recall": float(both / cells.sum().clamp(min=1)), "precision": float(both / mask.sum())}

    @torch.no_grad()
    def encode(self, clips: Clips) -> Tensor:
        """Tokens of all clips."""
        self.host.tokenizer.eval()
        return torch.cat([self.host.tokenizer.encode(part) for part in clips.features.split(512)])

    def train(self) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; yield what is to be logged after each step, or None."""
        cfg, training = self.cfg, self.training
        training.start()
        while training.spent() < 1:
            stage, done = self.stage(training.spent())
            for name, module in self.host.modules.items():
                module.train(name == f"{stage}." or (name == "reader." and stage == "transformer"))
            optimizer, module = self.optimizers[stage], self.trained(stage)
            with seeded(self.device, cfg.seed, training.step):
                loss, values = self.loss(stage)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            peak = cfg.lr if stage == "transformer" else cfg.tokenizer_lr
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_at(done)
            optimizer.step()
            training.step += 1
            if stage == "transformer":
                average_into(self.ema, module, cfg.ema)
            due = {"loss": loss.item(), "stage": float(list(self.optimizers).index(stage))} | values
            yield due if training.due() else None

    def result(self) -> Host:
        """The host with the transformer's averaged weights."""
        host = self.host
        transformer, reader = self.ema.children()
        return Host(host.config, host.tokenizer, transformer, reader, host.evaluator)  # type: ignore[arg-type]


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade a host; a stopped run goes on where it was.

    Args:
        cfg: The run.
        run: The run, entered.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    making = Making(cfg, device, run.artifacts / "checkpoint.pt")
    making.training.resume()
    making.training.follow(making.train(), run)
    path = save_host(making.result(), run.artifacts / HOST)
    grades = grade_host(load_host(device, path=path), cfg.eval_clips, seed=10_000)
    for name, (value, unit, better) in grades.items():
        run.row(name, value, unit=unit, better=better, n=cfg.eval_clips, split="held_out")
    details = {"graded": f"{cfg.eval_clips} held-out scenes of each kind", "parameters": making.host.parameters}
    result = {name: value for name, (value, _, _) in grades.items()}
    return finish_host(run, making.training, result, gates=GATES, details=details)
