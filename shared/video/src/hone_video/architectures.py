"""Video transformers of diffusers with random weights: tiny ones for tests, and the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch import nn

__all__ = ["FULL_SIZE", "full_size", "tiny"]


def tiny(kind: Literal["wan", "cogvideox"] = "wan", seed: int = 0, **config: Any) -> nn.Module:
    """A real transformer class, small enough for a CPU, with random weights.

    Args:
        kind: ``"wan"`` (4 latent channels, 2 heads of 32, 2 layers, patches 1x2x2, text width 32) or ``"cogvideox"``
            (the same, with 8 text tokens joined to the video and rotary embedding).
        seed: Of the weights. The global generator is left as it was.
        **config: Fields of the class's config to change.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: ``kind`` is another one.
    """
    if kind not in _TINY:
        raise ValueError(f"kind must be one of {', '.join(_TINY)}; got {kind!r}")
    make, defaults = _TINY[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**{**defaults, **config}).eval()


def full_size(name: str, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A published architecture with random weights, built where it is wanted.

    For timing and for checking layouts. Attention over random weights is nearly uniform: it says nothing about masks.

    Args:
        name: A name in ``FULL_SIZE``.
        device: ``"meta"`` allocates nothing.
        dtype: Of the weights, but for those that diffusers keeps in float32 when it loads the model.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in FULL_SIZE:
        raise ValueError(f"name must be one of {', '.join(FULL_SIZE)}; got {name!r}")
    make, config = FULL_SIZE[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make(**config).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(make, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()
    return model


FULL_SIZE: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "wan2.1-1.3b": (
        WanTransformer3DModel,
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan2.1-14b": (
        WanTransformer3DModel,
        {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
    ),
    "cogvideox-5b": (
        CogVideoXTransformer3DModel,
        {
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
    ),
}
"""Published architectures by name: the class and the config fields that differ from its defaults."""

_TINY: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "wan": (
        WanTransformer3DModel,
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 128,
            "num_layers": 2,
            "rope_max_seq_len": 64,
        },
    ),
    "cogvideox": (
        CogVideoXTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 32,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "max_text_seq_length": 8,
            "use_rotary_positional_embeddings": True,
        },
    ),
}
