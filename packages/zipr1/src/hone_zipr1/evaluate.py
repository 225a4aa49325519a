"""Accuracy of a model on questions from a file: dense, and with selected tokens, on the same inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.io import atomic_write_text
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.statistics import bootstrap_interval, paired

from .config import PRESETS, EvalConfig, SparseConfig
from .grading import DENSE, at_budget, table
from .models import attach
from .objectives import BudgetPolicy
from .questions import Item, check_context, is_right, load_items, model_inputs, prompt_features

__all__ = ["EvalReport", "evaluate"]

ANSWERS = "answers.jsonl"
LEARNED = "learned budget"
"""Variant of the answers at thresholds that a policy gave."""


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Accuracies and ratios, and the changes from the dense model."""

    def __str__(self) -> str:
        lines = [table(self.rows)]
        for row in self.rows:
            if row.metric == "change" and row.interval is not None:
                low, high = (100 * end for end in row.interval)
                lines.append(
                    f"{row.variant}: {100 * row.value:+.1f} [{low:+.1f}, {high:+.1f}] points from dense, "
                    f"McNemar p = {row.labels['mcnemar_p']:.2g}"
                )
        return "\n".join([*lines, f"answers  {self.path / 'artifacts' / ANSWERS}"])


def _answers(
    model: Any, processor: Any, inputs: dict[str, Any], cfg: EvalConfig, policy: BudgetPolicy | None
) -> dict[str, dict[str, Any]]:
    """Of one question: dense, at each threshold and, if so asked, at a learned one and by others at what each kept."""
    given = (model, processor, inputs, cfg.max_new_tokens)
    row = {DENSE: _ask(*given, None)}
    for one in cfg.selections:
        row[one.label] = _ask(*given, one)
        if cfg.peers:
            for name, other in at_budget(one, row[one.label]["ratio"], model.config).items():
                row[f"{name} as {one.label}"] = _ask(*given, other)
    if policy is not None:
        p = float(policy.best(prompt_features(model, inputs).to(policy.thresholds.device))[0])
        row[LEARNED] = _ask(*given, replace(PRESETS[cfg.preset].config, p=p)) | {"p": p}
    return row


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Ask and grade; a stopped run goes on with the questions that are left.

    Raises:
        ValueError: A question leaves no room for its answer in the model's context, or the file of questions has
            changed since the run stopped.
    """
    from hone_lm.choices import to_model

    from .adapters import load_model

    device = resolve_device(run.device)
    items, path = load_items(cfg.data)[: cfg.limit], run.artifacts / ANSWERS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # cut off within a line
        path.write_text(whole, encoding="utf-8")
    done = [json.loads(line) for line in whole.splitlines()]
    told, now = run.artifacts / "questions.sha256", _digest(items)
    if done and told.is_file() and told.read_text(encoding="utf-8") != now:
        raise ValueError(
            f"{cfg.data} has other questions than when {path} was begun; put them back, or choose another --out"
        )
    atomic_write_text(told, now)
    policy = None if cfg.budget is None else BudgetPolicy.load(cfg.budget)
    model, processor = load_model(cfg.model, device=device, dtype=resolve_dtype(cfg.dtype, device))
    with progress_bar(len(items), desc="questions", quiet=run.quiet) as bar, path.open("a", encoding="utf-8") as file:
        bar.update(len(done))
        for item in items[len(done) :]:
            made = model_inputs(processor, [item], cfg.frames)
            check_context(made, model.config, cfg.max_new_tokens, [item])
            inputs = to_model(made, model)
            row = _answers(model, processor, inputs, cfg, policy)
            for said in row.values():
                said["right"] = is_right(said["answer"], item)
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update()
    dense = [row[DENSE]["right"] for row in done]
    for name in done[0]:
        right, ratio = [row[name]["right"] for row in done], [row[name]["ratio"] for row in done]
        values, n = np.asarray(right, dtype=float), len(done)
        given: dict[str, Any] = {"n": n, "variant": name}
        run.row("accuracy", values.mean(), better="higher", interval=bootstrap_interval(values), **given)
        run.row("token_ratio", float(np.mean(ratio)), better="lower", **given)
        if name != DENSE:
            if "uniform" in done[0][name]:
                uniform = float(np.mean([row[name]["uniform"] for row in done]))
                run.row("uniform_ratio", uniform, better="none", **given)
            change = paired(right, dense)
            labels = {"mcnemar_p": change.p, "to_wrong": change.to_wrong, "to_right": change.to_right}
            run.row("change", change.change, better="none", interval=change.interval, labels=labels, **given)
    return EvalReport.of(run)


def _digest(items: Sequence[Item]) -> str:
    """Of the questions in their order; answers that are kept are told apart by their place alone."""
    texts = [(str(item.media), item.question, item.answer, item.type, item.tolerance) for item in items]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _ask(
    model: Any, processor: Any, inputs: dict[str, Any], length: int, config: SparseConfig | None
) -> dict[str, Any]:
    """One greedy answer."""

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    if config is None:
        return {"answer": answer(), "ratio": 1.0}
    with attach(model, config) as handle:
        said = answer()
        stats = handle.stats
    assert stats is not None, "a prompt was read"
    found = {"answer": said, "ratio": float(stats.ratio[0])}
    return found if config.ratio is not None else found | {"uniform": float(stats.uniform(config.p)[0])}
