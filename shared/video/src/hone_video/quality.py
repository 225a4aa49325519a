"""How far a clip is from a reference clip."""

from __future__ import annotations

import torch
from hone_core.errors import MissingExtraError
from torch import Tensor

__all__ = ["PSNR_CEILING", "psnr", "ssim"]

PSNR_CEILING = 100.0
"""PSNR of equal clips, in dB."""


def psnr(clips: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip over all its pixels, ``[B]`` in dB; 100, the ceiling, for equal clips.

    Args:
        clips: ``[B, 3, F, H, W]`` in [0, 1].
        reference: likewise.
    """
    _check_pair(clips, reference)
    error = (clips.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * torch.log10(error)).clamp(max=PSNR_CEILING).float()


def ssim(clips: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each clip, ``[B]``: the mean over its frames, torchmetrics' 11 x 11 Gaussian window.

    Args:
        clips: ``[B, 3, F, H, W]`` in [0, 1], frames of at least 11 x 11 pixels.
        reference: likewise.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise MissingExtraError("quality", "hone-video", "SSIM") from error

    _check_pair(clips, reference)
    batch, _, frames = clips.shape[:3]
    ours, theirs = (x.transpose(1, 2).flatten(0, 1).float() for x in (clips, reference))
    values = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.view(batch, frames).mean(1)


def _check_pair(clips: Tensor, reference: Tensor) -> None:
    if clips.shape != reference.shape or clips.ndim != 5:
        raise ValueError(
            f"clips and reference must both be [B, 3, F, H, W]; got {list(clips.shape)} and {list(reference.shape)}"
        )
