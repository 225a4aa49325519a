"""The claim on tiny hosts: training with attention masks against controls, equal tokens, several seeds.

All arms share the tokenizer and the evaluator of one host, and differ in what their training hides. Attention, random
and event masks hide as many tokens. The rules are fixed beforehand and ours to phrase.

Source: the ablation of masking strategies, where attention masks beat random ones by less than the printed intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from hone_core.claims import VERDICTS, MarginsReport, verdict_over_margins
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.jobs import run_jobs
from hone_core.progress import progress_bar
from hone_core.runs import Run
from hone_core.training import LogFile, Training, rate_at
from numpy.typing import NDArray
from torch import Tensor, nn

from .config import ArmConfig, ReproduceConfig
from .data import Clips, generated
from .features import recover
from .grading import draw_clips, embed, mask_overlap
from .grammar import right
from .host import Host, load_host
from .metrics import frechet
from .models import attach
from .train import seeded, transformer_loss

__all__ = ["CLAIMS", "Job", "ReproduceReport", "reproduce", "train_arm", "work"]

CLAIMS = {
    "C1 events, attention over random": "share of motions whose events are all right, attention's less random's",
    "C2 distance, attention under random": "Frechet distance, random's less attention's",
    "C3 masks find events": "recall of the attention masks on event cells, less the share of cells that they hide",
    "C4 events, attention over cosine": "share of motions whose events are all right, attention's less cosine's",
    "C5 known events over random": "share of motions whose events are all right, event masks' less random's",
}
"""Each holds where its number is positive. C3 and C5 are the stated mechanism: key frames and parts are hidden, and
that helps."""


class ReproduceReport(MarginsReport):
    """Result of ``reproduce``; as text, verdicts and the arms."""

    def __str__(self) -> str:
        margins = {row.variant: row for row in self.rows if row.metric == "margin_mean"}
        lines = [
            f"{found:<24}{claim}: {CLAIMS[claim]}: {margins[claim].value:.4g} +- {margins[claim].spread or 0:.2g}"
            for claim, found in self.verdicts.items()
        ]
        arms = list(dict.fromkeys(row.variant for row in self.rows if row.split.startswith("seed")))
        metrics = list(dict.fromkeys(row.metric for row in self.rows if row.split.startswith("seed")))
        lines += ["", f"{'arm':<12}" + "".join(f"{metric:>18}" for metric in metrics)]
        for arm in arms:
            cells = []
            for metric in metrics:
                values = [row.value for row in self.rows if (row.variant, row.metric) == (arm, metric)]
                cells.append(f"{mean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else ""))
            lines.append(f"{arm:<12}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def train_arm(
    host: Host,
    cfg: ArmConfig,
    clips: Sequence[Clips],
    tokens: Sequence[Tensor],
    training: Training,
    gen: torch.Generator,
) -> Iterator[dict[str, float] | None]:
    """The loop of one arm; see ``hone_core.training.Training``."""
    optimizer = training.parts["optimizer"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    host.transformer.train()
    host.reader.train()
    training.start()
    while training.spent() < 1:
        kind = training.step % 2
        at = torch.randint(len(clips[kind]), (cfg.batch,), generator=gen, device=host.device)
        with seeded(host.device, cfg.seed, training.step):
            loss, _ = transformer_loss(host, clips[kind], tokens[kind], at, gen, drop=0.1, corrupt=cfg.settings.corrupt)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * rate_at(training.spent())
        optimizer.step()
        training.step += 1
        yield {"loss": loss.item()} if training.due() else None
    host.transformer.eval()
    host.reader.eval()


class Job(NamedTuple):
    """One training."""

    arm: str
    seed: int

    def file(self, folder: Path) -> Path:
        """Where its grades are."""
        return folder / f"{self.arm}-{self.seed}.json"


class Material(NamedTuple):
    """What all trainings share, on one device.

    Attributes:
        host: Whose tokenizer and evaluator they have.
        clips: To train on, without music and with it.
        tokens: Of the clips.
        held: Held-out clips, likewise.
        real: Vectors of the first held-out motions.
    """

    host: Host
    clips: list[Clips]
    tokens: list[Tensor]
    held: list[Clips]
    real: NDArray[np.floating]


# A process makes it once; what a training changes is its own.
@lru_cache(maxsize=1)
def _material(path: Path | None, clips: int, limit: int, device: torch.device) -> Material:
    host = load_host(device, path=path)
    made = [generated(clips // 2, 1, dance=dance, device=device) for dance in (False, True)]
    with torch.no_grad():
        tokens = [torch.cat([host.tokenizer.encode(part) for part in kind.features.split(512)]) for kind in made]
    held = [generated(limit, 30_000, dance=dance, device=device) for dance in (False, True)]
    return Material(host, made, tokens, held, embed(host, held[0], held[0].features)[1])


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Train every arm with every seed, grade, and judge.

    A run that was cut off goes on with the arms that are missing, from the checkpoints of those that it was at.

    Raises:
        CheckpointError: There is no host.
    """
    load_host(path=cfg.host)
    device, folder = str(resolve_device(run.device)), run.artifacts
    # All arms of a seed before the next seed: what a cut leaves can be compared.
    jobs = [Job(arm, seed) for seed in cfg.seeds for arm in cfg.arms]
    left = [job for job in jobs if not job.file(folder).is_file()]
    with progress_bar(len(jobs), desc="trainings", quiet=run.quiet) as bar:
        bar.update(len(jobs) - len(left))
        for _ in run_jobs(partial(work, cfg, folder), left, workers=cfg.workers, device=device):
            bar.update()
    graded: dict[Job, dict[str, float]] = {
        job: json.loads(job.file(folder).read_text(encoding="utf-8")) for job in jobs
    }
    for job, grades in graded.items():
        for metric, value in grades.items():
            better = "lower" if metric == "frechet" else "none" if metric == "mask_share" else "higher"
            run.row(metric, value, better=better, n=cfg.limit, variant=job.arm, split=f"seed {job.seed}")  # type: ignore[arg-type]
    verdicts = {}
    for claim, values in _margins(cfg, graded).items():
        spread = stdev(values) if len(values) > 1 else None
        run.row("margin_mean", mean(values), better="higher", n=len(values), spread=spread, variant=claim)
        for seed, value in zip(cfg.seeds, values, strict=True):
            run.row("margin", value, better="higher", variant=claim, split=f"of seed {seed}")
        verdicts[claim] = verdict_over_margins(values)
    atomic_write_json(run.artifacts / VERDICTS, verdicts)
    return ReproduceReport.of(run)


def work(cfg: ReproduceConfig, folder: Path, job: Job, place: str) -> None:
    """Train one arm with one seed, grade it, and write its file."""
    device = torch.device(place)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    shared = _material(cfg.host, cfg.clips, cfg.limit, device)
    stored = shared.host
    fresh = Host.untrained(stored.config, job.seed).to(device)
    host = Host(stored.config, stored.tokenizer, fresh.transformer, fresh.reader, stored.evaluator)
    own = ArmConfig(
        settings=replace(cfg.settings, masking=job.arm),  # type: ignore[arg-type]
        seed=job.seed,
        steps=cfg.steps,
        batch=cfg.batch,
        lr=cfg.lr,
    )
    generator = torch.Generator(device).manual_seed(job.seed)
    optimizer = torch.optim.AdamW(
        [*host.transformer.parameters(), *host.reader.parameters()],
        cfg.lr,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    parts = {"transformer": host.transformer, "reader": host.reader, "optimizer": optimizer, "generator": generator}
    checkpoint = job.file(folder).with_suffix(".checkpoint")
    training = Training(own, checkpoint, parts)
    training.resume()
    attach(host.transformer, own.settings)
    loop = train_arm(host, own, shared.clips, shared.tokens, training, generator)
    training.follow(loop, LogFile(checkpoint.with_suffix(".jsonl")))
    atomic_write_json(job.file(folder), _grade(host, shared.held, shared.real, job.seed))
    checkpoint.unlink()


def _grade(host: Host, held: Sequence[Clips], real: NDArray[np.floating], seed: int) -> dict[str, float]:
    plain, dance = held
    drawn, danced = draw_clips(host, plain, seed), draw_clips(host, dance, seed)
    _, made = embed(host, plain, drawn)
    found = mask_overlap(host, plain)
    return {
        "events": float(right(recover(drawn), plain.scenes).float().mean()),
        "dance_events": float(right(recover(danced), dance.scenes).float().mean()),
        "frechet": frechet(made, real),
        "mask_recall": float(found.recall.mean()),
        "mask_precision": float(found.precision.mean()),
        "mask_share": float(found.share.mean()),
    }


def _margins(cfg: ReproduceConfig, graded: Mapping[Job, Mapping[str, float]]) -> dict[str, list[float]]:
    """Claim to its number for each seed; claims whose arms were not asked for are left out."""

    def less(first: str, second: str, metric: str) -> list[float] | None:
        if first not in cfg.arms or second not in cfg.arms:
            return None
        return [graded[Job(first, seed)][metric] - graded[Job(second, seed)][metric] for seed in cfg.seeds]

    finds = None
    if "attention" in cfg.arms:
        rows = [graded[Job("attention", seed)] for seed in cfg.seeds]
        finds = [row["mask_recall"] - row["mask_share"] for row in rows]
    found = [
        less("attention", "random", "events"),
        less("random", "attention", "frechet"),
        finds,
        less("attention", "cosine", "events"),
        less("events", "random", "events"),
    ]
    return {claim: values for claim, values in zip(CLAIMS, found, strict=True) if values is not None}
