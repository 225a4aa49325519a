"""Answer a question about a video, with the model as it is and with something attached."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_core.timing import AnswerWatch
from hone_lm.checkpoints import load_model
from hone_lm.choices import choice_inputs, choice_prompt, option_token_ids, read_choices, to_model
from hone_lm.decoders import find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from hone_lm.video import Clip, read_video

from .config import GenerateConfig, Knockout, KnockoutConfig
from .method import global_after
from .models import attach

__all__ = ["GenerateReport", "ask", "check_question", "exit_gap", "generate", "look"]

ANSWERS = "answers.json"
WRITTEN = 64
"""Tokens of a written answer, unless the config says."""


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """Answers with their cost; as text, side by side.

    Attributes:
        layout: of the prompt.
        answers: ``baseline`` and the label of what was attached, to the written answer or the option probabilities.
        milliseconds: of each, the whole answer: the median of warm turns that alternate.
        prefill_milliseconds: of each, up to the logits of the first token, with the vision tower.
        decode_milliseconds: of each, the tokens after the first; 0 where options are scored.
        peak_bytes: of each on a GPU; None on a CPU.
        options: texts, where they were given.
        exit_gap: largest difference of the next token's logits between the exit and LV-K in the layers without video;
            None without an exit.
    """

    layout: TokenLayout
    answers: dict[str, str | tuple[float, ...]]
    milliseconds: dict[str, float]
    prefill_milliseconds: dict[str, float]
    decode_milliseconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    options: tuple[str, ...]
    exit_gap: float | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows are written."""
        said = json.loads((run.artifacts / ANSWERS).read_text(encoding="utf-8"))
        values = {(row.metric, row.variant): row.value for row in run.rows}
        peaks = {name: values.get(("peak_memory", name)) for name in said["answers"]}
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            layout=TokenLayout.from_dict(said["layout"]),
            answers={name: tuple(a) if isinstance(a, list) else a for name, a in said["answers"].items()},
            milliseconds={name: values["answer", name] for name in peaks},
            prefill_milliseconds={name: values["prefill", name] for name in peaks},
            decode_milliseconds={name: values["decode", name] for name in peaks},
            peak_bytes={name: None if peak is None else round(peak * 2**30) for name, peak in peaks.items()},
            options=tuple(said["options"]),
            exit_gap=next((row.value for row in run.rows if row.metric == "exit_gap"), None),
        )

    def __str__(self) -> str:
        lines = [str(self.layout), ""]
        for name, answer in self.answers.items():
            peak = self.peak_bytes[name]
            cost = f"{self.milliseconds[name]:.0f} ms"
            if isinstance(answer, str):
                cost += f": prefill {self.prefill_milliseconds[name]:.0f}, decode {self.decode_milliseconds[name]:.0f}"
            cost += f", {peak / 2**30:.2f} GiB" if peak else ""
            lines.append(f"{name} ({cost})")
            if isinstance(answer, str):
                lines.append(f"  {answer}")
            else:
                lines += [f"  {p:6.1%}  {text}" for p, text in zip(answer, self.options, strict=True)]
        if self.exit_gap is not None:
            lines += [
                "",
                f"next-token logits of exit and LV-K in the same layers differ by at most {self.exit_gap:.1e}",
            ]
        return "\n".join([*lines, "", f"answers and times in {self.path}"])


def prompt_inputs(processor: Any, cfg: GenerateConfig, clip: Clip) -> tuple[str, dict[str, Any]]:
    """Prompt and model inputs of a question."""
    if cfg.options:
        prompt = choice_prompt(processor, cfg.ask, cfg.options, style=cfg.style)
    else:
        # Two options that are never shown: the text style lists none.
        prompt = choice_prompt(processor, cfg.ask, ("a", "b"), style="text")
    return prompt, choice_inputs(processor, [prompt], [clip])


def look(model: Any, processor: Any, cfg: GenerateConfig, clip: Clip | None = None) -> TokenLayout:
    """Layout of a prompt, without running the model.

    Args:
        model: Or its config.
        processor: Of the model.
        cfg: Video and question.
        clip: In place of the video.
    """
    clip = clip or read_video(cfg.video, num_frames=cfg.frames, start=cfg.start, end=cfg.end)
    _, inputs = prompt_inputs(processor, cfg, clip)
    return _layout(model, inputs, cfg, clip)


def check_question(model: Any, processor: Any, cfg: GenerateConfig, clip: Clip) -> None:
    """Look for what is wrong with a question before the weights are read.

    Args:
        model: Or its config.
        processor: Of the model.
        cfg: Video and question.
        clip: Frames of the video.

    Raises:
        ValueError: Options cannot be told apart, or the prompt has no visual token or no whole number of frames.
    """
    prompt, inputs = prompt_inputs(processor, cfg, clip)
    if cfg.options:
        option_token_ids(processor.tokenizer, prompt, cfg.options, style=cfg.style)
    _layout(model, inputs, cfg, clip)


def _layout(model: Any, inputs: dict[str, Any], cfg: GenerateConfig, clip: Clip) -> TokenLayout:
    (layout,) = find_layouts(model, inputs, tokens_per_frame=cfg.tokens_per_frame)
    return replace(layout, sampled=len(clip.frames))


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Answer with the model as it is, then with what the config attaches."""
    device = resolve_device(run.device)
    model, processor = load_model(cfg.model, device=device, dtype=resolve_dtype(cfg.dtype, device))
    return ask(model, processor, cfg, cfg.attached(find_decoder(model).num_layers), run)


@torch.no_grad()
def ask(
    model: Any, processor: Any, cfg: GenerateConfig, config: KnockoutConfig, run: Run, clip: Clip | None = None
) -> GenerateReport:
    """Answer with a loaded model as it is, then with something attached.

    Args:
        model: A ``...ForConditionalGeneration``.
        processor: Of the model.
        cfg: Video and question.
        config: What to attach.
        run: A started ``hone_core.runs.Run``.
        clip: In place of the video.
    """
    clip = clip or read_video(cfg.video, num_frames=cfg.frames, start=cfg.start, end=cfg.end)
    prompt, inputs = prompt_inputs(processor, cfg, clip)
    layout = _layout(model, inputs, cfg, clip)
    inputs = to_model(inputs, model)
    configs = [KnockoutConfig()] + ([config] if config != KnockoutConfig() else [])
    turns: dict[str, list[_Turn]] = {each.label: [] for each in configs}
    # Whoever goes first pays for the start of the machine: nobody's first turn counts, and the others alternate.
    for _ in range(1 + cfg.rounds):
        for each in configs:
            with attach(model, each, tokens_per_frame=cfg.tokens_per_frame):
                turns[each.label].append(_turn(model, processor, cfg, prompt, inputs))
    for name, (_, *timed) in turns.items():
        for metric, field in (("answer", "milliseconds"), ("prefill", "prefill"), ("decode", "decode")):
            values = [getattr(turn, field) for turn in timed]
            spread = statistics.stdev(values) if len(values) > 1 else None
            run.row(
                metric, statistics.median(values), unit="ms", better="lower", n=len(values), spread=spread, variant=name
            )
        peak = timed[-1].peak
        if peak is not None:
            run.row("peak_memory", peak / 2**30, unit="GiB", better="lower", variant=name)
    gap = exit_gap(model, inputs, config, tokens_per_frame=cfg.tokens_per_frame)
    if gap is not None:
        run.row("exit_gap", gap, better="lower", variant=config.label)
    said = {
        "layout": layout.to_dict(),
        "options": list(cfg.options),
        "answers": {name: timed[0].answer for name, timed in turns.items()},
    }
    atomic_write_json(run.artifacts / ANSWERS, said)
    return GenerateReport.of(run)


@torch.no_grad()
def exit_gap(
    model: Any, inputs: dict[str, Any], config: KnockoutConfig, *, tokens_per_frame: int | None = None
) -> float | None:
    """Largest difference of the next token's logits between an exit and LV-K in the layers from there on.

    It is rounding, or the exit changed more than what text reads.

    Args:
        model: A ``...ForConditionalGeneration``.
        inputs: Prompts, on the model's device.
        config: Settings; None is returned for those without an exit.
        tokens_per_frame: As in ``attach``.
    """
    if config.exit is None:
        return None
    late = Knockout(kind="LV", layers=global_after(config.exit, find_decoder(model).num_layers))
    blocked = KnockoutConfig(knockouts=(*config.knockouts, late), allow_empty=config.allow_empty)
    logits = []
    for each in (config, blocked):
        with attach(model, each, tokens_per_frame=tokens_per_frame):
            logits.append(model(**inputs, logits_to_keep=1).logits[:, -1].float())
    return float((logits[0] - logits[1]).abs().max())


class _Turn(NamedTuple):
    """One answer; times in milliseconds."""

    answer: str | tuple[float, ...]
    milliseconds: float
    prefill: float
    decode: float
    peak: int | None  # bytes on a GPU


def _turn(model: Any, processor: Any, cfg: GenerateConfig, prompt: str, inputs: dict[str, Any]) -> _Turn:
    """Answer once with what is attached."""
    answer: str | tuple[float, ...]
    with AnswerWatch(model) as watch:
        if cfg.options:
            logits = model(**inputs, logits_to_keep=1).logits[0, -1]
        else:
            out = model.generate(**inputs, max_new_tokens=cfg.max_new_tokens or WRITTEN, do_sample=False)
    if cfg.options:
        tokens = option_token_ids(processor.tokenizer, prompt, cfg.options, style=cfg.style)
        answer = read_choices(logits, tokens).probability
    else:
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    whole = 1e3 * watch.seconds
    prefill = whole if cfg.options else 1e3 * watch.prefill_seconds
    return _Turn(answer, whole, prefill, whole - prefill, watch.peak_bytes)
