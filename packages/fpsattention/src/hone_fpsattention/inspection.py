"""What the attention does inside a model: density, and what rounding and the window each lose, by layer and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_video.handle import LayerStats
from hone_video.host import load_host
from hone_video.layer_maps import draw_layer_maps

from . import host as tuned_host
from .config import PRESETS, FPSAttentionConfig, InspectConfig
from .models import FPSAttentionHandle, attach
from .sample import Sampler, draw

__all__ = ["InspectReport", "LayerRow", "inspect", "inspect_model", "to_rows"]

METRICS = {
    "density": "density of query-key pairs",
    "rounding_error": "error of rounding alone",
    "window_error": "error of the window alone",
    "error": "error of both",
}
"""Metric to the title of its panel. Errors are relative: L2 norm of the difference over that of exact attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """One self-attention call, over its batch and heads.

    Attributes:
        step: Denoising step, from 0.
        call: Forward within the step; with guidance Wan makes two.
        model: 1 for the second transformer of a Wan2.2 pipeline.
        layer: Transformer block.
        density: Query-key pairs computed over all pairs.
        rounding_error: Relative L2 error of E4M3 over every tile; like the next two, of the call's own queries, keys
            and values, against exact attention.
        window_error: Of the window without rounding.
        error: Of what ran.
    """

    step: int
    call: int
    model: int
    layer: int
    density: float
    rounding_error: float
    window_error: float
    error: float


@dataclass(frozen=True, kw_only=True)
class InspectReport(Report):
    """Result of an inspection; as text, a line per step.

    Attributes:
        inspection: The JSON file with a row for every call.
        figure: The plot.
    """

    inspection: Path
    figure: Path

    @classmethod
    def of(cls, run: Run) -> InspectReport:
        """Return the report of a run whose rows are written."""
        files = {"inspection": run.artifacts / "inspection.json", "figure": run.figures / "inspection.png"}
        return cls(path=run.path, rows=tuple(run.rows), **files)

    def __str__(self) -> str:
        cells: dict[tuple[str, str], dict[str, float]] = {}
        for row in self.rows:
            if row.metric in METRICS and row.variant:
                cells.setdefault((row.split, row.variant), {})[row.metric] = row.value
        lines = [f"{'':<12} {'density':>8} {'rounding':>9} {'window':>9} {'both':>9}   relative errors"]
        for (split, variant), found in cells.items():
            density, *errors = (found[metric] for metric in METRICS)
            lines.append(f"{f'{split} {variant}':<12} {density:>8.3f} " + " ".join(f"{e:>9.4f}" for e in errors))
        return "\n".join([*lines, f"all rows  {self.inspection}", f"plot      {self.figure}"])


def to_rows(stats: Iterable[LayerStats]) -> list[LayerRow]:
    """Numbers of recorded statistics; waits for the device once per call that was recorded."""
    return [
        LayerRow(step=step, call=call, model=model, layer=layer, **dict(zip(METRICS, values.tolist(), strict=True)))
        for step, call, model, layer, values in stats
    ]


def inspect_model(handle: FPSAttentionHandle, call: Callable[[], Any], run: Run, *, title: str = "") -> InspectReport:
    """Run ``call`` once and write what the attached model's attention did.

    Into the run go ``artifacts/inspection.json`` (all rows), ``figures/inspection.png``, and means by step and by layer
    as results. Each call of attention costs three more, one of them dense.

    Args:
        handle: FPSAttention on the model, from ``attach``.
        call: Runs the model: one forward, or a whole video.
        run: The run, entered.
        title: Above the plot.

    Raises:
        ValueError: ``call`` ran no attention of the method: every regime or layer is the model's own, or another model
            ran.
    """
    with handle.record() as stats:
        call()
    rows = to_rows(stats)
    if not rows:
        raise ValueError(
            f"no attention of the method ran. Either every regime or layer is the model's own (dense_layers="
            f"{handle.config.dense_layers}), or the call did not run the attached model"
        )
    for split in ("step", "layer"):
        for number in sorted({getattr(row, split) for row in rows}):
            own = [row for row in rows if getattr(row, split) == number]
            for metric in METRICS:
                value = sum(getattr(row, metric) for row in own) / len(own)
                run.row(metric, value, better="lower", n=len(own), variant=str(number), split=split)
    data = [dataclasses.asdict(row) for row in rows]
    atomic_write_json(run.artifacts / "inspection.json", data)
    errors = [metric for metric in METRICS if metric != "density"]
    draw_layer_maps(data, METRICS, run.figures / "inspection.png", errors=errors, title=title)
    return InspectReport.of(run)


def inspect(cfg: InspectConfig, run: Run) -> InspectReport:
    """Look at the tiny host while it draws one clip, or at a real pipeline, whose video is not decoded.

    Args:
        cfg: What to look at.
        run: The run, entered.

    Raises:
        CheckpointError: Weights are not there, or not whole.
        ValueError: A schedule is of another model, or as ``inspect_model``.
    """
    device, video = resolve_device(run.device), cfg.video
    if video.model is not None:
        with ExitStack() as stack:
            pipe = Sampler(cfg.pipeline, device, stack, run).pipe
            models = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
            handle = FPSAttentionHandle.of([model for model in models if model is not None])
            title = f"{type(handle.models[0]).__name__}, {video.steps} steps"
            return inspect_model(handle, lambda: draw(pipe, video, 0, output_type="latent"), run, title=title)
    if cfg.tuned is None:
        host, attention = load_host(device, path=cfg.host), PRESETS[cfg.preset or "tiny"].config
    else:
        host, attention = _tuned(cfg.tuned, device)
    text, noise = host.encode_prompt(video.prompts[0]), host.noise(1, video.seed)
    with attach(host.transformer, attention) as handle:
        title = f"tiny host: {video.prompts[0]}"
        return inspect_model(handle, lambda: host.sample(text, noise), run, title=title)


def _tuned(path: Path, device: torch.device) -> tuple[tuned_host.TunedHost, FPSAttentionConfig]:
    host = tuned_host.load_host(device, path=path)
    return host, host.attention
