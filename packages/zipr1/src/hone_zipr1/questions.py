"""Questions about pictures or videos with answers that a program can check, and a model that is asked them.

A line of JSON per question: ``{"image" or "video": path, "question": text, "answer": text, "type": "choice", "number"
or "string"}``, paths from the file's folder; a number may have a relative ``"tolerance"``.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from hone_core.io import read_lines
from torch import Tensor

from .models import SparseHandle, visual_ids
from .reinforce import Drawn

__all__ = [
    "Item",
    "ModelTask",
    "check_batch",
    "check_context",
    "check_longest",
    "is_right",
    "load_items",
    "model_inputs",
    "picture_inputs",
    "prompt_features",
]

Type = Literal["choice", "number", "string"]
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
_LETTER = re.compile(r"\b(?:[B-HJ-Z]|I(?!['\u2019]| +(?!is\b|because\b)[a-z])|A(?! +(?!is\b|because\b)[a-z]))\b")
_IGNORED = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        media: picture or video.
        is_video: which.
        question: text.
        answer: right one.
        type: how it is checked.
        tolerance: of a number, relative.
    """

    media: Path
    is_video: bool
    question: str
    answer: str
    type: Type
    tolerance: float = 0.0


def load_items(path: Path) -> list[Item]:
    """Read a file of questions.

    Raises:
        ValueError: A line is none, or an answer is not of its type.
        FileNotFoundError: The file, or what a question is about, is missing.
    """
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                found.append(_item(json.loads(line), path.parent))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}, line {number}: {error}") from error
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} has no question")
    if len({item.is_video for item in found}) > 1:
        raise ValueError(f"{path} asks about pictures and videos; a batch is of one kind, so make two files")
    return found


def _item(row: Any, folder: Path) -> Item:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object; got {type(row).__name__}")
    media = [name for name in ("image", "video") if row.get(name)]
    missing = [name for name in ("question", "answer", "type") if row.get(name) is None or not str(row[name]).strip()]
    if len(media) != 1 or missing:
        raise ValueError(
            f'expected "image" or "video", "question", "answer" and "type"; got {", ".join(row) or "nothing"}'
        )
    if row["type"] not in get_args(Type):
        raise ValueError(f"type must be one of {', '.join(get_args(Type))}; got {row['type']!r}")
    path = (folder / row[media[0]]).resolve()
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    item = Item(
        path, media[0] == "video", str(row["question"]), str(row["answer"]), row["type"], float(row.get("tolerance", 0))
    )
    if not is_right(item.answer, item):
        raise ValueError(f"the answer {item.answer!r} is no {item.type}")
    return item


def is_right(text: str, item: Item) -> bool:
    """Whether an answer is right.

    ``choice``: its first letter that stands alone is the right one; "I think" and "A dog" are words. ``number``: its
    last number is the right one, within the tolerance. ``string``: the same words, without case, punctuation and
    articles.
    """
    if item.type == "choice":
        letters = [_LETTER.search(t) for t in (text, item.answer)]
        return all(letters) and len({letter[0] for letter in letters if letter}) == 1
    if item.type == "number":
        numbers = [_NUMBER.findall(t) for t in (text, item.answer)]
        if not all(numbers):
            return False
        said, gold = (float(n[-1].replace(",", "")) for n in numbers)
        return math.isclose(said, gold, rel_tol=max(item.tolerance, 1e-9))
    first, second = (
        [word for word in t.lower().translate(_IGNORED).split() if word not in ("a", "an", "the")]
        for t in (text, item.answer)
    )
    return bool(second) and first == second


def model_inputs(processor: Any, items: Sequence[Item], frames: int) -> dict[str, Tensor]:
    """Left-padded model inputs of a batch of questions, all about pictures or all about videos.

    Args:
        processor: Of the model.
        items: Questions.
        frames: Of a video.

    Raises:
        ValueError: A question holds a placeholder of the processor, or a picture or video cannot be read.
    """
    from hone_lm.choices import choice_inputs, choice_prompt
    from hone_lm.video import read_picture, read_video

    if items[0].is_video:
        # Two options that are never shown: the text style lists none.
        prompts = [choice_prompt(processor, item.question, ("a", "b"), style="text") for item in items]
        return choice_inputs(processor, prompts, [read_video(item.media, num_frames=frames) for item in items])
    pictures = [[read_picture(item.media)] for item in items]
    return picture_inputs(processor, [item.question for item in items], pictures)


def check_context(inputs: Mapping[str, Tensor], config: Any, answer: int, items: Sequence[Item]) -> None:
    """Refuse prompts that leave no room for an answer.

    Args:
        inputs: Of the model.
        config: Of the model.
        answer: Tokens of an answer.
        items: What the inputs ask about.

    Raises:
        ValueError: One is too long.
    """
    lengths, context = inputs["attention_mask"].sum(-1), config.get_text_config().max_position_embeddings
    tokens, row = int(lengths.max()), int(lengths.argmax())
    if tokens + answer > context:
        raise ValueError(
            f"the prompt about {items[row].media} has {tokens} tokens and the answer up to {answer}; the model has a "
            f"context of {context}. Take a smaller picture, or fewer frames"
        )


def check_longest(model: str, items: Sequence[Item], frames: int, answer: int) -> None:
    """``check_context`` of the largest picture or video and of the longest question; no weights are read.

    Args:
        model: Folder or hub address.
        items: Questions.
        frames: Of a video.
        answer: Tokens of an answer.

    Raises:
        ValueError: One is too long, or a video cannot be read.
    """
    from hone_lm.checkpoints import read_config
    from hone_lm.video import video_size
    from PIL import Image
    from transformers import AutoProcessor

    def pixels(item: Item) -> int:
        if item.is_video:
            count, height, width = video_size(item.media)
            return min(count, frames) * height * width
        with Image.open(item.media) as picture:
            return picture.width * picture.height

    config, processor = read_config(model), AutoProcessor.from_pretrained(model)
    media = {item.media: item for item in items}  # several questions are about one
    asked = (max(items, key=lambda item: len(item.question)), max(media.values(), key=pixels))
    for item in dict.fromkeys(asked):
        check_context(model_inputs(processor, [item], frames), config, answer, [item])


def check_batch(model: str, items: Sequence[Item], frames: int) -> None:
    """Refuse videos that a model's processor cannot put into one batch, as one that stacks them; no weights are read.

    Args:
        model: Folder or hub address.
        items: Questions.
        frames: Of a video.

    Raises:
        ValueError: The shortest and the longest do not go together.
    """
    from hone_lm.video import video_size
    from transformers import AutoProcessor

    if not items[0].is_video:
        return
    counts = {item.media: (min(video_size(item.media)[0], frames), item) for item in items}
    (few, short), (many, long) = (pick(counts.values(), key=lambda found: found[0]) for pick in (min, max))
    if few == many:
        return
    try:
        model_inputs(AutoProcessor.from_pretrained(model), [short, long], frames)
    except ValueError as error:
        raise ValueError(
            f"{short.media} gives {few} frames and {long.media} {many}, which this model's processor does not put into "
            f"one batch. Lower frames to {few}, leave shorter videos out, or ask one prompt at a time (--prompts 1)"
        ) from error


def picture_inputs(processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """What the processor makes of questions with their pictures, padded at the left.

    Args:
        processor: Of the model.
        texts: Questions.
        pictures: Of each question, as PIL images in RGB; they stand before its text.

    Raises:
        ValueError: A text holds a placeholder of the processor.
    """
    from hone_lm.choices import check_text

    check_text(processor, *texts)
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    prompts = []
    for text, own in zip(texts, pictures, strict=True):
        content = [*({"type": "image"} for _ in own), {"type": "text", "text": text}]
        prompts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            if template
            else f"{processor.image_token}\n" * len(own) + f"{text}\n"
        )
    side, processor.tokenizer.padding_side = processor.tokenizer.padding_side, "left"
    try:
        shown: list[Any] = [picture for own in pictures for picture in own]
        if type(processor).__name__ == "SmolVLMProcessor" and shown:
            shown = [list(own) for own in pictures]  # it takes a flat list for the pictures of one prompt
        made = processor(text=prompts, images=shown or None, padding=True, return_tensors="pt")
    finally:
        processor.tokenizer.padding_side = side
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


@torch.no_grad()
def prompt_features(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean embedding of each prompt's text, for ``BudgetPolicy``; what a picture shows is not in it.

    Args:
        model: A model of a processor's inputs.
        inputs: Of it, ``input_ids`` and ``attention_mask`` among them, on the model's device.

    Returns:
        float32 ``[batch, dim]``.
    """
    ids = inputs["input_ids"]
    text = inputs["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(visual_ids(model.config), device=ids.device))
    embeds = model.get_input_embeddings()(ids).float()
    return (embeds * text[..., None]).sum(1) / text.sum(1, keepdim=True)


class ModelTask:
    """A model of transformers and a file of questions, as ``reinforce`` asks for them.

    Args:
        model: Trained; in evaluation mode.
        processor: Its.
        items: Questions.
        original: The same weights, frozen. None: the model without its adapters is the original.
        frames: Of a video.
        max_new_tokens: Of an answer.
        seed: Of the order of the questions.
        process: Number of this process among those that train together.
        processes: How many there are; each has questions of its own.
        sharded: Whether they share the model's layers out, and so run each forward together.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        *,
        original: Any = None,
        frames: int = 32,
        max_new_tokens: int = 64,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        sharded: bool = False,
    ) -> None:
        self.model, self.processor, self.items, self.original = model, processor, items, original
        self.frames, self.max_new_tokens, self.sharded = frames, max_new_tokens, sharded
        self._seed, self._process, self._processes = seed, process, processes
        self._last: tuple[list[Item], dict[str, Tensor]] | None = None

    def draw(self, step: int, prompts: int, group: int) -> list[Item]:
        """The next questions; every epoch has its own order."""
        first = (step * self._processes + self._process) * prompts
        return [self._at(index) for index in range(first, first + prompts) for _ in range(group)]

    def _at(self, index: int) -> Item:
        epoch, at = divmod(index, len(self.items))
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
        return self.items[int(torch.randperm(len(self.items), generator=generator)[at])]

    def part(self, rows: list[Item], which: slice) -> list[Item]:
        """Some of them."""
        return rows[which]

    def inputs(self, rows: list[Item]) -> dict[str, Tensor]:
        """On the model's device; those of the last rows are kept."""
        from hone_lm.choices import to_model

        if self._last is None or self._last[0] != rows:
            inputs = model_inputs(self.processor, rows, self.frames)
            check_context(inputs, self.model.config, self.max_new_tokens, rows)
            self._last = rows, to_model(inputs, self.model)
        return self._last[1]

    @torch.no_grad()
    def features(self, rows: list[Item]) -> Tensor:
        """See ``prompt_features``."""
        return prompt_features(self.model, self.inputs(rows))

    @torch.no_grad()
    def sample(self, rows: list[Item], handle: SparseHandle, p: Tensor, temperature: float, seed: int) -> Drawn:
        """Answer by the model's ``generate``, with no warper but the temperature."""
        inputs, tokenizer = self.inputs(rows), self.processor.tokenizer
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), handle.using(p=p):
            torch.manual_seed(seed)
            out = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                suppress_tokens=list(visual_ids(self.model.config)),
                max_new_tokens=self.max_new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
                synced_gpus=self.sharded,
            )
        assert handle.stats is not None, "a prompt was read"
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        logits = torch.stack(out.logits, 1)
        logps = self._logps(logits, ids, temperature)
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(ids, torch.as_tensor(ends, device=ids.device))
        mask = ended.cumsum(1) - ended.long() == 0  # to the first end, itself included
        texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask, strict=True)]
        correct = [is_right(text, item) for text, item in zip(texts, rows, strict=True)]
        return Drawn(ids, logps, mask, handle.stats.ratio, torch.tensor(correct, device=ids.device))

    def logps(
        self, rows: list[Item], ids: Tensor, handle: SparseHandle, p: Tensor, temperature: float, soft: bool
    ) -> Tensor:
        """Of given answers; the selection is that of the prompt alone."""
        inputs = self.inputs(rows)
        with handle.using(p=p, prompt_tokens=inputs["input_ids"].shape[1], soft=soft):
            return self._forced(self.model, inputs, ids, temperature)

    @torch.no_grad()
    def reference(self, rows: list[Item], ids: Tensor, temperature: float, handle: SparseHandle) -> Tensor:
        """Of the original, dense."""
        inputs = self.inputs(rows)
        if self.original is not None:
            return self._forced(self.original, inputs, ids, temperature)
        with handle.disabled(), _without_adapters(self.model):
            return self._forced(self.model, inputs, ids, temperature)

    def _forced(self, model: Any, inputs: Mapping[str, Tensor], ids: Tensor, temperature: float) -> Tensor:
        given = dict(inputs)
        given["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        given["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
        if "mm_token_type_ids" in given:
            types = given["mm_token_type_ids"]
            given["mm_token_type_ids"] = torch.cat([types, types.new_zeros(ids.shape)], 1)
        logits = model(**given, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
        return self._logps(logits, ids, temperature)

    def _logps(self, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """Placeholders of pictures are no words: a drawn one would want pixels in the next forward."""
        logits = logits.float() / temperature
        placeholders = torch.tensor(visual_ids(self.model.config), device=logits.device)
        return logits.index_fill(-1, placeholders, -torch.inf).log_softmax(-1).gather(2, ids[..., None])[..., 0]

    def right(self, rows: list[Item]) -> tuple[Tensor, Tensor]:
        """Answers as the model would write them: the text and the end."""
        tokenizer = self.processor.tokenizer
        texts = [tokenizer(item.answer, add_special_tokens=False)["input_ids"] for item in rows]
        longest = max(map(len, texts)) + 1
        ids = torch.full((len(rows), longest), tokenizer.eos_token_id, device=self.model.device)
        counts = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, device=ids.device)
            counts[row, : len(text) + 1] = True
        return ids, counts


@contextmanager
def _without_adapters(model: Any) -> Any:
    _adapt(model, False)
    try:
        yield
    finally:
        _adapt(model, True)


def _adapt(model: Any, on: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled=on)
