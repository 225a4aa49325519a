"""How good a clip is, and how far a sparse clip is from the dense one.

Two kinds of measures: *fidelity* (PSNR, SSIM against the dense clip of the same prompt and noise, as the paper's Table
3), and *task accuracy* (did the clip show what the prompt asked for), which a clip that merely differs from the dense
one does not lose.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hone_blade.data import FIELDS
from hone_blade.host import Host, estimate_motion

__all__ = ["bootstrap", "grade", "psnr", "ssim"]


def psnr(clips: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip, ``[B]`` in dB, over all its pixels; 100 dB (the ceiling) for equal clips.

    Args:
        clips: ``[B, 3, F, H, W]`` in [0, 1].
        reference: likewise.
    """
    _check_pair(clips, reference)
    error = (clips.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10)).float()


def ssim(clips: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each clip, ``[B]``: the mean over its frames, with torchmetrics' 11 x 11 Gaussian window.

    Args:
        clips: ``[B, 3, F, H, W]`` in [0, 1], frames of at least 11 x 11 pixels.
        reference: likewise.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(clips, reference)
    batch, _, frames = clips.shape[:3]
    flat = [x.transpose(1, 2).flatten(0, 1).float() for x in (clips, reference)]
    values = structural_similarity_index_measure(*flat, data_range=1.0, reduction="none")
    return values.view(batch, frames).mean(1)


def grade(host: Host, clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compare what clips show with what was asked for.

    Args:
        host: its classifier reads digit and color.
        clips: ``[B, 3, F, H, W]`` in [0, 1].
        labels: ``[B, 5]``.

    Returns:
        Per clip, ``[B]`` float (1 right, 0 wrong): ``digit``, ``color``, ``direction``, ``speed``, and ``accuracy``,
        which is 1 where digit and direction are both right; ``residual_px``, the root mean square distance of the
        digit's centers from a straight line.
    """
    labels = labels.to(clips.device)
    digit, color = host.classifier.classify(clips)
    motion = estimate_motion(clips)
    read = {"digit": digit, "color": color, "direction": motion.direction, "speed": motion.speed}
    right = {name: (value == labels[:, FIELDS.index(name)]).float() for name, value in read.items()}
    return right | {"accuracy": right["digit"] * right["direction"], "residual_px": motion.residual}


def bootstrap(
    values: Tensor | np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: ``[N]`` one per clip.
        level: coverage.
        draws: resamples.
        seed: of the resampling.

    Returns:
        (low, high).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty list of numbers; got shape {values.shape}")
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_pair(clips: Tensor, reference: Tensor) -> None:
    if clips.shape != reference.shape or clips.ndim != 5:
        raise ValueError(
            f"clips and reference must both be [B, 3, F, H, W]; got {list(clips.shape)} and {list(reference.shape)}"
        )


def mean_rows(grades: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean of each column of :func:`grade`."""
    return {name: float(value.float().mean()) for name, value in grades.items()}
