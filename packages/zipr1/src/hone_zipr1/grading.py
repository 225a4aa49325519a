"""Accuracy and token ratio of the tiny host under selections, on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hone_core.runs import Row, Run
from hone_core.statistics import bootstrap_interval
from torch import Tensor

from .config import SparseConfig
from .data import Mosaics, mosaics
from .host import Host
from .method import uniform_ratio
from .models import attach
from .rollouts import Rollout, rollout
from .visionzip import FAMILIES

__all__ = ["DENSE", "Outcome", "ask", "at_budget", "held_out", "peers", "table", "uniform_of", "write_rows"]

DENSE = "dense"


@dataclass(frozen=True)
class Outcome:
    """What a selection did to the answers.

    Attributes:
        label: of the selection.
        right: ``[items]``.
        ratio: ``[items]``, tau of each.
        layer_ratio: ``[layers]``, means; empty for the dense model.
        ids: ``[items, tokens]``, answers.
        uniform: ratio of a map without structure at the same p; None where p sets no budget, or not all rows are
            looked at.
    """

    label: str
    right: Tensor
    ratio: Tensor
    layer_ratio: tuple[float, ...]
    ids: Tensor
    uniform: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.float().mean())

    @property
    def tau(self) -> float:
        """Mean ratio."""
        return float(self.ratio.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy, over questions."""
        return bootstrap_interval(self.right.cpu().numpy().astype(float))


def held_out(host: Host, items: int, seed: int) -> Mosaics:
    """Questions on digits that were not trained on."""
    return mosaics(items, host.config.cells, 500_000 + seed, split="test", device=host.device)


def uniform_of(host: Host, config: SparseConfig) -> float | None:
    """Ratio of uniform attention on the host's prompts; None where p sets no budget, or not all rows are looked at."""
    if config.ratio is not None or config.rows != "all":
        return None
    protected = host.protected(1)[0]
    kept = int(protected.sum()) if config.protect == "text" else 1
    return uniform_ratio(config.p, len(protected), None, kept)


def ask(
    host: Host,
    asked: Mosaics,
    config: SparseConfig | None,
    *,
    batch: int,
    p: Tensor | None = None,
    label: str | None = None,
) -> Outcome:
    """Answer every question greedily.

    Args:
        host: The model.
        asked: Questions.
        config: Selection; None is the dense model.
        batch: Questions at a time.
        p: ``[items]``, a threshold per question in place of the config's.
        label: In place of the selection's.
    """
    parts: list[Rollout] = []
    slices = [slice(start, start + batch) for start in range(0, len(asked), batch)]
    if config is None:
        parts = [rollout(host, asked.part(rows)) for rows in slices]
    else:
        with attach(host.model, config) as handle:
            for rows in slices:
                parts.append(rollout(host, asked.part(rows), handle, p=None if p is None else p[rows]))
    ids = torch.cat([part.ids for part in parts])
    layers: tuple[float, ...] = ()
    if config is not None:
        layers = tuple(torch.cat([p.layer_ratio for p in parts if p.layer_ratio is not None], 1).mean(1).tolist())
    return Outcome(
        label or (DENSE if config is None else config.label),
        host.grade(asked, ids),
        torch.cat([part.ratio for part in parts]).float(),
        layers,
        ids,
        None if config is None or p is not None else uniform_of(host, config),
    )


FASTV_LAYER = 2
"""First layer of FastV that drops."""


def at_budget(config: SparseConfig, tau: float, model: Any) -> dict[str, SparseConfig]:
    """Other ways to spend a mean ratio, by name; our re-implementations.

    Args:
        config: A selection by its threshold.
        tau: What it kept.
        model: Config of the model. FastV keeps everything in the first two layers and less after them, for the same
            mean; where that is not possible, next to nothing. VisionZip is only among them where the model's tower is
            understood.
    """
    layers = model.get_text_config().num_hidden_layers
    later = (tau * layers - FASTV_LAYER) / (layers - FASTV_LAYER) if layers > FASTV_LAYER else 0.0
    fastv = {"policy": "fastv", "ratio": min(1.0, max(later, 1e-6)), "fastv_layer": min(FASTV_LAYER, layers - 1)}
    others = {
        "FastV": replace(config, **fastv),
        "VisionZip": replace(config, policy="visionzip", ratio=min(1.0, tau)),
        "top-k": replace(config, policy="top-k", ratio=min(1.0, tau)),
        "random": replace(config, policy="random"),
    }
    if model.model_type not in FAMILIES:
        del others["VisionZip"]
    return others


def peers(host: Host, asked: Mosaics, outcome: Outcome, config: SparseConfig, *, batch: int) -> list[Outcome]:
    """What ``at_budget`` answers at the mean ratio of an outcome; without FastV where it would keep more."""
    layers = host.config.layers
    others = at_budget(config, outcome.tau, host.model.config)
    if outcome.tau * layers <= FASTV_LAYER:
        del others["FastV"]
    return [ask(host, asked, other, batch=batch, label=f"{name} as {outcome.label}") for name, other in others.items()]


def write_rows(run: Run, outcome: Outcome, *, split: str = "held_out") -> None:
    """Accuracy, ratio and the uniform ratio beside it."""
    n = len(outcome.right)
    run.row(
        "accuracy",
        outcome.accuracy,
        better="higher",
        n=n,
        interval=outcome.interval,
        variant=outcome.label,
        split=split,
    )
    spread = float(outcome.ratio.std()) if n > 1 else None
    run.row("token_ratio", outcome.tau, better="lower", n=n, spread=spread, variant=outcome.label, split=split)
    if outcome.uniform is not None:
        run.row("uniform_ratio", outcome.uniform, better="none", variant=outcome.label, split=split)


def table(rows: Sequence[Row]) -> str:
    """The rows of ``write_rows`` as a table."""
    values = {(row.metric, row.variant): row for row in rows}
    lines = [f"{'':<26} accuracy            tokens kept   uniform attention"]
    for name in dict.fromkeys(row.variant for row in rows if row.metric == "accuracy"):
        accuracy = values["accuracy", name]
        low, high = accuracy.interval or (accuracy.value, accuracy.value)
        uniform = values.get(("uniform_ratio", name))
        lines.append(
            f"{name:<26} {100 * accuracy.value:5.1f} [{100 * low:5.1f}, {100 * high:5.1f}]  "
            f"{100 * values['token_ratio', name].value:9.1f} %"
            + ("" if uniform is None else f"{100 * uniform.value:16.1f} %")
        )
    return "\n".join(lines)
