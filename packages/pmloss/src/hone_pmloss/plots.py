"""Pictures of the verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from hone_core.plots import BLUE, INK, SKY, drawing, error_bars, finish
from hone_core.statistics import bootstrap_interval
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TITLES", "clouds", "depth_errors", "differences", "error_colours", "gains"]

Gain = tuple[str, dict[str, tuple[float, tuple[float, float]]]]
"""A setting, and each metric's mean difference with its interval."""
SHOWN = 4
"""Views per row."""
TITLES = {
    "psnr_between": "PSNR between, dB",
    "psnr_beyond": "PSNR beyond, dB",
    "depth_abs_rel": "error of depth",
    "depth_at_edges": "at edges",
    "depth_scale": "scale of depth",
    "flying": "flying",
}
"""Metrics that are drawn, by name."""


def clouds(
    arms: Mapping[str, tuple[Tensor, Tensor]], colours: Tensor, path: Path, *, views: Sequence[str], title: str
) -> Path:
    """A row per arm: its centres from above, and its pictures.

    Args:
        arms: Name to centres ``[G, 3]`` and pictures ``[V, 3, H, W]``.
        colours: ``[G, 3]`` of the centres, in [0, 1].
        path: To write.
        views: Where each of the V pictures is seen from.
        title: Of the figure.
    """
    first = next(iter(arms.values()))[1]
    picks = np.linspace(0, len(first) - 1, min(SHOWN, len(first))).round().astype(int)
    everything = next(iter(arms.values()))[0].cpu().numpy()
    low, high = everything.min(0) - 0.3, everything.max(0) + 0.3
    with drawing(path, 2.6 + 1.8 * len(picks), 2.0 * len(arms) + 0.4) as figure:
        axes = figure.subplots(
            len(arms), 1 + len(picks), squeeze=False, gridspec_kw={"width_ratios": [1.4] + [1] * len(picks)}
        )
        for line, (name, (centres, images)) in zip(axes, arms.items(), strict=True):
            points = centres.cpu().numpy()
            line[0].scatter(points[:, 0], points[:, 2], c=colours.clamp(0, 1).cpu().numpy(), s=0.8, linewidths=0)
            line[0].set(xlim=(low[0], high[0]), ylim=(low[2], high[2]), aspect="equal", ylabel=name)
            for axis, pick in zip(line[1:], picks, strict=True):
                axis.imshow(images[pick].clamp(0, 1).movedim(0, -1).cpu().numpy(), interpolation="nearest")
            for axis in line:
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
        for axis, name in zip(axes[0], ["points from above", *(views[pick] for pick in picks)], strict=True):
            axis.set_title(name)
        finish(figure, title=title)
    return path


def depth_errors(true: Tensor, found: Tensor, band: Tensor, path: Path, *, title: str) -> Path:
    """True depth, the splat's, and the relative error with the bands along depth edges outlined; a row per view.

    Args:
        true: ``[V, H, W]``.
        found: ``[V, H, W]``.
        band: ``[V, H, W]``, whether a pixel belongs to a band.
        path: To write.
        title: Of the figure.
    """
    picks = np.linspace(0, len(true) - 1, min(SHOWN, len(true))).round().astype(int)
    with drawing(path, 6.4, 2.1 * len(picks) + 0.4) as figure:
        axes = figure.subplots(len(picks), 3, squeeze=False)
        for line, pick in zip(axes, picks, strict=True):
            real, drawn = true[pick].cpu().numpy(), found[pick].cpu().numpy()
            known = np.isfinite(real) & (real > 0)
            # Of a view without a known depth there is only the splat's.
            shown = real[known] if known.any() else drawn
            span = {"vmin": float(shown.min()), "vmax": float(shown.max())}
            error = np.where(known, np.abs(drawn - real) / np.where(known, real, 1), np.nan)
            for axis, image, name, options in (
                (line[0], real, "true depth", {"cmap": "viridis", **span}),
                (line[1], drawn, "the splat's", {"cmap": "viridis", **span}),
                (line[2], error, "relative error, 0 to 20 %", {"cmap": "magma", "vmin": 0.0, "vmax": 0.2}),
            ):
                axis.imshow(image, interpolation="nearest", **options)
                axis.set(xticks=[], yticks=[], title=name)
                axis.grid(False)
            if band[pick].any():
                line[2].contour(band[pick].cpu().numpy(), levels=[0.5], colors=SKY, linewidths=0.8)
        finish(figure, title=title)
    return path


def error_colours(errors: Tensor, most: float) -> Tensor:
    """Colours ``[N, 3]`` in [0, 1] of errors ``[N]``: dark for none, light from ``most`` on."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps["magma"]((errors / most).clamp(0, 1).cpu().numpy())[:, :3]).float()


def differences(arms: Mapping[str, Mapping[str, NDArray[np.floating]]], path: Path, *, title: str) -> Path:
    """Each metric of each arm less that of the first arm, room by room: mean and its 95 % interval.

    Args:
        arms: Name to metric to values ``[rooms]``.
        path: To write.
        title: Of the figure.
    """
    first, *others = arms
    metrics = list(arms[first])
    with drawing(path, 2.3 * len(metrics) + 0.6, 2.6) as figure:
        for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for place, name in enumerate(others):
                gap = arms[name][metric] - arms[first][metric]
                bars = np.asarray(error_bars(float(gap.mean()), bootstrap_interval(gap)))
                axis.errorbar([place], [gap.mean()], bars, marker="o", capsize=3)
            axis.axhline(0.0, color="black", linewidth=0.8)
            axis.set_xticks(range(len(others)), others, rotation=20)
            axis.set_xlim(-0.6, len(others) - 0.4)
            axis.set_title(TITLES[metric])
        finish(figure, title=title)
    return path


def gains(found: Sequence[Gain], path: Path, *, title: str) -> Path:
    """Differences metric by metric, a line per setting; several of one setting, such as seeds, stand close together.

    Args:
        found: In order.
        path: To write.
        title: Of the figure.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for name, _ in found))
    metrics = list(found[0][1])
    with drawing(path, 1.9 * len(metrics) + 1.4, 0.34 * len(names) + 1.2) as figure:
        for axis, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
            for line, name in enumerate(names):
                several = [values[metric] for own, values in found if own == name]
                for number, (mean, interval) in enumerate(several):
                    place = line + 0.16 * (number - (len(several) - 1) / 2)
                    bars = np.asarray(error_bars(mean, interval))
                    axis.errorbar([mean], [place], xerr=bars, marker="o", color=BLUE, capsize=2)
            axis.axvline(0.0, color=INK, linewidth=0.8)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.set_title(TITLES[metric])
        finish(figure, title=title)
    return path
