"""Answer a question about a video, with the model as it is and with something attached."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hone_lm.choices import Style, choice_inputs, choice_prompt, option_token_ids, read_choices, to_model
from hone_lm.layouts import TokenLayout, find_layouts
from hone_lm.video import Clip, read_video

from .config import KnockoutConfig
from .models import attach

__all__ = ["AskConfig", "AskReport", "ask", "look"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AskConfig:
    """A video and a question."""

    model: str
    video: str
    ask: str
    options: tuple[str, ...] = ()
    """If given, the options are scored instead of an answer being written."""
    config: KnockoutConfig = field(default_factory=KnockoutConfig)
    frames: int = 32
    max_new_tokens: int = 64
    start: float | None = None
    end: float | None = None
    style: Style = "letter"

    def __post_init__(self) -> None:
        if not self.ask.strip():
            raise ValueError("the question is empty")
        if len(self.options) == 1:
            raise ValueError("one option is no choice; give at least two, or none for a written answer")
        if self.frames < 1 or self.max_new_tokens < 1:
            raise ValueError(f"frames and max_new_tokens must be positive; got {self.frames}, {self.max_new_tokens}")


@dataclass(frozen=True)
class AskReport:
    """Answers with their cost; as text, side by side.

    Attributes:
        layout: of the prompt.
        answers: ``baseline`` and the label of what was attached, to the written answer or the option probabilities.
        milliseconds: of each, the whole answer.
        peak_bytes: of each on a GPU; None on a CPU.
        options: texts, where they were given.
    """

    layout: TokenLayout
    answers: dict[str, str | tuple[float, ...]]
    milliseconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    options: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "layout": self.layout.to_dict(),
            "answers": {name: list(a) if isinstance(a, tuple) else a for name, a in self.answers.items()},
            "milliseconds": self.milliseconds,
            "peak_bytes": self.peak_bytes,
            "options": list(self.options),
        }

    def __str__(self) -> str:
        lines = [str(self.layout), ""]
        for name, answer in self.answers.items():
            peak = self.peak_bytes[name]
            cost = f"{self.milliseconds[name]:.0f} ms" + (f", {peak / 2**30:.2f} GiB" if peak else "")
            lines.append(f"{name} ({cost})")
            if isinstance(answer, str):
                lines.append(f"  {answer}")
            else:
                lines += [f"  {p:6.1%}  {text}" for p, text in zip(answer, self.options, strict=True)]
        return "\n".join(lines)


def prompt_inputs(processor: Any, cfg: AskConfig, clip: Clip) -> tuple[str, dict[str, Any]]:
    """Prompt and model inputs of a question."""
    if cfg.options:
        prompt = choice_prompt(processor, cfg.ask, cfg.options, style=cfg.style)
    else:
        # Two options that are never shown: the text style lists none.
        prompt = choice_prompt(processor, cfg.ask, ("a", "b"), style="text")
    return prompt, choice_inputs(processor, [prompt], [clip])


def look(model: Any, processor: Any, cfg: AskConfig, clip: Clip | None = None) -> TokenLayout:
    """Layout of a prompt, without running the model.

    Args:
        model: Or its config.
        processor: Of the model.
        cfg: Video and question.
        clip: In place of the video.
    """
    clip = clip or read_video(cfg.video, num_frames=cfg.frames, start=cfg.start, end=cfg.end)
    _, inputs = prompt_inputs(processor, cfg, clip)
    return find_layouts(model, inputs)[0]


@torch.no_grad()
def ask(model: Any, processor: Any, cfg: AskConfig, clip: Clip | None = None) -> AskReport:
    """Answer with the model as it is, then with what the config attaches.

    Args:
        model: A ``...ForConditionalGeneration``.
        processor: Of the model.
        cfg: Video, question, and what to attach.
        clip: In place of the video.
    """
    clip = clip or read_video(cfg.video, num_frames=cfg.frames, start=cfg.start, end=cfg.end)
    prompt, inputs = prompt_inputs(processor, cfg, clip)
    layout = find_layouts(model, inputs)[0]
    inputs = to_model(inputs, model)
    answers: dict[str, str | tuple[float, ...]] = {}
    milliseconds: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    gpu = model.device.type == "cuda"
    runs = [KnockoutConfig()] + ([cfg.config] if cfg.config != KnockoutConfig() else [])
    for config in runs:
        with attach(model, config):
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            if cfg.options:
                logits = model(**inputs, logits_to_keep=1).logits[0, -1]
                tokens = option_token_ids(processor.tokenizer, prompt, cfg.options, style=cfg.style)
                answers[config.label] = read_choices(logits, tokens).probability
            else:
                out = model.generate(**inputs, max_new_tokens=cfg.max_new_tokens, do_sample=False)
                new = out[0, inputs["input_ids"].shape[1] :]
                answers[config.label] = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
            if gpu:
                torch.cuda.synchronize()
            milliseconds[config.label] = 1e3 * (time.perf_counter() - begun)
            peaks[config.label] = torch.cuda.max_memory_allocated() if gpu else None
    return AskReport(layout, answers, milliseconds, peaks, cfg.options)


def save_layout(layout: TokenLayout, run: Any) -> Path:
    """Write a layout into a run's artifacts."""
    return layout.save(run.artifacts / "layout.json")
