"""Train the tiny pair: a small model, a large one, and the large one taught to check itself before it answers.

One command makes a pair as it ships in ``assets/``: ``hone-rstitch train-host --seed 0``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.config import to_dict
from hone_core.devices import resolve_device
from hone_core.environment import environment
from hone_core.errors import CheckpointError
from hone_core.hosts import HostFacts, open_host, save_host, write_facts
from hone_core.io import atomic_path
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from torch import nn

from .config import SamplingConfig, StitchConfig, TrainHostConfig
from .data import grade, product_batch, products
from .host import PACKAGE, PairConfig, build_model, load_pair

__all__ = ["GATES", "STAGES", "TrainReport", "train_host"]

log = logging.getLogger(__name__)

GATES = {"small": 0.2, "large": 0.9, "verbose": 0.9}
"""Accuracy on held-out products that each model must reach before the pair says anything."""
STAGES = ("small", "large", "verbose")
VERBOSE_SHARE = 0.7
"""Share of its texts in which the verbose model checks itself."""


@dataclass(frozen=True, kw_only=True)
class TrainReport(Report):
    """What a run made.

    Attributes:
        checkpoint: the exported ``host.safetensors``.
        facts: of its sidecar.
    """

    checkpoint: Path
    facts: HostFacts

    @classmethod
    def of(cls, run: Run) -> TrainReport:
        """Return the report of a finished run."""
        path = run.artifacts / "host.safetensors"
        facts = open_host(PairConfig, PACKAGE, path).facts
        assert facts is not None, "the facts are written before the run is done"
        return cls(path=run.path, rows=tuple(run.rows), checkpoint=path, facts=facts)

    def __str__(self) -> str:
        grades = ", ".join(f"{name} {value:.1%}" for name, value in self.facts.result.items())
        end = "" if self.facts.passed else f"\nmisses its gates {self.facts.gates}; train it longer"
        made = f"{self.facts.steps} steps in {self.facts.seconds:.0f} s"
        return f"{grades} on held-out products, {made}{end}\n{self.checkpoint}"


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade a pair; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    training = _Training(cfg, run.artifacts / "checkpoint.pt", device)
    training.resume()
    total = cfg.small_steps + cfg.large_steps + cfg.verbose_steps
    with progress_bar(total, desc="training", quiet=run.quiet) as bar:
        bar.update(training.total)
        for values in training.train():
            bar.update()
            if values is not None:
                run.log(step=training.total, **values)
                bar.show(stage=STAGES[training.stage], loss=f"{values['loss']:.3f}")
    training.save()
    path = run.artifacts / "host.safetensors"
    config = PairConfig(small=cfg.small, large=cfg.large)
    save_host(path, config, {f"{name}.": model for name, model in training.models.items()}, package=PACKAGE)
    grades, tokens = grade_pair(path, cfg.held_out, device)
    for name, value in grades.items():
        spread = math.sqrt(value * (1 - value))
        run.row("accuracy", value, better="higher", n=cfg.held_out, spread=spread, variant=name, split="held_out")
        run.row("tokens", tokens[name], better="none", n=cfg.held_out, variant=name, split="held_out")
    passed = all(grades[name] >= gate for name, gate in GATES.items())
    if not passed:
        log.warning("the gates %s were missed: %s. Train longer before using this pair.", GATES, grades)
    facts = HostFacts(
        command=run.command,
        seed=cfg.seed,
        steps=total,
        seconds=round(training.elapsed(), 1),
        result={name: round(value, 4) for name, value in grades.items()},
        gates=GATES,
        passed=passed,
        train_config=to_dict(cfg),
        environment={key: environment()[key] for key in ("commit", "dirty", "torch", "gpu", "cpu")},
        details={
            "graded": f"{cfg.held_out} held-out products, greedy",
            "tokens": {name: round(value, 1) for name, value in tokens.items()},
            "parameters": {
                name: sum(parameter.numel() for parameter in model.parameters())
                for name, model in training.models.items()
            },
        },
    )
    write_facts(path, facts, package=PACKAGE)
    return TrainReport.of(run)


def grade_pair(path: Path, items: int, device: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy and mean tokens of each stored model alone on held-out products, greedy."""
    problems = products(items, seed=20_000)
    accuracy, tokens = {}, {}
    for name in STAGES:
        pair = load_pair(path=path, verbose=name == "verbose", device=device)
        policy = StitchConfig(policy="small" if name == "small" else "large")
        texts, output = pair.answer(
            [problem.question for problem in problems], policy, SamplingConfig(max_new_tokens=72)
        )
        right = [grade(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
        accuracy[name] = sum(right) / items
        tokens[name] = sum(sum(usage.tokens) for usage in output.usage) / items
    return accuracy, tokens


class _Training:
    """Everything that a resumed run needs to go on, and the loop that changes it."""

    def __init__(self, cfg: TrainHostConfig, path: Path, device: torch.device) -> None:
        self.cfg, self.path, self.device = cfg, path, device
        self.models: dict[str, Any] = {
            "small": build_model(cfg.small, "small", seed=cfg.seed).to(device),
            "large": build_model(cfg.large, "large", seed=cfg.seed).to(device),
            "verbose": build_model(cfg.large, "large", seed=cfg.seed).to(device),
        }
        self.stage = self.step = self.total = 0
        self.before = 0.0
        self.started = self.saved = time.perf_counter()
        self.optimizers: list[torch.optim.Optimizer] = []
        self._begin()

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.started

    def _steps(self) -> int:
        return getattr(self.cfg, f"{STAGES[self.stage]}_steps")

    def _begin(self) -> None:
        """Optimisers of a stage: Muon for the matrices of the layers, AdamW for everything else."""
        matrices, others = [], []
        for name, parameter in self.models[STAGES[self.stage]].named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
        self.optimizers = [
            torch.optim.Muon(matrices, self.cfg.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, self.cfg.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def train(self) -> Iterator[dict[str, float] | None]:
        """Run all stages to their end; yield values to log, or None, after each step."""
        while True:
            while self.step < self._steps():
                loss = self._advance()
                self.step += 1
                self.total += 1
                values = None
                if self.step % self.cfg.log_every == 0:
                    values = {"loss": float(loss), "stage": float(self.stage), "seconds": self.elapsed()}
                    if not math.isfinite(values["loss"]):
                        raise RuntimeError(f"the loss is {values['loss']} at step {self.step}; lower the learning rate")
                yield values
                if time.perf_counter() - self.saved > self.cfg.checkpoint_seconds:
                    self.save()
            if self.stage == len(STAGES) - 1:
                break
            self.stage, self.step = self.stage + 1, 0
            if STAGES[self.stage] == "verbose":
                self.models["verbose"].load_state_dict(self.models["large"].state_dict())
            self._begin()
        for model in self.models.values():
            model.eval()

    def _advance(self) -> torch.Tensor:
        cfg, name = self.cfg, STAGES[self.stage]
        model = self.models[name].train()
        ids, targets = product_batch(
            cfg.batch,
            (cfg.seed, self.stage, self.step),
            eos=model.config.eos_token_id,
            pad=model.config.pad_token_id,
            verbose=VERBOSE_SHARE if name == "verbose" else 0.0,
        )
        ids, targets = ids.to(self.device), targets.to(self.device)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = (self._steps() - self.step) / self._steps()
        factor = min(1.0, (self.step + 1) / cfg.warmup_steps, left / cfg.decay)
        for optimizer, peak in zip(self.optimizers, (cfg.lr, cfg.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        return loss.detach()

    def save(self) -> None:
        """Write the resumable state."""
        content = {
            "config": to_dict(self.cfg),
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": [self.stage, self.step, self.total],
            "seconds": self.elapsed(),
        }
        with atomic_path(self.path) as scratch:
            torch.save(content, scratch)
        self.saved = time.perf_counter()

    def resume(self) -> None:
        """Read the state, if there is any.

        Raises:
            CheckpointError: It is of another config.
        """
        if not self.path.exists():
            return
        stored = torch.load(self.path, map_location=self.device, weights_only=True)
        if stored["config"] != to_dict(self.cfg):
            raise CheckpointError(f"{self.path} belongs to a run with another config; choose another --out")
        self.stage, self.step, self.total = stored["place"]
        for name, model in self.models.items():
            model.load_state_dict(stored["models"][name])
        self._begin()
        for optimizer, values in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.before = stored["seconds"]
        self.started = time.perf_counter()
        log.info("resumed at step %d", self.total)
