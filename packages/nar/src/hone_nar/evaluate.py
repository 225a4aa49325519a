"""Exact likelihoods of held-out digits, and quality of drawn ones, by NAR, by a raster model, and by one head alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.errors import CheckpointError
from hone_core.progress import progress_bar
from hone_core.runs import Report, Row, Run
from torch import Tensor

from .benchmarks import judge
from .codes import Codes, open_codes
from .config import HEADS, EvalConfig, Mix
from .data import Digits
from .flashar import FlashARForImageGeneration
from .grading import bits
from .host import Host, draw_digits, load_host
from .tasks import TASKS, Task
from .texts import TextReader, condition_of
from .transformer import LlamaGenForImageGeneration, NARForImageGeneration, NARForVideoGeneration

__all__ = ["EvalReport", "Variant", "evaluate", "fitting", "table", "variants_of"]


LIMIT = 1000
"""Images that are drawn of a variant, or measured of a folder, unless told."""
COLUMNS = (
    ("bits_per_token", "bits/token", 11, ".3f"),
    ("accuracy", "accuracy", 10, ".3f"),
    ("distance", "distance", 10, ".1f"),
    ("passes", "passes", 8, ".0f"),
    ("time_per_image", "ms/image", 10, ".2f"),
)
"""Of the table: metric, title, width, form of its values."""


@dataclass(frozen=True)
class Variant:
    """A way to draw.

    Attributes:
        name: Of it.
        model: That draws.
        kind: How its heads are mixed.
        task: What it draws.
        places: Its model's tokens ``[tokens]`` as places in the grid, where it was trained on permuted ones.
    """

    name: str
    model: torch.nn.Module
    kind: Mix | None = None
    task: Task = TASKS["digits"]
    places: Tensor | None = None

    @property
    def passes(self) -> int:
        """Forwards per image."""
        return len(self.model.order.steps)  # type: ignore[union-attr,arg-type]


def variants_of(host: Host) -> list[Variant]:
    """NAR, raster, and each head of NAR alone."""
    single = [Variant(f"{kind}-only", host.nar, kind, host.task) for kind in HEADS[: host.nar.heads]]
    return [Variant("nar", host.nar, "average", host.task), Variant("raster", host.raster, None, host.task), *single]


def table(rows: Sequence[Row]) -> str:
    """Variants with their values, as text; a column that no variant has a value for is left out."""
    found = {(row.variant, row.metric): row for row in rows}
    names = list(dict.fromkeys(row.variant for row in rows))
    columns = [column for column in COLUMNS if any(row.metric == column[0] for row in rows)]
    first = max(11, *map(len, names)) + 1
    lines = [f"{'':<{first}}" + "".join(f"{title:>{width}}" for _, title, width, _ in columns)]
    for name in names:
        line = f"{name:<{first}}"
        for metric, _, width, form in columns:
            row = found.get((name, metric))
            line += f"{format(row.value, form) if row else '':>{width}}"
        lines.append(line)
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """Result of ``eval``; as text, the table, or a benchmark's values."""

    def __str__(self) -> str:
        if any(row.split in ("imagenet", "ucf", "geneval") for row in self.rows):
            lines = [f"{row.metric:<32}{row.value:.4g}" for row in self.rows]
            return "\n".join([*lines, f"results  {self.path / 'results.json'}"])
        return f"{table(self.rows)}\nresults  {self.path / 'results.json'}"


def likelihood_rows(run: Run, variant: Variant, split: str = "") -> Tensor:
    """Write the row of exact bits per token; returns bits of each token."""
    test = variant.task.examples("test")
    if variant.places is not None:
        test = Digits(test.tokens[:, variant.places], test.labels)
    test = test.to(variant.model.tok_embeddings.weight.device)  # type: ignore[union-attr,arg-type]
    model, kind = variant.model, variant.kind
    found = bits(lambda tokens, labels: model.nll(tokens, labels, kind=kind), test)  # type: ignore[operator]
    _bits_row(run, found, variant.name, split)
    return found


def _bits_row(run: Run, bits_of: Tensor, variant: str, split: str = "") -> None:
    each = bits_of.mean(1)
    spread = float(each.std()) if len(each) > 1 else 0.0
    half = 1.96 * spread / math.sqrt(len(each))
    value = float(each.mean())
    run.row(
        "bits_per_token", value, unit="bits", better="lower", n=len(each), spread=spread,
        interval=(value - half, value + half), variant=variant, split=split,
    )  # fmt: skip


def drawing_rows(
    run: Run, variant: Variant, limit: int, *, batch: int, seed: int, guidance: float = 1.0, split: str = ""
) -> Tensor:
    """Draw, and write rows of accuracy, distance, passes and time; returns tokens ``[limit, tokens]``."""
    task = variant.task
    labels = torch.arange(limit) % task.classes
    parts = []
    begin = time.perf_counter()
    for at in range(0, limit, batch):
        part = labels[at : at + batch]
        seeds = range(seed + at, seed + at + len(part))
        tokens = draw_digits(variant.model, part, seeds, guidance=guidance, kind=variant.kind)  # type: ignore[arg-type]
        parts.append(tokens.cpu())
    seconds = time.perf_counter() - begin
    tokens = torch.cat(parts)
    if variant.places is not None:
        tokens = tokens[:, variant.places.argsort()]
    right = task.accuracy(tokens, labels).float()
    name = variant.name
    run.row("accuracy", float(right.mean()), better="higher", n=limit, variant=name, split=split)
    run.row("distance", task.distance(tokens), better="lower", n=limit, variant=name, split=split)
    run.row("passes", variant.passes, unit="passes", better="lower", variant=name, split=split)
    labels_of_time: dict[str, str | int | float] = {"batch": min(batch, limit)}
    run.row(
        "time_per_image", 1e3 * seconds / limit, unit="ms", better="lower", n=limit, variant=name, split=split,
        labels=labels_of_time,
    )  # fmt: skip
    return tokens


def real_rows(run: Run, task: Task, split: str = "") -> None:
    """Write what held-out ones themselves reach."""
    test, name = task.examples("test"), f"real {task.name}"
    right = task.accuracy(test.tokens, test.labels).float()
    run.row("accuracy", float(right.mean()), better="higher", n=len(test), variant=name, split=split)
    run.row("distance", task.distance(test.tokens), better="lower", n=len(test), variant=name, split=split)


def fitting(cfg: EvalConfig, folder: Path, data: Path) -> tuple[type[Any], Codes]:
    """Class of a saved model, and codes that fit it; no weight is read.

    Raises:
        CheckpointError: One of them is not there, or codes are out of range.
        ValueError: The codes are of texts and no encoder is named, or the other way round, or of another kind of model.
    """
    cls, options = _class_of(folder)
    codes, classes = open_codes(data), options["num_classes"]
    if codes.texts != (classes is None):
        raise ValueError(
            f"the model draws {'texts' if classes is None else 'classes'}, and the codes are of "
            f"{'texts' if codes.texts else 'classes'}"
        )
    if codes.texts != (cfg.text_encoder is not None):
        raise ValueError("--text-encoder belongs to codes of texts, and only to them; as google/flan-t5-xl")
    grid = tuple(options["grid"])
    if codes.grid is not None and tuple(codes.grid) != grid:
        raise ValueError(f"the codes are of a grid of {codes.grid}, and the model draws {grid}")
    codes.check(tokens=math.prod(grid), choices=options["vocab_size"], classes=classes, limit=cfg.limit or LIMIT)
    return cls, codes


def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Measure every variant.

    Raises:
        CheckpointError: There is no host, saved model or folder of codes, or codes are out of range.
        ValueError: Model and codes do not fit.
    """
    if cfg.protocol != "host":
        judge(cfg, run)
        return EvalReport.of(run)
    if cfg.model is not None and cfg.data is not None:
        _saved(cfg, cfg.model, cfg.data, run)
        return EvalReport.of(run)
    host = load_host(resolve_device(run.device), path=cfg.host)
    variants = variants_of(host)
    with progress_bar(len(variants), desc="variants", quiet=run.quiet) as bar:
        for variant in variants:
            likelihood_rows(run, variant)
            if not cfg.nll:
                guidance = 1.0 if cfg.guidance is None else cfg.guidance
                drawing_rows(run, variant, cfg.limit or LIMIT, batch=cfg.batch, seed=cfg.seed, guidance=guidance)
            bar.update()
    if not cfg.nll:
        real_rows(run, host.task)
    return EvalReport.of(run)


def _class_of(folder: Path) -> tuple[type[Any], dict[str, Any]]:
    """Class and config of a saved model."""
    known = (NARForImageGeneration, LlamaGenForImageGeneration, FlashARForImageGeneration, NARForVideoGeneration)
    kinds = {cls.__name__: cls for cls in known}
    try:
        options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = options["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no saved model; expected what train writes") from error
    if kind not in kinds:
        raise CheckpointError(f"{folder} holds a {kind}; expected one of {', '.join(kinds)}")
    return kinds[kind], options


def _saved(cfg: EvalConfig, folder: Path, data: Path, run: Run) -> None:
    """Write the row of a saved model's exact bits per token of codes' first views."""
    cls, codes = fitting(cfg, folder, data)
    device = resolve_device(run.device)
    model: Any = cls.from_pretrained(folder).to(device).eval()
    reader = None
    if cfg.text_encoder is not None:
        reader = TextReader.load(cfg.text_encoder, model.cls_token_num, device, resolve_dtype("auto", device))
    count, parts = min(cfg.limit or LIMIT, len(codes)), []
    with torch.no_grad(), progress_bar(count, desc="images", quiet=run.quiet) as bar:
        for at in range(0, count, cfg.batch):
            items = [codes.item(index) for index in range(at, min(at + cfg.batch, count))]
            tokens = torch.stack([views[0] for views, _ in items]).to(device)
            given = condition_of([label for _, label in items], reader, device)
            parts.append(model.nll(tokens, **given).cpu() / math.log(2))
            bar.update(len(items))
    flash = isinstance(model, FlashARForImageGeneration)
    _bits_row(run, torch.cat(parts), "flashar" if flash else "raster" if model.order.raster else "nar")
