"""One call of a pipeline's transformer in training: how latents are made noisy, how it is called, what it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .flow import sample_sigma
from .host import NUM_TRAIN_TIMESTEPS
from .pipeline_index import PIPELINES

__all__ = ["Denoiser", "Noisy"]


@dataclass(frozen=True)
class Noisy:
    """Latents with noise, and what a transformer is to say of them.

    Attributes:
        latents: Like the clean ones, float32.
        timestep: ``[B]``, whole numbers up to 1000.
        target: The velocity: ``noise - x_0`` of a flow model, ``sqrt(a) noise - sqrt(1 - a) x_0`` of CogVideoX, whose
            ``a`` is its scheduler's ``alphas_cumprod``.
    """

    latents: Tensor
    timestep: Tensor
    target: Tensor


class Denoiser:
    """How the transformers of a pipeline are trained.

    Latents are as the transformer takes them: ``[B, C, F, H, W]`` of Wan, ``[B, F, C, H, W]`` of CogVideoX.

    Args:
        pipe: Of a class in ``PIPELINES``; neither text encoder nor VAE is needed.
        part: Which of its transformers.

    Attributes:
        flow: Whether it is a flow model, ``x = (1 - sigma) x_0 + sigma noise``; else CogVideoX's v-prediction.
    """

    def __init__(self, pipe: Any, part: str = "transformer") -> None:
        self.pipe = pipe
        transformer = getattr(pipe, part)
        self.config, self.dtype = transformer.config, transformer.dtype
        self.flow = PIPELINES[type(pipe).__name__].family == "wan"

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Video tokens along (frames, height, width).

        Raises:
            ValueError: The latents are no whole number of patches.
        """
        config = self.config
        if self.flow:
            sizes, patch = tuple(latents.shape[-3:]), tuple(config.patch_size)
        else:
            sizes = (latents.shape[-4], *latents.shape[-2:])
            patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(
                f"latents along (frames, height, width) must be multiples of the patch {patch}; got {tuple(sizes)}. "
                "Train on another size"
            )
        f, h, w = (size // p for size, p in zip(sizes, patch, strict=True))
        return f, h, w

    def sample_timestep(self, generator: torch.Generator, *, shift: float, uniform: float = 0.0) -> float:
        """A time to train at, a whole number up to 1000: shifted logit-normal of a flow model, uniform of CogVideoX.

        Whole, as the samplers' own times are: FSDP would round a fraction to bfloat16 on its way into the model.

        Args:
            generator: On the CPU.
            shift: Of a flow model's noise levels.
            uniform: Share of uniform ones, see ``hone_video.flow.sample_sigma``.
        """
        if self.flow:
            sigma = float(sample_sigma(1, shift=shift, uniform=uniform, generator=generator))
            return max(1.0, round(sigma * NUM_TRAIN_TIMESTEPS))
        return float(torch.randint(NUM_TRAIN_TIMESTEPS, (1,), generator=generator))

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Noisy:
        """Make latents noisy.

        Args:
            latents: Clean.
            noise: Standard normal, like them.
            timestep: ``[B]``, whole numbers up to 1000.
        """
        if self.flow:
            level = (timestep / NUM_TRAIN_TIMESTEPS).view(-1, 1, 1, 1, 1)
            return Noisy((1 - level) * latents + level * noise, timestep, noise - latents)
        index = timestep.long()
        scheduler = self.pipe.scheduler
        return Noisy(scheduler.add_noise(latents, noise, index), index, scheduler.get_velocity(latents, noise, index))

    def __call__(
        self, model: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor, *, condition: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The velocity that a transformer predicts, like ``latents``, float32.

        Args:
            model: One of the pipeline's transformers, wrapped for training or not.
            latents: Noisy.
            timestep: ``[B]``, whole numbers up to 1000.
            text: ``[B, L, D]``.
            condition: Of image-to-video, channels that join the latents, ``[B, ...]``.
            image: Of Wan2.1's image-to-video, CLIP's tokens ``[B, L, D]``.
        """
        options: dict[str, Any] = {}
        joined = latents if condition is None else torch.cat([latents, condition.to(latents)], 1 if self.flow else 2)
        if image is not None:
            options["encoder_hidden_states_image"] = image.to(self.dtype)
        if not self.flow and condition is not None and self.config.ofs_embed_dim is not None:
            options["ofs"] = latents.new_full((1,), 2.0, dtype=self.dtype)  # as the pipeline has it
        if not self.flow and self.config.use_rotary_positional_embeddings:
            options["image_rotary_emb"] = self._rotary(latents)
        return model(
            hidden_states=joined.to(self.dtype),
            timestep=timestep.long(),
            encoder_hidden_states=text.to(self.dtype),
            return_dict=False,
            **options,
        )[0].float()

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.pipe.vae_scale_factor_spatial
        height, width = (side * scale for side in latents.shape[-2:])
        return self.pipe._prepare_rotary_positional_embeddings(height, width, latents.shape[1], latents.device)
