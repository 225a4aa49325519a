"""The tiny host: a small, trained ``LlavaOnevisionForConditionalGeneration`` that answers questions on generated clips.

It is transformers' own class at a small size, with its own processor and a chat template, so that everything that is
attached to it runs the code that runs in LLaVA-OneVision-7B: a frame is pooled to 5 x 5 tokens, eight frames and the
newline make 201, and the answer is the next token after the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hone_core import hosts
from hone_core.hosts import HostFacts
from torch import Tensor

from .config import HostConfig
from .data import COLORS, CORNERS, DIRECTIONS, SHAPES

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

__all__ = ["Host", "build_host", "host_config", "load_host", "pixel_values", "save_host"]

PACKAGE = "hone-knockout"

_QUESTION_WORDS = (
    *("what", "shape", "is", "the", "one", "where", "does", "move"),
    *("which", "appears", "first", "or", "white", "dot", "?", ","),
)
WORDS = tuple(dict.fromkeys([*_QUESTION_WORDS, *COLORS, *SHAPES, *DIRECTIONS, *CORNERS]))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass
class Host:
    """A model with its processor and config."""

    model: LlavaOnevisionForConditionalGeneration
    processor: LlavaOnevisionProcessor
    config: HostConfig

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


def build_host(cfg: HostConfig | None = None, *, seed: int = 0) -> Host:
    """Build the untrained model and its processor.

    Args:
        cfg: Architecture.
        seed: Of the weights; the global generator is left as it was.
    """
    # These cost seconds, which a host's config does not need.
    from hone_lm.tiny import build_tokenizer
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    cfg = cfg or HostConfig()
    size = cfg.clip.size
    tokenizer = build_tokenizer(("<image>", "<video>"), words=WORDS)
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    patches = 2 * cfg.clip.grid
    vision = SiglipVisionConfig(
        hidden_size=cfg.vision_width,
        intermediate_size=2 * cfg.vision_width,
        num_hidden_layers=cfg.vision_layers,
        num_attention_heads=2,
        image_size=size,
        patch_size=cfg.clip.cell // 2,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=cfg.width,
        intermediate_size=cfg.intermediate,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads_k,
        max_position_embeddings=2048,
        initializer_range=0.04,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[size, size]],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
    square = {"height": size, "width": size}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=[[size, size]], **half),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square, **half),
        num_image_tokens=patches**2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return Host(model, processor, cfg)


def pixel_values(video: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes ``[..., 3, height, width]`` as the model takes them: what the processor does, on any device."""
    return (video.to(dtype) / 255 - 0.5) / 0.5


def save_host(host: Host, path: Path, facts: HostFacts | None = None) -> Path:
    """Write a host, see ``hone_core.hosts``; returns the path."""
    return hosts.save_host(path, host.config, {"": host.model}, package=PACKAGE, facts=facts)


def host_config(path: Path | None = None) -> HostConfig:
    """Architecture of a trained host, without its weights; arguments and errors are those of ``load_host``."""
    return hosts.open_host(HostConfig, PACKAGE, path).config


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
