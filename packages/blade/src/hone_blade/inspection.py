"""What sparse attention does inside a model: density, clamped rows and recall of every layer at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Better, Report, Run
from hone_video.handle import LayerStats
from hone_video.host import load_host
from hone_video.layer_maps import draw_layer_maps

from .config import GenerateConfig, InspectConfig
from .inputs import check_inspected, find_inputs
from .models import BladeHandle, attach
from .sample import Sampler

__all__ = [
    "InspectReport",
    "LayerRow",
    "inspect",
    "inspect_model",
    "inspect_pipeline",
    "to_rows",
]

METRICS = {
    "density": "density of query-key pairs",
    "clamped": "rows at the upper clamp",
    "recall": "recall of dense attention's mass",
}
"""Metric to the title of its panel; every one of them lies in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """Statistics of one self-attention call, averaged over batch elements and heads.

    Attributes:
        step: Denoising step, from 0.
        call: Forward within the step; with guidance Wan makes two.
        model: 1 for the second transformer of a Wan2.2 pipeline.
        layer: Transformer block.
        density: Query-key pairs computed over all pairs, pooled keys not counted.
        pooled: Pooled keys over keys, what they add to the density.
        clamped: Share of query blocks whose threshold asked for more than the upper clamp.
        recall: Share of dense attention's probability on the pairs computed; None if it was not measured.
        recall_low: The worst head's recall.
        recall_high: The best head's recall.
    """

    step: int
    call: int
    model: int
    layer: int
    density: float
    pooled: float
    clamped: float
    recall: float | None
    recall_low: float | None
    recall_high: float | None


@dataclass(frozen=True, kw_only=True)
class InspectReport(Report):
    """Result of an inspection.

    Attributes:
        inspection: The JSON file with a row for every call.
        figure: The plot.
        calls: Self-attention calls seen.
        density: Mean over them; likewise the next two.
        clamped: See ``LayerRow``.
        recall: None if it was not measured.
    """

    inspection: Path
    figure: Path
    calls: int
    density: float
    clamped: float
    recall: float | None

    @classmethod
    def of(cls, run: Run) -> InspectReport:
        """Return the report of a run whose rows are written."""
        found = {row.metric: row for row in run.rows}
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            inspection=run.artifacts / "inspection.json",
            figure=run.figures / "inspection.png",
            calls=found["density"].n,
            density=found["density"].value,
            clamped=found["clamped"].value,
            recall=found["recall"].value if "recall" in found else None,
        )

    def __str__(self) -> str:
        means = {name: getattr(self, name) for name in METRICS}
        shown = {title: value for name, title in METRICS.items() if (value := means[name]) is not None}
        width = max(map(len, shown))
        return "\n".join(
            [
                f"means over {self.calls} calls of self-attention",
                *(f"{title:<{width}}  {value:.4f}" for title, value in shown.items()),
                f"{'all rows':<{width}}  {self.inspection}",
                f"{'plot':<{width}}  {self.figure}",
            ]
        )


def to_rows(stats: Iterable[LayerStats]) -> list[LayerRow]:
    """Numbers of recorded statistics; waits for the device once per call that was recorded."""
    rows = []
    for step, call, model, layer, values in stats:
        numbers = [values.density.mean(), values.clamped.mean()]
        if values.recall is not None:
            numbers += [values.recall.mean(), *values.recall.mean(0).aminmax()]
        density, clamped, *recall = torch.stack(numbers).tolist()
        mean, low, high = recall or (None, None, None)
        rows.append(
            LayerRow(
                step=step,
                call=call,
                model=model,
                layer=layer,
                density=density,
                pooled=values.pooled,
                clamped=clamped,
                recall=mean,
                recall_low=low,
                recall_high=high,
            )
        )
    return rows


def inspect_model(
    handle: BladeHandle, call: Callable[[], Any], run: Run, *, recall: bool = True, title: str = ""
) -> InspectReport:
    """Run ``call`` once and write what the attached model's attention did.

    Into the run go ``artifacts/inspection.json`` (all rows), ``figures/inspection.png`` and the means as results.

    Args:
        handle: BLADE on the model, from ``attach``.
        call: Runs the model: one forward, or a whole video.
        run: The run, entered.
        recall: Also measure recall, which costs a dense attention per call.
        title: Above the plot.

    Raises:
        ValueError: ``call`` ran no sparse self-attention: every layer, step or sequence was left dense, or another
            model ran.
    """
    with handle.record(recall=recall) as stats:
        call()
    rows = to_rows(stats)
    if not rows:
        raise ValueError(
            "no sparse self-attention ran. Either the settings leave everything dense "
            f"(dense_steps={handle.config.dense_steps}, dense_layers={handle.config.dense_layers}, "
            f"min_tokens={handle.config.min_tokens}), or the call did not run the attached model"
        )
    for metric in METRICS:
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        if values:
            better: Better = "higher" if metric == "recall" else "none"
            run.row(metric, sum(values) / len(values), better=better, n=len(values), variant="blade")
    data = [dataclasses.asdict(row) for row in rows]
    atomic_write_json(run.artifacts / "inspection.json", data)
    draw_layer_maps(data, METRICS, run.figures / "inspection.png", title=title)
    return InspectReport.of(run)


def inspect(cfg: InspectConfig, run: Run) -> InspectReport:
    """Look at the tiny host while it draws one clip, or at a real pipeline.

    Args:
        cfg: What to look at.
        run: The run, entered.

    Raises:
        CheckpointError: Weights are not there; before anything is loaded.
        ValueError: The settings are dense; or as ``inspect_model``.
    """
    if cfg.model is not None:
        return inspect_pipeline(cfg.pipeline, run, recall=cfg.recall)
    preset = cfg.preset or "tiny"
    host = load_host(resolve_device(run.device), path=cfg.host)
    check_inspected(cfg, host.config)
    text, noise = host.encode_prompt(cfg.prompt), host.noise(1, cfg.seed)
    with attach(host.transformer, preset) as handle:

        def draw_clip() -> None:
            host.sample(
                text, noise, steps=cfg.steps, guidance=cfg.guidance, on_step=lambda step, _: handle.begin_step(step)
            )

        return inspect_model(handle, draw_clip, run, recall=cfg.recall, title=f"tiny host, {preset}: {cfg.prompt}")


def inspect_pipeline(cfg: GenerateConfig, run: Run, *, recall: bool = True) -> InspectReport:
    """Inspect a real pipeline on the first prompt of a config, without decoding the video.

    Raises:
        CheckpointError, FileNotFoundError: Weights or prompts are not there; before anything is loaded.
        ValueError: The settings are dense; or as ``inspect_model``.
    """
    if cfg.dense:
        raise ValueError("there is nothing to inspect in dense attention; drop dense")
    sampler = Sampler.load(find_inputs(cfg), run.device)
    with sampler.attached() as handle:
        assert handle is not None  # the settings are not dense
        title = f"{type(handle.models[0]).__name__}, {sampler.attention_name}, {sampler.config.steps} steps"
        return inspect_model(handle, lambda: sampler.draw(0, output_type="latent"), run, recall=recall, title=title)
