"""Choose tau for a wanted share of large tokens, or a wanted time per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from hone_core.devices import resolve_device
from hone_core.runs import Report, Run

from .config import CalibrateConfig, StitchConfig
from .data import products, read_problems
from .evaluate import Answers, Outcome
from .host import load_models
from .method import token_time

__all__ = ["CalibrateReport", "Search", "calibrate", "find_tau"]

LOWEST = 1e-6
"""Least uncertainty, over ln V, at which the small model is still stopped."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search for tau came to.

    Attributes:
        tau: the threshold whose value is nearest to the wanted one.
        value: share or time there.
        reached: it is near enough.
        tried: (tau, value) in the order of trial.
    """

    tau: float
    value: float
    reached: bool
    tried: tuple[tuple[float, float], ...]


def find_tau(
    value_at: Callable[[float], float], wanted: float, *, gate: str = "entropy", tolerance: float, rounds: int
) -> Search:
    """Halve an interval of thresholds, on a scale of factors, until the value is near enough.

    Args:
        value_at: Threshold to share or time. It falls as the small model is let go on; where answers change with the
            threshold it need not do so smoothly.
        wanted: The value to reach.
        gate: ``entropy``, or ``confidence``, whose thresholds run the other way.
        tolerance: How near is near enough.
        rounds: Trials at most.
    """

    def tau_of(doubt: float) -> float:
        return doubt if gate == "entropy" else 1 - doubt

    low, high = math.log(LOWEST), 0.0
    tried: list[tuple[float, float]] = []
    for doubt in (low, high):
        tried.append((tau_of(math.exp(doubt)), value_at(tau_of(math.exp(doubt)))))
    while len(tried) < rounds and all(abs(value - wanted) > tolerance for _, value in tried):
        if not tried[1][1] <= wanted <= tried[0][1]:
            break  # no threshold reaches it
        middle = (low + high) / 2
        tau = tau_of(math.exp(middle))
        tried.append((tau, value_at(tau)))
        low, high = (middle, high) if tried[-1][1] > wanted else (low, middle)
    tau, value = min(tried, key=lambda pair: abs(pair[1] - wanted))
    return Search(tau, value, abs(value - wanted) <= tolerance, tuple(tried))


@dataclass(frozen=True, kw_only=True)
class CalibrateReport(Report):
    """Thresholds that were tried and the one to take."""

    def __str__(self) -> str:
        rows = {row.metric: row for row in self.rows if row.metric in ("tau", "found", "wanted")}
        what = rows["found"].variant
        lines = [
            f"tau {float(row.variant):<12.6g} {what} {row.value:.4f}" for row in self.rows if row.metric == "tried"
        ]
        tau, found, wanted = rows["tau"].value, rows["found"].value, rows["wanted"].value
        lines.append(f"take tau {tau:.6g}: {what} {found:.4f}, wanted {wanted:.4f} within {rows['wanted'].spread:g}")
        if abs(found - wanted) > (rows["wanted"].spread or 0):
            lines.append("NOT REACHED: no threshold tried comes near enough; try more rounds, or want something else")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def calibrate(cfg: CalibrateConfig, run: Run) -> CalibrateReport:
    """Search on a set of problems, whose answers are not graded for it."""
    pair = load_models(cfg.models, device=resolve_device(run.device))
    # Where they are generated, with a seed of their own: of a hundred about six are among the five hundred of eval.
    found = None if cfg.data is None else read_problems(cfg.data, limit=cfg.limit)
    problems = found or products(cfg.limit, seed=50_000 + cfg.seed)
    answers = Answers(
        run.artifacts / "answers.jsonl",
        pair,
        problems,
        cfg.sampling,
        batch=cfg.batch,
        seed=cfg.seed,
        quiet=run.quiet,
    )

    def value_at(tau: float) -> float:
        outcome = answers.ask(replace(cfg.stitch, tau=tau), label=f"tau {tau!r}")
        return value_of(outcome, cfg)

    wanted = cfg.share if cfg.time is None else cfg.time
    search = find_tau(value_at, wanted, gate=cfg.stitch.gate, tolerance=cfg.tolerance, rounds=cfg.rounds)
    what = "share" if cfg.time is None else "time"
    for tau, value in search.tried:
        run.row("tried", value, better="none", n=len(problems), variant=repr(tau))
    run.row("tau", search.tau, better="none", n=len(problems))
    run.row("found", search.value, better="none", n=len(problems), variant=what)
    run.row("wanted", wanted, better="none", spread=cfg.tolerance, variant=what)
    return CalibrateReport.of(run)


def value_of(outcome: Outcome, cfg: CalibrateConfig) -> float:
    """Share of large tokens, or time per token in steps of the large model, whichever is wanted."""
    if cfg.time is None:
        return outcome.share
    return token_time(outcome.share, outcome.discards, small=1 / cfg.time_ratio, large=1.0)


def matching_tau(answers: Answers, stitch: StitchConfig, share: float, *, tolerance: float, rounds: int) -> Search:
    """The threshold at which a gate comes to a share, on some problems."""
    return find_tau(
        lambda tau: answers.ask(replace(stitch, tau=tau), label=f"{replace(stitch, tau=tau).label} {tau!r}").share,
        share,
        gate=stitch.gate,
        tolerance=tolerance,
        rounds=rounds,
    )
