"""The paper's central claim on digits: diagonals with a head per axis, against raster and against what lacks a part.

Each seed trains four models of as many blocks for as many steps: raster, NAR on its mixture, NAR on a loss of each
head, and diagonals with one head; and post-trains the raster one by FlashAR for a third of the steps. On clips of a
moving shape it trains raster, NAR, and NAR on the same tokens in one random arrangement. Rules are fixed beforehand.

Source: Table 1 (quality beside raster), Table 4 (one head), Table 5 (one head alone), FlashAR's tables; the loss of
    each head is ours to ask, since the paper's text and release differ, and so is the arrangement, since its clips'
    tokens have no places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from statistics import mean, stdev
from typing import Any

import torch
from hone_core.claims import VERDICTS, MarginsReport, verdict_over_margins
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json, save_state
from hone_core.progress import progress_bar
from hone_core.runs import Better, Run
from hone_core.training import LogFile, Training
from torch import Tensor

from .config import HEADS, ReproduceConfig
from .data import Digits
from .evaluate import Variant, drawing_rows, likelihood_rows, real_rows, table
from .flashar import post_train_start
from .host import digit_model
from .method import diagonal_order
from .tasks import TASKS
from .train import Learner, take_step

__all__ = ["CLAIMS", "ReproduceReport", "reproduce"]

DIGITS_CLAIMS = {
    "likelihood": "bits per token of raster less NAR's",
    "drawing": "accuracy of NAR's digits less raster's, plus 0.02",
    "heads": "bits per token of diagonals with one head less NAR's",
    "mixture": "bits per token of the better head alone less the mixture's, less 0.2",
    "loss": "bits per token of NAR trained head by head less that on the mixture",
    "post-training": "bits per token of raster less those of FlashAR made of it, plus 0.05",
}
SHAPES_CLAIMS = {
    "likelihood": "bits per token of raster less NAR's",
    "drawing": "accuracy of NAR's clips less raster's, plus 0.02",
    "locality": "bits per token of NAR on permuted tokens less that on the grid",
    "local drawing": "accuracy of NAR's clips less that of NAR on permuted tokens",
}
CLAIMS = {"digits": DIGITS_CLAIMS, "shapes": SHAPES_CLAIMS}
"""By data; each holds where its number is positive."""

DIGITS_TRAININGS = {
    "raster": ("raster", "mixture"),
    "nar": ("nar", "mixture"),
    "separate": ("nar", "separate"),
    "one-head": ("one-head", "mixture"),
    "flashar": ("raster", "flashar"),
}
SHAPES_TRAININGS = {"raster": ("raster", "mixture"), "nar": ("nar", "mixture"), "permuted": ("nar", "mixture")}
TRAININGS = {"digits": DIGITS_TRAININGS, "shapes": SHAPES_TRAININGS}
"""By data, name to kind of model and loss."""
FLASHAR_SHARE = 3
"""Steps of a training over those of FlashAR after it."""


class ReproduceReport(MarginsReport):
    """Result of ``reproduce``; as text, verdicts and the means over seeds."""

    def __str__(self) -> str:
        margins = {row.variant: row for row in self.rows if row.metric == "margin_mean"}
        rules = next(claims for claims in CLAIMS.values() if set(claims) == set(margins))
        lines = [
            f"{self.verdicts[claim]:<22}{claim}: {rule}: {margins[claim].value:.3f} +- {margins[claim].spread or 0:.2g}"
            for claim, rule in rules.items()
        ]
        rows = [row for row in self.rows if row.split == "mean"]
        excess = [f"{row.variant}: {row.value:+.3f}" for row in rows if row.metric == "excess_bits"]
        means = table([row for row in rows if row.metric != "excess_bits"])
        lines += ["", means]
        if excess:
            lines += ["", f"bits of NAR less raster's, {', '.join(excess)}"]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Of one training, as ``Training`` asks for them."""

    name: str
    seed: int
    steps: int
    minutes: float = 0.0
    log_every: int = 50
    checkpoint_seconds: float = 60.0


def reproduce(cfg: ReproduceConfig, run: Run) -> ReproduceReport:
    """Train, measure and judge; a training that is done is not repeated, and one that was stopped goes on.

    Raises:
        RuntimeError: A loss is not finite.
    """
    device, task = resolve_device(run.device), TASKS[cfg.data]
    claims, trainings = CLAIMS[cfg.data], TRAININGS[cfg.data]
    margins: dict[str, list[float]] = {claim: [] for claim in claims}
    with progress_bar(len(cfg.seeds) * len(trainings) * cfg.steps, desc="training", quiet=run.quiet) as bar:
        for seed in cfg.seeds:
            split = f"seed {seed}"
            lengths: dict[str, Tensor] = {}
            models: dict[str, Any] = {}
            for name in trainings:
                models[name] = _trained(cfg, run, name, seed, device, bar, models.get("raster"))
                lengths[name] = _measure(cfg, run, name, models[name], seed, split)
            if cfg.data == "digits":
                _independence(run, lengths, split)
            for claim, value in _margins(run, split, cfg.data).items():
                margins[claim].append(value)
                run.row("margin", value, better="higher", variant=claim, split=split)
    real_rows(run, task, "mean")
    _write_means(run)
    verdicts = {claim: verdict_over_margins(values) for claim, values in margins.items()}
    for claim, values in margins.items():
        spread = stdev(values) if len(values) > 1 else None
        run.row("margin_mean", mean(values), better="higher", n=len(values), spread=spread, variant=claim)
    atomic_write_json(run.artifacts / VERDICTS, verdicts)
    return ReproduceReport.of(run)


def _places(cfg: ReproduceConfig, name: str) -> Tensor | None:
    """The arrangement of ``permuted``, the same for all seeds; None for the others."""
    if name != "permuted":
        return None
    return torch.randperm(prod(TASKS[cfg.data].grid), generator=torch.Generator().manual_seed(0))


def _trained(
    cfg: ReproduceConfig, run: Run, name: str, seed: int, device: torch.device, bar: Any, raster: Any
) -> torch.nn.Module:
    kind, loss = TRAININGS[cfg.data][name]
    file = run.artifacts / f"{name}-{seed}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "flashar":
            model: Any = post_train_start(raster, seed=seed)
        else:
            model = digit_model(kind, replace(cfg.host, data=cfg.data), dropout=cfg.dropout).to(device)
    if file.is_file():
        model.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        bar.update(cfg.steps)
        return model.eval()
    learner = Learner(model.requires_grad_(True), lr=cfg.lr, ema=0.99, loss=loss)
    train, places = TASKS[cfg.data].examples("train"), _places(cfg, name)
    if places is not None:
        train = Digits(train.tokens[:, places], train.labels)
    train = train.to(device)
    steps = -(-cfg.steps // FLASHAR_SHARE) if name == "flashar" else cfg.steps
    number = list(TRAININGS[cfg.data]).index(name)
    checkpoint = file.with_suffix(".checkpoint")
    training = Training(_Settings(name=name, seed=seed, steps=steps), checkpoint, learner.parts)
    training.resume()
    bar.update(cfg.steps / steps * training.step)

    def loop() -> Iterator[dict[str, float] | None]:
        training.start()
        while training.spent() < 1:
            done = training.step / steps
            value = take_step(learner, train, cfg.batch, done, seed, number, training.step)
            training.step += 1
            bar.update(cfg.steps / steps)
            yield {"loss": float(value)} if training.due() else None

    training.follow(loop(), LogFile(file.with_suffix(".jsonl")))
    save_state(learner.average.state_dict(), file)
    checkpoint.unlink()
    return learner.average


def _measure(cfg: ReproduceConfig, run: Run, name: str, model: torch.nn.Module, seed: int, split: str) -> Tensor:
    task = TASKS[cfg.data]
    whole = Variant(name, model, None, task, _places(cfg, name))
    found = likelihood_rows(run, whole, split)
    variants = [whole]
    if name in ("nar", "separate"):
        kinds = HEADS[: len(task.grid)]
        variants += [replace(whole, name=f"{name}, {kind}", kind=kind) for kind in kinds]
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


def _margins(run: Run, split: str, data: str) -> dict[str, float]:
    here = {(row.metric, row.variant): row.value for row in run.rows if row.split == split}
    bits = {variant: value for (metric, variant), value in here.items() if metric == "bits_per_token"}
    if data == "shapes":
        return {
            "likelihood": bits["raster"] - bits["nar"],
            "drawing": here["accuracy", "nar"] - here["accuracy", "raster"] + 0.02,
            "locality": bits["permuted"] - bits["nar"],
            "local drawing": here["accuracy", "nar"] - here["accuracy", "permuted"],
        }
    return {
        "likelihood": bits["raster"] - bits["nar"],
        "drawing": here["accuracy", "nar"] - here["accuracy", "raster"] + 0.02,
        "heads": bits["one-head"] - bits["nar"],
        "mixture": min(bits["nar, right"], bits["nar, below"]) - bits["nar"] - 0.2,
        "loss": bits["separate"] - bits["nar"],
        "post-training": bits["raster"] - bits["flashar"] + 0.05,
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
