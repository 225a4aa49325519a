"""The tiny host: a small, trained ``LlavaOnevisionForConditionalGeneration`` that answers questions on generated clips.

It is transformers' own class at a small size, with its own processor and a chat template, so that everything that is
attached to it runs the code that runs in LLaVA-OneVision-7B: a frame is pooled to 5 x 5 tokens, eight frames and the
newline make 201, and the answer is the next token after the prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hone_core.config import from_dict, to_dict
from hone_core.errors import CheckpointError
from hone_core.io import save_safetensors
from safetensors import safe_open
from torch import Tensor

from .config import ClipConfig
from .data import COLORS, CORNERS, DIRECTIONS, SHAPES

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

__all__ = ["Host", "HostConfig", "build_host", "host_config", "host_is_packaged", "load_host", "save_host"]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    layers: int = 12
    width: int = 128
    heads: int = 4
    heads_k: int = 2
    intermediate: int = 320
    vision_layers: int = 1
    vision_width: int = 64

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.heads_k:
            raise ValueError(
                "width must be a multiple of heads, and heads of heads_k; "
                f"got {self.width}, {self.heads}, {self.heads_k}"
            )
        if self.clip.cell % 2:
            raise ValueError(f"a cell is two vision patches wide; got {self.clip.cell} pixels")

    @property
    def tokens(self) -> int:
        """Visual tokens of a clip."""
        return self.clip.frames * self.clip.grid**2


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


def save_host(host: Host, path: Path) -> Path:
    """Write the weights in 16 bits, with the config beside them in the file's metadata."""
    tensors = {name: tensor.to(torch.float16) for name, tensor in host.model.state_dict().items()}
    return save_safetensors(tensors, path, metadata={"config": json.dumps(to_dict(host.config))})


def host_is_packaged() -> bool:
    """Whether a trained host ships with this installation."""
    return (files("hone_knockout") / "assets" / "host.safetensors").is_file()


def host_config(path: Path | None = None) -> HostConfig:
    """Architecture of a trained host, without its weights; arguments and errors are those of ``load_host``."""
    return _read_host(path, weights=False)[0]


def load_host(device: torch.device | str = "cpu", *, path: Path | None = None) -> Host:
    """Load a trained host.

    Args:
        device: Where the model goes; weights are float32 there.
        path: A ``host.safetensors``; the packaged one if None.

    Raises:
        CheckpointError: The file is missing or is no such checkpoint.
    """
    cfg, tensors = _read_host(path)
    host = build_host(cfg)
    try:
        host.model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path or 'the packaged host'} does not fit its own config: {error}") from error
    host.model.to(device)
    return host


def _read_host(path: Path | None, *, weights: bool = True) -> tuple[HostConfig, dict[str, Tensor]]:
    found = Path(str(files("hone_knockout") / "assets" / "host.safetensors")) if path is None else Path(path)
    if not found.is_file():
        hint = "train one with hone-knockout train-host, and name its host.safetensors with --host"
        raise CheckpointError(f"there is no trained host at {found}; {hint}")
    try:
        with safe_open(found, "pt") as file:
            cfg = from_dict(HostConfig, json.loads((file.metadata() or {})["config"]))
            names = file.keys() if weights else ()
            tensors = {name: file.get_tensor(name).float() for name in names}
    except Exception as error:
        raise CheckpointError(f"{found} is no checkpoint of a tiny host: {error}") from error
    return cfg, tensors


def describe_host(path: Path | None = None) -> dict[str, Any]:
    """Facts beside a checkpoint (``host.json``), or nothing."""
    found = Path(str(files("hone_knockout") / "assets" / "host.json")) if path is None else path.with_suffix(".json")
    return json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
