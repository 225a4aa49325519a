"""Clips of the same prompts and noise with every variant: how far from dense, and whether they show what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.plots import BLUE, GREEN, GREY, PINK, RED
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch
from hone_video.clips import random_labels
from hone_video.grader import grade
from hone_video.host import Host, load_host
from hone_video.means import write_grades, write_mean
from hone_video.quality import psnr, ssim
from hone_video.vbench import describe_grades, find_suite, grade_videos
from torch import Tensor

from . import host as tuned_host
from .config import PRESETS, EvalConfig, FPSAttentionConfig
from .models import attach
from .sample import render
from .schedule import step_regimes
from .windows import density

__all__ = [
    "LOOKS",
    "VARIANTS",
    "EvalReport",
    "Outcome",
    "Variant",
    "compare",
    "evaluate",
    "load_variants",
    "write_rows",
]

VARIANTS = {
    "dense": "dense",
    "e4m3": "E4M3 only",
    "window": "window only",
    "both": "E4M3 and window, training-free",
    "trained": "E4M3 and window, trained",
}
"""Name -> what it is."""

LOOKS = dict(zip(VARIANTS, zip(("dense", "E4M3", "window", "both", "both, trained"),
                               (GREY, GREEN, RED, PINK, BLUE), strict=True), strict=True))  # fmt: skip
"""Title and colour of each variant's column."""


@dataclass(frozen=True)
class Variant:
    """A host, and what is attached to it (None: nothing)."""

    host: Host
    attention: FPSAttentionConfig | None


@dataclass(frozen=True)
class Outcome:
    """One variant's clips and what they are worth; vectors are per clip.

    Attributes:
        clips: ``[N, 3, F, H, W]`` in [0, 1], on the CPU.
        grades: Name -> ``[N]``, see ``hone_video.grader.grade``.
        psnr: ``[N]`` dB to the dense clips.
        ssim: ``[N]`` to the dense clips.
        density: Query-key pairs read over all pairs, mean over the network's evaluations.
        seconds: Sampling time of a clip.
    """

    clips: Tensor
    grades: Mapping[str, Tensor]
    psnr: Tensor
    ssim: Tensor
    density: float
    seconds: float


def load_variants(
    device: torch.device, *, host: Path | None, tuned: Path | None, preset: str | None
) -> dict[str, Variant]:
    """The variants that there are weights for, dense first.

    Args:
        device: Where to put them.
        host: The dense host; the packaged one if None.
        tuned: The trained one; if None the packaged one, which was trained from the packaged dense host for its own
            attention, so that with another ``host`` or a ``preset`` there is none.
        preset: Attention without a trained host; None for ``tiny``.

    Raises:
        CheckpointError: A host is missing or of another package.
    """
    dense, attention = load_host(device, path=host), PRESETS[preset or "tiny"].config
    trained = None
    if tuned is not None or (host is None and preset is None):
        trained = tuned_host.load_host(device, path=tuned)
        attention = trained.attention
    variants = {"dense": Variant(dense, None)}
    variants |= {name: Variant(dense, config) for name, config in attention.parts().items()}
    return variants if trained is None else variants | {"trained": Variant(trained, attention)}


def compare(
    variants: Mapping[str, Variant],
    labels: Tensor,
    *,
    steps: int | None = None,
    batch: int = 16,
    seed: int = 0,
    reference: Tensor | None = None,
    quiet: bool = False,
) -> dict[str, Outcome]:
    """Sample the same prompts from the same noise with every variant.

    Args:
        variants: Dense first, unless ``reference`` is given.
        labels: ``[N, 5]`` what to draw.
        steps: Denoising steps; the host's own if None.
        batch: Clips sampled at once.
        seed: Of the noise.
        reference: ``[N, 3, F, H, W]`` dense clips, if they are there.
        quiet: Show no progress.
    """
    outcomes: dict[str, Outcome] = {}
    parts = range(0, len(labels), batch)
    first = next(iter(variants.values())).host
    total = len(variants) * len(parts) * (steps or first.config.steps)
    with progress_bar(total, desc="sampling", quiet=quiet) as bar:
        for name, variant in variants.items():
            bar.show(variant=name)
            host, attention = variant.host, variant.attention
            text, noise = host.encode_labels(labels), host.noise(len(labels), seed)
            with nullcontext() if attention is None else attach(host.transformer, attention):
                host.sample(text[:batch], noise[:batch], steps=1)  # threads, allocator and plans are warm
                with Stopwatch(host.device) as watch:
                    made = [
                        host.sample(
                            text[at : at + batch], noise[at : at + batch], steps=steps,
                            on_step=lambda *_: bar.update(),
                        )
                        for at in parts
                    ]  # fmt: skip
            clips = torch.cat(made).cpu()
            reference = clips if reference is None else reference
            outcomes[name] = Outcome(
                clips=clips,
                grades={key: value.cpu() for key, value in grade(host.classifier, clips, labels).items()},
                psnr=psnr(clips, reference),
                ssim=ssim(clips, reference),
                density=mean_density(host, attention, steps),
                seconds=watch.seconds / len(labels),
            )
    return outcomes


def mean_density(host: Host, attention: FPSAttentionConfig | None, steps: int | None = None) -> float:
    """Query-key pairs read over all pairs, mean over the evaluations of a clip."""
    if attention is None:
        return 1.0
    counts = host.evaluations(steps=steps)
    found = [
        density(host.config.grid, attention.tile, attention.regimes[i].window, border=attention.border).tokens
        for i in step_regimes(attention, len(counts))
    ]
    return sum(share * count for share, count in zip(found, counts, strict=True)) / sum(counts)


def write_rows(run: Run, outcomes: Mapping[str, Outcome], *, seconds: bool = True) -> None:
    """Add the outcomes to a run, a row per variant and metric; means carry their 95 % bootstrap interval."""
    for variant, outcome in outcomes.items():
        write_mean(run, "psnr", outcome.psnr, unit="dB", variant=variant)
        write_mean(run, "ssim", outcome.ssim, variant=variant)
        write_grades(run, outcome.grades, variant=variant)
        run.row("density", outcome.density, better="lower", variant=variant)
        if seconds:
            n = len(outcome.psnr)
            run.row("seconds", outcome.seconds, unit="s", better="lower", n=n, variant=variant)


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Result of a comparison; as text, a table."""

    def __str__(self) -> str:
        if not any(row.metric == "accuracy" for row in self.rows):
            return describe_grades(self.rows, self.path)
        cells: dict[str, dict[str, float]] = {}
        bounds: dict[str, tuple[float, float]] = {}
        for row in self.rows:
            cells.setdefault(row.variant, {})[row.metric] = row.value
            if row.metric == "accuracy" and row.interval is not None:
                bounds[row.variant] = row.interval
        count = next(row.n for row in self.rows if row.metric == "accuracy")
        lines = [f"{count} clips; PSNR and SSIM to dense; 95 % intervals"]
        lines.append(f"{'attention':<31} {'digit and direction':>19}  digit  PSNR  SSIM  density  s/clip")
        for name, found in cells.items():
            low, high = bounds[name]
            same = name == "dense"
            likeness = "   -     - " if same else f"{found['psnr']:5.1f} {found['ssim']:5.2f}"
            right = f"{found['accuracy']:.0%} ({low:.0%} to {high:.0%})"
            lines.append(
                f"{VARIANTS.get(name, name):<31} {right:>19}  {found['digit_accuracy']:5.0%} {likeness}  "
                f"{found['density']:7.3f}  {found['seconds']:6.2f}"
            )
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Compare the variants on random prompts, and write the rows; or make VBench's videos, and have them graded.

    Args:
        cfg: How many prompts, which hosts, or which pipeline.
        run: The run, entered.

    Raises:
        CheckpointError: A host is missing or of another package, or there is no pipeline or list of prompts.
        ValueError: Of a pipeline, as ``hone_fpsattention.sample.generate``.
        RuntimeError: VBench could not grade.
    """
    if cfg.protocol == "vbench":
        suite = find_suite(cfg.vbench, limit=cfg.prompts)
        render(cfg.videos(suite.expanded), run, suite.targets(run))
        grade_videos(cfg.vbench, suite, run)
        return EvalReport.of(run)
    run.processes.alone("eval of the clips")
    variants = load_variants(resolve_device(run.device), host=cfg.host, tuned=cfg.tuned, preset=cfg.preset)
    # Not the seed of the noise, and not one that training or its gate uses.
    labels = random_labels(cfg.prompts or 64, torch.Generator().manual_seed(cfg.seed + 1000))
    outcomes = compare(variants, labels, steps=cfg.steps, batch=cfg.batch, seed=cfg.seed, quiet=run.quiet)
    write_rows(run, outcomes)
    return EvalReport.of(run)
