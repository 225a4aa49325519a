"""What the method did in one image: the map, the tokens that ran, keys and work of every scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hone_core.devices import resolve_device
from hone_core.runs import Report, Run

from . import plots
from .calibrate import chosen
from .config import InspectConfig
from .data import caption
from .evaluate import scenes
from .flops import scale_gflops
from .host import load_host
from .models import SparsePolicy

__all__ = ["InspectReport", "inspect"]


@dataclass(frozen=True, kw_only=True)
class InspectReport(Report):
    """Result of ``inspect``; as text, a line per scale.

    Attributes:
        maps: PNG of the maps and what ran.
    """

    maps: Path

    @classmethod
    def of(cls, run: Run) -> InspectReport:
        """Return the report of a run whose rows are written."""
        return cls(path=run.path, rows=tuple(run.rows), maps=run.figures / "maps.png")

    def __str__(self) -> str:
        lines = [f"{'scale':<8}{'tokens':>8}{'kept':>8}{'keys':>8}{'GFLOP':>9}"]
        names = dict.fromkeys(row.variant for row in self.rows)
        values = {(row.variant, row.metric): row.value for row in self.rows}
        for name in names:
            counts = "".join(f"{values[name, metric]:>8.0f}" for metric in ("tokens", "kept", "keys"))
            lines.append(f"{name:<8}{counts}{values[name, 'gflops']:>9.3f}")
        return "\n".join([*lines, f"maps     {self.maps}"])


def inspect(cfg: InspectConfig, run: Run) -> InspectReport:
    """Draw one image and write down what ran.

    Raises:
        CheckpointError: There is no host.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    labels, _ = scenes(1, cfg.seed)
    drawn = host.draw(labels, [cfg.seed], policy=SparsePolicy(chosen(host, cfg.settings)))
    words = 1 + caption(labels[0]).count(",") * 3 + 3
    for record in drawn.records:
        found = {"tokens": record.tokens, "kept": record.kept, "keys": record.keys}
        found["gflops"] = scale_gflops(record, host.transformer, words)  # type: ignore[assignment]
        for metric, value in found.items():
            run.row(metric, value, better="none", variant=str(record.scale))
    report = InspectReport.of(run)
    state = drawn.state
    plots.maps(
        ((drawn.image() + 1) / 2)[0],
        {scale: score[0] for scale, score in state.scores.items()},
        {scale: kept[0] for scale, kept in state.kept.items()},
        report.maps,
    )
    return report
