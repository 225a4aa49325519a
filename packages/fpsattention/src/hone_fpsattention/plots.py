"""Figures of FPSAttention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hone_core.plots import BLUE, GREEN, GREY, INK, drawing, error_bars, finish
from hone_core.runs import Row
from jaxtyping import Float
from torch import Tensor

__all__ = ["INK", "arms_chart", "error_map"]


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


def arms_chart(rows: Sequence[Row], path: Path) -> Path:
    """Draw digits and directions right, and the held-out loss, of each arm of ``reproduce``.

    Args:
        rows: Of the run.
        path: PNG or SVG to write.
    """
    with drawing(path, 7.2, 3.2) as figure:
        for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "flow_loss"), strict=True):
            shown = [row for row in rows if row.metric == metric]
            for index, row in enumerate(shown):
                color = GREY if row.variant == "dense" else GREEN if row.variant in _TRAINED else BLUE
                error = error_bars(row.value, row.interval)
                axes.bar(index, row.value, color=color, width=0.7, yerr=error, capsize=2, ecolor=INK)
            axes.set_xticks(range(len(shown)), [row.variant for row in shown], rotation=60, ha="right")
            axes.set_ylabel("digit and direction right" if metric == "accuracy" else "held-out flow loss")
        finish(figure, note=f"{shown[0].n} clips an arm, green: trained, bars: 95 % over seeds and clips")
    return path


_TRAINED = ("flow", "distillation", "schedule-trained", "constant-trained")
