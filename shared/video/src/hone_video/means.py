"""Means over clips as rows of a run, each with how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hone_core.statistics import bootstrap_interval
from torch import Tensor

__all__ = ["bootstrap", "write_mean"]


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
