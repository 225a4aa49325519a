"""Training of a flow-matching host: noise levels, losses, and what makes its step fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .host import NUM_TRAIN_TIMESTEPS

__all__ = ["PatchLinear", "flow_loss", "sample_sigma"]


class PatchLinear(nn.Conv3d):
    """The model's patch embedding as a matrix product.

    Same parameters, names and result as the ``Conv3d`` it stands for during training: cuDNN has no fast bfloat16
    kernel for so few channels.
    """

    def forward(self, video: Tensor) -> Tensor:
        """Map ``[B, 3, F, H, W]`` to ``[B, C, F, H / p, W / p]``."""
        batch, channels, frames, height, width = video.shape
        p = self.kernel_size[1]
        patches = video.view(batch, channels, frames, height // p, p, width // p, p).permute(0, 2, 3, 5, 1, 4, 6)
        return F.linear(patches.flatten(4), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


def sample_sigma(
    count: int,
    *,
    shift: float,
    uniform: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw noise levels ``[count]`` in (0, 1).

    Args:
        count: how many.
        shift: timestep shift ``s``: sigma = s u / (1 + (s - 1) u).
        uniform: fraction with uniform ``u``; the others are logit-normal(0, 1).
        generator: of ``device``.
        device: where.
    """
    normal = torch.randn(count, generator=generator, device=device).sigmoid()
    flat = torch.rand(count, generator=generator, device=device)
    choose = torch.rand(count, generator=generator, device=device) < uniform
    u = torch.where(choose, flat, normal)
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(transformer: nn.Module, latents: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity ``noise - x_0`` at ``x = (1 - sigma) x_0 + sigma noise``.

    Args:
        transformer: predicts the velocity at timestep ``1000 sigma``.
        latents: ``x_0``, ``[B, 3, F, H, W]`` in [-1, 1].
        text: ``[B, T, text_dim]``.
        sigma: ``[B]`` in [0, 1].
        noise: like ``latents``.
    """
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = transformer(noisy, sigma * NUM_TRAIN_TIMESTEPS, text, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - latents)
