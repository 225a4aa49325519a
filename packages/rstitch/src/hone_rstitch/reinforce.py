"""R-Stitch+: the router is trained by DAPO on whole answers, both language models frozen.

Each step a batch of problems is answered several times with sampled routes. An answer's reward is 1 less the price of
its latency if it is right, and 0 if it is wrong, so that haste without an answer is worth nothing. What an answer's
reward is above the mean of its problem's answers, in standard deviations, is the advantage of each of its routes.

Source: arXiv 2507.17307, R-Stitch+ (reward, latency estimate); DAPO, arXiv 2503.14476 (clip bounds, mean over tokens,
groups without differences left out, no KL term). Learning rate and steps were not published; these are ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_core.training import Training
from torch import Tensor, nn

from .config import SMALL, StitchConfig, TrainRouterConfig
from .data import Problem, grade, practice, products, read_problems
from .evaluate import Answers, Outcome, step_ratio, table, write_rows
from .host import load_models
from .latency import Call, Latency, calls, read_latency, text_latency
from .models import Pair
from .router import Routed, Router, Routing, load_router, save_router

__all__ = ["TrainRouterReport", "advantages", "at_cost", "dapo_loss", "reward", "train_router"]

DRAWS = 2000
PRICE = 5e-6
"""lambda of the paper, of a millisecond."""
STEP_PRICE = 0.01
"""Ours, of a step of the large model."""


def reward(right: bool, latency: float, price: float) -> float:
    """r_acc - price * r_acc * latency.

    Args:
        right: The answer is.
        latency: Estimated, of all its calls.
        price: lambda.

    Source: arXiv 2507.17307, reward of R-Stitch+.
    """
    return (1.0 - price * latency) if right else 0.0


def price_of(cfg: TrainRouterConfig) -> float:
    """lambda: the config's own, else the paper's where latencies are in milliseconds, and ours where they are steps."""
    if cfg.price is not None:
        return cfg.price
    return STEP_PRICE if cfg.latency is None else PRICE


def advantages(
    rewards: Sequence[Sequence[float]], scale: Literal["group", "batch"] = "group"
) -> list[list[float] | None]:
    """(R - mean) / std within each problem's answers; None for a problem whose answers do not differ.

    Args:
        rewards: Of each problem's answers.
        scale: ``group``: std is of the problem's answers. ``batch``: of all answers, each less its problem's mean.

    Source: arXiv 2503.14476, Eq. 9 and the dynamic sampling of Section 3.2. Differs: no problems are drawn in place of
    those left out.
    """
    centred = [np.asarray(group, dtype=float) - np.mean(group) for group in rewards]
    whole = float(np.concatenate(centred).std())
    found: list[list[float] | None] = []
    for group in centred:
        own = float(group.std())
        found.append(None if own < 1e-9 else (group / (own if scale == "group" else whole)).tolist())
    return found


def dapo_loss(new: Tensor, old: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """Clipped objective with its own bound on either side, mean over routes, to be minimised.

    Args:
        new: ``[routes]`` log-probabilities of the actions taken, under the router as it is.
        old: ``[routes]``, under the router that took them.
        advantage: ``[routes]``.
        low: Lower clip bound, epsilon.
        high: Upper one.

    Source: arXiv 2503.14476, Eq. 8.
    """
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).mean()


@dataclass(frozen=True, kw_only=True)
class TrainRouterReport(Report):
    """The router beside the thresholds.

    Attributes:
        router: file of its weights.
    """

    router: Path

    @classmethod
    def of(cls, run: Run) -> TrainRouterReport:
        """Return the report of a finished run."""
        return cls(path=run.path, rows=tuple(run.rows), router=run.artifacts / "router.safetensors")

    def __str__(self) -> str:
        lines = [table(self.rows)]
        for row in self.rows:
            if row.metric == "margin" and row.interval is not None:
                low, high = row.interval
                lines.append(f"router over thresholds at its cost: {row.value:+.2f} points [{low:+.2f}, {high:+.2f}]")
        return "\n".join([*lines, f"router   {self.router}", f"results  {self.path / 'results.json'}"])


def train_router(cfg: TrainRouterConfig, run: Run) -> TrainRouterReport:
    """Train a router, export it, and hold it against plain thresholds on problems that it has not seen.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    pair = load_models(cfg.models, device=device)
    ratio = step_ratio(pair)
    # Without a measured latency a call costs what the weights do that it reads, in steps of the large model.
    plain = (Latency((0.0, 0.0, 0.0, ratio), (0.0, ratio)), Latency((0.0, 0.0, 0.0, 1.0), (0.0, 1.0)))
    latencies = plain if cfg.latency is None else read_latency(cfg.latency)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        router = Router(pair.small.config.get_text_config().hidden_size, cfg.width).to(device)
    optimizer = torch.optim.AdamW(router.parameters(), cfg.lr, weight_decay=0.0)
    training = Training(cfg, run.artifacts / "checkpoint.pt", {"router": router, "optimizer": optimizer})
    training.resume()
    problems = None if cfg.data is None else read_problems(cfg.data)
    training.follow(_train(cfg, training, pair, router, optimizer, latencies, problems), run, show=("reward", "small"))
    path = run.artifacts / "router.safetensors"
    save_router(path, router)
    _compare(cfg, run, pair, load_router(path).to(device), ratio)
    return TrainRouterReport.of(run)


def _train(
    cfg: TrainRouterConfig,
    training: Training,
    pair: Pair,
    router: Router,
    optimizer: torch.optim.Optimizer,
    latencies: tuple[Latency, Latency],
    problems: Sequence[Problem] | None,
) -> Iterator[dict[str, float] | None]:
    training.start()
    while training.step < cfg.steps:
        step = training.step
        if problems is None:
            asked = practice(cfg.batch, (cfg.seed, step))
        else:
            asked = random.Random(f"{cfg.seed},{step}").sample(problems, min(cfg.batch, len(problems)))
        found = _rollouts(cfg, pair, router, latencies, asked, step)
        values = _update(cfg, router, optimizer, found)
        training.step += 1
        yield values if training.due() else None


@dataclass(frozen=True)
class _Rollouts:
    """Answers of a step: rewards of each problem's, and what was decided in each."""

    rewards: list[list[float]]
    right: float
    latency: float
    routes: list[list[list[Routed]]]


def _rollouts(
    cfg: TrainRouterConfig,
    pair: Pair,
    router: Router,
    latencies: tuple[Latency, Latency],
    asked: Sequence[Problem],
    step: int,
) -> _Rollouts:
    routing = Routing(router.eval(), sample=True)
    count = cfg.rollouts
    rows = [problem for problem in asked for _ in range(count)]
    seeds = [(cfg.seed * 1_000_003 + step) * len(rows) + at for at in range(len(rows))]
    gate = replace(cfg.stitch, policy="router")
    texts, output = pair.answer([p.question for p in rows], gate, cfg.sampling, seed=seeds, routing=routing)
    small, large = pair.prompts([problem.question for problem in rows])
    right = [grade(text, problem.answer, cfg.format) for text, problem in zip(texts, rows, strict=True)]
    spent = [text_latency(latencies, _calls(output, at, (len(small[at]), len(large[at])))) for at in range(len(rows))]
    values = [reward(ok, ms, price_of(cfg)) for ok, ms in zip(right, spent, strict=True)]
    by_row: list[list[Routed]] = [[] for _ in rows]
    for record in routing.records:
        by_row[record.row].append(record)
    groups = range(0, len(rows), count)
    return _Rollouts(
        [values[at : at + count] for at in groups],
        float(np.mean(right)),
        float(np.mean(spent)),
        [by_row[at : at + count] for at in groups],
    )


@dataclass(frozen=True, slots=True)
class _Token:
    model: int
    discarded_entropy: float | None


def _calls(output: Any, row: int, prompts: tuple[int, int]) -> list[Call]:
    """Calls of a row, by what its output says."""
    count = sum(output.usage[row].tokens)
    models = output.models[row, :count].tolist()
    thrown = output.discarded_entropy[row, :count].tolist()
    # Not a number where nothing was thrown away.
    tokens = [_Token(model, None if value != value else value) for model, value in zip(models, thrown, strict=True)]
    return calls(tokens, prompts)


def _update(
    cfg: TrainRouterConfig, router: Router, optimizer: torch.optim.Optimizer, found: _Rollouts
) -> dict[str, float]:
    kept: list[tuple[Routed, float]] = []
    for group, answers in zip(advantages(found.rewards, cfg.scale), found.routes, strict=True):
        if group is not None:
            kept += [(route, value) for value, routes in zip(group, answers, strict=True) for route in routes]
    every = [route for answers in found.routes for routes in answers for route in routes]
    values = {
        "reward": float(np.mean(found.rewards)),
        "accuracy": found.right,
        "latency": found.latency,
        "small": float(np.mean([route.action == SMALL for route in every])) if every else 0.0,
        "routes": float(len(kept)),
        "loss": 0.0,
    }
    if not kept:
        return values
    device = next(router.parameters()).device
    features = torch.stack([route.features for route, _ in kept]).to(device)
    actions = torch.tensor([route.action for route, _ in kept], device=device)
    old = torch.tensor([route.logprob for route, _ in kept], device=device)
    advantage = torch.tensor([value for _, value in kept], device=device)
    router.train()
    for _ in range(cfg.epochs):
        new = router(features).log_softmax(-1).gather(1, actions[:, None])[:, 0]
        loss = dapo_loss(new, old, advantage, low=cfg.clip_low, high=cfg.clip_high)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
    values["loss"] = float(loss.detach())
    return values


def _compare(cfg: TrainRouterConfig, run: Run, pair: Pair, router: Router, ratio: float) -> None:
    """Accuracy and cost of the router and of thresholds, on problems that neither was chosen on."""
    if cfg.held_out_data is None:
        problems = products(cfg.items, seed=80_000 + cfg.seed)
    else:
        problems = read_problems(cfg.held_out_data, limit=cfg.items)
    # A repeated command finds the answers of the same router.
    answers = Answers(
        run.artifacts / "answers.jsonl", pair, problems, cfg.sampling, format=cfg.format, batch=cfg.batch * 4,
        seed=cfg.seed, quiet=run.quiet,
    )  # fmt: skip
    curve = [answers.ask(StitchConfig(policy="small")), answers.ask(StitchConfig(policy="large"))]
    curve += [answers.ask(replace(cfg.stitch, policy="stitch", tau=tau)) for tau in cfg.taus]
    routed = answers.ask(replace(cfg.stitch, policy="router"), routing=Routing(router))
    for outcome in [*curve, routed]:
        write_rows(run, outcome, ratio)
    margins = 100 * (np.asarray(routed.right, dtype=float) - at_cost(curve, routed.cost(ratio), ratio))
    rng = np.random.default_rng(cfg.seed)
    draws = [margins[rng.integers(0, len(margins), len(margins))].mean() for _ in range(DRAWS)]
    low, high = (float(value) for value in np.percentile(draws, [2.5, 97.5]))
    run.row(
        "margin", float(margins.mean()), unit="points", better="higher", n=len(margins), interval=(low, high),
        variant=routed.label,
    )  # fmt: skip


def at_cost(curve: Sequence[Outcome], cost: float, ratio: float) -> np.ndarray:
    """Chance of each answer to be right when thresholds spend so much: the best mixture of two of them.

    Args:
        curve: Outcomes of thresholds, and of each model alone.
        cost: Wanted mean cost.
        ratio: Of a small step to a large one.
    """
    best: np.ndarray | None = None
    for low in curve:
        for high in curve:
            first, second = low.cost(ratio), high.cost(ratio)
            if not first <= cost <= second:
                continue
            weight = 0.0 if second == first else (cost - first) / (second - first)
            mixed = (1 - weight) * np.asarray(low.right, dtype=float) + weight * np.asarray(high.right, dtype=float)
            if best is None or mixed.mean() > best.mean():
                best = mixed
    if best is None:  # cheaper than the cheapest, or dearer than the dearest
        ends = sorted(curve, key=lambda outcome: outcome.cost(ratio))
        best = np.asarray((ends[0] if cost < ends[0].cost(ratio) else ends[-1]).right, dtype=float)
    return best
