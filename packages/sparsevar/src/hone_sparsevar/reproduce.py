"""Claims about leaving low-frequency tokens out, each with a rule fixed beforehand, on tiny hosts and several seeds.

Source: the abstract's claims, made testable; C1 to C6 are ours to phrase. None of the paper's tables could be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hone_core.claims import VERDICTS, MarginsReport, verdict_over_margins
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.runs import Run

from . import plots
from .calibrate import chosen, mask_scores
from .config import VARIANTS, ReproduceConfig, SparseVARConfig
from .evaluate import compare, real_features, scenes, table, write_rows
from .host import SCHEDULE, load_host
from .models import variant_of

__all__ = ["CLAIMS", "NEEDED", "ReproduceReport", "answer", "reproduce"]

CLAIMS = {
    "C1 best block": "AUROC of the best block's map against known masks, less 0.8",
    "C1 blocks differ": "AUROC of the best block less the worst's, less 0.1",
    "C2 random": "Frechet distance of random masks less SparseVAR's",
    "C2 inverse": "Frechet distance of inverse masks less SparseVAR's",
    "C3 anchors": "Frechet distance without anchors, at as many tokens, less SparseVAR's",
    "C4 early stop, distance": "Frechet distance without the last scale, at about the same work, less SparseVAR's",
    "C4 early stop, texture": "distance to dense of the energy in textured parts, early stop's less SparseVAR's",
    "C5 distance score": "Frechet distance of FastVAR's score, at as many tokens, less SparseVAR's",
    "C6 objects": "objects read right in SparseVAR's images less those in dense ones, plus 0.02",
}
"""Each holds where its number is positive."""

NEEDED = ("C2 random", "C4 early stop, distance", "C6 objects")
"""What together says that low-frequency tokens can go: rather than others, rather than a scale, and without loss."""


def answer(verdicts: Mapping[str, str]) -> str:
    """Whether low-frequency tokens can go: yes where all of ``NEEDED`` are confirmed, no where one is refuted."""
    words = [verdicts[claim].split(",")[0] for claim in NEEDED]
    if "REFUTED" in words:
        return "NO, " + ", ".join(c for c, word in zip(NEEDED, words, strict=True) if word == "REFUTED")
    return "YES" if set(words) == {"CONFIRMED"} else "UNDECIDED"


class ReproduceReport(MarginsReport):
    """Result of ``reproduce``; as text, verdicts and the table of the first seed."""

    def __str__(self) -> str:
        margins = {row.variant: row for row in self.rows if row.metric == "margin_mean"}
        lines = [
            f"{self.verdicts[claim]:<22}{claim}: {rule}: {margins[claim].value:.4g} +- {margins[claim].spread or 0:.2g}"
            for claim, rule in CLAIMS.items()
        ]
        lines += [f"low-frequency tokens can go: {answer(self.verdicts)}"]
        first = next(row.split for row in self.rows if row.metric == "gflops")
        return "\n".join([*lines, "", table([row for row in self.rows if row.split == first]), f"results  {self.path}"])


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Draw every variant on every host and seed, and judge; a seed of a host that is done is not repeated.

    Raises:
        CheckpointError: There is no host.
    """
    margins: dict[str, list[float]] = {claim: [] for claim in CLAIMS}
    scale = SCHEDULE.resolve(cfg.settings.start_scale)
    for number, path in enumerate(cfg.hosts or (None,)):
        loaded: tuple[Any, SparseVARConfig] | None = None
        for seed in cfg.seeds:
            split, file = f"host {number}, seed {seed}", run.artifacts / f"host-{number}-seed-{seed}.json"
            if not file.is_file():
                if loaded is None:
                    host = load_host(resolve_device(run.device), path=path)
                    loaded = host, chosen(host, cfg.settings, min(cfg.limit, 128))
                own, settings = loaded
                _measure(own, settings, cfg, seed, run, split, scale, file)
            stored = json.loads(file.read_text(encoding="utf-8"))
            for row in stored["rows"]:
                run.row(**row)
            found = stored["margins"]
            for claim in CLAIMS:
                margins[claim].append(found[claim])
                run.row("margin", found[claim], better="higher", variant=claim, split=split)
    verdicts = {claim: verdict_over_margins(values) for claim, values in margins.items()}
    for claim, values in margins.items():
        spread = stdev(values) if len(values) > 1 else None
        said: dict[str, Any] = {"verdict": verdicts[claim]}
        run.row("margin_mean", mean(values), better="higher", n=len(values), spread=spread, variant=claim, labels=said)
    atomic_write_json(run.artifacts / VERDICTS, verdicts)
    first = next(row.split for row in run.rows if row.metric == "gflops")
    plots.frontier([row for row in run.rows if row.split == first], run.figures / "frontier.png")
    return ReproduceReport.of(run)


def _measure(
    host: Any, settings: SparseVARConfig, cfg: ReproduceConfig, seed: int, run: Run, split: str, scale: int, file: Path
) -> None:
    """Measure a seed of a host, and write its rows and margins."""
    found = _draw(host, settings, cfg, seed, run, split)
    blocks = mask_scores(host, min(cfg.limit, 256), scale, seed).nanmean(0).tolist()
    for block, value in enumerate(blocks):
        labels: dict[str, Any] = {"detector": int(block == settings.detector)}
        run.row("auroc", value, better="higher", variant=f"block {block}", split=split, labels=labels)
    found |= {"C1 best block": max(blocks) - 0.8, "C1 blocks differ": max(blocks) - min(blocks) - 0.1}
    rows = [asdict(row) for row in run.rows if row.split == split]
    atomic_write_json(file, {"rows": rows, "margins": found})


def _draw(
    host: Any, settings: SparseVARConfig, cfg: ReproduceConfig, seed: int, run: Run, split: str
) -> dict[str, float]:
    # Seeds do not share prompts or draws.
    labels, images = scenes(cfg.limit, 1000 * seed)
    policies = {name: variant_of(name, settings) for name in VARIANTS}
    policies |= {f"sparse {ratio:g}": variant_of("sparse", replace(settings, ratio=ratio)) for ratio in cfg.ratios}
    first = 1_000_000 * seed
    outcomes = compare(host, policies, labels, seed=first, batch=cfg.batch, quiet=run.quiet)
    # Dense again with other draws: how far apart two sets of its images are.
    again = compare(host, {"dense": policies["dense"]}, labels, seed=first + 500_000, batch=cfg.batch, quiet=run.quiet)
    outcomes["dense, other draws"] = again["dense"]
    write_rows(run, outcomes, real_features(host, images, cfg.batch), split=split)
    distance = {row.variant: row.value for row in run.rows if row.metric == "frechet" and row.split == split}
    energy = {name: float(outcome.grades["energy_textured"].mean()) for name, outcome in outcomes.items()}
    objects = {name: float(outcome.grades["objects"].mean()) for name, outcome in outcomes.items()}
    away = {name: abs(value - energy["dense"]) for name, value in energy.items()}
    stop = "early-stop-1"
    share = outcomes["sparse"].gflops / outcomes[stop].gflops
    run.row("work_over_early_stop", share, better="none", variant="sparse", split=split)
    return {
        "C2 random": distance["random"] - distance["sparse"],
        "C2 inverse": distance["inverse"] - distance["sparse"],
        "C3 anchors": distance["no-anchors"] - distance["sparse"],
        "C4 early stop, distance": distance[stop] - distance["sparse"],
        "C4 early stop, texture": away[stop] - away["sparse"],
        "C5 distance score": distance["distance"] - distance["sparse"],
        "C6 objects": objects["sparse"] - objects["dense"] + 0.02,
    }
