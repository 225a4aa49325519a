"""Answer a question about a video, with the model as it is and with something attached."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any, NamedTuple

import torch
from hone_lm.choices import Style, choice_inputs, choice_prompt, option_token_ids, read_choices, to_model
from hone_lm.decoders import find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from hone_lm.video import Clip, read_video

from .config import Knockout, KnockoutConfig
from .method import global_after
from .models import attach

__all__ = ["AskConfig", "AskReport", "ask", "check_question", "exit_gap", "look"]


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
    """Frames sampled from the video, all it has if it has fewer. A class that fuses two of them (Qwen) shows the
    decoder half as many: those are the frames of a layout."""
    tokens_per_frame: int | None = None
    """As in ``attach``; None is the rule of the model's class."""
    max_new_tokens: int = 64
    start: float | None = None
    end: float | None = None
    style: Style = "letter"
    rounds: int = 3
    """Turns that each gets after one that warms up; times are their medians."""

    def __post_init__(self) -> None:
        if not self.ask.strip():
            raise ValueError("the question is empty")
        if len(self.options) == 1:
            raise ValueError("one option is no choice; give at least two, or none for a written answer")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"options must differ; got {list(self.options)}")
        if self.style == "letter" and len(self.options) > len(ascii_uppercase):
            raise ValueError(f"there are letters for {len(ascii_uppercase)} options; got {len(self.options)}")
        if self.frames < 1 or self.max_new_tokens < 1:
            raise ValueError(f"frames and max_new_tokens must be positive; got {self.frames}, {self.max_new_tokens}")
        if self.tokens_per_frame is not None and self.tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame must be positive; got {self.tokens_per_frame}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be positive; got {self.rounds}")


@dataclass(frozen=True)
class AskReport:
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
    exit_gap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "layout": self.layout.to_dict(),
            "answers": {name: list(a) if isinstance(a, tuple) else a for name, a in self.answers.items()},
            "milliseconds": self.milliseconds,
            "prefill_milliseconds": self.prefill_milliseconds,
            "decode_milliseconds": self.decode_milliseconds,
            "peak_bytes": self.peak_bytes,
            "options": list(self.options),
            "exit_gap": self.exit_gap,
        }

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
    return _layout(model, inputs, cfg, clip)


def check_question(model: Any, processor: Any, cfg: AskConfig, clip: Clip) -> None:
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


def _layout(model: Any, inputs: dict[str, Any], cfg: AskConfig, clip: Clip) -> TokenLayout:
    (layout,) = find_layouts(model, inputs, tokens_per_frame=cfg.tokens_per_frame)
    return replace(layout, sampled=len(clip.frames))


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
    layout = _layout(model, inputs, cfg, clip)
    inputs = to_model(inputs, model)
    configs = [KnockoutConfig()] + ([cfg.config] if cfg.config != KnockoutConfig() else [])
    turns: dict[str, list[_Turn]] = {config.label: [] for config in configs}
    # Whoever goes first pays for the start of the machine: nobody's first turn counts, and the others alternate.
    for _ in range(1 + cfg.rounds):
        for config in configs:
            with attach(model, config, tokens_per_frame=cfg.tokens_per_frame):
                turns[config.label].append(_turn(model, processor, cfg, prompt, inputs))

    def median(field: str) -> dict[str, float]:
        return {name: statistics.median(getattr(turn, field) for turn in timed[1:]) for name, timed in turns.items()}

    return AskReport(
        layout=layout,
        answers={name: timed[0].answer for name, timed in turns.items()},
        milliseconds=median("milliseconds"),
        prefill_milliseconds=median("prefill"),
        decode_milliseconds=median("decode"),
        peak_bytes={name: timed[-1].peak for name, timed in turns.items()},
        options=cfg.options,
        exit_gap=exit_gap(model, inputs, cfg.config, tokens_per_frame=cfg.tokens_per_frame),
    )


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


def _turn(model: Any, processor: Any, cfg: AskConfig, prompt: str, inputs: dict[str, Any]) -> _Turn:
    """Answer once with what is attached."""
    gpu = model.device.type == "cuda"

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    first: list[float] = []

    def end(*_: Any) -> None:
        # Only the first forward, the prefill, is waited for, so that decoding runs as it always does.
        if not first:
            first.append(now())

    hook = model.register_forward_hook(end)
    try:
        begun = now()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        if cfg.options:
            logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            stop = now()
            tokens = option_token_ids(processor.tokenizer, prompt, cfg.options, style=cfg.style)
            answer: str | tuple[float, ...] = read_choices(logits, tokens).probability
        else:
            out = model.generate(**inputs, max_new_tokens=cfg.max_new_tokens, do_sample=False)
            stop = now()
            new = out[0, inputs["input_ids"].shape[1] :]
            answer = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    finally:
        hook.remove()
    prefill = stop if cfg.options else first[0]
    peak = torch.cuda.max_memory_allocated() if gpu else None
    return _Turn(answer, stop - begun, prefill - begun, stop - prefill, peak)
