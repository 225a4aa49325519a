"""Accuracy, shares and cost of a pair on problems with known answers, beside the baselines at equal share or cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hone_core.devices import resolve_device
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.statistics import bootstrap_interval

from . import plots
from .config import LARGE, SMALL, EvalConfig, SamplingConfig, StitchConfig
from .data import Problem, grade, products, read_problems
from .host import load_models
from .models import Pair
from .router import Routing
from .speculative import agreements, speculative_calls

__all__ = [
    "Answer",
    "Answers",
    "EvalReport",
    "Outcome",
    "auroc",
    "cascade",
    "evaluate",
    "matched_random",
    "step_ratio",
]

GENERATED = 500
"""Generated problems unless the config says how many."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one problem under one setting.

    Attributes:
        text: as written, special tokens left out.
        right: as graded.
        tokens: written and kept, by the small and the large model.
        calls: steps of each.
        discarded: small tokens thrown away.
        switches: times that the large model took over.
        seconds: spent in each model; a batch's time is divided among its rows.
        doubt: highest entropy (over ln V) that the small model had anywhere, thrown-away tokens included; 0 if it was
            not asked.
    """

    text: str
    right: bool
    tokens: tuple[int, int]
    calls: tuple[int, int]
    discarded: int
    switches: int
    seconds: tuple[float, float]
    doubt: float


@dataclass(frozen=True)
class Outcome:
    """All answers under one setting, in the order of the problems.

    Attributes:
        label: of the setting.
        answers: one per problem and sample, those of a problem together.
        samples: answers per problem.
    """

    label: str
    answers: tuple[Answer, ...]
    samples: int = 1

    @property
    def right(self) -> list[bool]:
        """Of each answer."""
        return [answer.right for answer in self.answers]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(np.mean(self.right))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy. Problems are drawn anew with all their answers, which are no new problems."""
        return bootstrap_interval(np.reshape(self.right, (-1, self.samples)).mean(1))

    @property
    def tokens(self) -> float:
        """Mean emitted tokens of an answer."""
        return float(np.mean([sum(answer.tokens) for answer in self.answers]))

    @property
    def share(self) -> float:
        """u: share of all emitted tokens that the large model wrote."""
        tokens = np.sum([answer.tokens for answer in self.answers], 0)
        return float(tokens[LARGE] / max(1, tokens.sum()))

    @property
    def discards(self) -> float:
        """s: small tokens thrown away per emitted token."""
        return sum(answer.discarded for answer in self.answers) / max(1, sum(sum(a.tokens) for a in self.answers))

    @property
    def run_length(self) -> float:
        """Mean run of large tokens."""
        return sum(a.tokens[LARGE] for a in self.answers) / max(1, sum(answer.switches for answer in self.answers))

    def calls(self, model: int) -> float:
        """Mean steps of a model per answer."""
        return float(np.mean([answer.calls[model] for answer in self.answers]))

    def cost(self, ratio: float) -> float:
        """Mean cost of an answer in steps of the large model, of which a small step is ``ratio``; prefills left out."""
        return self.calls(LARGE) + ratio * self.calls(SMALL)


def step_ratio(pair: Pair) -> float:
    """Weights that a small step reads over those of a large one, which is what decoding one token waits for."""
    small, large = (sum(p.numel() for p in model.parameters()) for model in (pair.small, pair.large))
    return small / large


class Answers:
    """Asks a pair, and keeps every answer in a file, so that what was asked once is not asked again.

    Args:
        path: JSON lines.
        pair: Who is asked.
        problems: What.
        sampling: How tokens are drawn.
        format: Of the grader.
        samples: Answers per problem.
        batch: Problems at a time.
        seed: Of the first answer's draws; every answer has its own.
        quiet: Show no progress.
    """

    def __init__(
        self,
        path: Path,
        pair: Pair,
        problems: Sequence[Problem],
        sampling: SamplingConfig,
        *,
        format: Literal["number", "math"] = "number",
        samples: int = 1,
        batch: int = 64,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        self.path, self.pair, self.problems, self.sampling = path, pair, problems, sampling
        self.format, self.samples, self.batch, self.seed, self.quiet = format, samples, batch, seed, quiet
        # A problem that was edited since has another name, and is asked anew.
        self.asked = [
            (f"{problem.id} {_digest(problem)} {sample}", problem) for problem in problems for sample in range(samples)
        ]
        self.known: dict[tuple[str, str], Answer] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):  # a crash left half a line
                path.write_bytes(whole)
            for line in whole.decode("utf-8").splitlines():
                row = json.loads(line)
                fields: dict[str, Any] = {
                    name: tuple(v) if isinstance(v, list) else v for name, v in row["answer"].items()
                }
                self.known[row["setting"], row["name"]] = Answer(**fields)

    def ask(
        self,
        stitch: StitchConfig,
        *,
        label: str | None = None,
        routing: Routing | None = None,
        draft: int | None = None,
    ) -> Outcome:
        """Answers to all problems under a setting.

        Args:
            stitch: Policy and gate.
            label: Of the setting; the config's own if None.
            routing: The router, with policy ``router``.
            draft: Count the calls of speculative decoding with so many drafted tokens; with policy ``large``, greedy.
        """
        label = stitch.label if label is None else label
        left = [(at, name, problem) for at, (name, problem) in enumerate(self.asked) if (label, name) not in self.known]
        parts = [left[start : start + self.batch] for start in range(0, len(left), self.batch)]
        with progress_bar(len(left), desc=label, quiet=self.quiet) as bar:
            for part in parts:
                texts, output = self.pair.answer(
                    [problem.question for _, _, problem in part],
                    stitch,
                    self.sampling,
                    seed=[self.seed * 1_000_003 + at for at, _, _ in part],
                    routing=routing,
                )
                doubts = _doubts(output)
                usages = [(usage.calls[SMALL], usage.calls[LARGE]) for usage in output.usage]
                if draft is not None:
                    usages = self._drafted([problem.question for _, _, problem in part], output, draft)
                lines = []
                for (_, name, problem), text, usage, called, doubt in zip(
                    part, texts, output.usage, usages, doubts, strict=True
                ):
                    answer = Answer(
                        text=text,
                        right=grade(text, problem.answer, self.format),
                        tokens=(usage.tokens[SMALL], usage.tokens[LARGE]),
                        calls=called,
                        discarded=usage.discarded,
                        switches=usage.switches,
                        seconds=(usage.seconds[SMALL], usage.seconds[LARGE]),
                        doubt=doubt,
                    )
                    self.known[label, name] = answer
                    lines.append(json.dumps({"setting": label, "name": name, "answer": asdict(answer)}) + "\n")
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
                bar.update(len(part))
        return Outcome(label, tuple(self.known[label, name] for name, _ in self.asked), self.samples)

    def _drafted(self, questions: Sequence[str], output: Any, draft: int) -> list[tuple[int, int]]:
        """Calls of speculative decoding that would write these texts."""
        count = output.models.shape[1]
        texts = [
            row[: sum(usage.tokens)].tolist()
            for row, usage in zip(output.sequences[:, -count:], output.usage, strict=True)
        ]
        same = agreements(self.pair, self.pair.prompts(questions)[0], texts)
        return [speculative_calls(agree, draft, self.sampling.max_new_tokens) for agree in same]


def matched_random(outcome: Outcome, *, runs: bool = False) -> StitchConfig:
    """Random routing with the share of large tokens that a setting came to.

    Args:
        outcome: Of the setting.
        runs: With its mean run of large tokens too, instead of a draw per token.
    """
    share = outcome.share
    if not runs:
        return StitchConfig(policy="random", share=share)
    shortest = max(1.0, share / (1 - share)) if share < 1 else 1.0
    return StitchConfig(policy="random", share=share, run_length=max(outcome.run_length, shortest))


def cascade(small: Outcome, large: Outcome, *, calls: float) -> Outcome:
    """The query-level baseline: the small model answers all, and the large one anew where it was most in doubt.

    Args:
        small: The small model alone.
        large: The large model alone.
        calls: Steps of the large model per answer that may be spent; problems are taken from the highest doubt down
            while they fit.
    """
    budget = calls * len(small.answers)
    answers = list(small.answers)
    for at in sorted(range(len(answers)), key=lambda at: -answers[at].doubt):
        first, second = small.answers[at], large.answers[at]
        if second.calls[LARGE] > budget:
            break
        budget -= second.calls[LARGE]
        answers[at] = replace(
            second,
            calls=(first.calls[SMALL], second.calls[LARGE]),
            seconds=(first.seconds[SMALL], second.seconds[LARGE]),
            doubt=first.doubt,
            switches=1,
        )
    return Outcome("cascade", tuple(answers), small.samples)


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that a positive has a higher score than a negative, ties counted half; 0.5 if there is only one kind."""
    values, flags = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    high, low = values[flags], values[~flags]
    if not len(high) or not len(low):
        return 0.5
    below = np.searchsorted(np.sort(low), high, "left") + np.searchsorted(np.sort(low), high, "right")
    return float(below.sum() / (2 * len(high) * len(low)))


def write_rows(run: Run, outcome: Outcome, ratio: float, **place: Any) -> None:
    """Rows of one setting."""
    count = len(outcome.answers)
    run.row(
        "accuracy",
        outcome.accuracy,
        better="higher",
        n=count,
        interval=outcome.interval,
        variant=outcome.label,
        **place,
    )
    seconds = float(np.mean([sum(answer.seconds) for answer in outcome.answers]))
    columns: tuple[tuple[str, float, str, Literal["lower", "none"]], ...] = (
        ("large_share", outcome.share, "", "lower"),
        ("discards", outcome.discards, "", "lower"),
        ("tokens", outcome.tokens, "", "none"),
        ("small_calls", outcome.calls(SMALL), "", "lower"),
        ("large_calls", outcome.calls(LARGE), "", "lower"),
        ("cost", outcome.cost(ratio), "large steps", "lower"),
        ("model_seconds", seconds, "s", "lower"),
    )
    for metric, value, unit, better in columns:
        run.row(metric, value, unit=unit, better=better, n=count, variant=outcome.label, **place)


def table(rows: Iterable[Any]) -> str:
    """Rows of ``write_rows`` as a table, a setting per line."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row.variant, {})[row.metric] = row
    found = {label: values for label, values in found.items() if "cost" in values}
    width = max((len(label) for label in found), default=0)
    lines = [f"{'setting':<{width}}  accuracy             large  discards  tokens  calls small/large    cost"]
    for label, values in found.items():
        v = {metric: row.value for metric, row in values.items()}
        low, high = (100 * end for end in values["accuracy"].interval)
        lines.append(
            f"{label:<{width}}  {100 * v['accuracy']:5.1f} [{low:5.1f}, {high:5.1f}]  {100 * v['large_share']:5.1f} %  "
            f"{v['discards']:8.3f}  {v['tokens']:6.1f}  {v['small_calls']:11.1f}/{v['large_calls']:5.1f}  "
            f"{v['cost']:6.1f}"
        )
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Result of an evaluation; as text, its table.

    Attributes:
        chart: accuracy against the large model's share.
    """

    chart: Path

    @classmethod
    def of(cls, run: Run) -> EvalReport:
        """Return the report of a finished run."""
        return cls(path=run.path, rows=tuple(run.rows), chart=run.figures / "curve.png")

    def __str__(self) -> str:
        note = "cost in steps of the large model, of which a small one is the ratio of their weights"
        return "\n".join([table(self.rows), note, f"picture  {self.chart}", f"results  {self.path / 'results.json'}"])


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Ask a pair under every threshold and baseline.

    Args:
        cfg: Problems, pair, thresholds.
        run: A started run; answers that its folder holds are not asked for again.
    """
    pair = load_models(cfg.models, device=resolve_device(run.device))
    if cfg.data is None:
        problems = products(cfg.limit or GENERATED, seed=cfg.seed)
    else:
        problems = read_problems(cfg.data, limit=cfg.limit)
    answers = Answers(
        run.artifacts / "answers.jsonl",
        pair,
        problems,
        cfg.sampling,
        format=cfg.format,
        samples=cfg.samples,
        batch=cfg.batch,
        seed=cfg.seed,
        quiet=run.quiet,
    )
    ratio = step_ratio(pair)
    alone = {
        policy: answers.ask(StitchConfig(policy=policy))
        for policy in ("small", "large")
        if policy in cfg.baselines or "cascade" in cfg.baselines
    }
    lines: dict[str, list[Outcome]] = {"stitch": [], "random": [], "cascade": []}
    for tau in cfg.taus:
        stitched = answers.ask(replace(cfg.stitch, tau=tau))
        lines["stitch"].append(stitched)
        if "random" in cfg.baselines:
            matched = answers.ask(matched_random(stitched), label=f"random as {stitched.label}")
            lines["random"].append(matched)
        if "cascade" in cfg.baselines:
            found = cascade(alone["small"], alone["large"], calls=stitched.calls(LARGE))
            lines["cascade"].append(replace(found, label=f"cascade as {stitched.label}"))
    speculative: list[Outcome] = []
    if "speculative" in cfg.baselines:
        name = f"speculative, drafts of {cfg.draft}"
        speculative = [answers.ask(StitchConfig(policy="large"), label=name, draft=cfg.draft)]
    for outcome in [*alone.values(), *speculative, *(outcome for line in lines.values() for outcome in line)]:
        write_rows(run, outcome, ratio)
    if "small" in alone:
        wrong = [not right for right in alone["small"].right]
        doubt = [answer.doubt for answer in alone["small"].answers]
        run.row("doubt_auroc", auroc(doubt, wrong), better="higher", n=len(wrong), variant="small")
    plots.curve(lines, alone, run.figures / "curve.png")
    return EvalReport.of(run)


def _digest(problem: Problem) -> str:
    return hashlib.sha256(json.dumps([problem.question, problem.answer]).encode()).hexdigest()[:12]


def _doubts(output: Any) -> list[float]:
    """Highest entropy of the small model per row."""
    own = np.where(output.models.numpy() == SMALL, output.entropy.numpy(), 0.0)
    thrown = np.nan_to_num(output.discarded_entropy.numpy())
    return np.maximum(own, thrown).max(1).tolist()
