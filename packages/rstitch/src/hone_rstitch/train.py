"""Train the tiny pair: a small model, a large one, and the large one taught to check itself before it answers.

One command makes a pair as it ships in ``assets/``: ``hone-rstitch train-host --seed 0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.hosts import save_host
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, finish_host, matrix_optimizers
from torch import nn

from .config import HostConfig, SamplingConfig, StitchConfig, TrainHostConfig
from .data import grade, product_batch, products
from .host import PACKAGE, build_model, load_host

__all__ = ["GATES", "STAGES", "grade_pair", "train_host"]

GATES = {"small": 0.2, "large": 0.9, "verbose": 0.9}
"""Accuracy on held-out products that each model must reach before the pair says anything."""
STAGES = ("small", "large", "verbose")
VERBOSE_SHARE = 0.7
"""Share of its texts in which the verbose model checks itself."""


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade a pair; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    models = {
        "small": build_model(cfg.small, "small", seed=cfg.seed).to(device),
        "large": build_model(cfg.large, "large", seed=cfg.seed).to(device),
        "verbose": build_model(cfg.large, "large", seed=cfg.seed).to(device),
    }
    optimizers = {
        name: matrix_optimizers(model, ".layers.", lr=cfg.lr, adamw_lr=cfg.adamw_lr) for name, model in models.items()
    }
    parts: dict[str, Any] = dict(models)
    parts |= {f"{name} optimizer {at}": one for name, both in optimizers.items() for at, one in enumerate(both)}
    training = Training(cfg, run.artifacts / "checkpoint.pt", parts)
    training.resume()
    training.follow(_train(cfg, training, models, optimizers), run)
    path = run.artifacts / HOST
    config = HostConfig(small=cfg.small, large=cfg.large)
    save_host(path, config, {f"{name}.": model.eval() for name, model in models.items()}, package=PACKAGE)
    grades, tokens = grade_pair(path, cfg.held_out, device)
    for name, value in grades.items():
        spread = math.sqrt(value * (1 - value))
        run.row("accuracy", value, better="higher", n=cfg.held_out, spread=spread, variant=name, split="held_out")
        run.row("tokens", tokens[name], better="none", n=cfg.held_out, variant=name, split="held_out")
    details = {
        "graded": f"{cfg.held_out} held-out products, greedy",
        "tokens": {name: round(value, 1) for name, value in tokens.items()},
        "parameters": {name: sum(part.numel() for part in model.parameters()) for name, model in models.items()},
    }
    return finish_host(run, training, grades, gates=GATES, details=details)


def grade_pair(path: Path, items: int, device: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy and mean tokens of each stored model alone on held-out products, greedy."""
    problems = products(items, seed=20_000)
    questions = [problem.question for problem in problems]
    accuracy: dict[str, float] = {}
    tokens: dict[str, float] = {}
    for name in STAGES:
        pair = load_host(path=path, verbose=name == "verbose", device=device)
        policy = StitchConfig(policy="small" if name == "small" else "large")
        texts, output = pair.answer(questions, policy, SamplingConfig(max_new_tokens=72))
        right = [grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
        accuracy[name] = sum(right) / items
        tokens[name] = sum(sum(usage.tokens) for usage in output.usage) / items
    return accuracy, tokens


def _train(
    cfg: TrainHostConfig,
    training: Training,
    models: dict[str, Any],
    optimizers: Mapping[str, tuple[torch.optim.Optimizer, torch.optim.Optimizer]],
) -> Iterator[dict[str, float] | None]:
    """One stage after the other; yields what to log, or None, after each step."""
    training.start()
    begins = 0
    for stage, name in enumerate(STAGES):
        steps = getattr(cfg, f"{name}_steps")
        if name == "verbose" and training.step == begins:
            models["verbose"].load_state_dict(models["large"].state_dict())
        while training.step < begins + steps:
            loss = _advance(cfg, models[name], optimizers[name], stage, training.step - begins, steps)
            training.step += 1
            yield {"loss": float(loss), "stage": float(stage)} if training.due() else None
        begins += steps


def _advance(
    cfg: TrainHostConfig,
    model: Any,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    stage: int,
    step: int,
    steps: int,
) -> torch.Tensor:
    model.train()
    ids, targets = product_batch(
        cfg.batch,
        (cfg.seed, stage, step),
        eos=model.config.eos_token_id,
        pad=model.config.pad_token_id,
        verbose=VERBOSE_SHARE if STAGES[stage] == "verbose" else 0.0,
    )
    ids, targets = ids.to(model.device), targets.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    factor = min(1.0, (step + 1) / cfg.warmup_steps, (steps - step) / steps / cfg.decay)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in zip(optimizers, (cfg.lr, cfg.adamw_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        optimizer.step()
    return loss.detach()
