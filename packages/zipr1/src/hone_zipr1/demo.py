"""The demo: a tiny model reads digits off a mosaic with fewer and fewer tokens.

Runs on the packaged host on a two-core CPU and downloads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run

from . import plots
from .config import PRESETS, DemoConfig
from .data import questions
from .grading import DENSE, Outcome, ask, held_out, peers, table, write_rows
from .host import Host, load_host
from .models import attach

__all__ = ["DemoReport", "demo"]


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, some answers and the table.

    Attributes:
        shown: per question its text, the right answer, and the answer at each setting.
        chart: accuracy against the token ratio.
        maps: what each layer kept.
    """

    shown: tuple[Mapping[str, Any], ...]
    chart: Path
    maps: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a finished run."""
        shown = json.loads((run.artifacts / "shown.json").read_text(encoding="utf-8"))
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            shown=tuple(shown),
            chart=run.figures / "curve.png",
            maps=run.figures / "kept.png",
        )

    def __str__(self) -> str:
        lines = []
        for row in self.shown:
            said = ", ".join(f"{name} {answer}" for name, answer in row["answers"].items())
            lines.append(f"{row['question']} = {row['right']}: {said}")
        files = {"picture": self.chart, "kept": self.maps, "results": self.path / "results.json"}
        return "\n".join([*lines, "", table(self.rows), *(f"{name:<8} {file}" for name, file in files.items())])


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Answer at every threshold, beside the dense model and other ways to choose tokens."""
    host = load_host(resolve_device(run.device), path=cfg.host)
    asked = held_out(host, cfg.items, cfg.seed)
    base = PRESETS["tiny"].config
    dense = ask(host, asked, None, batch=cfg.batch)
    lines: dict[str, list[Outcome]] = {name: [] for name in plots.STYLES}
    for p in cfg.ps:
        outcome = ask(host, asked, replace(base, p=p), batch=cfg.batch)
        lines["top-p"].append(outcome)
        for other in peers(host, asked, outcome, replace(base, p=p), batch=cfg.batch):
            lines[other.label.split()[0]].append(other)
    for outcome in (dense, *(one for line in lines.values() for one in line)):
        write_rows(run, outcome)
    shown = _shown(host, asked, cfg, [dense, *lines["top-p"]])
    atomic_write_json(run.artifacts / "shown.json", shown)
    plots.curve(lines, dense, run.figures / "curve.png", title=f"{cfg.items} mosaics of held-out digits, tiny host")
    plots.heat_maps(shown, run.figures / "kept.png", title=f"kept at p = {cfg.ps[0]:g}")
    return DemoReport.of(run)


def _shown(host: Host, asked: Any, cfg: DemoConfig, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """The first questions with all answers, and what each layer kept of their pictures at the first threshold."""
    few = asked.part(slice(0, cfg.shown))
    with attach(host.model, replace(PRESETS["tiny"].config, p=cfg.ps[0])) as handle:
        host.model(**host.inputs(few))
        stats = handle.stats
    assert stats is not None, "a prefill leaves them"
    side = 2 * host.config.cells
    maps = [keep[:, 1 : 1 + side * side].reshape(-1, side, side).int().tolist() for keep in stats.keep.values()]
    found = []
    for row, (question, right) in enumerate(zip(questions(few), few.answer.tolist(), strict=True)):
        answers = {one.label: host.read(one.ids[row : row + 1])[0] for one in outcomes}
        found.append(
            {
                "question": question,
                "right": right,
                "answer": f"{answers[outcomes[1].label]} ({DENSE} {answers[DENSE]}, right {right})",
                "answers": answers,
                "image": few.image_01[row].cpu().round(decimals=3).tolist(),
                "keep": [layer[row] for layer in maps],
            }
        )
    return found
