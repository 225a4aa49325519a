"""Ways to draw the same scenes, held against each other: what they ran, and what the images are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.progress import progress_bar
from hone_core.runs import Report, Row, Run
from hone_core.statistics import bootstrap_interval
from hone_visual_ar.generation import Generation, Policy
from torch import Tensor

from . import plots
from .benchmarks import judge
from .calibrate import chosen
from .config import EvalConfig
from .data import random_labels, render
from .flops import gflops
from .grader import frechet, grade, texture_energy
from .host import Host, load_host
from .models import variant_of

__all__ = ["EvalReport", "Outcome", "compare", "evaluate", "table", "write_rows"]


@dataclass(kw_only=True)
class Outcome:
    """Images of one variant.

    Attributes:
        images: ``[N, 3, 64, 64]`` in [0, 1].
        grades: Name to ``[N]``.
        features: ``[N, D]`` of the grader.
        gflops: Of the transformer, per image.
        kept: Tokens that ran over tokens there are, over the scales of the schedule.
        run: The last batch's generation, with its state.
    """

    images: Tensor
    grades: dict[str, Tensor]
    features: Tensor
    gflops: float
    kept: float
    run: Generation


@torch.no_grad()
def compare(
    host: Host,
    policies: Mapping[str, Policy],
    labels: Tensor,
    *,
    seed: int,
    batch: int,
    greedy: bool = False,
    quiet: bool = False,
) -> dict[str, Outcome]:
    """Draw the same prompts with the same draws by every policy; ``dense`` is held as the reference.

    Args:
        host: Draws and grades.
        policies: Name to policy; ``dense`` is among them.
        labels: ``[N, 4, 3]``.
        seed: Of the first image; the next has the next.
        batch: Images at a time.
        greedy: Take the likeliest bits.
        quiet: Show no progress.
    """
    order = ["dense", *(name for name in policies if name != "dense")]
    outcomes: dict[str, Outcome] = {}
    with progress_bar(len(order) * len(labels), desc="drawing", quiet=quiet) as bar:
        for name in order:
            images, work, ran, run = [], [], 0, None
            for begin in range(0, len(labels), batch):
                part = labels[begin : begin + batch]
                seeds = range(seed + begin, seed + begin + len(part))
                run = host.draw(part, seeds, policy=policies[name], greedy=greedy)
                images.append((run.image() + 1) / 2)
                words = 1 + 3 * float((part[..., 0] > 0).sum(1).float().mean())
                work.append(len(part) * gflops(run.records, host.transformer, round(words)))
                ran += len(part) * sum(r.kept for r in run.records)
                bar.update(len(part))
            assert run is not None
            pixels = torch.cat(images)
            reference = outcomes["dense"].images if outcomes else pixels
            outcomes[name] = Outcome(
                images=pixels,
                grades=_grades(host, pixels, reference, labels.to(host.device), exact=name == "dense"),
                features=torch.cat([host.grader.features(x).flatten(1) for x in pixels.split(batch)]),
                gflops=sum(work) / len(labels),
                kept=ran / (len(labels) * run.schedule.total),
                run=run,
            )
    return outcomes


def _grades(host: Host, images: Tensor, dense: Tensor, labels: Tensor, *, exact: bool) -> dict[str, Tensor]:
    grades = grade(host.grader, images, labels)
    energy = F.avg_pool2d(texture_energy(images)[:, None], 4).flatten(1)
    where = F.avg_pool2d(texture_energy(dense)[:, None], 4).flatten(1)
    textured = where >= where.quantile(0.75, dim=1, keepdim=True)
    flat = where <= where.quantile(0.5, dim=1, keepdim=True)
    grades["energy_textured"] = (energy * textured).sum(1) / textured.sum(1)
    grades["energy_flat"] = (energy * flat).sum(1) / flat.sum(1)
    if not exact:
        error = (images - dense).square().flatten(1).mean(1)
        grades["psnr"] = -10 * error.clamp(min=1e-10).log10()
    return grades


_BETTER = {"energy_textured": "none", "energy_flat": "none"}


def write_rows(run: Run, outcomes: Mapping[str, Outcome], real: Tensor, *, split: str = "") -> None:
    """Rows of every variant: work, tokens, grades with intervals, and the Frechet distance to real scenes.

    Args:
        run: Entered.
        outcomes: Of ``compare``.
        real: ``[N, D]`` features of real scenes of the same prompts.
        split: Of the rows.
    """
    for name, outcome in outcomes.items():
        count = len(outcome.images)
        run.row("gflops", outcome.gflops, unit="GFLOP", better="lower", n=count, variant=name, split=split)
        run.row("tokens", outcome.kept, better="none", n=count, variant=name, split=split)
        if count > 1:
            distance = frechet(outcome.features, real)
            run.row("frechet", distance, better="lower", n=count, variant=name, split=split)
        for metric, values in outcome.grades.items():
            run.row(
                metric,
                float(values.mean()),
                unit="dB" if metric == "psnr" else "",
                better="none" if metric.startswith("energy") else "higher",
                n=count,
                spread=float(values.std()) if count > 1 else None,
                interval=bootstrap_interval(values.cpu().numpy()),
                variant=name,
                split=split,
            )


def table(rows: Sequence[Row]) -> str:
    """Variants as lines."""
    names = list(dict.fromkeys(row.variant for row in rows if row.metric == "gflops"))
    found = {(row.variant, row.metric): row.value for row in rows}

    def cell(name: str, metric: str, form: str) -> str:
        value = found.get((name, metric))
        return f"{'-':>9}" if value is None else f"{value:>9{form}}"

    lines = [f"{'':<18}{'GFLOP':>9}{'tokens':>9}{'objects':>9}{'Frechet':>9}{'PSNR':>9}{'texture':>9}{'flat':>9}"]
    for name in names:
        cells = [cell(name, "gflops", ".2f"), cell(name, "tokens", ".3f"), cell(name, "objects", ".3f")]
        cells += [cell(name, "frechet", ".2f"), cell(name, "psnr", ".1f")]
        cells += [cell(name, "energy_textured", ".4f"), cell(name, "energy_flat", ".4f")]
        lines.append(f"{name:<18}" + "".join(cells))
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Result of ``eval``; as text, the table, or a benchmark's scores."""

    def __str__(self) -> str:
        if not any(row.metric == "gflops" for row in self.rows):
            lines = [f"{row.metric:<20}{row.value:>10.4g}" for row in self.rows]
            return "\n".join([*lines, f"images   {self.path / 'artifacts' / 'images'}"])
        chart = self.path / "figures" / "frontier.png"
        return f"{table(self.rows)}\nchart    {chart}\nresults  {self.path / 'results.json'}"


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels and real images of a seed, on the CPU."""
    generator = torch.Generator().manual_seed(50_000 + seed)
    labels = random_labels(count, generator)
    return labels, render(labels, generator).images


@torch.no_grad()
def real_features(host: Host, images: Tensor, batch: int) -> Tensor:
    """Features ``[N, D]`` of images on the CPU."""
    return torch.cat([host.grader.features(x.to(host.device)).flatten(1) for x in images.split(batch)])


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Draw and grade every variant; or a benchmark's images, see ``benchmarks.judge``.

    Raises:
        CheckpointError: There is no host.
    """
    if cfg.protocol != "scenes":
        judge(cfg, run)
        return EvalReport.of(run)
    host = load_host(resolve_device(run.device), path=cfg.host)
    labels, images = scenes(256 if cfg.limit is None else cfg.limit, cfg.seed)
    settings = chosen(host, cfg.settings)
    policies = {name: variant_of(name, settings) for name in dict.fromkeys(("dense", *cfg.variants))}
    outcomes = compare(host, policies, labels, seed=cfg.seed, batch=cfg.batch, greedy=cfg.greedy, quiet=run.quiet)
    write_rows(run, outcomes, real_features(host, images, cfg.batch))
    plots.frontier(run.rows, run.figures / "frontier.png")
    return EvalReport.of(run)
