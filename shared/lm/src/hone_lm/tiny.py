"""Tiny random-weight Video-LLMs of the real transformers classes, with their real processors.

Nothing is downloaded: tokenizers and processors are built here. A model of each family takes a fraction of a second and
a few megabytes, runs the code of its big sibling, and knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessorPil,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

__all__ = ["FAMILIES", "PROMPTS", "build_tokenizer", "random_video", "tiny", "tiny_inputs"]

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def build_tokenizer(
    special: Sequence[str] = (), *, words: Sequence[str] = (), named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single bytes, special tokens and whole words; any text survives a round trip.

    Args:
        special: Tokens that are never split, after pad, bos and eos (ids 0, 1, 2).
        words: Words that are one token each, with the space before them; anything else is bytes.
        named: Attribute to special token, such as ``{"image_token": "<image>"}``; processors look for these.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = [PAD, BOS, EOS, *dict.fromkeys(special)]
    vocabulary = {token: index for index, token in enumerate([*first, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in first])
    core.add_tokens([AddedToken(word, single_word=word[-1].isalnum(), lstrip=True, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=dict(named or {}),
        padding_side="left",
    )


def random_video(frames: int = 4, *, size: int = 56, seed: int = 0) -> torch.Tensor:
    """Noise as uint8 frames ``[frames, 3, size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, size, size), generator=generator, dtype=torch.uint8)


def _qwen2(vocab: int, layers: int, **more: Any) -> Qwen2Config:
    return Qwen2Config(**(_text(vocab, layers) | more))


def _text(vocab: int, layers: int) -> dict[str, Any]:
    """Grouped-query attention, four query heads on two key-value heads."""
    return {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# In pixels: the Qwen processors round to patch * merge and otherwise keep what lies between these.
_SMALL = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112 * 64}


def _qwen_tokens() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    tokenizer = build_tokenizer(_QWEN_SPECIAL)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return tokenizer, {n: tokenizer.convert_tokens_to_ids(t) for n, t in zip(names, _QWEN_SPECIAL, strict=True)}


def _qwen_video() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(size=dict(_SMALL), cap_pixels_per_frame=False)


def _qwen2_vl(layers: int) -> tuple[Any, Any]:
    tokenizer, ids = _qwen_tokens()
    config = Qwen2VLConfig(
        text_config=_text(len(tokenizer), layers) | {"rope_parameters": _MROPE},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **ids,
    )
    processor = Qwen2VLProcessor(Qwen2VLImageProcessorPil(size=dict(_SMALL)), tokenizer, _qwen_video())
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen2_5_vl(layers: int) -> tuple[Any, Any]:
    tokenizer, ids = _qwen_tokens()
    config = Qwen2_5_VLConfig(
        text_config=_text(len(tokenizer), layers) | {"rope_parameters": _MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(size=dict(_SMALL)), tokenizer, _qwen_video())
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3(config: type, model: type, layers: int, **text: Any) -> tuple[Any, Any]:
    tokenizer, ids = _qwen_tokens()
    rope = _MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    settings = config(
        text_config=_text(len(tokenizer), layers) | {"head_dim": 16, "rope_parameters": rope} | text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        **ids,
    )
    video = Qwen3VLVideoProcessor(size=dict(_SMALL), patch_size=14, do_sample_frames=False, cap_pixels_per_frame=False)
    processor = Qwen3VLProcessor(Qwen2VLImageProcessorPil(size=dict(_SMALL)), tokenizer, video)
    return model(settings), processor


def _qwen3_vl(layers: int) -> tuple[Any, Any]:
    return _qwen3(Qwen3VLConfig, Qwen3VLForConditionalGeneration, layers)


def _qwen3_vl_moe(layers: int) -> tuple[Any, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return _qwen3(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, layers, **experts)


def _llava_onevision(layers: int) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(("<image>", "<video>"))
    image, video = (tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>"))
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=8,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=_qwen2(len(tokenizer), layers),
        vision_config=vision,
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[56, 56]],
    )
    size = {"height": 56, "width": 56}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[56, 56]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=49,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _clip(image_size: int = 56, patch_size: int = 14) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=32,
    )


def _llava_next_video(layers: int) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(("<image>", "<video>"))
    image, video = (tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>"))
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**_text(len(tokenizer), layers)),
        vision_config=_clip(),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[56, 56]],
    )
    square = {"height": 56, "width": 56}
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": 56}, crop_size=square),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
    )
    return LlavaNextVideoForConditionalGeneration(config), processor


def _internvl(layers: int) -> tuple[Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = build_tokenizer(tuple(named.values()), named=named)
    config = InternVLConfig(
        text_config=_qwen2(len(tokenizer), layers),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size), tokenizer, InternVLVideoProcessor(size=size), image_seq_length=4
    )
    return InternVLForConditionalGeneration(config), processor


def _smolvlm(layers: int) -> tuple[Any, Any]:
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>")
    tokenizer = build_tokenizer(special)
    config = SmolVLMConfig(
        text_config=LlamaConfig(**_text(len(tokenizer), layers)),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    edge = {"longest_edge": 56}
    video = SmolVLMVideoProcessor(size=edge, max_image_size=edge)
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer,
        video,
        image_seq_len=4,
    )
    return SmolVLMForConditionalGeneration(config), processor


def _video_llama_3(layers: int) -> tuple[Any, Any]:
    tokenizer, ids = _qwen_tokens()
    config = VideoLlama3Config(
        text_config=_qwen2(len(tokenizer), layers),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 14,
        },
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )
    processor = VideoLlama3Processor(
        VideoLlama3ImageProcessorPil(size=dict(_SMALL)), tokenizer, VideoLlama3VideoProcessor(size=dict(_SMALL))
    )
    return VideoLlama3ForConditionalGeneration(config), processor


def _video_llava(layers: int) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(("<image>", "<video>"))
    image, video = (tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<video>"))
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**_text(len(tokenizer), layers)),
        vision_config=_clip(),
        image_token_index=image,
        video_token_index=video,
    )
    square = {"height": 56, "width": 56}
    processor = VideoLlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square),
        video_processor=VideoLlavaVideoProcessor(size={"shortest_edge": 56}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=14,
    )
    return VideoLlavaForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "video_llama_3": _video_llama_3,
    "video_llava": _video_llava,
}
"""``config.model_type`` to the builder of a tiny model and its processor."""

_VISION = "<|vision_start|><|video_pad|><|vision_end|>"
PROMPTS = {
    family: "You are helpful.\nUser: " + (_VISION if family.startswith("qwen") else video) + "{question}"
    for family, video in dict.fromkeys(FAMILIES, "<video>").items()
} | {"video_llama_3": "You are helpful.\nUser: <|video_pad|>{question}"}
"""Prompt with the family's video placeholder and a slot for the question."""


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")


def tiny(family: str, *, layers: int = 4, seed: int = 0) -> tuple[Any, Any]:
    """Make a tiny model of a family, in evaluation mode, and its processor.

    Args:
        family: A key of ``FAMILIES``, which is the ``model_type`` of the real config.
        layers: Decoder layers.
        seed: Of the weights; the global generator is left as it was.

    Raises:
        ValueError: The family is not known.
    """
    _check_family(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = FAMILIES[family](layers)
        # Fresh weights are small: attention would be almost uniform and a knockout almost invisible.
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "norm" not in name:
                torch.nn.init.normal_(weight, std=1.2 / weight[0].numel() ** 0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval(), processor


def tiny_inputs(
    family: str,
    processor: Any,
    questions: Sequence[str] = ("What moves?",),
    *,
    frames: int = 4,
    size: int = 56,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Process a noise video and a prompt for each question into a left-padded batch of model inputs.

    Args:
        family: As in ``tiny``.
        processor: From ``tiny``.
        questions: One per row of the batch.
        frames: Of each video.
        size: Pixels along a side.
        seed: Of the first video; each further one has the next.

    Raises:
        ValueError: The family is not known.
    """
    _check_family(family)
    text = [PROMPTS[family].format(question=question) for question in questions]
    videos = [random_video(frames, size=size, seed=seed + index) for index in range(len(text))]
    metadata = [
        {"fps": 2.0, "total_num_frames": frames, "duration": frames / 2.0, "frames_indices": list(range(frames))}
        for _ in text
    ]
    # Token types of Qwen and timestamps of SmolVLM come from this call, as for a real video.
    batch = processor(
        text=text,
        videos=[[video] for video in videos] if family == "smolvlm" else videos,
        video_metadata=[[entry] for entry in metadata] if family == "smolvlm" else metadata,
        padding=True,
        return_tensors="pt",
    )
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
