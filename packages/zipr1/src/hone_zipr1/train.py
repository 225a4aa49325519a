"""Train the tiny host, densely.

One command makes the host as it ships in ``assets/``: ``hone-zipr1 train-host``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, finish_host
from torch import Tensor, nn

from .config import KINDS, TrainHostConfig
from .data import mosaics
from .host import Host, build_host, load_host, save_host
from .rollouts import answer_logps, rollout

__all__ = ["GATES", "answer_loss", "dense_optimizers", "grade_host", "train_host"]

GATES = {"digit": 0.85, "sum": 0.6}
"""Accuracy on held-out digits that the host must reach before what is dropped from it says anything."""


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade a host; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    host = build_host(cfg.host, seed=cfg.seed)
    host.model.to(device)
    optimizers = dense_optimizers(host.model, cfg)
    parts: dict[str, Any] = {"model": host.model, "muon": optimizers[0], "adamw": optimizers[1]}
    training = Training(cfg, run.artifacts / "checkpoint.pt", parts)
    training.resume()
    training.follow(_train(cfg, training, host, optimizers), run)
    path = save_host(host, run.artifacts / HOST)
    grades = grade_host(load_host(device, path=path), cfg.held_out)
    for kind, (accuracy, count) in grades.items():
        spread = math.sqrt(accuracy * (1 - accuracy))
        run.row("accuracy", accuracy, better="higher", n=count, spread=spread, variant=kind, split="held_out")
    details = {
        "graded": f"{cfg.held_out} mosaics of digits that were not trained on, greedy",
        "parameters": sum(part.numel() for part in host.model.parameters()),
    }
    return finish_host(
        run, training, {kind: value for kind, (value, _) in grades.items()}, gates=GATES, details=details
    )


def grade_host(host: Host, items: int, *, seed: int = 0, batch: int = 500) -> dict[str, tuple[float, int]]:
    """Dense accuracy on held-out digits, and how many questions it is over, of each kind."""
    right: list[Tensor] = []
    kinds: list[Tensor] = []
    for at, start in enumerate(range(0, items, batch)):
        asked = mosaics(
            min(batch, items - start), host.config.cells, 7_000 * (seed + 1) + at, split="test", device=host.device
        )
        right.append(host.grade(asked, rollout(host, asked).ids))
        kinds.append(asked.kind)
    found, kind = torch.cat(right), torch.cat(kinds)
    return {name: (float(found[kind == at].float().mean()), int((kind == at).sum())) for at, name in enumerate(KINDS)}


def dense_optimizers(model: nn.Module, cfg: TrainHostConfig) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the decoder's layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return (
        torch.optim.Muon(matrices, cfg.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, cfg.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )


def answer_loss(logps: Tensor, gold: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of right answers: mean over the tokens that count.

    Args:
        logps: ``[batch, tokens, vocabulary]``.
        gold: ``[batch, tokens]``.
        counts: Which tokens are part of the answer.
    """
    losses = F.nll_loss(logps.flatten(0, 1), gold.flatten(), reduction="none").view_as(gold)
    return (losses * counts).sum() / counts.sum()


def _train(
    cfg: TrainHostConfig,
    training: Training,
    host: Host,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> Iterator[dict[str, float] | None]:
    """Yields what to log, or None, after each step."""
    training.start()
    while training.spent() < 1:
        loss = _advance(cfg, training.step, training.spent(), host, optimizers)
        training.step += 1
        yield {"loss": float(loss)} if training.due() else None


def _advance(
    cfg: TrainHostConfig,
    step: int,
    spent: float,
    host: Host,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> Tensor:
    batch = mosaics(cfg.batch, host.config.cells, 1_000_000_000 * (cfg.seed + 1) + step, device=host.device)
    gold, counts = host.answer_ids(batch)
    faster: Any = torch.autocast("cuda", torch.bfloat16) if host.device.type == "cuda" else nullcontext()
    with faster:
        loss = answer_loss(answer_logps(host, batch, gold), gold, counts)
    factor = min(1.0, (step + 1) / cfg.warmup_steps, (1 - spent) / cfg.decay)
    for optimizer, peak in zip(optimizers, (cfg.lr, cfg.adamw_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(host.model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()
