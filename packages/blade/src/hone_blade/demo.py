"""The demo: the same prompts and noise dense, with BLADE's attention, and with static masks of equal density.

Runs on the packaged tiny host in about a minute on an idle two-core CPU and downloads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_video.host import load_host
from hone_video.prompts import describe, parse_prompt
from hone_video.sheets import contact_sheet, describe_clips, write_video

from . import plots
from .config import DemoConfig
from .evaluate import Outcome, compare, comparison_table, means, write_rows

__all__ = ["DemoReport", "demo"]

NOTE = (
    "On a CPU and at this size (1,024 tokens) sparse attention is not expected to be faster: attention is a small\n"
    "part of the network, and the CPU backend is the reference, which computes every pair and masks it. What a\n"
    "block-sparse kernel leaves out shows in the last column; times at real sizes come from `hone-blade bench`."
)


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, the table.

    Attributes:
        video: MP4 of all clips side by side.
        sheet: PNG of a few frames of each.
        clips: per variant.
        variants: name -> metric -> mean.
    """

    video: Path
    sheet: Path
    clips: int
    variants: dict[str, dict[str, float]]

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a run whose rows are written."""
        variants, clips = means(run)
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            video=run.artifacts / "demo.mp4",
            sheet=run.figures / "contact_sheet.png",
            clips=clips,
            variants=variants,
        )

    def __str__(self) -> str:
        return "\n".join(
            [
                comparison_table(self.variants, self.clips),
                NOTE,
                "",
                f"video          {self.video}",
                f"contact sheet  {self.sheet}",
                f"results        {self.path / 'results.json'}",
            ]
        )


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Sample, compare, draw and write the rows.

    Args:
        cfg: prompts and density.
        run: the run, entered.

    Raises:
        CheckpointError: there is no such host.
        ValueError: the comparison does not fit the host; nothing has been sampled then.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    labels = torch.tensor([parse_prompt(prompt) for prompt in cfg.prompts[: cfg.limit]])
    outcomes = compare(
        host,
        labels,
        cfg.comparison,
        batch=len(labels),
        stats_every=cfg.stats_every,
        quiet=run.quiet,
    )
    write_rows(run, outcomes)
    clips = {name: outcome.clips for name, outcome in outcomes.items()}
    prompts = [describe(row) for row in labels]
    title = f"same prompts and noise; sparse columns compute {_reached(outcomes, cfg.comparison.density)}"
    captions = {
        name: describe_clips(
            host.classifier, outcome.clips, outcome.grades["accuracy"], None if name == "dense" else outcome.psnr
        )
        for name, outcome in outcomes.items()
    }
    report = DemoReport.of(run)
    contact_sheet(clips, prompts, captions, report.sheet, looks=plots.LOOKS, title=title)
    write_video(clips, prompts, report.video, looks=plots.LOOKS, title=title)
    return report


def _reached(outcomes: Mapping[str, Outcome], asked: float) -> str:
    """The share of pairs that the sparse variants computed, and the one asked for where that is another."""
    shares = sorted(outcome.density for name, outcome in outcomes.items() if name != "dense")
    low, high, wanted = (f"{100 * share:.3g}%" for share in (shares[0], shares[-1], asked))
    shown = low if low == high else f"{low} to {high}"
    return f"{shown} of the query-key pairs" + ("" if shown == wanted else f" ({wanted} asked for)")
