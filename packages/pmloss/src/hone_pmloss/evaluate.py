"""The geometry report of a splat: centres against true points, depth against the true one, at edges and elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_splat.files import write_ply
from hone_splat.formats import read_cloud
from hone_splat.harmonics import C0
from torch import Tensor

from . import plots
from .config import EvalConfig
from .geometry import KnownDepth, boundary_band, cloud_errors, splat_depth
from .method import nearest
from .truths import KnownCloud, thinned, truth_of

__all__ = ["GeometryReport", "evaluate"]

COVERED = 0.5
"""Share of a pixel that a splat must cover for its depth to count."""


@dataclass(frozen=True, kw_only=True)
class GeometryReport(Report):
    """Result of ``eval``; as text, a table.

    Attributes:
        picture: True depth, the splat's, and the error, view by view; None where the truth has no cameras.
        errors: The splat with its errors as colours, from dark for none to light for twice what makes a centre fly;
            None likewise.
    """

    picture: Path | None
    errors: Path | None

    @classmethod
    def of(cls, run: Run) -> GeometryReport:
        """Return the report of a finished run."""
        files = (run.figures / "depth_errors.png", run.artifacts / "errors.ply")
        picture, errors = (file if file.exists() else None for file in files)
        return cls(path=run.path, rows=tuple(run.rows), picture=picture, errors=errors)

    def __str__(self) -> str:
        lines = [f"{row.metric:<18} {row.split:<14} {row.value:>10.4g} {row.unit}".rstrip() for row in self.rows]
        shown = [] if self.picture is None else [f"picture  {self.picture}", f"errors   {self.errors}"]
        return "\n".join([*lines, "", *shown, f"results  {self.path / 'results.json'}"])


def evaluate(cfg: EvalConfig, run: Run) -> GeometryReport:
    """Write the report."""
    device = resolve_device(run.device)
    truth = truth_of(cfg, device)
    if isinstance(truth, KnownCloud):
        _report_cloud(cfg, run, truth)
        return GeometryReport.of(run)
    truth = KnownDepth(truth.cam_to_world.to(device), truth.intrinsics_norm.to(device), truth.depth_z.to(device))
    splat = read_cloud(cfg.ply).pruned(opacity=cfg.opacity).map(lambda part: part.to(device))
    errors = cloud_errors(splat.means, truth, flying=cfg.flying)
    _rows(run, accuracy=errors.accuracy, completion=errors.completion)
    colours = (plots.error_colours(errors.relative, 2 * cfg.flying).to(device) - 0.5) / C0
    write_ply(replace(splat, sh=colours[..., None]), run.artifacts / "errors.ply")
    run.row("flying", float(errors.flying.double().mean()), better="lower", n=len(splat))
    if len(errors.spacing) > 1:
        # Distances below that of the true points to each other say nothing.
        run.row("truth_spacing", float(errors.spacing.median()), better="none", n=len(errors.spacing), split="median")
    depth, cover = splat_depth(splat, truth)
    known = truth.known
    # What is not known lies at no edge.
    told = torch.where(known, truth.depth_z, torch.nan)
    band = boundary_band(told, width=cfg.band, jump=cfg.jump) & known
    error = (depth - truth.depth_z).abs() / torch.where(known, truth.depth_z, 1.0)
    for split, where in (("at edges", band), ("elsewhere", known & ~band)):
        seen = where & (cover >= COVERED)
        if bool(seen.any()):
            run.row("depth_abs_rel", float(error[seen].double().mean()), better="lower", n=int(seen.sum()), split=split)
        if bool(where.any()):
            run.row(
                "uncovered", float((~seen & where).sum() / where.sum()), better="lower", n=int(where.sum()), split=split
            )
    plots.depth_errors(truth.depth_z, depth, band, run.figures / "depth_errors.png", title=cfg.ply.name)
    return GeometryReport.of(run)


def _rows(run: Run, **distances: Tensor) -> None:
    """Mean and median of some distances."""
    for name, values in distances.items():
        values = values.double()
        mean, spread = float(values.mean()), float(values.std(correction=0))
        run.row(name, mean, better="lower", n=len(values), spread=spread, split="mean")
        run.row(name, float(values.median()), better="lower", n=len(values), split="median")


def _report_cloud(cfg: EvalConfig, run: Run, truth: KnownCloud) -> None:
    """Accuracy and completion against a scanned cloud.

    Raises:
        ValueError: No centre lies where the cloud says something.
    """
    centres = read_cloud(cfg.ply).pruned(opacity=cfg.opacity).means
    if cfg.thin:
        centres = thinned(centres, cfg.thin)
    seen, counted = centres[truth.sees(centres)], truth.points[truth.counted()]
    if not len(seen) or not len(counted):
        raise ValueError(f"{cfg.ply}: no centre lies where {cfg.cloud} was observed, or no true point counts")
    # Neighbours are looked for among all points of the other cloud.
    accuracy = (seen - truth.points[nearest(seen, truth.points)]).norm(dim=-1)
    completion = (counted - centres[nearest(counted, centres)]).norm(dim=-1)
    for name, values in (("accuracy", accuracy), ("completion", completion)):
        close = values if cfg.most is None else values[values < cfg.most]
        if not len(close):
            raise ValueError(f"{name}: every distance is {cfg.most:g} or more")
        _rows(run, **{name: close})
        run.row("left_out", 1 - len(close) / len(values), better="lower", n=len(values), split=name)
