"""Texts as a model reads them: features of T5, padded on the left.

Source: the release's ``language/t5.py``.
Differs: texts are lower-cased and stripped, not run through the release's rules for scraped captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from hone_core.errors import CheckpointError
from hone_visual_ar.pipelines import count_words
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from .places import cleaned

__all__ = ["TextReader", "condition_of", "encode_texts", "pad_left", "text_channels"]


def text_channels(name: str) -> int:
    """Channels of a T5's features; its config alone is read.

    Raises:
        CheckpointError: There is no such encoder.
    """
    try:
        return int(AutoConfig.from_pretrained(name).d_model)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{name} is no T5 that can be read ({error}); name one, as google/flan-t5-xl") from error


@dataclass(frozen=True)
class TextReader:
    """What turns stored texts into a model's condition.

    Attributes:
        encoder: T5's.
        tokenizer: Its.
        length: Of the condition.
    """

    encoder: Any
    tokenizer: PreTrainedTokenizerBase
    length: int

    @classmethod
    def load(cls, name: str, length: int, device: torch.device, dtype: torch.dtype) -> Self:
        """One by a folder or hub address."""
        encoder = T5EncoderModel.from_pretrained(name, dtype=dtype).to(device).eval()
        return cls(encoder.requires_grad_(False), AutoTokenizer.from_pretrained(name), length)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``text`` in float32 and ``words`` of texts, those that are too long cut, as a model's forward takes them."""
        features, words = encode_texts(self.encoder, self.tokenizer, texts, self.length, cut=True)
        return {"text": features.float(), "words": words}


def condition_of(
    labels: Sequence[int | str], reader: TextReader | None, device: torch.device | str
) -> dict[str, Tensor]:
    """What a model's forward takes of classes, or of texts where there is a reader."""
    if reader is not None:
        return reader([str(label) for label in labels])
    return {"labels": torch.tensor([int(label) for label in labels], device=device)}


def pad_left(features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Text features moved to the right end, and zero where there is no word.

    Args:
        features: ``[B, T, C]``, words first.
        words: ``[B, T]`` bool, True at words.

    Returns:
        Both, padded on the left.
    """
    count, length = words.sum(1), words.shape[1]
    places = (torch.arange(length, device=words.device)[None] + count[:, None]) % length
    moved = words.gather(1, places)
    rows = features.gather(1, places[..., None].expand_as(features))
    return rows * moved[..., None], moved


@torch.no_grad()
def encode_texts(
    encoder: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, *, cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Features ``[B, length, C]`` of texts, padded on the left, and where their words are, on the encoder's device.

    Args:
        encoder: T5's.
        tokenizer: Its.
        texts: To read.
        length: Of the model's condition.
        cut: Leave out what is too long, as in training, in place of refusing it.

    Raises:
        ValueError: A text is empty, or too long.
    """
    prompts = cleaned(texts)
    if cut:
        found = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in prompts]
    else:
        found = count_words(tokenizer, prompts, length)
    ids = torch.zeros(len(found), length, dtype=torch.long)
    words = torch.zeros(len(found), length, dtype=torch.bool)
    for row, each in enumerate(found):
        ids[row, : len(each)], words[row, : len(each)] = torch.tensor(each), True
    ids, words = ids.to(encoder.device), words.to(encoder.device)
    features = encoder(ids, attention_mask=words.long()).last_hidden_state
    # Hooks of an offloaded encoder run it elsewhere.
    return pad_left(features, words.to(features.device))
