"""Means over clips as rows of a run, each with how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hone_core.statistics import bootstrap_interval
from torch import Tensor

__all__ = ["GRADES", "bootstrap", "grade_metric", "write_grades", "write_mean"]

GRADES = ("accuracy", "digit", "direction", "color", "speed")
"""What ``hone_video.grader.grade`` says of a clip, right or wrong; ``accuracy`` is digit and direction."""


def bootstrap(values: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, (low, high).

    The samples are drawn as they were for the results that are committed: by torch, seed 0.

    Args:
        values: ``[N]`` one per clip.
    """
    resamples = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    return bootstrap_interval(values.double().cpu().numpy(), resamples=resamples.numpy())


def write_mean(
    run: Any,
    metric: str,
    values: Tensor,
    *,
    variant: str,
    unit: str = "",
    better: str = "higher",
    split: str = "",
    labels: Mapping[str, str] | None = None,
) -> float:
    """Add a mean over clips and its 95 % bootstrap interval to a run; return the mean.

    Args:
        run: a started ``hone_core.runs.Run``.
        metric: name of the row.
        values: ``[N]`` one per clip.
        variant: of the row, like the rest.
        unit: word, or empty.
        better: "higher" or "lower".
        split: of the data.
        labels: further columns.
    """
    values = values.double().cpu()
    mean = float(values.mean())
    run.row(
        metric,
        mean,
        unit=unit,
        better=better,
        n=len(values),
        spread=float(values.std()) if len(values) > 1 else None,
        variant=variant,
        split=split,
        interval=bootstrap(values),
        labels=labels,
    )
    return mean


def grade_metric(name: str) -> str:
    """Name of the row of a grade: ``digit`` is the row ``digit_accuracy``, ``residual_px`` the row ``residual``."""
    return {"accuracy": "accuracy", "residual_px": "residual"}.get(name, f"{name}_accuracy")


def write_grades(run: Any, grades: Mapping[str, Tensor], **where: Any) -> dict[str, float]:
    """Add a row of each grade of some clips; return the means by the grade's name.

    Args:
        run: a started ``hone_core.runs.Run``.
        grades: name to ``[N]``, as ``hone_video.grader.grade`` gives them.
        **where: ``variant``, ``split`` and ``labels`` of the rows.
    """
    means = {name: write_mean(run, grade_metric(name), grades[name], **where) for name in GRADES if name in grades}
    if "residual_px" in grades:
        residual = write_mean(run, "residual", grades["residual_px"], unit="px", better="lower", **where)
        means["residual_px"] = residual
    return means
