"""Pipelines: prompts or classes in, images out, in the manner of diffusers.

``save_pretrained`` and ``from_pretrained`` are diffusers', in safetensors; ``from_published`` makes a pipeline of the
releases' own files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, SupportsIndex, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from .checkpoints import build, load_published
from .generation import Policy, generate
from .infinity import INFINITY_SIZES, Infinity
from .sampling import Sampling
from .schedules import infinity_schedule
from .tokenizers import BSQVAE, VQVAE
from .transformer import Condition
from .var import VAR, VAR_SIZES

__all__ = ["InfinityPipeline", "VARPipeline", "check_prompts", "count_words", "seeds_of", "tokenizer_of"]

OutputType = Literal["pil", "np", "pt"]


def tokenizer_of(model: str) -> str:
    """Published tokenizer that a published Infinity or VAR was trained with, by its name in ``MANIFESTS``.

    Raises:
        ValueError: There is no such model.
    """
    if model in VAR_SIZES:
        return "vq_ch160v4096z32"
    if model not in INFINITY_SIZES:
        raise ValueError(f"no published model {model!r}; expected one of {', '.join((*INFINITY_SIZES, *VAR_SIZES))}")
    size = INFINITY_SIZES[model]
    return "bsq_d14_patchify" if size.get("patchify") else f"bsq_d{size['code_dim']}"


def count_words(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> list[list[int]]:
    """Tokens of each prompt.

    Raises:
        ValueError: There is no prompt, or one is longer than ``longest`` tokens; nothing is cut off.
    """
    if not prompts:
        raise ValueError("expected at least one prompt; got none")
    words: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, found in zip(prompts, words, strict=True):
        if len(found) > longest:
            raise ValueError(
                f"a prompt has {len(found)} tokens, and this model reads at most {longest}; shorten {prompt[:40]!r} ..."
            )
    return words


def check_prompts(folder: Path, prompts: Sequence[str], longest: int) -> None:
    """Hold prompts against the tokenizer of a saved pipeline; no weight is read.

    Raises:
        ValueError: As ``count_words``.
    """
    count_words(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), prompts, longest)


def seeds_of(seeds: int | Sequence[int], images: int) -> list[int]:
    """A seed for each image; one number counts up from itself.

    Raises:
        ValueError: There are not as many as images.
    """
    with contextlib.suppress(TypeError):
        first = index(cast(SupportsIndex, seeds))
        return list(range(first, first + images))
    each = [index(seed) for seed in cast(Sequence[int], seeds)]
    if len(each) != images:
        raise ValueError(f"expected one seed, or one for each of {images} images; got {len(each)}")
    return each


class _NextScalePipeline(DiffusionPipeline):
    transformer: Any
    vae: Any
    model_cpu_offload_seq = "text_encoder->transformer"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vae"]

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Not there: a block reads weights of its layers beside calling them.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("layers cannot be offloaded one by one; take enable_model_cpu_offload()")

    enable_group_offload = enable_sequential_cpu_offload

    def _output(self, pixels: Tensor, output_type: OutputType, return_dict: bool) -> Any:
        """Images ``[B, 3, H, W]`` in [-1, 1] as asked for.

        Raises:
            RuntimeError: Pixels are not finite.
        """
        if not bool(pixels.isfinite().all()):
            raise RuntimeError(
                f"the tokenizer's pixels are not finite in {self.vae.dtype}; put vae into float32, or look at its "
                "weights"
            )
        unit = (pixels + 1) / 2
        images: Any = unit
        if output_type != "pt":
            images = unit.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_output(output_type: str) -> None:
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be pil, np or pt; got {output_type!r}")


class InfinityPipeline(_NextScalePipeline):
    """Text to image with Infinity.

    Args:
        transformer: Its blocks may be of a lower precision, see ``to_body_dtype``; the rest is float32.
        vae: Tokenizer of images that belongs to it.
        text_encoder: Flan-T5-XL of the published weights.
        tokenizer: Of the text encoder.
    """

    def __init__(
        self,
        transformer: Infinity,
        vae: BSQVAE,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        channels = transformer.config.text_channels
        if text_encoder.config.d_model != channels:
            raise ValueError(
                f"this Infinity reads text of {channels} channels; the text encoder gives {text_encoder.config.d_model}"
            )
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    @classmethod
    def from_published(
        cls,
        model: str,
        *,
        transformer: str | Path,
        vae: str | Path,
        text_encoder: str,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> Self:
        """A pipeline of published files; every name and shape is compared before a weight is read.

        Args:
            model: Size, such as ``infinity_2b``.
            transformer: Its file or folder.
            vae: The tokenizer's file.
            text_encoder: Folder or hub address of the T5, such as ``google/flan-t5-xl``.
            dtype: Of the transformer's blocks and the text encoder.
            local_files_only: Ask no hub.

        Raises:
            CheckpointError: A file is missing, damaged, or of another size.
            ValueError: There is no such Infinity.
        """
        if model not in INFINITY_SIZES:
            raise ValueError(f"no published model {model!r}; expected one of {', '.join(INFINITY_SIZES)}")
        image: Any = load_published(build(tokenizer_of(model)), vae)
        body: Any = load_published(build(model), transformer)
        words = AutoTokenizer.from_pretrained(text_encoder, local_files_only=local_files_only)
        text = T5EncoderModel.from_pretrained(text_encoder, dtype=dtype, local_files_only=local_files_only)
        return cls(body.to_body_dtype(dtype), image, text, words)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """What the text encoder makes of prompts.

        Returns:
            ``[B, T, text_channels]`` float32, and the tokens of each.

        Raises:
            ValueError: A prompt is longer than the model reads.
        """
        words = count_words(self.tokenizer, prompts, self.transformer.config.text_maxlen)
        lengths = [len(found) for found in words]
        ids = torch.zeros(len(words), max(lengths), dtype=torch.long)
        for row, found in zip(ids, words, strict=True):
            row[: len(found)] = torch.tensor(found)
        inside = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        device = self.text_encoder.device
        text = self.text_encoder(ids.to(device), attention_mask=inside.long().to(device)).last_hidden_state
        return text.float(), lengths

    @torch.no_grad()
    def condition(
        self, prompts: Sequence[str], *, guided: bool = True, negative: Sequence[str] | None = None
    ) -> Condition:
        """The condition of prompts, with an unconditional row of each under guidance."""
        return self.transformer.condition(
            *self.encode_prompt(prompts),
            guided=guided,
            negative=None if negative is None else self.encode_prompt(negative),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        pixels: str = "1M",
        aspect: float = 1.0,
        guidance_scale: float = 4.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.97,
        greedy: bool = False,
        num_images_per_prompt: int = 1,
        seeds: int | Sequence[int] = 0,
        policy: Policy | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            prompt: One or several.
            negative_prompt: In place of the learned unconditional text: one for all, or one of each prompt.
            pixels: Size, one of ``schedules.PIXELS``.
            aspect: Height over width, one of ``schedules.ASPECTS``.
            guidance_scale: 1 draws without guidance, at half the work.
            temperature: Of the bits.
            top_k: Choices of a bit that are kept; there are two.
            top_p: A bit takes its likelier value where the other has at most ``1 - top_p``.
            greedy: Take the likeliest bits.
            num_images_per_prompt: Images of a prompt, one after the other.
            seeds: Of each image; one number counts up from itself.
            policy: What of a scale runs; what is attached to the transformer if None.
            output_type: ``pil``, ``np`` (``[B, H, W, 3]``) or ``pt`` (``[B, 3, H, W]``), in [0, 1].
            return_dict: Give an ``ImagePipelineOutput``; a tuple of its images otherwise.

        Raises:
            ValueError: Size, prompts, seeds or sampling do not fit; no image has been begun then.
        """
        _check_output(output_type)
        schedule = infinity_schedule(pixels, aspect)
        sampling = Sampling(guidance=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1; got {num_images_per_prompt}")
        count = len(prompts) * num_images_per_prompt
        numbers = seeds_of(seeds, count)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if negative is not None and guidance_scale == 1:
            raise ValueError("a negative prompt needs guidance; give guidance_scale another value than 1")
        if negative is not None and len(negative) != len(prompts):
            raise ValueError(f"expected one negative prompt or one of each prompt; got {len(negative)}")
        repeat = lambda texts: [text for text in texts for _ in range(num_images_per_prompt)]  # noqa: E731
        condition = self.condition(
            repeat(prompts),
            guided=guidance_scale != 1,
            negative=None if negative is None else repeat(negative),
        )
        run = generate(self.transformer, self.vae, condition, schedule, seeds=numbers, sampling=sampling, policy=policy)
        self.maybe_free_model_hooks()
        return self._output(run.image(), output_type, return_dict)


class VARPipeline(_NextScalePipeline):
    """Class to image with VAR.

    Args:
        transformer: Its blocks may be of a lower precision, see ``to_body_dtype``; the rest is float32.
        vae: Tokenizer of images that belongs to it.
    """

    def __init__(self, transformer: VAR, vae: VQVAE) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @classmethod
    def from_published(
        cls, model: str, *, transformer: str | Path, vae: str | Path, dtype: torch.dtype = torch.float32
    ) -> Self:
        """A pipeline of published files; the arguments are those of ``InfinityPipeline.from_published``.

        Raises:
            CheckpointError: A file is missing, damaged, or of another size.
            ValueError: There is no such VAR.
        """
        if model not in VAR_SIZES:
            raise ValueError(f"no published model {model!r}; expected one of {', '.join(VAR_SIZES)}")
        image: Any = load_published(build(tokenizer_of(model)), vae)
        body: Any = load_published(build(model), transformer)
        return cls(body.to_body_dtype(dtype), image)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        *,
        guidance_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        greedy: bool = False,
        seeds: int | Sequence[int] = 0,
        policy: Policy | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images; defaults are those of the published FID.

        Args:
            class_labels: Of each image.
            guidance_scale: Strength at the last scale; 0 draws without guidance, at half the work.
            temperature: Of the tokens.
            top_k: Entries of the codebook that are kept; 0 keeps all.
            top_p: Least mass that is kept; 0 keeps all.
            greedy: Take the likeliest entries.
            seeds: Of each image; one number counts up from itself.
            policy: What of a scale runs; what is attached to the transformer if None.
            output_type: As of ``InfinityPipeline``.
            return_dict: Likewise.

        Raises:
            ValueError: Classes, seeds or sampling do not fit; nothing has run then.
        """
        _check_output(output_type)
        classes = torch.as_tensor(class_labels)
        if not classes.numel():
            raise ValueError("expected at least one class; got none")
        classes = classes[None] if classes.ndim == 0 else classes
        sampling = Sampling(guidance=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
        numbers = seeds_of(seeds, len(classes))
        condition = self.transformer.condition(classes, guided=guidance_scale != 0)
        run = generate(
            self.transformer,
            self.vae,
            condition,
            self.transformer.schedule,
            seeds=numbers,
            sampling=sampling,
            policy=policy,
        )
        self.maybe_free_model_hooks()
        return self._output(run.image(), output_type, return_dict)
