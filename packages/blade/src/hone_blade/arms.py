"""Is distillation better with the sparse attention in the loop? Students that differ in one thing each.

All are of the tiny host, with the same number of updates, batch, prompts and noise, and all sparse ones compute the
same share of the query-key pairs. What decides was fixed beforehand; see ``verdicts``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hone_core.devices import resolve_device
from hone_core.io import save_state
from hone_core.jobs import run_jobs
from hone_core.progress import progress_bar
from hone_core.runs import Row, Run
from hone_core.training import LogFile
from hone_video.clips import random_labels
from hone_video.grader import grade
from hone_video.host import Host, load_host
from hone_video.means import GRADES, grade_metric
from hone_video.prompts import describe
from hone_video.quality import psnr, ssim
from hone_video.sheets import contact_sheet, describe_clips
from numpy.typing import NDArray
from torch import Tensor

from . import plots
from .config import TEACHER_STEPS, BladeConfig, DistillConfig, ReproduceConfig, StudentsConfig
from .distill import Distillation, host_task, rollout_clips, student_host
from .models import attach

__all__ = ["ARMS", "compare_arms", "describe_arms", "frechet", "is_comparison_of_arms", "trainings", "verdicts"]

ARMS = {
    "A": f"teacher, {TEACHER_STEPS} guided dense steps",
    "B": "student trained and drawn dense",
    "C": "B, drawn with ASA_G",
    "C asa": "B, drawn with ASA",
    "C 2 dense": "B, drawn with ASA_G but for 2 dense steps",
    "D": "student trained and drawn with ASA_G",
    "E": "D with ASA, no pooled keys",
    "F": "D trained dense for the first half",
    "G": "D with a static window in place of the prober",
    "H": "D with random blocks in place of the prober",
    "I": "D in raster order",
    "J": "D with a dense fake score",
    "K": "D, drawn by UniPC in place of its own rollout",
}
"""Name -> what it is; the letters are the plan's."""

COLUMNS = {"A": "teacher", "B": "dense", "C": "B, drawn sparse", "D": "sparse", "G": "window", "H": "random blocks"}
"""Arms on the sheet of clips, in words that fit above them."""

DIFFERENCES = tuple(("D", other) for other in ("B", "C", "C asa", "C 2 dense", "E", "F", "G", "H", "I", "J", "K"))

COMPONENTS = 64
"""Of the teacher's features, in which the Frechet distance is taken."""
REPEATED = (16, 8)
"""Prompts, and clips of each, for the diversity within a prompt."""
SHOWN = 4
"""Clips of each arm on the sheet."""

Draw = Callable[[Tensor, int], Tensor]
"""Clips ``[N, 3, F, H, W]`` in [0, 1] of labels, from the noise of a seed."""


class Job(NamedTuple):
    """One student (or the teacher) with one seed."""

    arm: str
    seed: int

    def file(self, folder: Path) -> Path:
        """Where its results are."""
        return folder / f"{self.arm}-{self.seed}.pt"


def trainings(cfg: StudentsConfig, tokens: int, seed: int) -> dict[str, DistillConfig]:
    """The students that are trained, by arm.

    Args:
        cfg: What they share.
        tokens: Of the host.
        seed: Of adapters, prompts and noise.
    """
    variants = cfg.comparison.configs(tokens)
    asa, asa_g = variants["asa"], variants["asa_g"]
    assert asa is not None
    assert asa_g is not None
    return {
        "B": cfg.run(asa_g, seed, dense_share=1.0),
        "D": cfg.run(asa_g, seed),
        "E": cfg.run(asa, seed),
        "F": cfg.run(asa_g, seed, dense_share=0.5),
        "G": cfg.run(replace(asa_g, mask="window", order="tile"), seed),
        "H": cfg.run(replace(asa_g, mask="random"), seed),
        "I": cfg.run(replace(asa_g, order="raster"), seed),
        "J": cfg.run(asa_g, seed, tdm=replace(cfg.tdm, fake_attention="dense")),
    }


def compare_arms(cfg: ReproduceConfig, run: Run) -> None:
    """Train what is not trained yet, draw, grade, and write rows and figures.

    Args:
        cfg: Students, prompts, seeds.
        run: The run, entered. Its artifacts hold a file per student; a run that was cut off goes on with the rest, and
            with the checkpoints of those that it was at.

    Raises:
        CheckpointError: There is no such host.
        RuntimeError: The teacher misses its gate.
        ValueError: The comparison does not fit the host.
    """
    device, folder = str(resolve_device(run.device)), run.artifacts
    host = load_host(path=cfg.host)
    trained = trainings(cfg.students, host.config.tokens, 0)
    jobs = [Job(arm, seed) for arm in ("A", *trained) for seed in range(cfg.seeds)]
    with progress_bar(len(jobs), desc="students", quiet=run.quiet) as bar:
        done = [job for job in jobs if job.file(folder).is_file()]
        bar.update(len(done))
        left = [job for job in jobs if job not in done]
        for job in run_jobs(partial(work, cfg, folder), left, workers=cfg.workers, device=device):
            bar.update()
            if job.arm == "A":
                _check_gate(cfg, job, folder)
    found = {job: torch.load(job.file(folder), weights_only=True) for job in jobs}
    _write_rows(run, cfg, found)
    _draw(run, host, cfg, found)


def _check_gate(cfg: ReproduceConfig, job: Job, folder: Path) -> None:
    grades = torch.load(job.file(folder), weights_only=True)["A"]
    reached = {name: float(grades[name].mean()) for name in ("digit", "direction")}
    if min(reached.values()) < cfg.gate:
        raise RuntimeError(
            f"the teacher must reach {cfg.gate:.0%} of digits and directions at {TEACHER_STEPS} guided steps before "
            f"its students mean anything; with seed {job.seed} it reached "
            + " and ".join(f"{value:.0%} ({name})" for name, value in reached.items())
            + ". Train the host longer"
        )


# One job, in a process of its own or not.


def work(cfg: ReproduceConfig, folder: Path, job: Job, device: str) -> None:
    """Do one job and write its file."""
    found = _teacher(cfg, job, device) if job.arm == "A" else _student(cfg, job, device, folder)
    save_state(found, job.file(folder))


def _teacher(cfg: ReproduceConfig, job: Job, device: str) -> dict[str, dict[str, Tensor]]:
    host = load_host(device, path=cfg.host)

    def draw(labels: Tensor, seed: int) -> Tensor:
        text, noise = host.encode_labels(labels), host.noise(len(labels), seed)
        parts = [slice(at, at + cfg.batch) for at in range(0, len(labels), cfg.batch)]
        return torch.cat([host.sample(text[part], noise[part], steps=TEACHER_STEPS).cpu() for part in parts])

    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(3000 + job.seed))
    reference = _features(host, draw(labels, 1000 + job.seed), cfg.batch)
    return {"A": _measure(host, draw, cfg, job.seed)[0], "reference": {"features": reference}}


def _student(cfg: ReproduceConfig, job: Job, device: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    half = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    teacher = load_host(device, half, path=cfg.host)
    settings = trainings(cfg.students, teacher.config.tokens, job.seed)[job.arm]
    name = f"{job.arm}-{job.seed}"
    checkpoint = folder / f"{name}.checkpoint"
    training = Distillation(settings, host_task(teacher, settings.tdm), checkpoint)
    training.training.resume()
    training.training.follow(training.train(), LogFile(folder / f"{name}.jsonl"))
    lora = training.export(folder / f"{name}.safetensors")
    del training, teacher

    host = load_host(device, path=cfg.host)
    attention = student_host(host, lora)
    tdm = settings.tdm

    def few(labels: Tensor, seed: int) -> Tensor:
        return rollout_clips(host, labels, tdm, seed=seed, batch=cfg.batch)

    def unipc(labels: Tensor, seed: int) -> Tensor:
        text, noise = host.encode_labels(labels), host.noise(len(labels), seed)
        options: dict[str, Any] = {"steps": tdm.student_steps, "solver": "unipc", "guidance": 1.0}
        parts = [slice(at, at + cfg.batch) for at in range(0, len(labels), cfg.batch)]
        return torch.cat([host.sample(text[part], noise[part], **options).cpu() for part in parts])

    drawn: dict[str, tuple[BladeConfig | None, Draw]] = {job.arm: (attention, few)}
    if job.arm == "B":
        asa = cfg.students.comparison.configs(host.config.tokens)["asa"]
        drawn = {"B": (None, few), "C": (attention, few), "C asa": (asa, few)}
        drawn["C 2 dense"] = (replace(attention, dense_steps=2), few)
    if job.arm == "D":
        drawn["K"] = (attention, unipc)
    found, clips = {}, {}
    for arm, (sparse, draw) in drawn.items():
        with nullcontext() if sparse is None else attach(host.transformer, sparse):
            found[arm], clips[arm] = _measure(host, draw, cfg, job.seed)
    if job.arm == "B":
        for arm in ("C", "C asa", "C 2 dense"):
            found[arm] |= {"psnr": psnr(clips[arm], clips["B"]), "ssim": ssim(clips[arm], clips["B"])}
    if job.arm in "BD":
        found["clips"] = {job.arm: (clips[job.arm] * 255).round().byte()}
    if job.arm != "D":
        lora.unlink()
    checkpoint.unlink()
    return found


def _measure(host: Host, draw: Draw, cfg: ReproduceConfig, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Grades per clip, features and diversity; and the clips."""
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(2000 + seed))
    clips = draw(labels, seed)
    parts = [slice(at, at + cfg.batch) for at in range(0, len(labels), cfg.batch)]
    grades = [grade(host.classifier, clips[part], labels[part]) for part in parts]
    found = {name: torch.cat([part[name] for part in grades]).cpu() for name in grades[0]}
    found["features"] = _features(host, clips, cfg.batch)
    prompts, times = min(REPEATED[0], cfg.prompts), REPEATED[1]
    again = draw(labels[:prompts].repeat_interleave(times, 0), 500 + seed).view(prompts, times, -1)
    apart = torch.cdist(again, again) / again.shape[-1] ** 0.5
    found["diversity"] = apart.sum((1, 2)) / (times * (times - 1))
    found["shown"] = (clips[:SHOWN] * 255).round().byte()
    return found, clips


@torch.no_grad()
def _features(host: Host, clips: Tensor, batch: int) -> Tensor:
    """The classifier's features of clips, mean over frames, ``[N, C]``."""
    parts = []
    for at in range(0, len(clips), batch):
        frames = clips[at : at + batch].to(host.device).transpose(1, 2)
        flat = host.classifier.features(frames.flatten(0, 1) * 2 - 1)
        parts.append(flat.view(*frames.shape[:2], -1).mean(1).cpu())
    return torch.cat(parts)


# What came out.


def frechet(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Frechet distance of two normal distributions, given by samples ``[N, C]`` and ``[M, C]``.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, as the Frechet inception distance has it.
    """
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    gap = first.mean(0) - second.mean(0)
    return float(gap @ gap + sum(np.trace(x) for x in covariances) - 2 * cross)


@dataclass(frozen=True)
class _Draws:
    """Bootstrap samples over seeds and, within each, over clips: a student is one draw of its training."""

    seeds: NDArray[np.int64]
    clips: NDArray[np.int64]

    @classmethod
    def of(cls, seeds: int, clips: int, count: int) -> _Draws:
        rng = np.random.default_rng(0)
        return cls(rng.integers(0, seeds, (count, seeds)), rng.integers(0, clips, (count, seeds, clips)))

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean of ``[seeds, clips]`` in each sample."""
        return values[self.seeds[:, :, None], self.clips].mean((1, 2))


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _write_rows(run: Run, cfg: ReproduceConfig, found: Mapping[Job, Mapping[str, Mapping[str, Tensor]]]) -> None:
    def stack(arm: str, name: str) -> NDArray[np.float64]:
        """``[seeds, clips, ...]`` of one arm."""
        jobs = sorted((job for job in found if arm in found[job]), key=lambda job: job.seed)
        return np.stack([found[job][arm][name].double().numpy() for job in jobs])

    draws = _Draws.of(cfg.seeds, cfg.prompts, 2000)
    accuracy: dict[str, NDArray[np.float64]] = {}
    steps = cfg.students.tdm.student_steps
    host = load_host(path=cfg.host)

    def row(metric: str, values: NDArray[np.float64], arm: str, better: Any = "higher", unit: str = "") -> None:
        own = draws if values.shape[1] == cfg.prompts else _Draws.of(len(values), values.shape[1], 2000)
        spread = float(values.mean(1).std(ddof=1)) if len(values) > 1 else None
        interval = _interval(own.means(values))
        options: dict[str, Any] = {"n": values.size, "spread": spread, "variant": arm, "interval": interval}
        run.row(metric, float(values.mean()), unit=unit, better=better, **options)

    clips = {
        arm: [found[Job(arm, seed)]["clips"][arm].float() / 255 for seed in range(cfg.seeds)] for arm in ("B", "D")
    }
    for arm in ARMS:
        calls = sum(host.evaluations(steps=TEACHER_STEPS)) if arm == "A" else steps
        run.row("nfe", calls, better="lower", variant=arm)
        for name in GRADES:
            row(grade_metric(name), stack(arm, name), arm)
        accuracy[arm] = stack(arm, "accuracy")
        row("residual", stack(arm, "residual_px"), arm, "lower", "px")
        row("diversity", stack(arm, "diversity"), arm)
        if arm.startswith("C"):
            row("psnr", stack(arm, "psnr"), arm, unit="dB")
            row("ssim", stack(arm, "ssim"), arm)
    pairs = list(zip(clips["D"], clips["B"], strict=True))
    row("psnr", np.stack([psnr(a, b).double().numpy() for a, b in pairs]), "D", unit="dB")
    row("ssim", np.stack([ssim(a, b).double().numpy() for a, b in pairs]), "D")

    reference = stack("reference", "features").reshape(cfg.seeds * cfg.prompts, -1)
    axes = np.linalg.svd(reference - reference.mean(0), full_matrices=False)[2][:COMPONENTS].T
    reference = reference @ axes
    few = _Draws(draws.seeds[:200], draws.clips[:200])
    distances = {}
    for arm in ARMS:
        features = stack(arm, "features") @ axes
        value = frechet(features.reshape(-1, features.shape[-1]), reference)
        drawn = [
            frechet(features[s[:, None], c].reshape(-1, features.shape[-1]), reference)
            for s, c in zip(few.seeds, few.clips, strict=True)
        ]
        distances[arm] = value, np.array(drawn)
        # A sample drawn again from itself lies farther away: of distances only differences have an interval.
        run.row("frechet", value, better="lower", n=len(reference), variant=arm)
    for first, second in DIFFERENCES:
        change, name = accuracy[first] - accuracy[second], f"{first} - {second}"
        row("accuracy_difference", change, name, "none")
        drawn = distances[first][1] - distances[second][1]
        value = distances[first][0] - distances[second][0]
        run.row("frechet_difference", value, better="none", n=change.size, variant=name, interval=_interval(drawn))


def _draw(run: Run, host: Host, cfg: ReproduceConfig, found: Mapping[Job, Mapping[str, Mapping[str, Tensor]]]) -> None:
    for ending in ("png", "svg"):
        plots.arms_chart(run.rows, run.figures / f"arms.{ending}")
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(2000))[:SHOWN]
    own = {arm: arm for arm in ARMS} | {"C": "B", "C asa": "B", "C 2 dense": "B", "K": "D"}
    shown = {arm: found[Job(own[arm], 0)][arm] for arm in COLUMNS}
    clips = {arm: values["shown"].float() / 255 for arm, values in shown.items()}
    captions = {arm: describe_clips(host.classifier, clips[arm], shown[arm]["accuracy"]) for arm in clips}
    looks = {arm: (f"{arm}: {title}", plots.INK) for arm, title in COLUMNS.items()}
    prompts = [describe(row) for row in labels]
    contact_sheet(clips, prompts, captions, run.figures / "arms_clips.png", looks=looks)


def is_comparison_of_arms(rows: Sequence[Row]) -> bool:
    """Whether the rows are of this comparison."""
    return any(row.metric == "accuracy_difference" for row in rows)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the differences say, a line each. The rules were fixed before anything was trained.

    A difference counts where its 95 % interval, over seeds and clips, excludes 0.

    1. *Joint beats training-free*: D has more digits and directions right than C, and a smaller Frechet distance.
    2. *Sparse holds dense*: D does not have fewer right than B.
    3. *Joint beats sequential*: D has more right than F. Otherwise "sequential is impractical" is not confirmed, and
       false here if it has fewer.
    4. *Masks have to look*: D has more right than G and than H. Otherwise the prober is not what matters here.
    """
    found = {(row.metric, row.variant): row.interval or (row.value, row.value) for row in rows}

    def sign(other: str, metric: str = "accuracy") -> int:
        low, high = found[f"{metric}_difference", f"D - {other}"]
        return (low > 0) - (high < 0)

    free = sign("C") > 0 and sign("C", "frechet") < 0
    parts = f"no: on accuracy {_WORDS[sign('C')]}, on Frechet distance {_WORDS[-sign('C', 'frechet')]}"
    answer = "yes" if free else parts
    lines = [f"joint training beats the same sparse attention put into a dense student (D over C): {answer}"]
    lines.append(f"the sparse student holds the dense one (D beside B): {'no: worse' if sign('B') < 0 else 'yes'}")
    words = {1: "yes", 0: "not confirmed: no difference found", -1: "no: sequential is better here"}
    lines.append(f"joint training beats dense first, sparse after (D over F): {words[sign('F')]}")
    for other, name in (("G", "a static window"), ("H", "random blocks")):
        answer = "yes" if sign(other) > 0 else "no: " + _WORDS[sign(other)]
        lines.append(f"masks that look beat {name} (D over {other}): {answer}")
    confirmed = free and sign("B") >= 0
    lines.append(f"the central claim, the first two together: {'confirmed' if confirmed else 'not confirmed'} here")
    return lines


_WORDS = {1: "better", 0: "no difference found", -1: "worse"}


def describe_arms(rows: Sequence[Row], path: Path) -> str:
    """The arms as a table, their differences, and the verdict."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.variant, {})[row.metric] = row
    lines = [f"{'':<52} {'calls':>5} {'digit and direction':>19} {'Frechet':>8} {'diversity':>9} {'PSNR to B':>9}"]
    for arm, text in ARMS.items():
        values = cells[arm]
        right = values["accuracy"]
        low, high = right.interval or (right.value, right.value)
        fidelity = f"{values['psnr'].value:6.1f} dB" if "psnr" in values else "-"
        lines.append(
            f"{arm + ': ' + text:<52} {values['nfe'].value:>5.0f} {f'{right.value:.0%} ({low:.0%} to {high:.0%})':>19}"
            f" {values['frechet'].value:>8.3f} {values['diversity'].value:>9.3f} {fidelity:>9}"
        )
    lines += ["", f"{'difference':<14} {'digit and direction':>27} {'Frechet':>28}"]
    for first, second in DIFFERENCES:
        name = f"{first} - {second}"
        right, far = cells[name]["accuracy_difference"], cells[name]["frechet_difference"]
        assert right.interval is not None
        assert far.interval is not None
        share = f"{right.value:+.1%} ({right.interval[0]:+.1%} to {right.interval[1]:+.1%})"
        distance = f"{far.value:+.3f} ({far.interval[0]:+.3f} to {far.interval[1]:+.3f})"
        lines.append(f"{name:<14} {share:>27} {distance:>28}")
    return "\n".join([*lines, "", *verdicts(rows), f"results  {path / 'results.json'}"])
