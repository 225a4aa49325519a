"""What a method measured in each layer at each denoising step, as a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hone_core.plots import drawing

__all__ = ["draw_layer_maps"]


def draw_layer_maps(
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, str],
    path: Path,
    *,
    errors: Collection[str] = (),
    title: str = "",
) -> Path:
    """Draw one panel per metric: layers down, denoising steps across.

    Calls of a step are averaged; a layer without a value in a step is left blank. Layers of a second transformer count
    after those of the first.

    Args:
        rows: Of the calls: ``step``, ``model``, ``layer`` and the metrics, of which None was not measured.
        metrics: Metric to the title of its panel; one that no row has is left out. Colours go from 0 to 1.
        path: PNG or SVG to write.
        errors: Metrics that share one logarithmic scale of colours instead.
        title: Above the panels.

    Raises:
        ValueError: There are no rows.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    if not rows:
        raise ValueError("there are no rows to plot")
    steps, each = 1 + max(row["step"] for row in rows), 1 + max(row["layer"] for row in rows)
    layers = each * (1 + max(row["model"] for row in rows))
    grids = {}
    for metric in metrics:
        cells: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            if row[metric] is not None:
                cells.setdefault((row["layer"] + each * row["model"], row["step"]), []).append(row[metric])
        if cells:
            grids[metric] = np.full((layers, steps), np.nan)
            for at, values in cells.items():
                grids[metric][at] = np.mean(values)
    share = Normalize(0, 1)
    above = [value for metric in grids if metric in errors for value in grids[metric].flat if value > 0]
    error = LogNorm(min(above), max(max(above), 1.01 * min(above))) if above else share
    norms = {metric: error if metric in errors else share for metric in grids}
    with drawing(path, 2.3 * len(grids) + 0.8, min(8.0, 1.9 + 0.16 * layers)) as figure:
        figure.set_layout_engine("constrained")
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        pictures = {}
        for axes, (metric, grid) in zip(panels, grids.items(), strict=True):
            norm = norms[metric]
            pictures[norm] = axes.imshow(grid, norm=norm, cmap="cividis", aspect="auto", interpolation="nearest")
            axes.set_title(metrics[metric], fontsize=8)
            axes.set_xlabel("denoising step")
            for axis, count in ((axes.xaxis, steps), (axes.yaxis, layers)):
                # A locator would divide a single step or layer.
                axis.set_ticks(range(0, count, -(-count // 8)))
        panels[0].set_ylabel("layer")
        for norm, picture in pictures.items():  # beside the last panel of each scale
            last = [axes for axes, metric in zip(panels, grids, strict=True) if norms[metric] is norm][-1]
            figure.colorbar(picture, ax=last)
        if title:
            figure.suptitle(title)
    return path
