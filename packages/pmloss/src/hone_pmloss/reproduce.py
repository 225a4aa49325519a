"""The paper's claims on tiny hosts of several seeds, reported whichever way they come out.

From the same weights and on the same rooms, one arm went on by pictures alone and one with PM-Loss of the exact points.

1. Beyond the given views, the arm with PM-Loss draws better pictures.
2. Between them it is no worse.
3. Fewer of its centres fly off the surfaces, and its depth is closer to the true one, at depth edges too.

The release frees the pixels' offsets together with the loss: with hosts of both kinds, the loss is judged with free
offsets too, and the freed offset by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hone_core.claims import ClaimsReport, decided, write_claims
from hone_core.devices import resolve_device
from hone_core.hosts import packaged_host
from hone_core.runs import Run
from hone_core.statistics import bootstrap_interval
from torch import Tensor

from . import plots
from .config import ARMS, ReproduceConfig
from .data import graded_rooms
from .grading import METRICS, grade
from .host import PACKAGE, load_host, open_tiny

__all__ = ["RULES", "UNITS", "prepare", "reproduce"]

MARGIN = 0.25
"""Decibels between the given views within which a picture counts as no worse; set before any host was judged."""
RULES = {
    "beyond": "PSNR beyond the given views, with PM-Loss above pictures alone",
    "between": f"PSNR between them, with PM-Loss at most {MARGIN:g} dB below pictures alone",
    "flying": "share of flying centres, pictures alone above PM-Loss",
    "depth": "relative error of depth, pictures alone above PM-Loss",
    "depth at edges": "the same within two pixels of depth edges",
    "beyond, free": "as beyond, with free offsets in both arms",
    "flying, free": "as flying, with free offsets in both arms",
    "offset alone": "PSNR beyond the given views by pictures alone, free offsets above bounded ones",
    "as released": "PSNR beyond the given views, PM-Loss with free offsets above pictures alone with bounded ones",
}
"""Each is a difference that must be above zero; so decides its 95 % interval over rooms."""
UNITS = {name: "" if name.startswith(("flying", "depth")) else "dB" for name in RULES}
FIRST_ROOM = 1000
"""Rooms below are those that train-host grades."""


def prepare(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look whether every host is there, of its kind, and has passed its gates.

    Raises:
        CheckpointError: One is missing.
        ValueError: One has not passed: what it does says nothing. Or its offsets are not what its flag says.
    """
    cfg = replace(
        cfg, hosts=tuple(path.resolve() for path in cfg.hosts), free=tuple(path.resolve() for path in cfg.free)
    )
    kinds = [(path, "bounded") for path in cfg.hosts or (packaged_host(PACKAGE),)]
    for path, offset in [*kinds, *((path, "unconstrained") for path in cfg.free)]:
        stored = open_tiny(path)
        if stored.facts is None or not stored.facts.passed:
            raise ValueError(f"{path} misses its gates ({stored.facts and stored.facts.result}); train it longer")
        if stored.config.offset != offset:
            raise ValueError(
                f"{path} has {stored.config.offset} offsets; expected {offset} ones, see --hosts and --free"
            )
    return cfg


def reproduce(cfg: ReproduceConfig, run: Run) -> ClaimsReport:
    """Grade both arms of every host, apply the rules, and write the verdict."""
    device = resolve_device(run.device)
    hosts = []
    for number, path in enumerate(cfg.hosts or (None,)):
        free = cfg.free[number] if cfg.free else None
        hosts.append(_host(cfg, run, f"host {number}", path, free, device))
    kinds = "bounded and free offsets" if cfg.free else "bounded offsets"
    heading = f"{len(hosts)} host(s) with {kinds}, {cfg.rooms} rooms each"
    return write_claims(run, heading, RULES, hosts, unit=UNITS, items=cfg.rooms)


def _host(
    cfg: ReproduceConfig, run: Run, name: str, path: Path | None, free: Path | None, device: torch.device
) -> dict[str, Any]:
    files = {"": path} | ({"_free": free} if free else {})
    found: dict[str, dict[str, Tensor]] = {}
    size = open_tiny(path).config.size
    first = FIRST_ROOM * (cfg.seed + 1)
    scenes = [graded_rooms([first + room], cfg.targets, size, device=device) for room in range(cfg.rooms)]
    for suffix, file in files.items():
        for arm in ARMS:
            variant = arm + suffix
            found[variant] = grade(load_host(arm, path=file, device=device).host, scenes)
            for metric, (unit, better) in METRICS.items():
                values = found[variant][metric].numpy()
                run.row(
                    metric,
                    float(values.mean()),
                    unit=unit,
                    better=better,
                    n=cfg.rooms,
                    interval=bootstrap_interval(values),
                    variant=variant,
                    split=name,
                )
    plots.differences(
        {variant: {metric: values.numpy() for metric, values in grades.items()} for variant, grades in found.items()},
        run.figures / f"{name.replace(' ', '-')}.png",
        title=f"tiny {name}, {cfg.rooms} rooms: each arm less pictures alone",
    )

    def over(metric: str, better: str, worse: str) -> Tensor:
        return found[better][metric] - found[worse][metric]

    gaps = {
        "beyond": over("psnr_beyond", "pm", "photometric"),
        "between": over("psnr_between", "pm", "photometric") + MARGIN,
        "flying": over("flying", "photometric", "pm"),
        "depth": over("depth_abs_rel", "photometric", "pm"),
        "depth at edges": over("depth_at_edges", "photometric", "pm"),
    }
    if free:
        gaps |= {
            "beyond, free": over("psnr_beyond", "pm_free", "photometric_free"),
            "flying, free": over("flying", "photometric_free", "pm_free"),
            "offset alone": over("psnr_beyond", "photometric_free", "photometric"),
            "as released": over("psnr_beyond", "pm_free", "photometric"),
        }
    claims = {claim: decided(values.numpy()) for claim, values in gaps.items()}
    return {"name": name, "path": str(path or "packaged"), "free": str(free or ""), "claims": claims}
