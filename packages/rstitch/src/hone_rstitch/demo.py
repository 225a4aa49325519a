"""The demo: two tiny trained models multiply together, and every character says who wrote it and how sure it was.

Runs on the packaged pair on a two-core CPU and downloads nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run

from . import plots
from .config import LARGE, PRESETS, SMALL, DemoConfig, SamplingConfig, StitchConfig
from .data import grade, products
from .evaluate import Answers, cascade, matched_random, step_ratio, table, write_rows
from .host import load_host
from .models import Pair

__all__ = ["DemoReport", "demo", "records", "show_answer"]

ANSI = ("\033[34m", "\033[1;31m", "\033[0m")


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, answers and the table.

    Attributes:
        answers: per shown problem: question, right, tokens with text, model and entropy, usage.
        chart: accuracy against the large model's share.
        sheet: the answers with their entropies.
    """

    answers: tuple[Mapping[str, Any], ...]
    chart: Path
    sheet: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a finished run."""
        answers = json.loads((run.artifacts / "shown.json").read_text(encoding="utf-8"))
        chart, sheet = run.figures / "curve.png", run.figures / "answers.png"
        return cls(path=run.path, rows=tuple(run.rows), answers=tuple(answers), chart=chart, sheet=sheet)

    def __str__(self) -> str:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        lines = ["large model in red:" if color else "large model in [brackets]:"]
        lines += [show_answer(answer, color=color) for answer in self.answers]
        lines += [
            "",
            table(self.rows),
            "cost in steps of the large model, of which a small one is the ratio of weights",
        ]
        files = {"picture": self.chart, "answers": self.sheet, "results": self.path / "results.json"}
        return "\n".join([*lines, *(f"{name:<8} {file}" for name, file in files.items())])


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Answer, draw who wrote what, and hold the gate against chance at equal share."""
    pair = load_host(cfg.pair, device=resolve_device(run.device))
    ratio = step_ratio(pair)
    problems = products(cfg.items, seed=1000 + cfg.seed)
    gate = PRESETS["tiny"].config
    shown = records(pair, [problem.question for problem in problems[: cfg.shown]], gate, SamplingConfig(), cfg.seed)
    for record, problem in zip(shown, problems, strict=False):
        record["right"] = grade(record["text"], problem.answer)
    atomic_write_json(run.artifacts / "shown.json", shown)
    plots.answers(shown, run.figures / "answers.png", title=f"two models, one answer ({gate.label})")
    answers = Answers(
        run.artifacts / "answers.jsonl",
        pair,
        problems,
        SamplingConfig(),
        batch=cfg.batch,
        seed=cfg.seed,
        quiet=run.quiet,
    )
    alone = {policy: answers.ask(StitchConfig(policy=policy)) for policy in ("small", "large")}
    lines: dict[str, list[Any]] = {"stitch": [], "random": [], "cascade": []}
    for tau in cfg.taus:
        stitched = answers.ask(StitchConfig(tau=tau))
        lines["stitch"].append(stitched)
        lines["random"].append(answers.ask(matched_random(stitched), label=f"random as {stitched.label}"))
        asked_anew = cascade(alone["small"], alone["large"], calls=stitched.calls(LARGE))
        lines["cascade"].append(replace(asked_anew, label=f"cascade as {stitched.label}"))
    for outcome in (*alone.values(), *lines["stitch"], *lines["random"], *lines["cascade"]):
        write_rows(run, outcome, ratio)
    plots.curve(lines, alone, run.figures / "curve.png", title=f"{cfg.items} held-out products, tiny pair {cfg.pair}")
    return DemoReport.of(run)


def records(
    pair: Pair, questions: list[str], stitch: StitchConfig, sampling: SamplingConfig, seed: int, **options: Any
) -> list[dict[str, Any]]:
    """Answers as JSON types, token by token: who wrote it, how sure it was, what it cost."""
    texts, output = pair.answer(questions, stitch, sampling, seed=seed, **options)
    start = output.sequences.shape[1] - output.models.shape[1]
    found = []
    for row, (question, text, usage) in enumerate(zip(questions, texts, output.usage, strict=True)):
        tokens = []
        for at in range(sum(usage.tokens)):
            thrown = float(output.discarded_entropy[row, at])
            tokens.append(
                {
                    "text": pair.tokenizer.decode([int(output.sequences[row, start + at])]),
                    "model": int(output.models[row, at]),
                    "entropy": round(float(output.entropy[row, at]), 6),
                    "logprob": round(float(output.logprobs[row, at]), 6),
                    "discarded_entropy": None if thrown != thrown else round(thrown, 6),
                }
            )
        cost = {
            "small_tokens": usage.tokens[SMALL],
            "large_tokens": usage.tokens[LARGE],
            "small_calls": usage.calls[SMALL],
            "large_calls": usage.calls[LARGE],
            "discarded": usage.discarded,
            "switches": usage.switches,
            "small_seconds": round(usage.seconds[SMALL], 4),
            "large_seconds": round(usage.seconds[LARGE], 4),
        }
        found.append({"question": question, "text": text, "tokens": tokens, "usage": cost})
    return found


def show_answer(answer: Mapping[str, Any], *, color: bool) -> str:
    """One line: the answer with the large model's tokens marked, its largest entropies, its cost."""
    text, active = "", SMALL
    blue, red, end = ANSI
    for token in answer["tokens"]:
        model = token["model"]
        if not color and model != active:
            text += "[" if model == LARGE else "]"
        text += f"{(blue, red)[model]}{token['text']}{end}" if color else token["text"]
        active = model
    text += "]" if active == LARGE and not color else ""
    usage = answer["usage"]
    peak = max(max(t["entropy"], t["discarded_entropy"] or 0.0) for t in answer["tokens"])
    mark = "" if "right" not in answer else " right" if answer["right"] else " wrong"
    return (
        f"{answer['question']} {text}{mark}  large {usage['large_tokens']} of {len(answer['tokens'])} tokens, "
        f"steps {usage['small_calls']} small + {usage['large_calls']} large, highest entropy {peak:.2f}"
    )
