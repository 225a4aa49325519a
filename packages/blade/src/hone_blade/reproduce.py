"""The paper's claims on the tiny host: which blocks matter has to be asked, and distillation should know of it.

For ``masks``, at equal density, both of BLADE's masks are set beside a static window and random blocks, over densities
and seeds. The rule was fixed beforehand: the claim holds at a density if the accuracies of ASA and of ASA_G have 95 %
intervals that lie above those of both static masks. Beside them stands the pyramid, at the same number of query-key
products: whether it is nearer to the dense clip than ASA, as its paper has it by 1.2 dB at a quarter. The students of
``distillation`` are in ``arms``, the ablations in ``recall`` and ``decomposition``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Report, Row, Run
from hone_video.clips import random_labels
from hone_video.host import Host, load_host
from hone_video.means import GRADES, write_grades, write_mean

from .arms import compare_arms, describe_arms, is_comparison_of_arms
from .config import Comparison, ReproduceConfig
from .decomposition import compare_rungs, describe_rungs, is_decomposition
from .evaluate import Outcome, compare
from .recall import compare_recall, describe_recall, is_recall

__all__ = ["ADAPTIVE", "PYRAMID", "STATIC", "ReproduceReport", "above", "holds", "reproduce"]

ADAPTIVE = ("asa", "asa_g")
PYRAMID = "psa"
STATIC = ("window", "random")


@dataclass(frozen=True, kw_only=True)
class ReproduceReport(Report):
    """Variants by setting, or arms; as text, a table and a verdict for each."""

    def __str__(self) -> str:
        if is_comparison_of_arms(self.rows):
            return describe_arms(self.rows, self.path)
        for ablation, describe in ((is_recall, describe_recall), (is_decomposition, describe_rungs)):
            if ablation(self.rows):
                return f"{describe(self.rows)}\nresults  {self.path / 'results.json'}"
        cells: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            cells.setdefault((str(row.labels.get("setting", "")), row.variant), {})[row.metric] = row
        head = f"{'density of sparse steps':<35} {'attention':<9} {'digit and direction':>19}"
        lines = [f"{head}   PSNR  SSIM  recall  density"]
        for (setting, variant), found in cells.items():
            right, same = found["accuracy"], variant == "dense"
            likeness = "    -     -" if same else f"{found['psnr'].value:5.1f} {found['ssim'].value:5.2f}"
            low, high = right.interval or (right.value, right.value)
            lines.append(
                f"{setting:<35} {variant:<9} {f'{right.value:.0%} ({low:.0%} to {high:.0%})':>19}  {likeness}"
                f"  {found['recall'].value:6.2f}  {found['density'].value:7.3f}"
            )
        lines += ["", "BLADE's masks above the static ones, intervals apart:"]
        for setting in dict.fromkeys(setting for setting, _ in cells if setting):
            verdict = holds({name: cells[setting, name]["accuracy"] for name in ADAPTIVE + STATIC})
            lines.append(f"  {setting}: {'yes' if verdict else 'no'}")
        lines += ["", "The pyramid nearer to dense than blocks read or skipped (ASA), PSNR, intervals apart:"]
        for setting in dict.fromkeys(setting for setting, name in cells if name == PYRAMID):
            pyramid, blocks = (cells[setting, name]["psnr"] for name in (PYRAMID, "asa"))
            verdict, apart = above(pyramid, blocks), pyramid.value - blocks.value
            lines.append(f"  {setting}: {'yes' if verdict else 'no'} ({apart:+.1f} dB)")
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def above(one: Row, other: Row) -> bool:
    """Whether one value's interval lies above another's."""
    return (one.interval or (one.value,))[0] > (other.interval or (other.value,))[-1]


def holds(accuracy: Mapping[str, Row]) -> bool:
    """Whether the claim about masks holds at one density.

    Args:
        accuracy: Row of each variant in ``ADAPTIVE`` and ``STATIC``, with its interval.
    """
    ends = {name: row.interval or (row.value, row.value) for name, row in accuracy.items()}
    return min(ends[name][0] for name in ADAPTIVE) > max(ends[name][1] for name in STATIC)


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Compare the variants at every setting, or what else the claim compares, with every seed.

    The rows of a setting are stored once it is measured, so that a run that was cut off goes on with the next one.

    Args:
        cfg: Settings, prompts and seeds.
        run: The run, entered.

    Raises:
        CheckpointError: There is no such host.
        RuntimeError: The teacher is not good enough to distil.
        ValueError: A comparison does not fit the host.
    """
    others = {"distillation": compare_arms, "recall": compare_recall, "decomposition": compare_rungs}
    if cfg.claim in others:
        others[cfg.claim](cfg, run)
        return ReproduceReport.of(run)
    host: Host | None = None
    first = next(iter(cfg.settings))
    with progress_bar(len(cfg.settings) * cfg.seeds, desc="seeds", quiet=run.quiet) as bar:
        for name, setting in cfg.settings.items():
            file = run.artifacts / f"{_slug(name)}.json"
            if file.exists():
                for row in json.loads(file.read_text(encoding="utf-8")):
                    run.row(**row)
                bar.update(cfg.seeds)
                continue
            host = host or load_host(resolve_device(run.device), path=cfg.host)
            found: dict[str, list[Outcome]] = {}
            for seed in range(cfg.seeds):
                for variant, outcome in _one_seed(host, setting, cfg, seed).items():
                    # Dense clips are the same at every density.
                    if variant != "dense" or name == first:
                        found.setdefault(variant, []).append(outcome)
                bar.update()
            _write_rows(run, name, found)
            own = [row for row in run.rows if row.labels.get("setting", first) == name]
            atomic_write_json(file, [asdict(row) for row in own])
    return ReproduceReport.of(run)


def _one_seed(host: Host, setting: Comparison, cfg: ReproduceConfig, seed: int) -> dict[str, Outcome]:
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(1000 + seed))
    return compare(host, labels, replace(setting, seed=seed), batch=cfg.batch, quiet=True)


def _write_rows(run: Run, name: str, found: Mapping[str, list[Outcome]]) -> None:
    """Rows of one setting, over its seeds."""
    for variant, outcomes in found.items():
        label = {} if variant == "dense" else {"setting": name}
        for metric in ("psnr", "ssim"):
            values = torch.cat([getattr(outcome, metric) for outcome in outcomes])
            unit = "dB" if metric == "psnr" else ""
            write_mean(run, metric, values, unit=unit, variant=variant, labels=label)
        grades = {task: torch.cat([outcome.grades[task] for outcome in outcomes]) for task in GRADES}
        write_grades(run, grades, variant=variant, labels=label)
        recall, density, gflop = (
            sum(getattr(outcome, metric) for outcome in outcomes) / len(outcomes)
            for metric in ("recall", "density", "attention_gflop")
        )
        n = len(outcomes)
        run.row("recall", recall, better="higher", n=n, variant=variant, labels=label)
        run.row("density", density, better="lower", n=n, variant=variant, labels=label)
        run.row("attention_gflop", gflop, unit="GFLOP", better="lower", n=n, variant=variant, labels=label)


def _slug(name: str) -> str:
    """A setting's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
