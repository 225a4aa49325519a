"""Does rewarding sparsity make a model sparser? Trainings of tiny hosts that differ in one thing each.

Every arm starts from the same dense host and takes the same steps on the same mosaics. Rules were fixed beforehand, and
the answer is reported whichever way it comes out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hone_core.claims import SEEDS, VerdictReport, verdict_over_seeds
from hone_core.devices import resolve_device
from hone_core.hosts import read_facts
from hone_core.io import atomic_write_json, save_state
from hone_core.jobs import run_jobs
from hone_core.progress import progress_bar
from hone_core.runs import Run
from hone_core.statistics import bootstrap_interval
from hone_core.training import LogFile, Training

from . import plots
from .config import ArmConfig, ReinforceConfig, ReproduceConfig, SparseConfig
from .data import Mosaics
from .grading import ask, held_out, uniform_of
from .host import PACKAGE, PACKAGED, Host, build_host, load_host
from .models import attach
from .reinforce import Reinforcement
from .rollouts import HostTask

__all__ = ["ARMS", "PS", "RULES", "ReproduceReport", "judge", "matching_p", "reproduce", "trainings", "work"]

PS = (0.8, 0.94, 0.975)
"""Thresholds of every evaluation, beside the dense model."""
WIDE = (0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.96, 0.975)
"""Thresholds of the arms with a wide grid."""
SELECTION = SparseConfig(rows="all", compute="mask", cache="retrieve")

ARMS = {
    "untrained": "random weights",
    "pretrained": "dense training alone, which is ZipVL's use",
    "paper": "GRPO, the paper's reward",
    "correctness": "GRPO, correctness alone",
    "efficiency": "GRPO, efficiency alone, no gate",
    "sft": "cross-entropy under the sparse forward",
    "dense": "cross-entropy, dense",
    "entropy": "cross-entropy, dense, + 0.1 entropy of the column mass",
    "wide": "GRPO, the paper's reward, thresholds 0.6 .. 0.975",
    "budget-policy": "the threshold is an action, 0.6 .. 0.975",
    "soft-ratio": "GRPO on correctness + the support's size",
}
RULES = {
    "paper": "CONFIRMED: tau at p = 0.975 falls by at least 25 points from the pretrained host's, accuracy there by at "
    "most 1 point from its dense accuracy, and correctness alone keeps at least 10 points more. REFUTED: tau falls by "
    "less than 5 points, or correctness alone or sft comes within 2 points of the paper's tau",
    "equal ratio": "the paper's arm at p = 0.8 answers better than the pretrained host at the p that keeps as much",
    "equal ratio, wide": "the same of the arm with thresholds from 0.6",
    "learned budget": "learned thresholds answer better than the fixed one, in the same weights, that keeps as much",
    "soft-ratio": "tau at p = 0.975 falls by at least 25 points, accuracy by at most 1 point",
}
NEEDED = {
    "paper": ("paper", "correctness", "sft"),
    "equal ratio": ("paper",),
    "equal ratio, wide": ("wide",),
    "learned budget": ("budget-policy",),
    "soft-ratio": ("soft-ratio",),
}


@dataclass(frozen=True, kw_only=True)
class ReproduceReport(VerdictReport):
    """Verdicts; as text, with the numbers of every arm."""

    def __str__(self) -> str:
        values = {(row.metric, row.variant, row.split): row for row in self.rows}
        splits = list(dict.fromkeys(row.split for row in self.rows if row.metric == "accuracy"))
        lines = [f"accuracy / tokens kept, %, means over {len(self.verdict['seeds'])} host(s)"]
        widths = [max(16, len(split) + 2) for split in splits]

        def line(name: str, cells: Sequence[str]) -> str:
            return f"{name:<58.58}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

        lines.append(line("", splits))
        for arm, text in ARMS.items():
            cells = []
            for split in splits:
                right, tau = values.get(("accuracy", arm, split)), values.get(("token_ratio", arm, split))
                shown = "" if right is None or tau is None else f"{100 * right.value:.1f} / {100 * tau.value:.1f}"
                cells.append(shown)
            if any(cells):
                lines.append(line(f"{arm}: {text}", cells))
        uniform = [
            "" if row is None else f"{100 * row.value:.1f}"
            for row in (values.get(("uniform_ratio", "uniform attention", split)) for split in splits)
        ]
        lines.append(line("uniform attention", uniform))
        for claim, found in self.verdict["claims"].items():
            lines.append(f"{claim}: {found['verdict']} ({RULES[claim]})")
            lines += [f"  host {seed}: {text}" for seed, text in found["shown"].items()]
        lines += [f"note: {note}" for note in self.verdict["notes"]]
        return "\n".join([*lines, f"chart    {self.path / 'figures'}", f"results  {self.path / 'results.json'}"])


class Job(NamedTuple):
    """One arm from one host."""

    arm: str
    host: int

    def file(self, folder: Path) -> Path:
        """Where its results are."""
        return folder / f"{self.arm}-{self.host}.pt"


def _hosts(cfg: ReproduceConfig) -> list[Path]:
    return [*cfg.hosts] or [PACKAGED]


def trainings(cfg: ReproduceConfig) -> dict[str, ReinforceConfig]:
    """The arms that are trained, by name."""
    base = ReinforceConfig(prompts=cfg.prompts, lr=cfg.lr)
    supervised = replace(base, objective="supervised")
    one = replace(supervised, ps=(1.0,), group=1)
    found = {
        "paper": base,
        "correctness": replace(base, efficiency=0.0),
        "efficiency": replace(base, performance=0.0, gated=False),
        "sft": supervised,
        "dense": one,
        "entropy": replace(one, soft_weight=0.1, soft_log=True),
        "wide": replace(base, ps=WIDE),
        "budget-policy": replace(base, objective="budget-policy", ps=WIDE),
        "soft-ratio": replace(base, objective="soft-ratio", soft_weight=cfg.soft_weight),
    }
    return {name: arm for name, arm in found.items() if not cfg.arms or name in cfg.arms}


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Train what is not trained yet, evaluate, apply the rules, and write the verdict.

    A run that was cut off goes on with the arms that are missing, from the checkpoints of those that it was at.

    Raises:
        RuntimeError: A loss is not finite.
    """
    device, folder = str(resolve_device(run.device)), run.artifacts
    paths = _hosts(cfg)
    names = ["untrained", "pretrained", *trainings(cfg)]
    jobs = [Job(arm, host) for arm in names for host in range(len(paths))]
    left = [job for job in jobs if not job.file(folder).is_file()]
    with progress_bar(len(jobs), desc="arms", quiet=run.quiet) as bar:
        bar.update(len(jobs) - len(left))
        # The longest are the last arms: they go first.
        for _ in run_jobs(partial(work, cfg, folder), left[::-1], workers=cfg.workers, device=device):
            bar.update()
    found = {job: torch.load(job.file(folder), weights_only=True) for job in jobs}
    seeds = [read_facts(path, PACKAGE).seed for path in paths]
    _write_rows(run, names, found, seeds, load_host(path=paths[0]))
    claims = {}
    for claim, arms in NEEDED.items():
        if not set(arms) <= set(names):
            continue
        judged = [
            judge(claim, {arm: found[Job(arm, host)] for arm in ("pretrained", *arms)}) for host in range(len(paths))
        ]
        claims[claim] = {
            "verdict": verdict_over_seeds([holds for holds, _ in judged]),
            "shown": {str(seed): f"{holds}, {text}" for seed, (holds, text) in zip(seeds, judged, strict=True)},
        }
    notes = [] if len(seeds) >= SEEDS else [f"{len(seeds)} host(s); a verdict wants {SEEDS} seeds"]
    notes.append("toy scale, answers of two or three tokens: a warning, no refutation of the paper at its own scale")
    verdict = {"seeds": seeds, "steps": cfg.steps, "items": cfg.items, "rules": RULES, "claims": claims, "notes": notes}
    atomic_write_json(run.artifacts / "verdict.json", verdict)
    plots.arms_chart(run.rows, run.figures / "arms.png")
    return ReproduceReport.of(run)


def work(cfg: ReproduceConfig, folder: Path, job: Job, device: str) -> None:
    """Train one arm from one host, evaluate it, and write its file."""
    path = _hosts(cfg)[job.host]
    original = load_host(device, path=path)
    host = load_host(device, path=path)
    asked = held_out(host, cfg.items, cfg.seed)
    task = budget = None
    if job.arm == "untrained":
        host = build_host(host.config, seed=read_facts(path, PACKAGE).seed)
        host.model.to(device)
    elif job.arm != "pretrained":
        task = HostTask(host, original, seed=cfg.seed)
        original.model.requires_grad_(False)
        arm = ArmConfig(
            reinforce=trainings(cfg)[job.arm],
            sparse=SELECTION,
            host=hashlib.sha256(path.read_bytes()).hexdigest(),
            seed=cfg.seed,
            steps=cfg.steps,
        )
        with attach(host.model, SELECTION) as handle:
            loop = Reinforcement(arm.reinforce, task, handle, seed=cfg.seed)
            training = Training(arm, folder / f"{job.arm}-{job.host}.checkpoint", loop.parts)
            training.resume()
            training.follow(loop.loop(training), LogFile(folder / f"{job.arm}-{job.host}.jsonl"))
        budget = loop.budget
    found = {"dense": ask(host, asked, None, batch=cfg.batch)}
    for p in PS:
        found[f"p {p:g}"] = ask(host, asked, replace(SELECTION, p=p), batch=cfg.batch)
    if job.arm in ("paper", "wide"):
        p = matching_p(original, asked, found["p 0.8"].tau, batch=cfg.batch)
        found["pretrained as p 0.8"] = ask(original, asked, replace(SELECTION, p=p), batch=cfg.batch)
    if budget is not None and task is not None:
        chosen = torch.cat(
            [
                budget.best(task.features(asked.part(slice(at, at + cfg.batch))))
                for at in range(0, len(asked), cfg.batch)
            ]
        )
        found["learned"] = ask(host, asked, SELECTION, batch=cfg.batch, p=chosen)
        p = matching_p(host, asked, found["learned"].tau, batch=cfg.batch)
        found["fixed as learned"] = ask(host, asked, replace(SELECTION, p=p), batch=cfg.batch)
    save_state({name: {"right": o.right.cpu(), "ratio": o.ratio.cpu()} for name, o in found.items()}, job.file(folder))
    (folder / f"{job.arm}-{job.host}.checkpoint").unlink(missing_ok=True)


def matching_p(host: Host, asked: Mosaics, tau: float, *, batch: int, tolerance: float = 1e-3) -> float:
    """The threshold, by bisection, at which a host keeps this much; no answer is looked at.

    Args:
        host: Whose attention.
        asked: Prompts.
        tau: Wanted mean ratio.
        batch: Prompts at a time.
        tolerance: Of the ratio.
    """
    low, high = 0.0, 1.0
    for _ in range(16):
        p = (low + high) / 2
        kept = _mean_ratio(host, asked, p, batch)
        if abs(kept - tau) <= tolerance:
            return p
        low, high = (p, high) if kept < tau else (low, p)
    return (low + high) / 2


@torch.no_grad()
def _mean_ratio(host: Host, asked: Mosaics, p: float, batch: int) -> float:
    kept = []
    with attach(host.model, replace(SELECTION, p=p)) as handle:
        for at in range(0, len(asked), batch):
            part = asked.part(slice(at, at + batch))
            with handle.using(protected=host.protected(len(part))):
                host.model(**host.embedded(part), use_cache=False, logits_to_keep=1)
            assert handle.stats is not None, "a forward was run"
            kept.append(handle.stats.ratio)
    return float(torch.cat(kept).mean())


# What came out.

_Found = Mapping[str, Mapping[str, torch.Tensor]]


def judge(claim: str, found: Mapping[str, _Found]) -> tuple[str, str]:
    """What one host says to a claim: "yes", "no" or "undecided", and the numbers. The rules are ``RULES``.

    Args:
        claim: A key of ``RULES``.
        found: Results of the arms that it needs, and of "pretrained".
    """

    def tau(arm: str) -> float:
        return 100 * float(found[arm]["p 0.975"]["ratio"].mean())

    def right(arm: str, at: str) -> np.ndarray:
        return 100 * found[arm][at]["right"].numpy().astype(float)

    pairs = {
        "equal ratio": ("paper", "p 0.8", "pretrained as p 0.8"),
        "equal ratio, wide": ("wide", "p 0.8", "pretrained as p 0.8"),
        "learned budget": ("budget-policy", "learned", "fixed as learned"),
    }
    if claim in pairs:
        arm, first, second = pairs[claim]
        gaps = right(arm, first) - right(arm, second)
        low, high = bootstrap_interval(gaps)
        kept = [100 * float(found[arm][at]["ratio"].mean()) for at in (first, second)]
        holds = "yes" if low > 0 else "no" if high <= 0 else "undecided"
        return holds, (
            f"{right(arm, first).mean():.1f} % at tau {kept[0]:.1f}, "
            f"{right(arm, second).mean():.1f} % at {kept[1]:.1f}: "
            f"{gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}] points"
        )
    fall = tau("pretrained") - tau(claim)
    loss = float(right("pretrained", "dense").mean() - right(claim, "p 0.975").mean())
    text = f"tau {tau('pretrained'):.1f} -> {tau(claim):.1f}, accuracy {-loss:+.2f} points from dense"
    if claim == "soft-ratio":
        return ("yes" if fall >= 25 and loss <= 1 else "no"), text
    more = {arm: tau(arm) - tau(claim) for arm in ("correctness", "sft")}
    text += f"; correctness keeps {more['correctness']:+.1f}, sft {more['sft']:+.1f} points"
    if fall < 5 or min(more.values()) <= 2:
        return "no", text
    return ("yes" if fall >= 25 and loss <= 1 and more["correctness"] >= 10 else "undecided"), text


def _write_rows(run: Run, names: Sequence[str], found: Mapping[Job, _Found], seeds: Sequence[int], host: Host) -> None:
    """Means over hosts, and what each host found; intervals are over questions, which all share, spreads over hosts."""
    hosts = len(seeds)
    for arm in names:
        for split in found[Job(arm, 0)]:
            right = np.stack([found[Job(arm, at)][split]["right"].numpy() for at in range(hosts)]).astype(float)
            ratio = np.stack([found[Job(arm, at)][split]["ratio"].numpy() for at in range(hosts)]).astype(float)
            for metric, values, better in (("accuracy", right, "higher"), ("token_ratio", ratio, "lower")):
                run.row(
                    metric,
                    values.mean(),
                    better=better,  # type: ignore[arg-type]
                    n=values.size,
                    spread=values.mean(1).std(ddof=1) if hosts > 1 else None,
                    interval=bootstrap_interval(values.mean(0)),
                    variant=arm,
                    split=split,
                )
                for seed, own in zip(seeds, values, strict=True):
                    run.row(
                        f"host_{metric}",
                        own.mean(),
                        better=better,  # type: ignore[arg-type]
                        n=own.size,
                        interval=bootstrap_interval(own),
                        variant=arm,
                        split=split,
                        labels={"seed": seed},
                    )
    for p in PS:
        uniform = uniform_of(host, replace(SELECTION, p=p))
        assert uniform is not None, "all rows are looked at"
        run.row("uniform_ratio", uniform, better="none", variant="uniform attention", split=f"p {p:g}")
