"""The paper's claims on tiny hosts of several seeds, reported whichever way they come out.

1. With many views, the host with ZPressor draws better pictures than the host that was trained on few views and is
   given all of them.
2. Fusion does better than its anchors alone, from training as long.
3. Quality holds as views are added: ZPressor at the most views is at most half a decibel below itself at few.

Beside them: farthest anchors against random ones, and a sweep over the number of anchors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.hosts import packaged_host
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_core.statistics import bootstrap_interval

from . import plots
from .config import ReproduceConfig
from .data import graded_rooms
from .grading import Grades, grade, with_settings
from .host import PACKAGE, load_host, open_tiny

__all__ = ["RULES", "ReproduceReport", "decided", "prepare", "reproduce", "verdict_over_seeds"]

MARGIN = 0.5
"""Decibels within which quality counts as held; set before any host was judged."""
RULES = {
    "host": "PSNR of ZPressor above that of the host with all views, mean over the judged numbers of views",
    "anchors": "PSNR of ZPressor above that of its anchors alone, likewise",
    "held": f"PSNR of ZPressor at the most judged views at most {MARGIN:g} dB below that at the fewest views above its "
    "anchors",
    "farthest": "PSNR with the farthest cameras as anchors above that with random ones, likewise",
}
"""Each is a difference that must be above zero; so decides its 95 % interval over rooms."""
SEEDS = 3
SWEEP_VIEWS = 24


@dataclass(frozen=True, kw_only=True)
class ReproduceReport(Report):
    """Verdicts; as text, with their numbers.

    Attributes:
        verdict: Contents of ``artifacts/verdict.json``.
    """

    verdict: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> ReproduceReport:
        """Return the report of a finished run."""
        verdict = json.loads((run.artifacts / "verdict.json").read_text(encoding="utf-8"))
        return cls(path=run.path, rows=tuple(run.rows), verdict=verdict)

    def __str__(self) -> str:
        found = self.verdict
        lines = [f"{len(found['hosts'])} host(s), {found['rooms']} rooms each, judged at {found['judged']} views"]
        for claim, rule in RULES.items():
            lines.append(f"{claim}: {found['claims'][claim]} ({rule})")
            for host in found["hosts"]:
                numbers = host["claims"][claim]
                low, high = numbers["interval"]
                lines.append(f"  {host['name']}: {numbers['margin']:+.2f} [{low:+.2f}, {high:+.2f}] dB")
        return "\n".join([*lines, f"pictures {self.path / 'figures'}", f"results  {self.path / 'results.json'}"])


def prepare(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look whether every host is there and has passed its gates.

    Raises:
        CheckpointError: One is missing.
        ValueError: One has not: what it does says nothing.
    """
    cfg = replace(cfg, hosts=tuple(path.resolve() for path in cfg.hosts))
    for path in cfg.hosts or (packaged_host(PACKAGE),):
        facts = open_tiny(path).facts
        if facts is None or not facts.passed:
            raise ValueError(f"{path} misses its gates ({facts and facts.result}); train it longer")
    return cfg


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Grade every arm of every host, apply the rules, and write the verdict."""
    device = resolve_device(run.device)
    hosts = [_host(cfg, run, number, path, device) for number, path in enumerate(cfg.hosts or (None,))]
    claims = {claim: verdict_over_seeds([host["claims"][claim]["holds"] for host in hosts]) for claim in RULES}
    verdict = {"rooms": cfg.rooms, "judged": list(cfg.judged), "rules": RULES, "claims": claims, "hosts": hosts}
    atomic_write_json(run.artifacts / "verdict.json", verdict)
    return ReproduceReport.of(run)


def _host(cfg: ReproduceConfig, run: Run, number: int, path: Path | None, device: torch.device) -> dict[str, Any]:
    name = f"host {number}"
    arms = {arm: load_host(arm, path=path, device=device) for arm in ("host", "zpressor", "anchors")}
    size, plain = arms["host"].config.size, arms["zpressor"].config.zpressor
    seeds = range(1000 * cfg.seed + 1000, 1000 * cfg.seed + 1000 + cfg.rooms)
    lines: dict[str, dict[int, tuple[float, tuple[float, float]]]] = {}
    psnr: dict[tuple[str, int], torch.Tensor] = {}

    def record(variant: str, views: int, grades: Grades, anchors: int) -> None:
        labels = {"views": views, "anchors": anchors}
        for metric, unit, values in (("psnr", "dB", grades.psnr), ("ssim", "", grades.ssim)):
            run.row(
                metric,
                float(values.mean()),
                unit=unit,
                better="higher",
                n=cfg.rooms,
                interval=bootstrap_interval(values.numpy()),
                variant=variant,
                split=name,
                labels=labels,
            )

    for views in sorted({*cfg.views, *((SWEEP_VIEWS,) if cfg.anchor_counts else ())}):
        scenes = [graded_rooms([seed], views, cfg.targets, size, device=device) for seed in seeds]
        if views in cfg.views:
            variants: dict[str, tuple[str, dict[str, Any]]] = {
                "host": ("host", {}),
                "zpressor": ("zpressor", {}),
                "anchors": ("anchors", {}),
                "random": ("zpressor", {"selection": "random"}),
            }
            for variant, (arm, changes) in variants.items():
                if arm != "host":
                    with_settings(arms[arm], **{"selection": "distance", "anchors": plain.anchors} | changes)
                grades = grade(arms[arm], scenes)
                psnr[variant, views] = grades.psnr
                record(variant, views, grades, views if arm == "host" else min(views, plain.anchors))
                point = (float(grades.psnr.mean()), bootstrap_interval(grades.psnr.numpy()))
                lines.setdefault(variant, {})[views] = point
        if views == SWEEP_VIEWS:
            for anchors in cfg.anchor_counts:
                for arm in ("zpressor", "anchors"):
                    with_settings(arms[arm], selection="distance", anchors=anchors)
                    record(f"{arm}, sweep", views, grade(arms[arm], scenes), anchors)
    plots.curve(lines, run.figures / f"views-{number}.png", title=f"tiny {name}, {cfg.rooms} rooms", across="views")

    def over(first: str, second: str) -> torch.Tensor:
        return torch.stack([psnr[first, views] - psnr[second, views] for views in cfg.judged]).mean(0)

    above = min(views for views in cfg.views if views > plain.anchors)
    gaps = {
        "host": over("zpressor", "host"),
        "anchors": over("zpressor", "anchors"),
        "held": psnr["zpressor", max(cfg.judged)] - psnr["zpressor", above] + MARGIN,
        "farthest": over("zpressor", "random"),
    }
    claims = {claim: decided(values) for claim, values in gaps.items()}
    for claim, numbers in claims.items():
        run.row(
            "margin",
            numbers["margin"],
            unit="dB",
            better="none",
            n=cfg.rooms,
            interval=(numbers["interval"][0], numbers["interval"][1]),
            variant=claim,
            split=name,
            labels={"holds": numbers["holds"]},
        )
    return {"name": name, "path": str(path or "packaged"), "claims": claims}


def decided(gaps: torch.Tensor) -> dict[str, Any]:
    """Mean of a difference per room, its 95 % interval, and what the interval says."""
    low, high = bootstrap_interval(gaps.numpy())
    holds = "yes" if low > 0 else "no" if high <= 0 else "undecided"
    return {"margin": float(gaps.mean()), "interval": [low, high], "holds": holds}


def verdict_over_seeds(holds: Sequence[str]) -> str:
    """Over the seeds: confirmed or refuted where there are enough of them and all say so."""
    counts = ", ".join(f"{word} on {holds.count(word)}" for word in ("yes", "no", "undecided") if word in holds)
    if len(holds) < SEEDS:
        return f"UNDECIDED, {len(holds)} of {SEEDS} seeds ({counts})"
    if len(set(holds)) == 1 and holds[0] != "undecided":
        return f"{'CONFIRMED' if holds[0] == 'yes' else 'REFUTED'} ({counts})"
    return f"{'MIXED' if {'yes', 'no'} <= set(holds) else 'UNDECIDED'} ({counts})"
