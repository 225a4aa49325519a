"""The loop: sample groups under sparse attention, reward them, and update; or update on right answers.

It asks a ``Task`` for prompts, rollouts, log-probabilities and grades, and knows nothing else of the model. The policy
is sparse at each rollout's own threshold, in sampling and in the update; the reference is the original model, dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import ReinforceConfig
from .models import SparseHandle
from .objectives import BudgetPolicy, advantages, grpo_loss, rewards

__all__ = ["Drawn", "Reinforcement", "Task", "whole"]


class Drawn(NamedTuple):
    """Answers of a batch of prompts.

    Attributes:
        ids: ``[rows, tokens]``, padded after the end.
        logps: ``[rows, tokens]``, of each token when it was drawn, at the temperature.
        mask: ``[rows, tokens]``, which are tokens of the answer.
        ratio: ``[rows]``, tau.
        correct: ``[rows]``.
    """

    ids: Tensor
    logps: Tensor
    mask: Tensor
    ratio: Tensor
    correct: Tensor


class Task(Protocol):
    """Questions with answers that can be checked, for a model and its frozen original.

    Rows are prompts repeated ``group`` times, one after the other.
    """

    @property
    def model(self) -> nn.Module:
        """Policy."""

    def draw(self, step: int, prompts: int, group: int) -> Any:
        """Rows of a step: the same step gives the same."""

    def features(self, rows: Any) -> Tensor:
        """``[rows, dim]``, what a prompt is like, for the learned budget; without gradient."""

    def sample(self, rows: Any, handle: SparseHandle, p: Tensor, temperature: float, seed: int) -> Drawn:
        """Answer, each row at its threshold ``p``; the same seed draws the same."""

    def logps(self, rows: Any, ids: Tensor, handle: SparseHandle, p: Tensor, temperature: float, soft: bool) -> Tensor:
        """``[rows, tokens]`` of given answers under the sparse policy, with gradient."""

    def part(self, rows: Any, which: slice) -> Any:
        """Some rows."""

    def reference(self, rows: Any, ids: Tensor, temperature: float, handle: SparseHandle) -> Tensor:
        """``[rows, tokens]`` of given answers under the original model with dense attention."""

    def right(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Right answers ``[rows, tokens]`` and which tokens count."""


class Reinforcement:
    """Training of a task's model by an objective.

    Args:
        cfg: Objective.
        task: Prompts and the model.
        handle: What is attached to the model.
        seed: Of the draws of answers and budgets.
        process: Number of this process among those that train together.
        reduce: Mean of a tensor over the processes, where there are several.

    Attributes:
        parts: What a continuation needs.
    """

    def __init__(
        self,
        cfg: ReinforceConfig,
        task: Task,
        handle: SparseHandle,
        *,
        seed: int = 0,
        process: int = 0,
        reduce: Any = None,
    ) -> None:
        self.cfg, self.task, self.handle, self.reduce = cfg, task, handle, reduce
        self._seed = 1_000_003 * (seed + 1) + 101 * process
        self.trained = [p for p in task.model.parameters() if p.requires_grad]
        # Weights that are shared out over processes, and those that are not, take their steps apart.
        kinds = [[p for p in self.trained if isinstance(p, DTensor) == shared] for shared in (False, True)]
        groups: list[dict[str, Any]] = [{"params": kind, "lr": cfg.lr} for kind in kinds if kind]
        self.parts: dict[str, Any] = {"model": task.model}
        self.budget: BudgetPolicy | None = None
        if cfg.objective == "budget-policy":
            dim = task.features(task.draw(0, 1, 1)).shape[-1]
            self.budget = BudgetPolicy(cfg.ps, dim).to(self.trained[0].device)
            self.trained = [*self.trained, *self.budget.parameters()]
            groups.append({"params": list(self.budget.parameters()), "lr": cfg.budget_lr})
            self.parts["budget"] = self.budget
        fused = self.trained[0].is_cuda or None
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)
        self.parts["optimizer"] = self.optimizer

    def loop(self, training: Any) -> Iterator[dict[str, float] | None]:
        """Steps of a ``hone_core.training.Training``: yields what to log, or None."""
        training.start()
        while training.spent() < 1:
            found = self.advance(training.step)
            training.step += 1
            yield {name: float(value) for name, value in found.items()} if training.due() else None

    def advance(self, step: int) -> dict[str, Tensor]:
        """Sample, and update."""
        cfg = self.cfg
        rows = self.task.draw(step, cfg.prompts, cfg.group)
        if cfg.objective == "supervised":
            return self._supervised(rows)
        seed = self._seed + 7919 * step
        device = self.trained[0].device
        p = torch.tensor(cfg.ps, device=device).repeat(cfg.prompts * max(1, cfg.group // len(cfg.ps)))
        features = choice = None
        old = torch.zeros(cfg.prompts * cfg.group, 0, device=device)
        if self.budget is not None:
            features = self.task.features(rows)
            choice, first = self.budget.draw(features, torch.Generator().manual_seed(seed))
            p, old = self.budget.thresholds[choice], first[:, None]
        drawn = self.task.sample(rows, self.handle, p, cfg.temperature, seed)
        reward, advantage = self.judge(drawn)
        # A budget, if one was drawn, is the first token of the answer.
        old = torch.cat([old, drawn.logps], 1)
        mask = torch.cat(
            [torch.ones_like(old[:, : old.shape[1] - drawn.mask.shape[1]], dtype=torch.bool), drawn.mask], 1
        )
        parts = self._parts(len(mask))
        reference = torch.cat(
            [self.task.reference(self.task.part(rows, at), drawn.ids[at], cfg.temperature, self.handle) for at in parts]
        )
        found: dict[str, Tensor] = {}
        for update in range(cfg.updates):
            self.optimizer.zero_grad(set_to_none=True)
            terms = []
            for at in parts:
                some = self.task.part(rows, at)
                logp = self.task.logps(some, drawn.ids[at], self.handle, p[at], cfg.temperature, cfg.soft_weight > 0)
                against = reference[at]
                if self.budget is not None and features is not None and choice is not None:
                    first = self.budget(features[at]).gather(1, choice[at, None])
                    # The original model has no budget to stay near.
                    logp, against = torch.cat([first, logp], 1), torch.cat([first.detach(), against], 1)
                term = grpo_loss(logp, old[at], against, advantage[at], mask[at], epsilon=cfg.epsilon, beta=cfg.beta)
                share = len(logp) / len(mask)
                ((term.loss + self._soft()) * share).backward()
                terms.append((term.loss.detach() * share, term.kl * share, term.ratio_error))
            self._step()
            if not update:
                loss, kl, error = (torch.stack(values) for values in zip(*terms, strict=True))
                found = {"loss": loss.sum(), "kl": kl.sum(), "ratio_error": error.max()}
        found |= {"reward": reward.mean(), "accuracy": drawn.correct.float().mean(), "tau": drawn.ratio.mean()}
        return found | ({"p": p.mean()} if self.budget is not None else {})

    def judge(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Rewards ``[groups, rollouts]`` and the advantage of each row."""
        cfg = self.cfg
        correct, ratio = drawn.correct.view(-1, cfg.group), drawn.ratio.float().view(-1, cfg.group)
        efficiency = 0.0 if cfg.objective == "soft-ratio" else cfg.efficiency
        reward = rewards(correct, ratio, performance=cfg.performance, efficiency=efficiency, gated=cfg.gated)
        return reward, advantages(reward, floor=cfg.floor).flatten()

    def _supervised(self, rows: Any) -> dict[str, Tensor]:
        cfg = self.cfg
        gold, counts = self.task.right(rows)
        p = torch.tensor(cfg.ps, device=gold.device).repeat(len(gold) // len(cfg.ps))
        self.optimizer.zero_grad(set_to_none=True)
        total, kept = torch.zeros((), device=gold.device), []
        for at in self._parts(len(gold)):
            soft = cfg.soft_weight > 0
            logp = self.task.logps(self.task.part(rows, at), gold[at], self.handle, p[at], 1.0, soft)
            loss = -(logp * counts[at]).sum() / counts.sum()
            (loss + self._soft() * (len(logp) / len(gold))).backward()
            total = total + loss.detach()
            assert self.handle.stats is not None, "a forward was run"
            kept.append(self.handle.stats.ratio)
        self._step()
        return {"loss": total, "tau": torch.cat(kept).mean()}

    def _parts(self, rows: int) -> list[slice]:
        size = self.cfg.micro_batch or rows
        return [slice(at, at + size) for at in range(0, rows, size)]

    def _soft(self) -> Tensor | float:
        """Weighted size of the support, mean over layers and rows."""
        if not self.cfg.soft_weight:
            return 0.0
        assert self.handle.stats is not None, "a forward was run"
        size = torch.stack(list(self.handle.stats.soft.values()))
        return self.cfg.soft_weight * (size.log() if self.cfg.soft_log else size).mean()

    def _step(self) -> None:
        if self.reduce is not None:
            # The backward of a layer that is shared out has averaged its own.
            for parameter in (p for p in self.trained if not isinstance(p, DTensor)):
                # A process whose rows gave a parameter no gradient still takes part in the mean.
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.reduce(grad)
        grads = [p.grad for p in self.trained if p.grad is not None]
        norm = torch.stack([whole(torch.linalg.vector_norm(grad)) for grad in grads]).norm()
        for grad in grads:
            grad.mul_((1 / (norm + 1e-6)).clamp(max=1))
        self.optimizer.step()


def whole(x: Tensor) -> Tensor:
    """A tensor in one piece, where it is shared out over processes: all of them take part."""
    return x.full_tensor() if isinstance(x, DTensor) else x
