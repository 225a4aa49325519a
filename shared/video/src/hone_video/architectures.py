"""Video transformers of diffusers with random weights: tiny ones for tests, and the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    HunyuanVideoTransformer3DModel,
    ModelMixin,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

__all__ = ["FULL_SIZE", "Kind", "full_size", "tiny", "tiny_inputs", "tiny_pipeline"]


Kind = Literal["wan", "cogvideox", "hunyuan"]


def tiny(kind: Kind = "wan", seed: int = 0, **config: Any) -> ModelMixin:
    """A real transformer class, small enough for a CPU, with random weights.

    Args:
        kind: ``"wan"`` (4 latent channels, 2 heads of 32, 2 layers, patches 1x2x2, text width 32), ``"cogvideox"``
            (the same, with 8 text tokens joined to the video and rotary embedding) or ``"hunyuan"`` (HunyuanVideo, one
            layer of two streams and one of one).
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


def tiny_inputs(
    kind: Kind = "wan",
    *,
    batch: int = 2,
    frames: int = 3,
    height: int = 10,
    width: int = 14,
    timestep: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments of a ``tiny`` model's forward, with 8 text tokens, of which HunyuanVideo's last 3 are padding.

    Args:
        kind: As for ``tiny``.
        batch: Videos.
        frames: Latent frames.
        height: Latents; two are a token.
        width: Likewise.
        timestep: The same for all.
        seed: Of latents and text.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 8, 32, generator=generator)
    inputs = {"encoder_hidden_states": text, "timestep": torch.full((batch,), timestep)}
    if kind == "wan":
        return {"hidden_states": torch.randn(batch, 4, frames, height, width, generator=generator), **inputs}
    if kind == "hunyuan":
        mask = torch.ones(batch, 8)
        mask[:, 5:] = 0
        return {
            "hidden_states": torch.randn(batch, 4, frames, height, width, generator=generator),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(batch, 16, generator=generator),
            "guidance": torch.full((batch,), 6000.0),
            **inputs,
        }
    grid = (height // 2, width // 2)
    return {
        "hidden_states": torch.randn(batch, frames, 4, height, width, generator=generator),
        "image_rotary_emb": get_3d_rotary_pos_embed(32, ((0, 0), grid), grid, frames),
        **inputs,
    }


def tiny_pipeline(
    kind: Literal["wan", "cogvideox"] = "wan", *, image: bool = False, **options: Any
) -> DiffusionPipeline:
    """A whole pipeline of the real classes with random weights, small enough for a CPU.

    Its tokenizer knows a few English words and the letters. The transformer is ``tiny`` with one layer.

    Args:
        kind: As for ``tiny``.
        image: Whether its videos begin with an image; Wan's transformer reads it by CLIP too, as Wan2.1's.
        **options: Parts and settings of the pipeline class to change.

    Raises:
        ValueError: ``kind`` is another one.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    words = [("▁" + word, -2.0) for word in ("a", "red", "blue", "cat", "dog", "runs", "left", "right")]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz.,"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *words, ("▁", -3.0), *letters]
    parts: dict[str, Any] = {"tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0)}
    text = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    if kind == "wan":
        more = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 64} if image else {}
        parts["transformer"] = tiny("wan", num_layers=1, **more)
        parts["scheduler"] = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts["text_encoder"] = UMT5EncoderModel(UMT5Config(**text)).eval()
            parts["vae"] = AutoencoderKLWan(
                base_dim=3,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            ).eval()
        if not image:
            return WanPipeline(**{**parts, **options})
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **clip)).eval()
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return diffusers.WanImageToVideoPipeline(**{**parts, **options})
    more = {"in_channels": 8, "out_channels": 4} if image else {}
    parts["transformer"] = tiny(kind, num_layers=1, max_text_seq_length=226, **more)
    parts["scheduler"] = CogVideoXDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, clip_sample=False
    )
    channels = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["text_encoder"] = T5EncoderModel(T5Config(**text)).eval()
        parts["vae"] = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, **channels
        ).eval()
    return (diffusers.CogVideoXImageToVideoPipeline if image else CogVideoXPipeline)(**{**parts, **options})


def full_size(
    name: str, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16, **config: Any
) -> ModelMixin:
    """A published architecture with random weights, built where it is wanted.

    For timing and for checking layouts. Attention over random weights is nearly uniform: it says nothing about masks.

    Args:
        name: A name in ``FULL_SIZE``.
        device: ``"meta"`` allocates nothing.
        dtype: Of the weights, but for those that diffusers keeps in float32 when it loads the model.
        **config: Fields of the class's config to change, such as ``num_layers``.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in FULL_SIZE:
        raise ValueError(f"name must be one of {', '.join(FULL_SIZE)}; got {name!r}")
    make, own = FULL_SIZE[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make(**{**own, **config}).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(make, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()
    return model


FULL_SIZE: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
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
    "hunyuan-video": (HunyuanVideoTransformer3DModel, {"num_layers": 20, "num_single_layers": 40}),
}
"""Published architectures by name: the class and the config fields that differ from its defaults."""

_TINY: dict[str, tuple[Callable[..., ModelMixin], dict[str, Any]]] = {
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
    "hunyuan": (
        HunyuanVideoTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (8, 12, 12),
        },
    ),
}
