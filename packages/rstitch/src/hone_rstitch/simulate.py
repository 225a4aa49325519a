"""A simulator of two models that serve several requests at once, to choose when the large one should start.

Requests alternate between the models at random, with the chances that a policy has on a workload. A model that is idle
starts with all requests that wait for it, once they are enough; a step takes the same time however many there are, as
it does while weights dominate. Waiting for company makes a step serve more, and its first comer wait longer.

Source: the offline model of TokenRouter (2026), whose nine published predictions are this module's test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hone_core.runs import Report, Run

from .config import LARGE, SMALL, SimulateConfig

__all__ = ["Load", "SimulateReport", "can_start", "simulate", "throughput"]


SERVERS, TOKENS = 4000, 200
"""Servers simulated side by side at most, so that a step of the program is a step of each; tokens of each at least."""
WARM_UP = 0.1
"""Share of the tokens that come first and are not counted: all requests start at the small model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the requests do and what a step takes.

    Attributes:
        p: chance that a step of the small model calls the large one.
        q: chance that the large model hands back after its token.
        discard: a step that calls the large model leaves no token.
        small_ms: time of a small step, whatever the batch.
        large_ms: of a large one.
        shared: both run on one device, one at a time.
    """

    p: float
    q: float
    small_ms: float
    large_ms: float
    discard: bool = True
    shared: bool = False


def can_start(requests: int, batches: tuple[int, int]) -> bool:
    """Whether some model always has enough to start with: sum of (B - 1) below the number of requests.

    Source: TokenRouter (2026).
    """
    return sum(batch - 1 for batch in batches) < requests


def throughput(
    load: Load, *, requests: int, batches: tuple[int, int] = (1, 1), tokens: int = 1_000_000, seed: int = 0
) -> float:
    """Tokens per second of all requests together, in the long run.

    Args:
        load: What requests do.
        requests: In flight; a finished one is replaced at once.
        batches: Requests that the small and the large model wait for.
        tokens: How many to simulate; the error falls with their root.
        seed: Of the chances.

    Raises:
        ValueError: Every request could wait for company that never comes.
    """
    if not can_start(requests, batches):
        raise ValueError(
            f"{requests} requests cannot fill batches of {batches[SMALL]} and {batches[LARGE]}: all would wait; "
            "lower one of them"
        )
    rng = np.random.default_rng(seed)
    times, least = np.array([load.small_ms, load.large_ms]), np.array(batches)
    # Many servers side by side, each with its own requests; a row per server, a column per model.
    servers = max(1, min(SERVERS, tokens // TOKENS))
    rows = np.arange(servers)
    waiting = np.zeros((servers, 2), dtype=int)
    waiting[:, SMALL] = requests
    running = np.zeros_like(waiting)
    ends = np.full((servers, 2), np.inf)
    now, turn = np.zeros(servers), np.full(servers, SMALL)
    done = np.zeros(servers, dtype=int)
    warm: tuple[int, float] | None = None
    while done.sum() < tokens * (1 + WARM_UP):
        if warm is None and done.sum() >= tokens * WARM_UP:
            warm = int(done.sum()), float(now.sum())
        for model in (turn, 1 - turn):
            busy = running.any(1) if load.shared else running[rows, model] > 0
            starts = ~busy & (waiting[rows, model] >= least[model])
            at = rows[starts], model[starts]
            running[at], waiting[at] = waiting[at], 0
            ends[at] = now[starts] + times[model[starts]]
            turn = np.where(starts, 1 - model, turn)
        # What ends at the same moment is taken in together.
        now = ends.min(1)
        for who, chance in ((SMALL, load.p), (LARGE, load.q)):
            over = ends[:, who] <= now
            batch = np.where(over, running[:, who], 0)
            moved = rng.binomial(batch, chance)
            waiting[:, 1 - who] += moved
            waiting[:, who] += batch - moved
            done += batch - (moved if who == SMALL and load.discard else 0)
            running[over, who], ends[over, who] = 0, np.inf
    before, since = warm or (0, 0.0)
    return 1000 * float(done.sum() - before) / float(now.sum() - since)


@dataclass(frozen=True, kw_only=True)
class SimulateReport(Report):
    """Throughput of each setting, the best per number of requests marked."""

    def __str__(self) -> str:
        lines = [f"{'requests':>8}  {'large from':>10}  {'tokens/s':>8}  {'ms per token':>12}"]
        best: dict[int, float] = {}
        for row in self.rows:
            requests = int(row.labels["requests"])
            best[requests] = max(best.get(requests, 0.0), row.value)
        for row in self.rows:
            requests, batch = int(row.labels["requests"]), row.labels["large_batch"]
            mark = "  best" if row.value == best[requests] else ""
            lines.append(f"{requests:>8}  {batch:>10}  {row.value:8.1f}  {1000 * requests / row.value:12.2f}{mark}")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def simulate(cfg: SimulateConfig, run: Run) -> SimulateReport:
    """Try every number of requests with every batch of the large model that cannot deadlock.

    Raises:
        ValueError: None can start.
    """
    load = Load(
        p=cfg.p,
        q=cfg.q,
        small_ms=cfg.small_ms,
        large_ms=cfg.large_ms,
        discard=cfg.discard,
        shared=cfg.shared,
    )
    settings = [
        (requests, (cfg.small_batch, batch))
        for requests in cfg.requests
        for batch in cfg.large_batches
        if can_start(requests, (cfg.small_batch, batch))
    ]
    if not settings:
        raise ValueError("every setting can deadlock: all requests would wait for company; lower the batches")
    for requests, batches in settings:
        value = throughput(load, requests=requests, batches=batches, tokens=cfg.tokens, seed=cfg.seed)
        run.row(
            "throughput",
            value,
            unit="tokens/s",
            better="higher",
            n=cfg.tokens,
            labels={"requests": requests, "small_batch": batches[SMALL], "large_batch": batches[LARGE]},
        )
    return SimulateReport.of(run)
