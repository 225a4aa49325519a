"""The tiny host: a small ``Qwen2_5_VLForConditionalGeneration`` that reads a mosaic of digits.

It is transformers' own class with its own processor, so that what is attached runs the code that runs in Qwen2.5-VL-7B.
A mosaic of 4 x 4 digits is 64 visual tokens, with a question 69; the answer is one digit or two, and the end of text.
The vision tower has no layers: transformers runs its attention window by window, which takes longer than all the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from hone_core import hosts
from hone_core.hosts import HostFacts
from torch import Tensor

from .config import KINDS, HostConfig
from .data import Mosaics, cell_name, questions

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

__all__ = ["ANSWER_TOKENS", "PACKAGE", "PACKAGED", "Host", "build_host", "load_host", "save_host"]

PACKAGE = "hone-zipr1"
PACKAGED = hosts.packaged_host(PACKAGE)
"""Where the host that ships lies."""
ANSWER_TOKENS = 3
"""Two digits and the end of text."""
_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>{question}"
PATCH = 2
"""Pixels; two by two patches are a visual token."""


@dataclass(eq=False)
class Host:
    """A model with its processor and config."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: Qwen2_5_VLProcessor
    config: HostConfig

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def inputs(self, batch: Mosaics) -> dict[str, Tensor]:
        """What the processor makes of mosaics, as for any picture."""
        from PIL import Image

        bytes_ = (batch.image_01.cpu() * 255).round().to(torch.uint8).numpy()
        prompts = [PROMPT.format(question=question) for question in questions(batch)]
        made = self.processor(
            text=prompts, images=[Image.fromarray(i).convert("RGB") for i in bytes_], return_tensors="pt"
        )
        return {name: value.to(self.device) for name, value in made.items() if isinstance(value, Tensor)}

    @cached_property
    def _ids(self) -> dict[str, Tensor]:
        """Token ids of the prompt's parts."""
        convert = self.processor.tokenizer.convert_tokens_to_ids
        cells = self.config.cells
        vision = [convert("<|vision_start|>"), *[convert("<|image_pad|>")] * self.config.visual_tokens]
        vision.append(convert("<|vision_end|>"))
        parts = {
            "vision": vision,
            "kinds": [convert(kind) for kind in KINDS],
            "cells": [convert(cell_name(cell, cells)) for cell in range(cells * cells)],
            "digits": [convert(str(digit)) for digit in range(10)],
        }
        return {name: torch.tensor(ids, device=self.device) for name, ids in parts.items()}

    def prompt_ids(self, batch: Mosaics) -> Tensor:
        """``[batch, tokens]``, what the processor's tokenizer makes of the prompts."""
        ids = self._ids
        vision = ids["vision"].expand(len(batch), -1)
        return torch.cat([vision, ids["kinds"][batch.kind][:, None], ids["cells"][batch.asked]], 1)

    def answer_ids(self, batch: Mosaics) -> tuple[Tensor, Tensor]:
        """Right answers ``[batch, ANSWER_TOKENS]`` with the end of text, and which positions count."""
        ids, tokenizer = self._ids, self.processor.tokenizer
        tens, ones = ids["digits"][batch.answer // 10], ids["digits"][batch.answer % 10]
        end = torch.full_like(ones, tokenizer.eos_token_id)
        short = torch.stack([ones, end, torch.full_like(ones, tokenizer.pad_token_id)], 1)
        long = torch.stack([tens, ones, end], 1)
        is_sum = batch.kind[:, None] == 1
        counts = is_sum | (torch.arange(ANSWER_TOKENS, device=self.device) < 2)
        return torch.where(is_sum, long, short), counts

    def pixel_values(self, batch: Mosaics) -> Tensor:
        """``[batch, patches, channels]``, what the processor's image processor makes of the mosaics, on any device."""
        grey = (batch.image_01 * 255).round() / 255 * 2 - 1
        count, side = len(grey), grey.shape[1] // (2 * PATCH)
        blocks = grey.view(count, side, 2, PATCH, side, 2, PATCH).permute(0, 1, 4, 2, 5, 3, 6)
        patches = blocks.reshape(count, side * side * 4, 1, 1, PATCH, PATCH)
        return patches.expand(-1, -1, 3, 2, -1, -1).flatten(2).to(self.model.dtype)

    @cached_property
    def _positions(self) -> Tensor:
        """``[3, tokens]`` of a prompt and its answer, equal for all."""
        model, length = self.model.model, self.config.visual_tokens + 2 + 3 + ANSWER_TOKENS
        side = self.config.size // PATCH
        ids = torch.cat([self._ids["vision"], self._ids["cells"][:1].expand(3 + ANSWER_TOKENS)])[None]
        types = (ids == self.model.config.image_token_id).int()
        grid = torch.tensor([[1, side, side]], device=self.device)
        found, _ = model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=types)
        assert found.shape[-1] == length, "a position per token"
        return found[:, 0]

    def embedded(self, batch: Mosaics, answer: Tensor | None = None) -> dict[str, Tensor]:
        """The model's arguments for a whole batch at once, with the same logits as ``inputs`` and much less work.

        transformers finds positions and windows sample by sample, which takes longer than the model.

        Args:
            batch: Questions.
            answer: ``[batch, tokens]`` that stand after the prompt.
        """
        visual = self.model.model.visual
        # The patch embedding is a convolution over whole patches: a product with a matrix.
        patches = F.linear(self.pixel_values(batch).flatten(0, 1), visual.patch_embed.proj.weight.flatten(1))
        features = visual.merger(patches)
        ids = self.prompt_ids(batch)
        if answer is not None:
            ids = torch.cat([ids, answer], 1)
        embeds = self.model.get_input_embeddings()(ids)
        tokens = self.config.visual_tokens
        embeds = torch.cat([embeds[:, :1], features.view(len(batch), tokens, -1), embeds[:, 1 + tokens :]], 1)
        positions = self._positions[:, None, : ids.shape[1]].expand(-1, len(batch), -1)
        return {"inputs_embeds": embeds, "position_ids": positions}

    def positions(self, start: int, stop: int, batch: int) -> Tensor:
        """``[3, batch, stop - start]`` of tokens of an answer, counted from the start of the prompt."""
        return self._positions[:, None, start:stop].expand(-1, batch, -1)

    def protected(self, batch: int) -> Tensor:
        """``[batch, tokens]``, the text of the prompts."""
        tokens = self.config.visual_tokens
        text = torch.ones(batch, tokens + 5, dtype=torch.bool, device=self.device)
        text[:, 1 : 1 + tokens] = False
        return text

    def read(self, answer: Tensor) -> list[str]:
        """Answers as text, with a question mark for what an untrained host writes beside digits."""
        texts = self.processor.tokenizer.batch_decode(answer, skip_special_tokens=True)
        return ["".join(c if c in "0123456789" else "?" for c in text) for text in texts]

    def grade(self, batch: Mosaics, answer: Tensor) -> Tensor:
        """``[batch]``, whether the answers are right to the end of text."""
        gold, counts = self.answer_ids(batch)
        return ((answer == gold) | ~counts).all(1)


def build_host(cfg: HostConfig | None = None, *, seed: int = 0) -> Host:
    """Build the untrained model and its processor.

    Args:
        cfg: Architecture.
        seed: Of the weights; the global generator is left as it was.
    """
    from hone_lm.tiny import build_tokenizer
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
        Qwen2VLVideoProcessor,
    )

    cfg = cfg or HostConfig()
    words = (*KINDS, *(cell_name(cell, cfg.cells) for cell in range(cfg.cells**2)))
    tokenizer = build_tokenizer(_SPECIAL, words=words)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    special = {n: tokenizer.convert_tokens_to_ids(t) for n, t in zip(names, _SPECIAL, strict=True)}
    pairs = cfg.width // cfg.heads // 2
    section = [pairs // 4, (pairs - pairs // 4) // 2]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": cfg.width,
            "intermediate_size": cfg.intermediate,
            "num_hidden_layers": cfg.layers,
            "num_attention_heads": cfg.heads,
            "num_key_value_heads": cfg.heads_k,
            "max_position_embeddings": 1024,
            "initializer_range": 0.04,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [*section, pairs - sum(section)],
            },
        },
        vision_config={
            "depth": 0,
            "hidden_size": cfg.vision_width,
            "out_hidden_size": cfg.width,
            "intermediate_size": cfg.vision_width,
            "num_heads": 2,
            "patch_size": PATCH,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [],
            "initializer_range": 0.04,
        },
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    pixels = {"shortest_edge": cfg.size**2, "longest_edge": cfg.size**2}
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": PATCH}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(size=dict(pixels), **half), tokenizer, Qwen2VLVideoProcessor(size=dict(pixels), **half)
    )
    return Host(model, processor, cfg)


def save_host(host: Host, path: Path, facts: HostFacts | None = None) -> Path:
    """Write a host, see ``hone_core.hosts``; returns the path."""
    return hosts.save_host(path, host.config, {"": host.model}, package=PACKAGE, facts=facts)


def load_host(device: torch.device | str = "cpu", *, path: Path | None = None) -> Host:
    """Load a trained host.

    Args:
        device: Where the model goes; weights are float32 there.
        path: A ``host.safetensors``; the packaged one if None.

    Raises:
        CheckpointError: The file is missing or is no such checkpoint.
    """
    stored = hosts.open_host(HostConfig, PACKAGE, path)
    host = build_host(stored.config)
    stored.load({"": host.model})
    host.model.to(device)
    return host
