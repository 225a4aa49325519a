"""Multiple choice: prompts, the token that stands for each option, and what a model thinks of them.

An option is scored by one token, the first that tells it from the others as the continuation of the answer prefix. It
is found by tokenising prefix and option together: SentencePiece and BPE give a lone letter another id.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .video import Clip

__all__ = [
    "LETTER_PREFIX",
    "Choices",
    "Style",
    "check_text",
    "choice_inputs",
    "choice_prompt",
    "option_token_ids",
    "read_choices",
    "to_model",
]

Style = Literal["letter", "text"]
"""``letter``: options are listed as (A), (B), ... and a letter is scored. ``text``: the option itself is."""

LETTER_PREFIX = "Best option: ("


@dataclass(frozen=True)
class Choices:
    """What a model thinks of the options of one question.

    Attributes:
        probability: of each option, given that it is one of them; sums to 1.
        mass: probability that the next token is any of them.
    """

    probability: tuple[float, ...]
    mass: float

    @property
    def best(self) -> int:
        """Index of the likeliest option."""
        return max(range(len(self.probability)), key=self.probability.__getitem__)


def choice_prompt(processor: Any, question: str, options: Sequence[str], *, style: Style = "letter") -> str:
    """Prompt with a video placeholder, up to and including the answer prefix.

    Uses the processor's chat template; one without a template gets placeholder, question and prefix on their own.

    Args:
        processor: Of the model.
        question: Text.
        options: Texts, without letters.
        style: See ``Style``; ``text`` lists no options.

    Raises:
        ValueError: There are fewer than two options, or more than there are letters; or a text holds what the processor
            would take for a place of a video or image.
    """
    if len(options) < 2:
        raise ValueError(f"a question needs at least two options; got {len(options)}")
    check_text(processor, question, *options)
    if style == "letter":
        if len(options) > len(string.ascii_uppercase):
            raise ValueError(f"there are letters for {len(string.ascii_uppercase)} options; got {len(options)}")
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False))
        question = f"{question}\n{listed}\nAnswer with the letter of the best option."
    content = [{"type": "video"}, {"type": "text", "text": question}]
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    else:
        prompt = f"{processor.video_token}\n{question}\n"
    return prompt + (LETTER_PREFIX if style == "letter" else "")


def check_text(processor: Any, *texts: str) -> None:
    """Refuse texts that hold a placeholder, which the processor would expand as it does the video's own.

    Raises:
        ValueError: One does.
    """
    tokens: set[str] = {getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "video", "audio")}
    for text in texts:
        held = sorted(token for token in tokens if token and token in text)
        if held:
            raise ValueError(
                f"{text!r} holds {', '.join(held)}, which the processor takes for the place of a video or image; reword"
            )


def option_token_ids(tokenizer: Any, prompt: str, options: Sequence[str], *, style: Style = "letter") -> list[int]:
    """Token that stands for each option as the continuation of a prompt.

    Args:
        tokenizer: Of the model.
        prompt: Ends with the answer prefix.
        options: Texts; only their number matters for letters.
        style: As in ``choice_prompt``.

    Raises:
        ValueError: An option adds no token, or two options begin with the same one.
    """
    texts = (
        list(string.ascii_uppercase[: len(options)]) if style == "letter" else [option.strip() for option in options]
    )
    # The last stretch of the prompt is all that can merge with what follows.
    tail = prompt[-48:]
    before = tokenizer(tail, add_special_tokens=False)["input_ids"]
    found = []
    for text in texts:
        after = tokenizer(tail + text, add_special_tokens=False)["input_ids"]
        first = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
        if not text or first >= len(after):
            raise ValueError(f"option {text!r} adds no token to the prompt")
        found.append(after[first])
    if len(set(found)) != len(found):
        clash = [text for text, token in zip(texts, found, strict=True) if found.count(token) > 1]
        raise ValueError(
            f"options {clash} begin with the same token and cannot be told apart by it; use style='letter'"
        )
    return found


def read_choices(logits: Float[Tensor, " vocabulary"], tokens: Sequence[int]) -> Choices:
    """Probabilities of the options from the logits after the prompt."""
    logits = logits.float()
    chosen = logits[torch.as_tensor(tokens, device=logits.device)]
    mass = float((torch.logsumexp(chosen, 0) - torch.logsumexp(logits, 0)).exp())
    return Choices(tuple(chosen.softmax(0).tolist()), mass)


def choice_inputs(processor: Any, prompts: Sequence[str], clips: Sequence[Clip]) -> dict[str, Tensor]:
    """Left-padded model inputs of a batch of prompts, one clip each, with the frames as they are."""
    nested = type(processor).__name__ == "SmolVLMProcessor"
    videos: list[Any] = [clip.frames for clip in clips]
    metadata: list[Any] = [clip.metadata() for clip in clips]
    if nested:
        videos, metadata = [[video] for video in videos], [[entry] for entry in metadata]
    side = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "left"
    try:
        batch = processor(
            text=list(prompts),
            videos=videos,
            video_metadata=metadata,
            do_sample_frames=False,
            padding=True,
            return_tensors="pt",
        )
    finally:
        processor.tokenizer.padding_side = side
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def to_model(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Move inputs to a model's device, and pixels to its dtype; times and grids keep theirs."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    for name in ("pixel_values", "pixel_values_videos"):
        if name in moved:
            moved[name] = moved[name].to(model.dtype)
    return moved
