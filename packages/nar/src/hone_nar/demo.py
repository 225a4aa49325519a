"""The demo: digits by NAR and by a raster model, and by one head of NAR alone; the picture growing from its corner.

Runs on the packaged tiny host on a CPU and downloads nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from torch import Tensor

from . import plots
from .config import DemoConfig
from .evaluate import likelihood_rows, table, variants_of
from .generation import Decoding
from .host import draw_digits, load_host
from .places import host_of

__all__ = ["DemoReport", "demo"]


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, the table.

    Attributes:
        sheet: Digits of every variant.
        growth: What is there after each pass, as a GIF.
    """

    sheet: Path
    growth: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a run whose rows are written."""
        figures = run.figures
        return cls(path=run.path, rows=tuple(run.rows), sheet=figures / "sheet.png", growth=figures / "growth.gif")

    def __str__(self) -> str:
        paths = f"growth   {self.growth}\nsheet    {self.sheet}\nresults  {self.path / 'results.json'}"
        return f"{table(self.rows)}\n{paths}"


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Draw, compare and show.

    Raises:
        CheckpointError: There is no host.
    """
    host = load_host(resolve_device(run.device), path=cfg.host or host_of(cfg.data))
    task = host.task
    labels = torch.arange(cfg.limit) % task.classes
    seeds = range(cfg.seed, cfg.seed + cfg.limit)
    frames: dict[str, list[Tensor]] = {}
    images, captions = {}, {}
    for variant in variants_of(host):
        nll = likelihood_rows(run, variant)
        shown: list[Tensor] = []

        def keep(state: Decoding, step: int, shown: list[Tensor] = shown) -> None:
            order = state.model.order
            drawn = torch.zeros(state.model.tokens, dtype=torch.bool)
            drawn[list(order.ids[: order.starts[step + 1]])] = True
            pictures = task.to_image(state.raster().cpu())
            shown.append(torch.stack([plots.unfinished(picture, task.flat(drawn)) for picture in pictures]))

        options = {"guidance": cfg.guidance, "kind": variant.kind}
        draw_digits(variant.model, labels, seeds, on_step=keep, **options)  # type: ignore[arg-type]
        begin = time.perf_counter()
        tokens = draw_digits(variant.model, labels, seeds, **options)  # type: ignore[arg-type]
        per_image = 1e3 * (time.perf_counter() - begin) / cfg.limit
        right = task.accuracy(tokens, labels).float()
        run.row("accuracy", float(right.mean()), better="higher", n=cfg.limit, variant=variant.name)
        run.row("passes", variant.passes, unit="passes", better="lower", variant=variant.name)
        run.row(
            "time_per_image", per_image, unit="ms", better="lower", n=cfg.limit, variant=variant.name,
            labels={"batch": cfg.limit},
        )  # fmt: skip
        if variant.name in ("nar", "raster"):
            frames[variant.name] = shown
        images[variant.name] = task.to_image(tokens.cpu()).expand(-1, 3, -1, -1)
        captions[variant.name] = (
            f"{variant.passes} passes", f"{per_image:.1f} ms an image", f"{float(nll.mean()):.2f} bits per token"
        )  # fmt: skip
    report = DemoReport.of(run)
    plots.sheet(images, captions, report.sheet)
    plots.growth(frames, report.growth)
    return report
