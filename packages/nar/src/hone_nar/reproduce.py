"""The paper's central claim on digits: diagonals with a head per axis, against raster and against what lacks a part.

Each seed trains four models of as many blocks for as many steps: raster, NAR on its mixture, NAR on a loss of each
head, and diagonals with one head. Rules are fixed beforehand.

Source: Table 1 (quality beside raster), Table 4 (one head), Table 5 (one head alone); the loss of each head is ours to
    ask, since the paper's text and release differ.
"""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

import torch
from hone_core.claims import VERDICTS, MarginsReport, verdict_over_margins
from hone_core.devices import resolve_device
from hone_core.io import atomic_path, atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Better, Run
from torch import Tensor

from .config import ReproduceConfig
from .data import digits
from .evaluate import Variant, drawing_rows, likelihood_rows, real_rows, table
from .host import digit_model
from .method import diagonal_order
from .train import Learner, take_step

__all__ = ["CLAIMS", "ReproduceReport", "reproduce"]

CLAIMS = {
    "likelihood": "bits per token of raster less NAR's",
    "drawing": "accuracy of NAR's digits less raster's, plus 0.02",
    "heads": "bits per token of diagonals with one head less NAR's",
    "mixture": "bits per token of the better head alone less the mixture's, less 0.2",
    "loss": "bits per token of NAR trained head by head less that on the mixture",
}
"""Each holds where its number is positive."""

TRAININGS = {
    "raster": ("raster", "mixture"),
    "nar": ("nar", "mixture"),
    "separate": ("nar", "separate"),
    "one-head": ("one-head", "mixture"),
}
"""Name to kind of model and loss."""


class ReproduceReport(MarginsReport):
    """Result of ``reproduce``; as text, verdicts and the means over seeds."""

    def __str__(self) -> str:
        margins = {row.variant: row for row in self.rows if row.metric == "margin_mean"}
        lines = [
            f"{self.verdicts[claim]:<22}{claim}: {rule}: {margins[claim].value:.3f} +- {margins[claim].spread or 0:.2g}"
            for claim, rule in CLAIMS.items()
        ]
        rows = [row for row in self.rows if row.split == "mean"]
        excess = [f"{row.variant}: {row.value:+.3f}" for row in rows if row.metric == "excess_bits"]
        means = table([row for row in rows if row.metric != "excess_bits"])
        lines += ["", means, "", f"bits of NAR less raster's, {', '.join(excess)}"]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Train, measure and judge; a training that is done is not repeated.

    Raises:
        RuntimeError: A loss is not finite.
    """
    device = resolve_device(run.device)
    margins: dict[str, list[float]] = {claim: [] for claim in CLAIMS}
    trainings = len(cfg.seeds) * len(TRAININGS)
    with progress_bar(trainings * cfg.steps, desc="training", quiet=run.quiet) as bar:
        for seed in cfg.seeds:
            split = f"seed {seed}"
            lengths: dict[str, Tensor] = {}
            for name in TRAININGS:
                model = _trained(cfg, run, name, seed, device, bar)
                lengths[name] = _measure(cfg, run, name, model, seed, split)
            _independence(run, lengths, split)
            for claim, value in _margins(run, split).items():
                margins[claim].append(value)
                run.row("margin", value, better="higher", variant=claim, split=split)
    real_rows(run, "mean")
    _write_means(run)
    verdicts = {claim: verdict_over_margins(values) for claim, values in margins.items()}
    for claim, values in margins.items():
        spread = stdev(values) if len(values) > 1 else None
        run.row("margin_mean", mean(values), better="higher", n=len(values), spread=spread, variant=claim)
    atomic_write_json(run.artifacts / VERDICTS, verdicts)
    return ReproduceReport.of(run)


def _trained(cfg: ReproduceConfig, run: Run, name: str, seed: int, device: torch.device, bar: Any) -> torch.nn.Module:
    kind, loss = TRAININGS[name]
    file = run.artifacts / f"{name}-{seed}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digit_model(kind, cfg.host, dropout=cfg.dropout).to(device)
    if file.is_file():
        model.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        bar.update(cfg.steps)
        return model.eval()
    learner = Learner(model, lr=cfg.lr, ema=0.99, loss=loss)
    train = digits("train").to(device)
    for step in range(cfg.steps):
        value = take_step(learner, train, cfg.batch, step / cfg.steps, seed, list(TRAININGS).index(name), step)
        bar.update()
        if step % 50 == 49:
            if not math.isfinite(float(value)):
                raise RuntimeError(f"the loss of {name} became {float(value)}; lower lr")
            run.log(step=step + 1, **{f"loss of {name}, seed {seed}": float(value)})
    with atomic_path(file) as scratch:
        torch.save(learner.average.state_dict(), scratch)
    return learner.average


def _measure(cfg: ReproduceConfig, run: Run, name: str, model: torch.nn.Module, seed: int, split: str) -> Tensor:
    found = likelihood_rows(run, Variant(name, model), split)
    variants = [Variant(name, model)]
    if name in ("nar", "separate"):
        variants += [Variant(f"{name}, right", model, "right"), Variant(f"{name}, below", model, "below")]
    for variant in variants:
        if variant.kind is not None:
            likelihood_rows(run, variant, split)
        drawing_rows(run, variant, cfg.limit, batch=250, seed=1_000_000 * seed, split=split)
    return found


def _independence(run: Run, lengths: dict[str, Tensor], split: str) -> None:
    """Bits that NAR loses or wins over raster, by how many tokens are drawn at once."""
    order = diagonal_order((8, 8))
    for length in range(1, 9):
        ids = [number for step in order.steps if len(step) == length for number in step]
        excess = (lengths["nar"] - lengths["raster"])[:, ids].mean(1)
        run.row(
            "excess_bits", float(excess.mean()), unit="bits", better="lower", n=len(excess),
            spread=float(excess.std()), variant=f"{length} at once", split=split,
        )  # fmt: skip


def _margins(run: Run, split: str) -> dict[str, float]:
    here = {(row.metric, row.variant): row.value for row in run.rows if row.split == split}
    bits = {variant: value for (metric, variant), value in here.items() if metric == "bits_per_token"}
    return {
        "likelihood": bits["raster"] - bits["nar"],
        "drawing": here["accuracy", "nar"] - here["accuracy", "raster"] + 0.02,
        "heads": bits["one-head"] - bits["nar"],
        "mixture": min(bits["nar, right"], bits["nar, below"]) - bits["nar"] - 0.2,
        "loss": bits["separate"] - bits["nar"],
    }


def _write_means(run: Run) -> None:
    """Means over seeds of what each seed measured."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in run.rows:
        if row.split.startswith("seed") and row.metric not in ("margin", "time_per_image"):
            groups.setdefault((row.metric, row.variant), []).append(row.value)
    for (metric, variant), values in groups.items():
        better: Better = "higher" if metric == "accuracy" else "lower"
        spread = stdev(values) if len(values) > 1 else None
        run.row(metric, mean(values), better=better, n=len(values), spread=spread, variant=variant, split="mean")
