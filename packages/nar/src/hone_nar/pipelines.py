"""``NARPipeline``: classes or prompts in, images out, in the manner of diffusers, with NAR or a raster LlamaGen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from hone_visual_ar.pipelines import seeds_of
from hone_visual_ar.sampling import Sampling
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from .checkpoints import SIZES, build, load_published
from .flashar import FlashARForImageGeneration
from .generation import Decoding, GraphedDecoding, generate, graphed
from .larp import LARPTokenizer
from .texts import encode_texts
from .tokenizer import LlamaGenVQModel
from .transformer import Condition, LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration

__all__ = ["NARPipeline", "NARVideoPipeline"]

OutputType = Literal["pil", "np", "pt", "codes"]


class _Pipeline(DiffusionPipeline):
    """What both share: transformer and tokenizer stay where they are, which is small beside a text encoder."""

    vae: Any
    model_cpu_offload_seq = "text_encoder"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["transformer", "vae"]

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Not there: steps read weights beside calling layers, and graphs read them where they lie.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "layers cannot be offloaded one by one; enable_model_cpu_offload() offloads the text encoder"
        )

    enable_group_offload = enable_sequential_cpu_offload

    def _pixels(self, codes: Tensor) -> Tensor:
        """What the tokenizer makes of codes, float32.

        Raises:
            RuntimeError: It is not finite.
        """
        found = self.vae.decode(codes).float()
        if not bool(found.isfinite().all()):
            raise RuntimeError(
                f"the tokenizer's pixels are not finite in {self.vae.dtype}; put vae into float32, or look at its "
                "weights"
            )
        return found


class NARPipeline(_Pipeline):
    """Images with NAR, or with a raster LlamaGen in the same engine.

    Args:
        transformer: Of classes, or of texts.
        vae: Its tokenizer of images.
        text_encoder: Flan-T5-XL, for a model of texts; None for one of classes.
        tokenizer: Of the text encoder.
    """

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        transformer: NARForImageGeneration | LlamaGenForImageGeneration | FlashARForImageGeneration,
        vae: LlamaGenVQModel,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if transformer.vocab_size != vae.choices:
            raise ValueError(
                f"transformer and tokenizer do not belong together: {transformer.vocab_size} codes and {vae.choices}"
            )
        if transformer.num_classes is None:
            if text_encoder is None or tokenizer is None:
                raise ValueError("a model of texts needs text_encoder and tokenizer, such as google/flan-t5-xl")
            channels = transformer.config.caption_dim
            if text_encoder.config.d_model != channels:
                raise ValueError(
                    f"this model reads texts of {channels} channels; the encoder gives {text_encoder.config.d_model}"
                )
        elif text_encoder is not None or tokenizer is not None:
            raise ValueError("a model of classes reads no text; leave text_encoder and tokenizer out")
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    @classmethod
    def from_published(
        cls,
        model: str,
        *,
        transformer: str | Path,
        vae: str | Path,
        text_encoder: str | None = None,
        grid: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> Self:
        """A pipeline of published files; every name and shape is compared before a weight is read.

        Args:
            model: Size, such as ``nar_xl``, ``llamagen_b`` or ``flashar_l``.
            transformer: Its file.
            vae: ``vq_ds16_c2i.pt``, or ``vq_ds16_t2i.pt`` of texts.
            text_encoder: Folder or hub address of the T5, for a model of texts.
            grid: Rows and columns of tokens, where they are not 16 x 16: (24, 24) of 384 px, (32, 32) of 512 px.
            dtype: Of transformer and text encoder.
            local_files_only: Ask no hub.

        Raises:
            CheckpointError: A file is missing, damaged, or of another size.
            ValueError: There is no such image model.
        """
        kinds = (NARForImageGeneration, LlamaGenForImageGeneration, FlashARForImageGeneration)
        names = [name for name, (kind, _) in SIZES.items() if kind in kinds]
        if model not in names:
            raise ValueError(f"no published image model {model!r}; expected one of {', '.join(names)}")
        body: Any = load_published(build(model, grid=grid), transformer, dtype=dtype)
        image: Any = load_published(build("vq_ds16"), vae)
        if text_encoder is None:
            return cls(body, image)
        words = AutoTokenizer.from_pretrained(text_encoder, local_files_only=local_files_only)
        text = T5EncoderModel.from_pretrained(text_encoder, dtype=dtype, local_files_only=local_files_only)
        return cls(body, image, text, words)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features ``[B, T, caption_dim]`` of prompts, padded on the left, and where their words are.

        Raises:
            ValueError: A prompt is empty or longer than the model reads.
        """
        encoder, tokenizer = self.text_encoder, self.tokenizer
        assert encoder is not None
        assert tokenizer is not None
        features, words = encode_texts(encoder, tokenizer, prompts, self.transformer.cls_token_num)
        for hook in getattr(self, "_all_hooks", ()):
            # Of enable_model_cpu_offload: the encoder is away while images are drawn.
            hook.offload()
        place = self.transformer.tok_embeddings.weight
        return features.to(place.device, place.dtype), words.to(place.device)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        guided_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        greedy: bool = False,
        seeds: int | Sequence[int] = 0,
        on_step: Callable[[Decoding, int], None] | None = None,
        decoding: Decoding | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            class_labels: Of each image, for a model of classes.
            prompt: One or several, for a model of texts.
            guidance_scale: 1 draws without guidance, at half the work. If None, the published 2 of classes (Table 1)
                or 7.5 of texts.
            guided_tokens: Guidance ends once more tokens than this are drawn; None: never.
            temperature: Of the tokens.
            top_k: Entries of the codebook that are kept; 0 keeps all.
            top_p: Least mass that is kept; 0 keeps all.
            greedy: Take the likeliest entries.
            seeds: Of each image; one number counts up from itself.
            on_step: Called after each step with the run and the step's number.
            decoding: What draws, made by ``graphs`` for as many images, in place of the six before ``seeds``.
            output_type: ``pil``, ``np`` (``[B, H, W, 3]``), ``pt`` (``[B, 3, H, W]``), in [0, 1], or ``codes``.
            return_dict: Give an ``ImagePipelineOutput``; a tuple of its images otherwise.

        Raises:
            ValueError: Classes, prompts, seeds or sampling do not fit; nothing has run then.
        """
        if output_type not in ("pil", "np", "pt", "codes"):
            raise ValueError(f"output_type must be pil, np, pt or codes; got {output_type!r}")
        model, told = self.transformer, guidance_scale is not None
        guidance_scale = _guidance(model, guidance_scale)
        sampling = Sampling(guidance=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
        guided = guidance_scale != 1
        if decoding is not None:
            _check_decoding(decoding, model, told=told, guided_tokens=guided_tokens, sampling=sampling)
            guided = decoding.guided
        if model.num_classes is None:
            if prompt is None or class_labels is not None:
                raise ValueError("this model draws texts; give prompt and no class_labels")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            numbers = seeds_of(seeds, len(prompts))
            text, words = self.encode_prompt(prompts)
            condition = model.condition(text=text, words=words, guided=guided)
        else:
            if class_labels is None or prompt is not None:
                raise ValueError("this model draws classes; give class_labels and no prompt")
            labels = _labels(class_labels, model)
            numbers = seeds_of(seeds, len(labels))
            condition = model.condition(labels, guided=guided)
        if decoding is None:
            codes = generate(
                model, condition, seeds=numbers, sampling=sampling, guided_tokens=guided_tokens, on_step=on_step
            )
        else:
            codes = _run(decoding, condition, numbers, on_step)
        grid = codes.unflatten(1, model.grid)
        images: Any = grid
        if output_type != "codes":
            images = (self._pixels(grid) + 1) / 2
            if output_type != "pt":
                images = images.permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def graphs(
        self,
        images: int,
        *,
        guidance_scale: float | None = None,
        guided_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        greedy: bool = False,
    ) -> GraphedDecoding:
        """What draws batches of so many images by a CUDA graph for each step; for ``decoding`` of calls.

        Args:
            images: Of each batch.
            guidance_scale: As of a call, and so are the others.
            guided_tokens: Likewise.
            temperature: Likewise.
            top_k: Likewise.
            top_p: Likewise; with it or ``greedy``, draws are no kernel of their own.
            greedy: Likewise.

        Raises:
            UnsupportedHardwareError: The pipeline is not on a CUDA device.
        """
        scale = _guidance(self.transformer, guidance_scale)
        sampling = Sampling(guidance=scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
        return graphed(self.transformer, images, sampling=sampling, guided_tokens=guided_tokens)


class NARVideoPipeline(_Pipeline):
    """Clips of classes with NAR on LARP's tokens.

    Args:
        transformer: Of clips.
        vae: Its tokenizer of clips.
    """

    def __init__(self, transformer: NARForVideoGeneration, vae: LARPTokenizer) -> None:
        super().__init__()
        if (transformer.vocab_size, transformer.tokens) != (vae.choices, vae.config.tokens):
            raise ValueError(
                f"transformer and tokenizer do not belong together: {transformer.tokens} tokens of "
                f"{transformer.vocab_size} codes, and {vae.config.tokens} of {vae.choices}"
            )
        self.register_modules(transformer=transformer, vae=vae)

    @classmethod
    def from_published(
        cls, model: str, *, transformer: str | Path, vae: str | Path, dtype: torch.dtype = torch.float32
    ) -> Self:
        """A pipeline of published files; every name and shape is compared before a weight is read.

        Args:
            model: ``nar_video_l`` or ``nar_video_lp``.
            transformer: Its file.
            vae: File or folder of LARP-L-long's tokenizer.
            dtype: Of the transformer.

        Raises:
            CheckpointError: A file is missing, damaged, or of another size.
            ValueError: There is no such model of clips.
        """
        names = [name for name, (kind, _) in SIZES.items() if kind is NARForVideoGeneration]
        if model not in names:
            raise ValueError(f"no published model of clips {model!r}; expected one of {', '.join(names)}")
        body: Any = load_published(build(model), transformer, dtype=dtype)
        return cls(body, load_published(build("larp_l_long"), vae))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        *,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        greedy: bool = False,
        seeds: int | Sequence[int] = 0,
        decoding: Decoding | None = None,
        output_type: Literal["np", "pt", "codes"] = "np",
    ) -> Any:
        """Draw clips.

        Args:
            class_labels: Of each clip.
            guidance_scale: 1 draws without guidance, at half the work. If None, the paper's 1.25; its script's is 2.5.
            temperature: Of the tokens.
            top_k: Entries of the codebook that are kept; 0 keeps all.
            top_p: Least mass that is kept; 0 keeps all.
            greedy: Take the likeliest entries.
            seeds: Of each clip; one number counts up from itself.
            decoding: What draws, made by ``graphs`` for as many clips, in place of the five before ``seeds``.
            output_type: ``np`` (``[B, F, H, W, 3]``) or ``pt`` (``[B, 3, F, H, W]``), in [0, 1], or ``codes``.

        Raises:
            ValueError: Classes, seeds or sampling do not fit; nothing has run then.
        """
        if output_type not in ("np", "pt", "codes"):
            raise ValueError(f"output_type must be np, pt or codes; got {output_type!r}")
        model, scale = self.transformer, _guidance(self.transformer, guidance_scale)
        sampling = Sampling(guidance=scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
        if decoding is not None:
            _check_decoding(decoding, model, told=guidance_scale is not None, guided_tokens=None, sampling=sampling)
        labels = _labels(class_labels, model)
        numbers = seeds_of(seeds, len(labels))
        condition = model.condition(labels, guided=scale != 1 if decoding is None else decoding.guided)
        if decoding is None:
            codes = generate(model, condition, seeds=numbers, sampling=sampling)
        else:
            codes = _run(decoding, condition, numbers)
        if output_type == "codes":
            return codes
        clips = self._pixels(codes)
        return clips if output_type == "pt" else clips.permute(0, 2, 3, 4, 1).cpu().numpy()

    def graphs(
        self,
        clips: int,
        *,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        greedy: bool = False,
    ) -> GraphedDecoding:
        """What draws batches of so many clips by a CUDA graph for each step; see ``NARPipeline.graphs``."""
        scale = _guidance(self.transformer, guidance_scale)
        sampling = Sampling(guidance=scale, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy)
        return graphed(self.transformer, clips, sampling=sampling)


def _guidance(model: Any, scale: float | None) -> float:
    """What is given, or the published strength of clips, texts and classes."""
    if scale is not None:
        return scale
    if isinstance(model, NARForVideoGeneration):
        return 1.25
    return 7.5 if model.num_classes is None else 2.0


def _check_decoding(
    decoding: Decoding, model: Any, *, told: bool, guided_tokens: int | None, sampling: Sampling
) -> None:
    plain = Sampling(guidance=sampling.guidance)
    if told or guided_tokens is not None or sampling != plain:
        raise ValueError("guidance and sampling are those of decoding; give them to graphs(), and not to the call")
    if decoding.model is not model:
        raise ValueError("decoding was made of another model; make it by graphs() of this pipeline")


def _run(
    decoding: Decoding,
    condition: Condition,
    seeds: Sequence[int],
    on_step: Callable[[Decoding, int], None] | None = None,
) -> Tensor:
    decoding.load(condition, seeds)
    return decoding.run(None if on_step is None else lambda step: on_step(decoding, step))


def _labels(class_labels: int | Sequence[int], model: Any) -> Tensor:
    labels = torch.as_tensor(class_labels, device=model.tok_embeddings.weight.device)
    if not labels.numel():
        raise ValueError("expected at least one class; got none")
    return labels[None] if labels.ndim == 0 else labels
