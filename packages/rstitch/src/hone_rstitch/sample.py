"""Answer one question with two models, and say who wrote what."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run

from .config import GenerateConfig
from .demo import records, show_answer
from .host import load_models
from .router import Routing, load_router

__all__ = ["GenerateReport", "generate"]


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """One answer.

    Attributes:
        answer: question, text, tokens with model and entropy, usage.
    """

    answer: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a finished run."""
        answer = json.loads((run.artifacts / "answer.json").read_text(encoding="utf-8"))
        return cls(path=run.path, rows=tuple(run.rows), answer=answer)

    def __str__(self) -> str:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return f"{show_answer(self.answer, color=color)}\ntokens   {self.path / 'artifacts' / 'answer.json'}"


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Answer ``cfg.ask``."""
    pair = load_models(cfg.models, device=resolve_device(run.device))
    options: dict[str, Any] = {"stop": cfg.stop} if cfg.stop else {}
    if cfg.router is not None:
        options["routing"] = Routing(load_router(cfg.router).to(pair.small.device))
    (answer,) = records(pair, [cfg.ask], cfg.stitch, cfg.sampling, cfg.seed, **options)
    atomic_write_json(run.artifacts / "answer.json", answer)
    usage = answer["usage"]
    for name in ("small", "large"):
        run.row("tokens", usage[f"{name}_tokens"], better="none", variant=name)
        run.row("calls", usage[f"{name}_calls"], better="lower", variant=name)
        run.row("seconds", usage[f"{name}_seconds"], unit="s", better="lower", variant=name)
    run.row("discarded", usage["discarded"], better="lower")
    return GenerateReport.of(run)
