"""Claims put to the test on hosts of several seeds: what an interval decides, what the seeds say together, a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_core.statistics import bootstrap_interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "SEEDS",
    "VERDICTS",
    "ClaimsReport",
    "MarginsReport",
    "VerdictReport",
    "decided",
    "decided_over",
    "verdict_over_margins",
    "verdict_over_seeds",
    "write_claims",
]

SEEDS = 3
"""Hosts that a verdict needs at least."""
VERDICT = "verdict.json"
VERDICTS = "verdicts.json"
"""Artifact of ``MarginsReport``: claim to verdict."""


def decided(margins: "ArrayLike", *, seed: int = 0) -> dict[str, Any]:
    """What a difference per item says of the claim that it is above zero.

    Args:
        margins: ``[N]``.
        seed: Of the bootstrap.

    Returns:
        ``margin``, its mean; ``interval``, the mean's 95 % bootstrap interval; ``holds``: yes, no or undecided, by
        whether the interval lies above zero, below, or around it.
    """
    import numpy as np

    return _said(float(np.asarray(margins, dtype=np.float64).mean()), bootstrap_interval(margins, seed=seed))


def decided_over(margin: float, draws: "ArrayLike") -> dict[str, Any]:
    """As ``decided``, of a number that is no mean.

    Args:
        margin: The number.
        draws: ``[draws]``, the number of each bootstrap sample.
    """
    import numpy as np

    low, high = np.percentile(np.asarray(draws, dtype=np.float64), [2.5, 97.5])
    return _said(float(margin), (float(low), float(high)))


def _said(margin: float, interval: tuple[float, float]) -> dict[str, Any]:
    low, high = interval
    holds = "yes" if low > 0 else "no" if high <= 0 else "undecided"
    return {"margin": margin, "interval": [low, high], "holds": holds}


def verdict_over_seeds(holds: Sequence[str]) -> str:
    """Over the seeds: confirmed or refuted where there are enough of them and all say so."""
    if not holds:
        return "NOT TESTED"
    counts = ", ".join(f"{word} on {holds.count(word)}" for word in ("yes", "no", "undecided") if word in holds)
    if len(holds) < SEEDS:
        return f"UNDECIDED, {len(holds)} of {SEEDS} seeds ({counts})"
    if len(set(holds)) == 1 and holds[0] != "undecided":
        return f"{'CONFIRMED' if holds[0] == 'yes' else 'REFUTED'} ({counts})"
    return f"{'MIXED' if {'yes', 'no'} <= set(holds) else 'UNDECIDED'} ({counts})"


def verdict_over_margins(margins: Sequence[float]) -> str:
    """Of a claim that holds where its number is positive, one number a seed: what all of them say, by sign alone."""
    positive = sum(margin > 0 for margin in margins)
    if len(margins) < SEEDS:
        return f"UNDECIDED, {len(margins)} of {SEEDS} seeds"
    if positive in (0, len(margins)):
        return "CONFIRMED" if positive else "REFUTED"
    return f"MIXED, {positive} of {len(margins)}"


def write_claims(
    run: Run,
    heading: str,
    rules: Mapping[str, str],
    hosts: Sequence[Mapping[str, Any]],
    *,
    unit: Mapping[str, str],
    items: int,
) -> "ClaimsReport":
    """Add a row of each claim and host, write the verdict, and return the report.

    Args:
        run: The run, entered.
        heading: What was compared, in a line.
        rules: Claim to the rule that was fixed beforehand.
        hosts: Each with ``name`` and ``claims``: claim to what ``decided`` gave. A claim that a host cannot answer is
            left out.
        unit: Of each claim's margin.
        items: That each margin is over.
    """
    for host in hosts:
        for claim, numbers in host["claims"].items():
            run.row(
                "margin",
                numbers["margin"],
                unit=unit[claim],
                better="none",
                n=items,
                interval=(numbers["interval"][0], numbers["interval"][1]),
                variant=claim,
                split=host["name"],
                labels={"holds": numbers["holds"]},
            )
    claims = {
        claim: verdict_over_seeds([host["claims"][claim]["holds"] for host in hosts if claim in host["claims"]])
        for claim in rules
    }
    verdict = {"heading": heading, "rules": dict(rules), "unit": dict(unit), "claims": claims, "hosts": list(hosts)}
    atomic_write_json(run.artifacts / VERDICT, verdict)
    return ClaimsReport.of(run)


@dataclass(frozen=True, kw_only=True)
class VerdictReport(Report):
    """A verdict; a package says how it reads.

    Attributes:
        verdict: Contents of ``artifacts/verdict.json``.
    """

    verdict: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows and verdict are written."""
        verdict = json.loads((run.artifacts / VERDICT).read_text(encoding="utf-8"))
        return cls(path=run.path, rows=tuple(run.rows), verdict=verdict)


@dataclass(frozen=True, kw_only=True)
class ClaimsReport(VerdictReport):
    """Verdicts; as text, with their numbers."""

    def __str__(self) -> str:
        found = self.verdict
        lines = [found["heading"]]
        for claim, rule in found["rules"].items():
            lines.append(f"{claim}: {found['claims'][claim]} ({rule})")
            for host in found["hosts"]:
                if claim in host["claims"]:
                    numbers, unit = host["claims"][claim], found["unit"][claim]
                    low, high = numbers["interval"]
                    text = f"  {host['name']}: {numbers['margin']:+.3g} [{low:+.3g}, {high:+.3g}] {unit}"
                    lines.append(text.rstrip())
        return "\n".join([*lines, f"pictures {self.path / 'figures'}", f"results  {self.path / 'results.json'}"])


@dataclass(frozen=True, kw_only=True)
class MarginsReport(Report):
    """Verdicts of ``verdict_over_margins``; a package says how they read.

    Attributes:
        verdicts: Claim to verdict.
    """

    verdicts: Mapping[str, str]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows and artifact ``VERDICTS`` are written."""
        found = json.loads((run.artifacts / VERDICTS).read_text(encoding="utf-8"))
        return cls(path=run.path, rows=tuple(run.rows), verdicts=found)
