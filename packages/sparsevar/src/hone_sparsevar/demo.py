"""The demo: the same scenes dense, sparse, stopped early and with other masks, at about the same work.

Runs on the packaged tiny host on a CPU and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hone_core.devices import resolve_device
from hone_core.runs import Report, Run

from . import plots
from .calibrate import chosen
from .config import DemoConfig
from .data import caption
from .evaluate import compare, real_features, scenes, table, write_rows
from .host import load_host
from .models import variant_of

__all__ = ["SHOWN", "DemoReport", "demo"]

SHOWN = ("dense", "sparse", "early-stop-1", "random", "inverse", "zero")


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, the table.

    Attributes:
        sheet: Images of every variant.
        maps: What ran of the first image.
    """

    sheet: Path
    maps: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a run whose rows are written."""
        return cls(path=run.path, rows=tuple(run.rows), sheet=run.figures / "sheet.png", maps=run.figures / "maps.png")

    def __str__(self) -> str:
        return f"{table(self.rows)}\nsheet    {self.sheet}\nmaps     {self.maps}\nresults  {self.path / 'results.json'}"


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Draw, compare and show.

    Raises:
        CheckpointError: There is no host.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    labels, images = scenes(cfg.limit, cfg.seed)
    settings = chosen(host, cfg.settings)
    policies = {name: variant_of(name, settings) for name in SHOWN}
    outcomes = compare(host, policies, labels, seed=cfg.seed, batch=cfg.limit, quiet=run.quiet)
    write_rows(run, outcomes, real_features(host, images, cfg.limit))
    captions = {}
    for name, outcome in outcomes.items():
        right = f"objects {outcome.grades['objects'].mean():.2f}"
        captions[name] = f"{outcome.gflops:.2f} GFLOP, {outcome.kept:.0%} of tokens, {right}"
        if "psnr" in outcome.grades:
            captions[name] += f", {outcome.grades['psnr'].mean():.1f} dB to dense"
    report = DemoReport.of(run)
    shown = {name: outcome.images[:6] for name, outcome in outcomes.items()}
    plots.sheet(shown, captions, [caption(label) for label in labels[:6]], report.sheet)
    sparse = outcomes["sparse"]
    state = sparse.run.state
    plots.maps(
        sparse.images[0],
        {scale: score[0] for scale, score in state.scores.items()},
        {scale: kept[0] for scale, kept in state.kept.items()},
        report.maps,
    )
    return report
