"""The paper's claims on tiny hosts of several seeds, reported whichever way they come out.

1. With many views, the host with ZPressor draws better pictures than the host that was trained on few views and is
   given all of them.
2. Fusion does better than its anchors alone, from training as long.
3. Quality holds as views are added: ZPressor at the most views is at most half a decibel below itself at few.

Beside them: farthest anchors against random ones, anchors by overlap, and a sweep over the number of anchors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hone_core.claims import ClaimsReport, decided, write_claims
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_core.statistics import bootstrap_interval

from . import plots
from .config import ReproduceConfig
from .data import graded_rooms
from .grading import Grades, grade, with_settings
from .host import load_host

__all__ = ["RULES", "reproduce"]

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
SWEEP_VIEWS = 24
Lines = dict[str, dict[int, tuple[float, tuple[float, float]]]]
"""Arm to views to PSNR and its interval."""


def reproduce(cfg: ReproduceConfig, run: Run) -> ClaimsReport:
    """Grade every arm of every host, apply the rules, and write the verdict."""
    device = resolve_device(run.device)
    panels: dict[str, Lines] = {}
    hosts = [_host(cfg, run, number, path, device, panels) for number, path in enumerate(cfg.hosts or (None,))]
    plots.curves(panels, run.figures / "views.png", title=f"views of {cfg.rooms} rooms that were not trained on")
    judged = " and ".join(map(str, cfg.judged))
    heading = f"{len(hosts)} host(s), {cfg.rooms} rooms each, judged at {judged} views"
    return write_claims(run, heading, RULES, hosts, unit=dict.fromkeys(RULES, "dB"), items=cfg.rooms)


def _host(
    cfg: ReproduceConfig, run: Run, number: int, path: Path | None, device: torch.device, panels: dict[str, Lines]
) -> dict[str, Any]:
    name = f"host {number}"
    arms = {arm: load_host(arm, path=path, device=device) for arm in ("host", "zpressor", "anchors")}
    size, plain = arms["host"].config.size, arms["zpressor"].config.zpressor
    seeds = range(1000 * cfg.seed + 1000, 1000 * cfg.seed + 1000 + cfg.rooms)
    lines: Lines = {}
    panels[name] = lines
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
                "overlap": ("zpressor", {"selection": "overlap"}),
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

    def over(first: str, second: str) -> torch.Tensor:
        return torch.stack([psnr[first, views] - psnr[second, views] for views in cfg.judged]).mean(0)

    above = min(views for views in cfg.views if views > plain.anchors)
    gaps = {
        "host": over("zpressor", "host"),
        "anchors": over("zpressor", "anchors"),
        "farthest": over("zpressor", "random"),
    }
    if max(cfg.judged) > above:  # else it would be held against itself
        gaps["held"] = psnr["zpressor", max(cfg.judged)] - psnr["zpressor", above] + MARGIN
    claims = {claim: decided(values.numpy()) for claim, values in gaps.items()}
    return {"name": name, "path": str(path or "packaged"), "claims": claims}
