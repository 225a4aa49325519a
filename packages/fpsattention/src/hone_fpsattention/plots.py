"""Figures of FPSAttention."""

from __future__ import annotations

from pathlib import Path

from hone_core.plots import drawing, finish
from jaxtyping import Float
from torch import Tensor

__all__ = ["error_map"]


def error_map(snr_db: Float[Tensor, "steps layers"], path: Path) -> Path:
    """Draw the signal-to-noise ratio of attention as a map of steps and layers.

    Args:
        snr_db: dB.
        path: PNG or SVG to write.
    """
    with drawing(path, 6.0, 3.2) as figure:
        axes = figure.subplots()
        image = axes.imshow(snr_db.T.numpy(), aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
        axes.set_xlabel("denoising step")
        axes.set_ylabel("layer")
        figure.colorbar(image, label="signal to noise, dB")
        finish(figure, title="attention of the schedule against the model's own")
    return path
