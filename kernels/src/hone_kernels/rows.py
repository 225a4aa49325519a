"""Rows of results: a call that was timed is a time, a rate and an error; and the table that a person reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hone_core.runs import Report, Row, Run
from hone_core.timing import Timing

__all__ = ["DENSE", "TimesReport", "table", "timed"]

DENSE = "cudnn dense"
"""The variant whose time is the one to beat. A name that ends in "dense" computes every pair."""

_UNITS = {"TFLOP/s": 1e9, "GB/s": 1e6}

_log = logging.getLogger(__name__)


def timed(
    run: Run,
    variant: str,
    timing: Timing,
    *,
    split: str,
    work: float = 0.0,
    unit: str = "TFLOP/s",
    error: float | None = None,
    **labels: Any,
) -> None:
    """Write the rows ``time``, ``rate`` and ``error`` of a call.

    Args:
        run: Gets them.
        variant: What ran.
        timing: Its times; ``spread`` is half of what lies between the 20th and the 80th percentile.
        split: What of the op: ``forward``, ``prologue`` ...
        work: Operations or bytes of a call; 0 if it has no rate.
        unit: Of the rate, ``TFLOP/s`` or ``GB/s``.
        error: Relative to the reference; None if it was not compared.
        labels: Shape, density and what else tells rows apart; ``kernel`` and ``settings`` name launch settings with
            which it ran, where a results file shall say them.
    """
    fields: dict[str, Any] = dict(variant=variant, split=split, n=timing.n, labels=labels)
    spread = (timing.ms_p80 - timing.ms_p20) / 2
    rows = [run.row("time", timing.ms_p50, unit="ms", better="lower", spread=spread, **fields)]
    if work:
        rows.append(run.row("rate", work / timing.ms_p50 / _UNITS[unit], unit=unit, better="higher", **fields))
    if error is not None:
        run.row("error", error, better="lower", **fields)
    where = " ".join(str(labels[key]) for key in ("shape", "dtype", "density") if key in labels)
    _log.info("%s %s %s: %s", where, split, variant, ", ".join(f"{row.value:.4g} {row.unit}" for row in rows))


@dataclass(frozen=True, kw_only=True)
class TimesReport(Report):
    """What was timed."""

    def __str__(self) -> str:
        return f"{table(self.rows)}\nresults  {self.path / 'results.json'}"


def table(rows: Sequence[Row]) -> str:
    """The rows as text: time, rate, how many times faster than the dense attention beside it, which, and error.

    The dense attention is that which a row names as ``dense``, the fastest of its run, else cuDNN's. Memory is a column
    where it was measured.
    """
    calls: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        place = tuple(sorted((k, v) for k, v in row.labels.items() if k not in ("kernel", "settings")))
        calls.setdefault((row.variant, row.split, place), {})[row.metric] = row
    held = any(row.metric == "memory" for row in rows)
    lines = [("shape", "dtype", "what", "density", "variant", "ms", "rate", "x dense", "of", "error") + ("MiB",) * held]
    for (variant, split, place), found in calls.items():
        labels = dict(place)
        best = labels.get("dense", DENSE)
        dense = calls.get((best, split, place), {}).get("time")
        time, rate, error, host, memory = (
            found.get(metric) for metric in ("time", "rate", "error", "host_us", "memory")
        )
        speed = f"{host.value:.1f} us of the host" if host else "-"
        lines.append(
            (
                " ".join(str(labels[name]) for name in ("shape", "memory") if name in labels),
                *(str(labels.get("dtype", "")), split),
                *(f"{labels['density']:.2f}" if "density" in labels else "-", variant),
                *(f"{time.value:.3f}" if time else "-", f"{rate.value:.0f} {rate.unit}" if rate else speed),
                *((f"{dense.value / time.value:.2f}", best.removesuffix(" dense")) if dense and time else ("-", "-")),
                f"{error.value:.1e}" if error else "-",
                *((f"{memory.value:.1f}" if memory else "-",) if held else ()),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < 5 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines
    )
