"""From a sweep to a recipe: the earliest exit and the widest frame-local start within an accuracy budget.

Chosen on one half of the questions and reported on the other: a layer that looks free on the questions it was picked
on has been picked for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from hone_core.config import from_dict, load_config, to_dict
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run, load_results
from hone_core.statistics import Paired, bootstrap_interval, paired
from hone_lm.checkpoints import read_config
from hone_lm.choices import choice_inputs, choice_prompt, to_model
from hone_lm.decoders import deepstack_layers
from hone_lm.question_sets import read_clip

from .config import EvalConfig, Knockout, KnockoutConfig, RecommendConfig
from .evaluate import BASELINE, Configuration, SweepReport, configurations, is_right, read_answers, shown_p, sweep
from .sample import exit_gap
from .sources import load_source, read_questions, source_of_run

__all__ = ["Recipe", "RecommendReport", "choose", "halves", "recommend"]

RECIPE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """What to attach, and what it does to the questions it was not chosen on.

    Attributes:
        exit: layer at which visual tokens leave; None if none is within the budget.
        window: first layers in which frames may read only themselves, by itself; 0 if none. With an exit before its end
            what runs is ``used_window``.
        max_drop: budget in points of accuracy.
        baseline: accuracy on the reporting half.
        interval: of ``baseline``.
        exit_change: of the exit alone on the reporting half.
        window_change: of the window alone.
        chosen_on: number of questions that it was chosen on.
        reported_on: number of the others.
    """

    exit: int | None
    window: int
    max_drop: float
    baseline: float
    interval: tuple[float, float]
    exit_change: Paired | None
    window_change: Paired | None
    chosen_on: int
    reported_on: int

    @property
    def used_window(self) -> int:
        """Layers of the window that still have visual tokens."""
        return self.window if self.exit is None else min(self.window, self.exit)

    @property
    def config(self) -> KnockoutConfig:
        """Settings for ``attach``; a window past the exit ends there."""
        knockouts = (Knockout(kind="VT", layers=tuple(range(self.used_window))),) if self.window else ()
        return KnockoutConfig(knockouts=knockouts, exit=self.exit)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; ``window`` is what runs, ``window_alone`` what ``window_change`` was measured with."""
        fields = {name: getattr(self, name) for name in ("exit", "max_drop", "baseline", "chosen_on", "reported_on")}
        return fields | {
            "window": self.used_window,
            "window_alone": self.window,
            "interval": list(self.interval),
            "exit_change": None if self.exit_change is None else asdict(self.exit_change),
            "window_change": None if self.window_change is None else asdict(self.window_change),
        }

    def __str__(self) -> str:
        window = f"frames read only themselves in the first {self.used_window} layers"
        if self.used_window < self.window:
            window += f" (up to the exit; {self.window} layers, alone)"
        lines = [
            f"chosen on {self.chosen_on} questions for at most {self.max_drop:g} points, reported on the other "
            f"{self.reported_on}",
            f"baseline       {self.baseline:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]",
        ]
        for name, change, what in (
            ("exit", self.exit_change, f"visual tokens leave before layer {self.exit} (after {self.exit} layers)"),
            ("window", self.window_change, window),
        ):
            if change is None:
                lines.append(f"{name:<14} none within the budget")
            else:
                low, high = (100 * value for value in change.interval)
                lines.append(
                    f"{name:<14} {what}: {100 * change.change:+.1f} points [{low:+.1f}, {high:+.1f}], "
                    f"McNemar p {shown_p(change.p)}"
                )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class RecommendReport(Report):
    """A recipe and, where it was run, what exit and window do together.

    Attributes:
        recipe: what was chosen.
        together: its sweep on the reporting half, or None.
        exit_gap: largest difference of the next token's logits between the exit and LV-K in the layers without video,
            on the first question; None without an exit or a run.
    """

    recipe: Recipe
    together: SweepReport | None
    exit_gap: float | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows are written."""
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            recipe=from_dict(Recipe, json.loads((run.artifacts / RECIPE).read_text(encoding="utf-8"))),
            together=SweepReport.of(run) if run.rows else None,
            exit_gap=next((row.value for row in run.rows if row.metric == "exit_gap"), None),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "path": str(self.path),
            "rows": [asdict(row) for row in self.rows],
            "recipe": self.recipe.to_dict(),
            "exit_gap": self.exit_gap,
        }

    def __str__(self) -> str:
        text = str(self.recipe)
        if self.together is None:
            return f"{text}\nrecipe in {self.path}"
        text += f"\n\nboth together, on the reporting half:\n{self.together}"
        if self.exit_gap is not None:
            text += f"\nnext-token logits of exit and LV-K in the same layers differ by at most {self.exit_gap:.1e}"
        return text


def recommend(cfg: RecommendConfig, run: Run) -> RecommendReport:
    """Choose from an eval run, and run what was chosen on the questions that it was not chosen on.

    Raises:
        ValueError: The eval run has no answers, or now leads to another recipe than when this run was begun.
        FileNotFoundError: What the eval run names is not there any more.
    """
    sweep_cfg = load_config(EvalConfig, cfg.run / "config.json")
    sweep_cfg = replace(sweep_cfg, source=source_of_run(cfg.run, sweep_cfg.source, model_alone=not cfg.verify))
    answers, _ = read_answers(cfg.run)
    if not answers:
        raise ValueError(f"{cfg.run} holds no answers; let the eval run finish first")
    num_layers = _layers_of(cfg.run)
    found = configurations(sweep_cfg, num_layers)
    model = sweep_cfg.source.model
    deepstack = 0 if model is None else deepstack_layers(read_config(model))
    recipe = choose(
        answers, found, num_layers=num_layers, max_drop=cfg.max_drop, deepstack_layers=deepstack, seed=cfg.seed
    )
    stored = run.artifacts / RECIPE
    if stored.exists() and from_dict(Recipe, json.loads(stored.read_text(encoding="utf-8"))) != recipe:
        raise ValueError(f"{stored} holds another recipe, of other answers in {cfg.run}; choose another --out")
    atomic_write_json(stored, to_dict(recipe))
    if not cfg.verify or recipe.config == KnockoutConfig():
        return RecommendReport.of(run)
    _, second = halves(list(answers), seed=cfg.seed)
    items = [item for item in read_questions(sweep_cfg.source, sweep_cfg.seed) if item.id in set(second)]
    entry = Configuration(recipe.config, "recipe", "recipe", recipe.exit or 0, num_layers - 1)
    chosen = {BASELINE: found[BASELINE], recipe.config.label: entry}
    loaded, processor = load_source(sweep_cfg.source, run.device)
    sweep(loaded, processor, items, sweep_cfg, run, chosen=chosen)
    # A sweep runs LV-K as the exit that it equals; here each runs as itself.
    done, _ = read_answers(run.path)
    item = next(item for item in items if item.id in done)
    prompt = choice_prompt(processor, item.question, item.options, style=sweep_cfg.style)
    inputs = choice_inputs(processor, [prompt], [read_clip(item, num_frames=sweep_cfg.frames)])
    gap = exit_gap(loaded, to_model(inputs, loaded), recipe.config, tokens_per_frame=sweep_cfg.tokens_per_frame)
    if gap is not None:
        run.row("exit_gap", gap, better="lower", variant=recipe.config.label)
    return RecommendReport.of(run)


def _layers_of(run: Path) -> int:
    """Decoder layers of the model that a run was made with, from its baseline row."""
    for row in load_results(run)["rows"]:
        if row.get("labels", {}).get("setting") == "baseline":
            return int(row["labels"]["last"]) + 1
    raise ValueError(f"{run} holds no finished sweep; repeat the eval command to finish it")


def halves(names: Sequence[str], *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split question ids into two halves that do not depend on their order.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(names) < 2:
        raise ValueError(f"two halves need at least two questions; got {len(names)}")
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}-{name}".encode()).hexdigest())
    return ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]


def choose(
    answers: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Configuration],
    *,
    num_layers: int,
    max_drop: float = 1.0,
    deepstack_layers: int = 0,
    seed: int = 0,
) -> Recipe:
    """Choose exit and window.

    Args:
        answers: Of a sweep with ``global1`` (for the exit), and ``local`` (for the window) if it was run.
        found: Its configurations.
        num_layers: Of the decoder.
        max_drop: Largest loss of accuracy on the choosing half, in points. The exit is the earliest from which on every
            later one is within it, too; the window likewise.
        deepstack_layers: Of the decoder; the exit is never earlier.
        seed: Of the halves.

    Raises:
        ValueError: The sweep has no ``global1`` configuration, or ``max_drop`` is negative.
    """
    if max_drop < 0:
        raise ValueError(f"max_drop is a loss in points and not negative; got {max_drop}")
    exits = sorted(
        (entry.first, label) for label, entry in found.items() if entry.setting == "global1" and entry.kind == "LV"
    )
    if not exits:
        raise ValueError("the sweep has no global1 configuration; run it with that setting to choose an exit")
    locals_ = sorted((entry.last + 1, label) for label, entry in found.items() if entry.setting == "local")
    first, second = halves(list(answers), seed=seed)

    def right(names: Sequence[str], label: str) -> list[bool]:
        return [is_right(answers[name], label) for name in names]

    def free(label: str) -> bool:
        now, before = right(first, label), right(first, BASELINE)
        return 100 * (sum(before) - sum(now)) / len(first) <= max_drop + 1e-9

    exit_at, exit_label = None, ""
    for at, label in reversed(exits):
        if not free(label) or at < max(1, deepstack_layers):
            break
        exit_at, exit_label = at, label
    window, window_label = 0, ""
    for at, label in locals_:
        if not free(label):
            break
        window, window_label = at, label
    before = right(second, BASELINE)
    return Recipe(
        exit=exit_at,
        window=window,
        max_drop=max_drop,
        baseline=sum(before) / len(second),
        interval=bootstrap_interval(before, seed=seed),
        exit_change=None if exit_at is None else paired(right(second, exit_label), before, seed=seed),
        window_change=None if not window else paired(right(second, window_label), before, seed=seed),
        chosen_on=len(first),
        reported_on=len(second),
    )
