"""How good a clip is, and how far a sparse clip is from the dense one.

Two kinds of measures. *Fidelity*: PSNR and SSIM against the dense clip of the same prompt and noise, as in the paper's
Table 3. *Task accuracy*: whether the clip shows what the prompt asked for, which a clip that is merely another good one
does not lose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from hone_core.devices import resolve_device
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch
from hone_video.clips import random_labels
from hone_video.grader import grade
from hone_video.handle import LayerStats
from hone_video.host import Host, load_host
from hone_video.means import write_grades, write_mean
from hone_video.quality import psnr, ssim
from hone_video.vbench import describe_grades, find_suite, grade_videos
from torch import Tensor

from . import plots
from .config import BladeConfig, Comparison, EvalConfig
from .inputs import find_inputs
from .models import BladeHandle, attach
from .sample import render

log = logging.getLogger(__name__)

__all__ = [
    "VARIANTS",
    "EvalReport",
    "Outcome",
    "attention_gflop",
    "compare",
    "comparison_table",
    "evaluate",
    "means",
    "write_rows",
]

VARIANTS = {
    "dense": "dense attention",
    "asa": "adaptive blocks (ASA)",
    "asa_g": "adaptive blocks and pooled tokens (ASA_G)",
    "psa": "adaptive pool factors (PSA)",
    "window": "static 3-D window",
    "random": "random blocks",
}
"""Name -> what it is. The sparse ones compute equally many query-key products, ASA_G and PSA up to a block fewer in a
row."""

FOOTNOTE = """\
  recall: dense attention's probability on the kept pairs; ASA_G's pooled keys are in the density and not in here, and
  pairs that PSA reads pooled count like those read whole.
  digit: the classifier always names one of the ten digits, broken ones too, so it flatters; look at the clips."""
"""Below a table of a comparison."""


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Result of an evaluation; as text, the table, or VBench's grades.

    Attributes:
        clips: per variant; 0 of VBench.
        variants: name -> metric -> mean; none of VBench.
    """

    clips: int
    variants: dict[str, dict[str, float]]

    @classmethod
    def of(cls, run: Run) -> EvalReport:
        """Return the report of a run whose rows are written."""
        if not any(row.metric == "accuracy" for row in run.rows):
            return cls(path=run.path, rows=tuple(run.rows), clips=0, variants={})
        variants, clips = means(run)
        return cls(path=run.path, rows=tuple(run.rows), clips=clips, variants=variants)

    def __str__(self) -> str:
        if not self.variants:
            return describe_grades(self.rows, self.path)
        table = comparison_table(self.variants, self.clips, intervals=True)
        return f"{table}\nresults  {self.path / 'results.json'}"


@dataclass(frozen=True)
class Outcome:
    """One variant's clips and what they are worth; vectors are per clip.

    Attributes:
        clips: ``[N, 3, F, H, W]`` in [0, 1], on the CPU.
        grades: name -> ``[N]``, see :func:`hone_video.grader.grade`.
        psnr: ``[N]`` dB to the dense clips.
        ssim: ``[N]`` to the dense clips.
        density: query-key pairs computed over all pairs, pooled keys included.
        recall: share of dense attention's probability on the kept pairs, mean over layers, heads and measured steps.
            Pooled keys are not counted.
        seconds: sampling time of a clip; None if no sparse step was left to time.
        attention_gflop: of self-attention per clip, prober included.
    """

    clips: Tensor
    grades: Mapping[str, Tensor]
    psnr: Tensor
    ssim: Tensor
    density: float
    recall: float
    seconds: float | None
    attention_gflop: float


def attention_gflop(host: Host, config: BladeConfig | None, *, density: float, evaluations: list[int]) -> float:
    """Floating-point operations of self-attention for one clip in 10^9, a multiply-add counted as two.

    Args:
        host: gives tokens, heads and layers.
        config: None for dense; otherwise the prober's sampled logits are added where it runs.
        density: query-key pairs computed over all pairs, mean over the evaluations.
        evaluations: of the network at each step.
    """
    cfg = host.config
    width = cfg.heads * cfg.head_dim
    pairs = 4 * cfg.tokens**2 * width * density  # q k^T and p v
    total = pairs * cfg.layers * sum(evaluations)
    if config is not None and config.mask in ("adaptive", "pyramid"):
        sampled = -(-cfg.tokens // config.block) * config.samples
        total += 2 * sampled**2 * width * cfg.layers * sum(evaluations[config.dense_steps :])
    return total / 1e9


def compare(
    host: Host,
    labels: Tensor,
    comparison: Comparison,
    *,
    batch: int = 16,
    stats_every: int = 4,
    quiet: bool = False,
) -> dict[str, Outcome]:
    """Sample the same prompts from the same noise with every variant, and log the density that each reached.

    Args:
        host: the trained tiny host; left as it was.
        labels: ``[N, 5]`` what to draw.
        comparison: density and settings.
        batch: clips sampled at once.
        stats_every: density and recall are measured on every so-many-th sparse step, beginning with the first; such a
            step is not timed.
        quiet: show no progress.

    Returns:
        Variant name to outcome, dense first.

    Raises:
        ValueError: the comparison leaves no step sparse, or ASA_G cannot keep to its density; nothing is sampled then.
    """
    steps = host.config.steps if comparison.steps is None else comparison.steps
    comparison.check_steps(steps)
    configs = comparison.configs(host.config.tokens)
    text = host.encode_labels(labels)
    noise = host.noise(len(labels), comparison.seed)
    host.sample(text[:batch], noise[:batch], steps=1)  # threads, allocator and libraries are warm for the first one
    outcomes: dict[str, Outcome] = {}
    dense: Tensor | None = None
    batches = -(-len(labels) // batch)
    with progress_bar(len(configs) * batches * steps, desc="sampling", quiet=quiet) as bar:
        for name, config in configs.items():
            bar.show(variant=name)
            with ExitStack() as stack:
                handle = None if config is None else stack.enter_context(attach(host.transformer, config))
                sampler = _Sampler(host, handle, steps, stats_every, bar.update)
                clips = torch.cat(
                    [sampler(text[i : i + batch], noise[i : i + batch]) for i in range(0, len(labels), batch)]
                )
            density, recall = sampler.stats()
            seconds = sampler.seconds()
            if config is not None:
                asked = 1 - (1 - comparison.density) * sampler.sparse_share
                log.info("%s: density %.4f, asked for %.4f", name, density, asked)
            dense = clips if dense is None else dense
            outcomes[name] = Outcome(
                clips=clips,
                grades={key: value.cpu() for key, value in grade(host.classifier, clips, labels).items()},
                psnr=psnr(clips, dense),
                ssim=ssim(clips, dense),
                density=density,
                recall=recall,
                seconds=None if seconds is None else seconds / len(labels),
                attention_gflop=attention_gflop(
                    host, config, density=density, evaluations=host.evaluations(steps=steps)
                ),
            )
    return outcomes


def write_rows(run: Any, outcomes: Mapping[str, Outcome]) -> None:
    """Add the outcomes to a run, a row per variant and metric.

    Means over clips carry their standard deviation as ``spread`` and their 95 % bootstrap interval as ``interval``.
    """
    for variant, outcome in outcomes.items():
        write_mean(run, "psnr", outcome.psnr, unit="dB", variant=variant)
        write_mean(run, "ssim", outcome.ssim, variant=variant)
        write_grades(run, outcome.grades, variant=variant)
        count = len(outcome.psnr)
        run.row("recall", outcome.recall, better="higher", variant=variant)
        run.row("density", outcome.density, better="lower", variant=variant)
        if outcome.seconds is not None:
            run.row("seconds", outcome.seconds, unit="s", better="lower", n=count, variant=variant)
        run.row("attention_gflop", outcome.attention_gflop, unit="GFLOP", better="lower", variant=variant)


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Compare the variants on random prompts, write the rows and draw them; or make VBench's videos.

    Args:
        cfg: how many prompts, at which density.
        run: the run, entered.

    Raises:
        CheckpointError: there is no such host.
        ValueError: the comparison does not fit the host; nothing has been sampled then.
    """
    if cfg.protocol == "vbench":
        suite = find_suite(cfg.vbench, limit=cfg.prompts)
        render(find_inputs(cfg.videos(suite.expanded)), run, suite.targets(run))
        grade_videos(cfg.vbench, suite, run)
        return EvalReport.of(run)
    run.processes.alone("eval of the clips")
    host = load_host(resolve_device(run.device), path=cfg.host)
    # not the seed of the noise, and not one that training or its gate uses
    labels = random_labels(cfg.prompts or 64, torch.Generator().manual_seed(cfg.comparison.seed + 1000))
    outcomes = compare(
        host,
        labels,
        cfg.comparison,
        batch=cfg.batch,
        stats_every=cfg.stats_every,
        quiet=run.quiet,
    )
    write_rows(run, outcomes)
    plots.accuracy_chart({"rows": [asdict(row) for row in run.rows]}, run.figures / "accuracy.png")
    return EvalReport.of(run)


def means(run: Any) -> tuple[dict[str, dict[str, float]], int]:
    """Return variant -> metric -> value of a run's rows that are of no split, and the number of clips per variant.

    The ends of an interval are there as ``<metric>_low`` and ``<metric>_high``.
    """
    variants: dict[str, dict[str, float]] = {}
    for row in run.rows:
        if row.split:
            continue
        values = variants.setdefault(row.variant, {})
        values[row.metric] = row.value
        if row.interval is not None:
            values[f"{row.metric}_low"], values[f"{row.metric}_high"] = row.interval
    return variants, next(row.n for row in run.rows if row.metric == "accuracy")


def comparison_table(variants: Mapping[str, Mapping[str, float]], clips: int, *, intervals: bool = False) -> str:
    """Lay out metrics by variant as a table of text, with a line on what it does not show.

    Args:
        variants: name -> metric -> mean, as in ``DemoReport``.
        clips: per variant.
        intervals: show 95 % bootstrap intervals of the accuracies.
    """
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    def score(row: Mapping[str, float], metric: str) -> str:
        if not intervals:
            return f"{row[metric]:.0%}"
        return f"{row[metric]:.0%} ({row[f'{metric}_low']:.0%} to {row[f'{metric}_high']:.0%})"

    columns = ("PSNR dB", "SSIM", "recall", "density", "digit", "direction", "both", "s/clip", "attn GFLOP")
    table = Table(box=SIMPLE_HEAD, title=f"{clips} clips; PSNR and SSIM to dense", title_justify="left")
    table.add_column("attention", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in variants.items():
        same = name == "dense"
        table.add_row(
            VARIANTS[name],
            "-" if same else f"{row['psnr']:.1f}",
            "-" if same else f"{row['ssim']:.3f}",
            f"{row['recall']:.2f}",
            f"{row['density']:.3f}",
            score(row, "digit_accuracy"),
            score(row, "direction_accuracy"),
            score(row, "accuracy"),
            f"{row['seconds']:.2f}" if "seconds" in row else "-",
            f"{row['attention_gflop']:.1f}",
        )
    text = StringIO()
    Console(file=text, width=160, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    return "\n".join([*lines, *FOOTNOTE.splitlines()]) + "\n"


class _Sampler:
    """Samples batches; times the steps on which it does not measure.

    Args:
        host: what samples.
        handle: BLADE on it, or None for dense.
        steps: denoising steps.
        every: density and recall are measured on every so-many-th sparse step, beginning with the first.
        tick: called after each step.
    """

    def __init__(
        self, host: Host, handle: BladeHandle | None, steps: int, every: int, tick: Callable[[], None]
    ) -> None:
        self.host, self.handle, self.steps, self.tick = host, handle, steps, tick
        self.evaluations = host.evaluations(steps=steps)
        self.sparse_from = steps if handle is None else handle.config.dense_steps
        self.measured = set(range(self.sparse_from, steps, every))
        self.timings: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        self.records: list[list[LayerStats]] = []
        self.batches = 0

    @property
    def sparse_share(self) -> float:
        """Share of the evaluations that are sparse."""
        return sum(self.evaluations[self.sparse_from :]) / sum(self.evaluations)

    def __call__(self, text: Tensor, noise: Tensor) -> Tensor:
        self.batches += 1
        running = ExitStack()
        watch = Stopwatch(self.host.device)

        def end(step: int) -> None:
            running.close()
            if step >= 0:
                if step not in self.measured:
                    self.timings[step >= self.sparse_from].append((watch.seconds, self.evaluations[step]))
                self.tick()

        def begin(step: int, _: int) -> None:
            end(step - 1)
            if self.handle is not None:
                self.handle.begin_step(step)
                if step in self.measured:
                    self.records.append(running.enter_context(self.handle.record(recall=True)))
            running.enter_context(watch)

        with running:
            clips = self.host.sample(text, noise, steps=self.steps, on_step=begin)
            end(self.steps - 1)
        return clips.cpu()

    def seconds(self) -> float | None:
        """Time of all batches, an evaluation in a measured step taken to last as long as the other sparse ones.

        None if every sparse step was measured.
        """
        total = sum(spent for spent, _ in self.timings[False])
        if self.sparse_from == self.steps:
            return total
        timed = sum(count for _, count in self.timings[True])
        if not timed:
            return None
        measured = sum(self.evaluations[step] for step in self.measured) * self.batches
        return total + sum(spent for spent, _ in self.timings[True]) * (timed + measured) / timed

    def stats(self) -> tuple[float, float]:
        """Mean density (pooled keys included) and recall over steps, layers, heads and clips; 1 where all is dense."""
        if self.sparse_from == self.steps:
            return 1.0, 1.0
        rows = [row.stats for record in self.records for row in record]
        if not rows:
            raise ValueError(
                "no sparse attention ran in the measured steps: expected statistics of every layer, got none. Leave "
                "no layer and no sequence length dense"
            )
        density = torch.stack([stats.density.mean() + stats.pooled for stats in rows]).mean().item()
        recall = torch.stack([cast(Tensor, stats.recall).mean() for stats in rows]).mean().item()
        sparse = self.sparse_share
        return sparse * density + 1 - sparse, sparse * recall + 1 - sparse
