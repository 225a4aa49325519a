"""The paper's claims on tiny hosts of several seeds, reported whichever way they come out.

From the same weights and on the same rooms, one arm went on by pictures alone and one with PM-Loss of the exact points.

1. Beyond the given views, the arm with PM-Loss draws better pictures.
2. Between them it is no worse.
3. Fewer of its centres fly off the surfaces, and its depth is closer to the true one, at depth edges too.

The release frees the pixels' offsets together with the loss: with hosts of both kinds, the loss is judged with free
offsets too, and the freed offset by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hone_core.claims import ClaimsReport, decided, write_claims
from hone_core.config import to_dict
from hone_core.devices import resolve_device
from hone_core.hosts import HostFacts
from hone_core.runs import Run
from hone_core.statistics import bootstrap_interval
from torch import Tensor

from . import plots
from .config import ARMS, ReproduceConfig, TrainHostConfig
from .data import Scene, graded_rooms
from .grading import METRICS, grade
from .host import load_host, open_tiny

__all__ = ["RULES", "UNITS", "reproduce", "told"]

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
AT_ONCE = 4
"""Rooms that a host sees in one forward."""
Grades = dict[str, dict[str, Tensor]]
"""Arm to metric to values ``[rooms]``."""


def _facts(path: Path | None) -> HostFacts:
    facts = open_tiny(path).facts
    assert facts is not None
    return facts


def reproduce(cfg: ReproduceConfig, run: Run) -> ClaimsReport:
    """Grade both arms of every host, apply the rules, and write the verdict."""
    rooms = partial(_rooms, cfg, resolve_device(run.device), {})
    hosts, gains = [], []
    for number, path in enumerate(cfg.hosts or (None,)):
        found = {"": path} | ({"_free": cfg.free[number]} if cfg.free else {})
        grades: Grades = {}
        for suffix, file in found.items():
            grades |= _graded(cfg, run, file, f"host {number}", suffix, rooms)
            gains.append(_gain(cfg, run, file, grades, suffix))
        plots.differences(
            {variant: {metric: one[metric].numpy() for metric in plots.TITLES} for variant, one in grades.items()},
            run.figures / f"host-{number}.png",
            title=f"tiny host {number}, {cfg.rooms} rooms: each arm less pictures alone",
        )
        claims = {claim: decided(values.numpy()) for claim, values in _gaps(grades).items()}
        hosts.append({"name": f"host {number}", "path": str(path or "packaged"), "claims": claims})
    for number, file in enumerate(cfg.sweep):
        name = f"sweep {number}, {told(_facts(file))}"
        gains.append(_gain(cfg, run, file, _graded(cfg, run, file, name, "", rooms), ""))
    plots.gains(gains, run.figures / "gains.png", title=f"the arm with PM-Loss less pictures alone, {cfg.rooms} rooms")
    kinds = "bounded and free offsets" if cfg.free else "bounded offsets"
    heading = f"{len(hosts)} host(s) with {kinds}, {cfg.rooms} rooms each"
    return write_claims(run, heading, RULES, hosts, unit=UNITS, items=cfg.rooms)


def told(facts: HostFacts) -> str:
    """What a host's training has of its own, in words."""
    usual, own = to_dict(TrainHostConfig()), facts.train_config
    parts = [("offset", usual["host"]["offset"], own.get("host", {}).get("offset", usual["host"]["offset"]))]
    parts += [(key, value, own.get("pm", {}).get(key, value)) for key, value in usual["pm"].items()]
    parts += [(key, usual[key], own.get(key, usual[key])) for key in ("teacher_noise", "teacher_blur")]
    words = [f"{key.replace('_', ' ')} {value}" for key, default, value in parts if value != default]
    return ", ".join(words) or "as in the paper"


def _rooms(cfg: ReproduceConfig, device: torch.device, drawn: dict[int, list[Scene]], size: int) -> list[Scene]:
    """The rooms, which are the same for all hosts of a size; ``drawn`` keeps them."""
    if size not in drawn:
        first = FIRST_ROOM * (cfg.seed + 1)
        seeds = range(first, first + cfg.rooms)
        drawn[size] = [
            graded_rooms(seeds[begin : begin + AT_ONCE], cfg.targets, size, device=device)
            for begin in range(0, cfg.rooms, AT_ONCE)
        ]
    return drawn[size]


def _graded(
    cfg: ReproduceConfig, run: Run, path: Path | None, name: str, suffix: str, rooms: Callable[[int], list[Scene]]
) -> Grades:
    """Grades of both arms of a host, each under its name and the suffix; writes a row of each mean."""
    stored = open_tiny(path)
    facts = _facts(path)
    labels: dict[str, str | int | float] = {"seed": facts.seed, "sha256": stored.sha256}
    run.row("steps", facts.steps, better="none", n=1, variant=told(facts), split=name, labels=labels)
    scenes = rooms(stored.config.size)
    device = scenes[0].distance.device
    found: Grades = {}
    for arm in ARMS:
        found[arm + suffix] = grade(load_host(arm, path=path, device=device).host, scenes)
        for metric, (unit, better) in METRICS.items():
            values = found[arm + suffix][metric].numpy()
            run.row(
                metric,
                float(values.mean()),
                unit=unit,
                better=better,
                n=cfg.rooms,
                interval=bootstrap_interval(values),
                variant=arm + suffix,
                split=name,
                labels={"seed": facts.seed},
            )
    return found


def _gain(cfg: ReproduceConfig, run: Run, path: Path | None, grades: Grades, suffix: str) -> plots.Gain:
    """Write, metric by metric, what the arm with the loss has more than the other; room by room the two are paired."""
    facts = _facts(path)
    gain: plots.Gain = (told(facts), {})
    for metric, (unit, _) in METRICS.items():
        values = (grades["pm" + suffix][metric] - grades["photometric" + suffix][metric]).numpy()
        mean, interval = float(values.mean()), bootstrap_interval(values)
        labels = {"of": metric}
        run.row(
            "gain", mean, unit=unit, better="none", n=cfg.rooms, interval=interval, variant=told(facts),
            split=f"seed {facts.seed}", labels=labels,
        )  # fmt: skip
        if metric in plots.TITLES:
            gain[1][metric] = (mean, interval)
    return gain


def _gaps(found: Grades) -> dict[str, Tensor]:
    """Claim to its difference ``[rooms]``."""

    def over(metric: str, better: str, worse: str) -> Tensor:
        return found[better][metric] - found[worse][metric]

    gaps = {
        "beyond": over("psnr_beyond", "pm", "photometric"),
        "between": over("psnr_between", "pm", "photometric") + MARGIN,
        "flying": over("flying", "photometric", "pm"),
        "depth": over("depth_abs_rel", "photometric", "pm"),
        "depth at edges": over("depth_at_edges", "photometric", "pm"),
    }
    if "pm_free" in found:
        gaps |= {
            "beyond, free": over("psnr_beyond", "pm_free", "photometric_free"),
            "flying, free": over("flying", "photometric_free", "pm_free"),
            "offset alone": over("psnr_beyond", "photometric_free", "photometric"),
            "as released": over("psnr_beyond", "pm_free", "photometric"),
        }
    return gaps
