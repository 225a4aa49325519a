"""Answer a question with selected tokens, and with the dense model beside it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_core.timing import AnswerWatch

from .config import PRESETS, AskConfig, GenerateConfig, SparseConfig

__all__ = ["GenerateReport", "generate", "item_of", "load_asked", "processed", "selection_of", "stored_bytes"]

Ask = TypeVar("Ask", bound=AskConfig)

ANSWERS = "answers.json"


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """Answers with their cost; as text, side by side.

    Attributes:
        tokens: of the prompt.
        answers: ``dense``, where compared, and the label of the selection, to the answer.
        layer_ratio: kept tokens over tokens, of each layer.
        uniform: the ratio of a map without structure, at the same p on a prompt as long; None where p sets no budget.
    """

    tokens: int
    answers: dict[str, str]
    layer_ratio: tuple[float, ...]
    uniform: float | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the report of a run whose rows are written."""
        said = json.loads((run.artifacts / ANSWERS).read_text(encoding="utf-8"))
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            tokens=said["tokens"],
            answers=said["answers"],
            layer_ratio=tuple(said["layer_ratio"]),
            uniform=said["uniform"],
        )

    def __str__(self) -> str:
        values = {(row.metric, row.variant): row.value for row in self.rows}
        lines = [f"prompt of {self.tokens} tokens"]
        for name, answer in self.answers.items():
            cost = f"prefill {values['prefill', name]:.1f} ms, decode {values['decode', name]:.1f} ms"
            cost += f", cache {values['cache', name]:.3f} MiB"
            if ("peak_memory", name) in values:
                cost += f", peak {values['peak_memory', name]:.2f} GiB"
            lines.append(f"{name} ({cost})\n  {answer}")
        tau = sum(self.layer_ratio) / len(self.layer_ratio)
        beside = "" if self.uniform is None else f"; uniform attention would keep {100 * self.uniform:.1f} %"
        lines.append(f"kept {100 * tau:.1f} % of the prompt's tokens{beside}")
        lines.append("by layer, %: " + " ".join(f"{100 * ratio:.0f}" for ratio in self.layer_ratio))
        return "\n".join([*lines, f"answers and times in {self.path}"])


def processed(cfg: AskConfig) -> tuple[Any, Any]:
    """The model's config, and what its processor makes of the question; weights of a model are not read."""
    if cfg.model is None:
        model, _, inputs = load_asked(cfg, torch.device("cpu"))
        return model.config, inputs
    from hone_lm.checkpoints import read_config
    from transformers import AutoProcessor

    from .adapters import base_of

    base = base_of(cfg.model)
    return read_config(base), _inputs(AutoProcessor.from_pretrained(base), cfg)


def load_asked(cfg: AskConfig, device: torch.device) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Model, processor, and what the processor makes of the question.

    Args:
        cfg: Question.
        device: Where the model and the inputs go.
    """
    if cfg.model is None:
        from .data import mosaics, parse_question
        from .host import load_host

        host = load_host(device)
        kind, asked = parse_question(cfg.ask, host.config.cells)
        batch = mosaics(1, host.config.cells, cfg.seed, split="test", device=device).asking(kind, asked)
        return host.model, host.processor, host.inputs(batch)
    from hone_lm.choices import to_model

    from .adapters import load_model

    model, processor = load_model(cfg.model, device=device, dtype=resolve_dtype(cfg.dtype, device))
    return model, processor, to_model(_inputs(processor, cfg), model)


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Answer, and compare."""
    from .models import attach

    model, processor, inputs = load_asked(cfg, resolve_device(run.device))
    selection = selection_of(cfg)
    # Everything kept is the dense model, bit for bit.
    dense = SparseConfig(p=1.0, captured=True) if cfg.captured else None
    variants: dict[str, SparseConfig | None] = {"dense": dense} if cfg.compare_dense else {}
    variants[selection.label] = selection
    turns: dict[str, list[_Turn]] = {name: [] for name in variants}
    stats: Any = None
    # Whoever goes first pays for the start of the machine: nobody's first turn counts, and the others alternate.
    for _ in range(1 + cfg.rounds):
        for name, config in variants.items():
            if config is None:
                turns[name].append(_turn(model, processor, inputs, cfg.max_new_tokens))
                continue
            with attach(model, config) as handle:
                turns[name].append(_turn(model, processor, inputs, cfg.max_new_tokens))
                stats = handle.stats  # of the selection, which comes last
    for name, (_, *timed) in turns.items():
        for metric in ("prefill", "decode"):
            values = [getattr(turn, metric) for turn in timed]
            spread = statistics.stdev(values) if len(values) > 1 else None
            run.row(
                metric, statistics.median(values), unit="ms", better="lower", n=len(values), spread=spread, variant=name
            )
        run.row("cache", timed[-1].stored / 2**20, unit="MiB", better="lower", variant=name)
        if timed[-1].peak is not None:
            run.row("peak_memory", timed[-1].peak / 2**30, unit="GiB", better="lower", variant=name)
    run.row("token_ratio", float(stats.ratio[0]), better="lower", variant=selection.label)
    said = {
        "tokens": int(stats.real.sum()),
        "answers": {name: timed[-1].answer for name, timed in turns.items()},
        "layer_ratio": stats.layer_ratio[:, 0].tolist(),
        "uniform": float(stats.uniform(selection.p)[0]) if selection.policy in ("top-p", "random") else None,
    }
    atomic_write_json(run.artifacts / ANSWERS, said)
    return GenerateReport.of(run)


def stored_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def selection_of(cfg: AskConfig) -> SparseConfig:
    """The preset's, with the flags'."""
    chosen = PRESETS[cfg.preset].config
    if isinstance(cfg, GenerateConfig):
        chosen = replace(chosen, cache=cfg.cache, captured=cfg.captured)
    return chosen if cfg.p is None else replace(chosen, p=cfg.p)


def _inputs(processor: Any, cfg: AskConfig) -> dict[str, torch.Tensor]:
    """What the processor makes of the question and its picture or video."""
    from .questions import model_inputs

    return model_inputs(processor, [item_of(cfg)], cfg.frames)


def item_of(cfg: AskConfig) -> Any:
    """The question, as those of a file are."""
    from .questions import Item

    media = cfg.video or cfg.image
    assert media is not None, "the config has seen to it"
    return Item(media, cfg.video is not None, cfg.ask, "", "string")


class _Turn(NamedTuple):
    """One answer; times in milliseconds."""

    answer: str
    prefill: float
    decode: float
    stored: int
    peak: int | None  # bytes on a GPU


@torch.no_grad()
def _turn(model: Any, processor: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> _Turn:
    with AnswerWatch(model) as watch:
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    answer = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    prefill = 1e3 * watch.prefill_seconds
    return _Turn(answer, prefill, 1e3 * watch.seconds - prefill, stored_bytes(out.past_key_values), watch.peak_bytes)
