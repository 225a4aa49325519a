"""Sweeps: a set of questions under many knockouts, with the statistics that say what a difference is worth.

Every answer goes to ``artifacts/answers.jsonl`` as soon as it is there, one line per question with the option
probabilities under every configuration. So a stopped sweep goes on where it was, and everything else (accuracy,
intervals, plots, the recommendation) is computed from that file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from hone_core.io import atomic_write_text
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.statistics import bootstrap_interval, paired
from hone_lm.choices import choice_inputs, choice_prompt, option_token_ids, read_choices, to_model
from hone_lm.decoders import find_decoder
from hone_lm.question_sets import Item, read_clip
from hone_lm.video import Clip
from torch import Tensor

from . import plots
from .config import Control, EvalConfig, Kind, Knockout, KnockoutConfig, Setting
from .method import global_after, windows
from .models import attach, check_devices
from .prefix import Counts, PrefixRunner
from .sources import load_source, read_questions

__all__ = [
    "Configuration",
    "SweepReport",
    "configurations",
    "evaluate",
    "is_right",
    "read_answers",
    "summarise",
    "sweep",
]

log = logging.getLogger(__name__)

BASELINE = "baseline"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Configuration:
    """A point of a sweep.

    Attributes:
        config: what is attached.
        setting: of the sweep that it belongs to.
        kind: knockout kind, ``random`` appended for a control.
        first: first layer of the knockout, counted from 0.
        last: last layer.
    """

    config: KnockoutConfig
    setting: str
    kind: str
    first: int
    last: int


def configurations(cfg: EvalConfig, num_layers: int) -> dict[str, Configuration]:
    """Every configuration of a sweep by label, ``baseline`` first.

    Raises:
        ValueError: A window is wider than the decoder.
    """
    found: dict[str, Configuration] = {BASELINE: Configuration(KnockoutConfig(), "baseline", "none", 0, num_layers - 1)}

    def add(setting: Setting, kind: Kind, layers: tuple[int, ...], control: Control = "none") -> None:
        item = Knockout(kind=kind, layers=layers, control=control, seed=cfg.seed)
        name = f"{setting} {item.label}"
        shown = kind if control == "none" else f"{kind} {control}"
        config = KnockoutConfig(knockouts=(item,))
        found[name] = Configuration(config, setting, shown, layers[0], layers[-1])

    for setting in cfg.settings:
        if setting == "global1":
            for after in range(0, num_layers, cfg.step):
                add(setting, "LV", global_after(after, num_layers))
        elif setting == "local":
            for stop in range(cfg.step, num_layers + 1, cfg.step):
                add(setting, "VT", tuple(range(stop)))
        elif setting == "global2":
            for kind in cfg.kinds:
                controls: tuple[Control, ...] = ("none", "random") if cfg.random_control else ("none",)
                for control in controls:
                    add(setting, kind, global_after(0, num_layers), control)
        else:
            for kind in cfg.kinds:
                for layers in windows(num_layers, width=cfg.width, stride=cfg.stride):
                    add(setting, kind, layers)
    return found


@dataclass(frozen=True, kw_only=True)
class SweepReport(Report):
    """Result of a sweep; as text, the table.

    Attributes:
        items: questions answered.
        failed: questions that could not be, with causes, as in the answers file.
    """

    items: int
    failed: dict[str, str]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows are written."""
        answers, failed = read_answers(run.path)
        return cls(path=run.path, rows=tuple(run.rows), items=len(answers), failed=failed)

    def __str__(self) -> str:
        shown = [row for row in self.rows if row.metric == "accuracy" and row.split == "all"]
        values = {(row.metric, row.variant): row.value for row in self.rows if row.split == "all"}
        width = max((len(row.variant) for row in shown), default=0)
        lines = [f"{'configuration':<{width}}  accuracy [95 %]         change  to wrong  to right  McNemar p"]
        for row in shown:
            low, high = row.interval or (row.value, row.value)
            line = f"{row.variant:<{width}}  {row.value:.3f} [{low:.3f}, {high:.3f}]"
            if ("accuracy_change", row.variant) in values:
                change, *flips, p = (
                    values[name, row.variant] for name in ("accuracy_change", "to_wrong", "to_right", "mcnemar_p")
                )
                line += f"  {100 * change:+6.1f}  {flips[0]:8.0f}  {flips[1]:8.0f}  {shown_p(p):>9}"
            lines.append(line)
        if ("chance", "") in values:
            lines.append(f"chance level {values['chance', '']:.3f}; {self.items} questions")
        if self.failed:
            lines += [
                f"{len(self.failed)} of {self.items + len(self.failed)} questions left out: "
                f"{next(iter(self.failed.values()))}, ...",
                f"the same command with --out {self.path} --retry-failed asks them again",
            ]
        return "\n".join([*lines, "", f"answers and results in {self.path}"])


def shown_p(p: float) -> str:
    """A p-value as a table shows it."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def reopen(cfg: EvalConfig, run: Run) -> None:
    """Take up a finished run again, if its failed questions are to be asked again, or questions were edited since.

    Raises:
        ValueError: Failed ones are to be asked again, and there is no run.
    """
    if cfg.retry_failed and not (run.done or run.resumed):
        raise ValueError("which run? --retry-failed goes with --out, the folder of the run whose questions failed")
    if not run.done:
        return
    answers, failed = read_answers(run.path)
    items = read_questions(cfg.source, cfg.seed)
    if (cfg.retry_failed and failed) or len(_current(answers, items)) < len(answers):
        run.reopen()


def evaluate(cfg: EvalConfig, run: Run) -> SweepReport:
    """Answer the questions of a source under every configuration, and draw the chart."""
    model, processor = load_source(cfg.source, run.device)
    report = sweep(model, processor, read_questions(cfg.source, cfg.seed), cfg, run)
    plots.sweep_chart([asdict(row) for row in run.rows], run.figures / "sweep.png")
    return report


def sweep(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    cfg: EvalConfig,
    run: Run,
    *,
    chosen: Mapping[str, Configuration] | None = None,
) -> SweepReport:
    """Answer every question under every configuration.

    A question that fails, for whatever reason (a video that cannot be decoded, options that cannot be told apart, too
    little memory for it alone), is written down with its cause and left out.

    Args:
        model: A ``...ForConditionalGeneration``.
        processor: Of the model.
        items: Questions.
        cfg: Settings.
        run: A started ``hone_core.runs.Run``. One that was stopped goes on where it was; questions that failed before
            are asked again, since a file may be there now, or memory free; so are those whose text, options or video
            is another now.
        chosen: Configurations in place of those of ``cfg``; the baseline is always run.

    Raises:
        ValueError: Every question failed, the decoder is spread over devices, or the answers that the run holds are
            those of other weights.
    """
    decoder = find_decoder(model)
    check_devices(decoder)
    found = configurations(cfg, decoder.num_layers) if chosen is None else dict(chosen)
    for entry in found.values():
        entry.config.check(decoder.num_layers, decoder.deepstack_layers)
    path = run.artifacts / ANSWERS
    weights = weights_digest(model)
    _drop_edited(path, items, weights)
    answers, _ = read_answers(run.path)
    waiting = [item for item in items if item.id not in answers]
    counts, started = Counts(), time.perf_counter()
    with path.open("a", encoding="utf-8") as file, progress_bar(len(items), desc="questions", quiet=run.quiet) as bar:
        bar.update(len(items) - len(waiting))
        for at in range(0, len(waiting), cfg.batch):
            for line in _answer_batch(model, processor, waiting[at : at + cfg.batch], found, cfg, counts):
                file.write(json.dumps(line | {"weights": weights}) + "\n")
            file.flush()
            bar.update(len(waiting[at : at + cfg.batch]))
    answers, failed = read_answers(run.path)
    for name, cause in failed.items():
        log.warning("question %s is left out: %s", name, cause)
    if not answers:
        raise ValueError(f"every question failed; the first: {next(iter(failed.values()), 'there was none')}")
    summarise(answers, found, run, num_layers=decoder.num_layers, seed=cfg.seed)
    if counts.layers:
        for name, value in vars(counts).items():
            run.row(f"evaluated_{name}", value, better="none", n=len(waiting) or 1)
        run.row("sweep_seconds", time.perf_counter() - started, unit="s", better="lower", n=len(waiting) or 1)
    run.row("failed_items", len(failed), better="lower", n=len(items))
    return SweepReport.of(run)


def _answer_batch(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    found: Mapping[str, Configuration],
    cfg: EvalConfig,
    counts: Counts,
) -> list[dict[str, Any]]:
    """A line per item."""
    lines, ready = [], []
    for item in items:
        try:
            if item.error:
                raise ValueError(item.error)
            order = _option_order(item, cfg)
            options = [item.options[index] for index in order]
            prompt = choice_prompt(processor, item.question, options, style=cfg.style)
            tokens = option_token_ids(processor.tokenizer, prompt, options, style=cfg.style)
            ready.append(_Ready(item, order, prompt, tokens, read_clip(item, num_frames=cfg.frames)))
        except Exception as error:
            lines.append(_failure(item, error))
    return lines + _answer_ready(model, processor, ready, found, cfg, counts)


class _Ready(NamedTuple):
    """A question that can be asked."""

    item: Item
    order: list[int]
    prompt: str
    tokens: list[int]
    clip: Clip


def _answer_ready(
    model: Any,
    processor: Any,
    ready: Sequence[_Ready],
    found: Mapping[str, Configuration],
    cfg: EvalConfig,
    counts: Counts,
) -> list[dict[str, Any]]:
    """A line per question. A batch that fails is halved, so that one question, or memory for all, fails alone."""
    if not ready:
        return []
    failure = None
    try:
        inputs = choice_inputs(processor, [entry.prompt for entry in ready], [entry.clip for entry in ready])
        inputs = to_model(inputs, model)
        logits = _run_all(model, inputs, found, cfg, counts)
    except Exception as error:
        failure = _failure(ready[0].item, error)
    if failure is not None:
        # Out here the traceback, which holds the tensors of the failed forward, is gone.
        inputs, logits = {}, {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(ready) == 1:
            return [failure]
        half = len(ready) // 2
        log.info("a batch of %d failed and is halved: %s", len(ready), failure["error"])
        return [
            line
            for part in (ready[:half], ready[half:])
            for line in _answer_ready(model, processor, part, found, cfg, counts)
        ]
    lines = []
    for row, (item, order, _, tokens, _) in enumerate(ready):
        results = {}
        for label, table in logits.items():
            choices = read_choices(table[row], tokens)
            probability = [0.0] * len(order)
            for place, index in enumerate(order):
                probability[index] = round(choices.probability[place], 6)
            results[label] = {"p": probability, "mass": round(choices.mass, 6)}
        asked = {"id": item.id, "digest": item_digest(item), "answer": item.answer, "category": item.category}
        lines.append(asked | {"results": results})
    return lines


def _failure(item: Item, error: Exception) -> dict[str, Any]:
    """Line of a question that could not be answered. Messages of ours say what is wrong; others need their type."""
    log.debug("question %s", item.id, exc_info=error)
    kind, text = type(error).__name__, " ".join(str(error).split())[:500]
    if not (isinstance(error, (ValueError, OSError)) and text):
        text = f"{kind}: {text}"
    return {"id": item.id, "error": text, "type": kind}


def _run_all(
    model: Any,
    inputs: dict[str, Tensor],
    found: Mapping[str, Configuration],
    cfg: EvalConfig,
    counts: Counts,
) -> dict[str, Tensor]:
    if cfg.reuse:
        configs = [entry.config for entry in found.values()]
        runner = PrefixRunner(model, inputs, configs, tokens_per_frame=cfg.tokens_per_frame)
        logits = {label: runner.run(entry.config).cpu() for label, entry in found.items()}
        for name, value in vars(runner.counts).items():
            setattr(counts, name, getattr(counts, name) + value)
        return logits
    logits = {}
    with torch.no_grad():
        for label, entry in found.items():
            with attach(model, entry.config, tokens_per_frame=cfg.tokens_per_frame):
                logits[label] = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].cpu()
    return logits


def item_digest(item: Item) -> str:
    """Digest of all that an answer depends on: text, options, answer, category, and which part of which video.

    A file counts by name and size, a clip in memory by its frames.
    """
    video: Any = None
    if item.video is not None:
        there = item.video.is_file()
        video = [item.video.name, item.video.stat().st_size if there else None]
    elif item.clip is not None:
        video = hashlib.sha256(item.clip.frames.contiguous().numpy().tobytes()).hexdigest()
    parts = [item.question, item.options, item.answer, item.category, video, item.start, item.end, item.fps]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Digest of a model's weights: name, shape and 64 values of each parameter, spread over it."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def _current(answers: Mapping[str, Mapping[str, Any]], items: Sequence[Item]) -> set[str]:
    """Questions whose answer is to what the question is now."""
    return {item.id for item in items if item.id in answers and answers[item.id].get("digest") == item_digest(item)}


def _drop_edited(path: Path, items: Sequence[Item], weights: str) -> None:
    """Take answers to questions that were edited or removed since out of the file.

    Raises:
        ValueError: Some are those of other weights.
    """
    answers, failed = read_answers(path)
    others = {row.get("weights") for row in answers.values()} - {weights}
    if others:
        raise ValueError(
            f"{path} holds answers of other weights than the model has now; take another --out, or put the weights back"
        )
    current = _current(answers, items)
    if len(current) == len(answers):
        return
    lost = len(answers) - len(current)
    log.warning("%d answers are to questions that were edited or removed since; they are dropped", lost)
    kept = [json.dumps(answers[name]) for name in answers if name in current]
    kept += [json.dumps({"id": name, "error": cause}) for name, cause in failed.items()]
    atomic_write_text(path, "".join(line + "\n" for line in kept))


def _option_order(item: Item, cfg: EvalConfig) -> list[int]:
    order = list(range(len(item.options)))
    if cfg.shuffle:
        random.Random(f"{cfg.seed}-{item.id}").shuffle(order)
    return order


def read_answers(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Answers by question, and causes of the questions left out, from a run folder or an answers file.

    A line that a crash left unfinished is dropped, and its question asked again. Of several lines of a question that
    was asked again, an answer counts before a failure.
    """
    path = folder / "artifacts" / ANSWERS if folder.is_dir() else folder
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    if not path.exists():
        return answers, failed
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    for line in text.splitlines():
        row = json.loads(line)
        if "error" in row:
            failed[row["id"]] = row["error"]
        else:
            answers[row["id"]] = row
    return answers, {name: cause for name, cause in failed.items() if name not in answers}


def is_right(answer: Mapping[str, Any], label: str) -> bool:
    """Whether a question is answered right under a configuration."""
    probability = answer["results"][label]["p"]
    return max(range(len(probability)), key=probability.__getitem__) == answer["answer"]


def summarise(
    answers: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Configuration],
    run: Run,
    *,
    num_layers: int,
    seed: int = 0,
) -> None:
    """Write rows for all questions and per category.

    Per configuration: ``accuracy`` with interval, ``performance_ratio``, ``p_right`` (mean probability of the right
    option), ``accuracy_change`` with a paired interval, ``accuracy_of_correct`` and ``p_right_change`` (of questions
    that the baseline has right, which favours drops: accuracy, and the peers' measure, relative change of ``p_right``),
    ``to_wrong``, ``to_right`` and ``mcnemar_p``. Once per split: ``chance``.
    """
    categories = sorted({row["category"] for row in answers.values()} - {""})
    for split in ["all", *categories]:
        rows = [row for row in answers.values() if split in ("all", row["category"])]
        count = len(rows)
        before = [is_right(row, BASELINE) for row in rows]
        p_before = [row["results"][BASELINE]["p"][row["answer"]] for row in rows]
        options = [len(row["results"][BASELINE]["p"]) for row in rows]
        run.row("chance", sum(1 / n for n in options) / count, better="none", n=count, split=split)
        for label, entry in found.items():
            right = [is_right(row, label) for row in rows]
            p = [row["results"][label]["p"][row["answer"]] for row in rows]
            labels = {"setting": entry.setting, "kind": entry.kind, "first": entry.first, "last": entry.last}
            labels["layer_ratio"] = round((entry.first if entry.setting == "global1" else num_layers) / num_layers, 6)
            common = {"variant": label, "split": split, "labels": labels, "n": count}
            accuracy = sum(right) / count
            run.row("accuracy", accuracy, better="higher", interval=bootstrap_interval(right, seed=seed), **common)
            run.row("p_right", sum(p) / count, better="higher", interval=bootstrap_interval(p, seed=seed), **common)
            if label == BASELINE:
                continue
            pair = paired(right, before, seed=seed)
            run.row("accuracy_change", pair.change, better="higher", interval=pair.interval, **common)
            run.row("to_wrong", pair.to_wrong, better="lower", **common)
            run.row("to_right", pair.to_right, better="higher", **common)
            run.row("mcnemar_p", pair.p, better="none", **common)
            if any(before):
                run.row("performance_ratio", accuracy / (sum(before) / count), better="higher", **common)
                kept = [now for now, then in zip(right, before, strict=True) if then]
                of_correct = common | {"n": len(kept)}
                run.row("accuracy_of_correct", sum(kept) / len(kept), better="higher", **of_correct)
                # Right means at least 1 / options, so nothing here divides by next to nothing.
                pairs = [pair for pair, then in zip(zip(p, p_before, strict=True), before, strict=True) if then]
                relative = [100 * (now - then) / then for now, then in pairs]
                run.row("p_right_change", sum(relative) / len(kept), unit="%", better="higher", **of_correct)
