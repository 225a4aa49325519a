"""The demo: the same prompts and noise dense, rounded, windowed, both, and both after training, side by side.

Runs on the packaged tiny host on a CPU, where E4M3 is emulated value for value, and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_video.prompts import describe, parse_prompt
from hone_video.sheets import contact_sheet, describe_clips, write_video

from .config import DemoConfig
from .evaluate import LOOKS, EvalReport, compare, load_variants, write_rows

__all__ = ["DemoReport", "demo"]

NOTE = (
    "On a CPU nothing here is faster: E4M3 is emulated, and the window is masked out of all pairs. What is read\n"
    "shows in the density; times at real sizes come from `hone-fpsattention bench` on a GPU."
)


@dataclass(frozen=True, kw_only=True)
class DemoReport(EvalReport):
    """Result of the demo; as text, the table.

    Attributes:
        video: MP4 of all clips side by side.
        sheet: PNG of a few frames of each.
    """

    video: Path
    sheet: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a run whose rows are written."""
        video, sheet = run.artifacts / "demo.mp4", run.figures / "contact_sheet.png"
        return cls(path=run.path, rows=tuple(run.rows), video=video, sheet=sheet)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{NOTE}\nvideo    {self.video}\nsheet    {self.sheet}"


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Sample, compare, draw and write the rows.

    Args:
        cfg: Prompts and hosts.
        run: The run, entered.

    Raises:
        CheckpointError: A host is missing or of another package.
    """
    variants = load_variants(resolve_device(run.device), host=cfg.host, tuned=cfg.tuned, preset=cfg.preset)
    labels = torch.tensor([parse_prompt(prompt) for prompt in cfg.prompts[: cfg.limit]])
    outcomes = compare(variants, labels, steps=cfg.steps, batch=len(labels), seed=cfg.seed, quiet=run.quiet)
    write_rows(run, outcomes)
    clips = {name: outcome.clips for name, outcome in outcomes.items()}
    prompts = [describe(row) for row in labels]
    classifier = variants["dense"].host.classifier
    captions = {
        name: describe_clips(
            classifier, outcome.clips, outcome.grades["accuracy"], None if name == "dense" else outcome.psnr
        )
        for name, outcome in outcomes.items()
    }
    report = DemoReport.of(run)
    title = f"same prompts and noise; windows read {outcomes['both'].density:.1%} of the query-key pairs"
    contact_sheet(clips, prompts, captions, report.sheet, looks=LOOKS, title=title)
    write_video(clips, prompts, report.video, looks=LOOKS, title=title)
    return report
