"""Which block tells textured from flat: every block's change against known masks, and against the drawn image.

Source: ours; the abstract says that blocks attend to different regions, and not which is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json, read_prompts
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_visual_ar.generation import Generation, Policy
from hone_visual_ar.schedules import infinity_schedule
from torch import Tensor

from .config import CalibrateConfig, SparseVARConfig
from .data import random_labels, render, words
from .grader import texture_energy
from .host import SCHEDULE, Host, load_host
from .method import change_map, resize_map
from .sample import check_inputs, drawer

__all__ = ["CalibrateReport", "Watch", "auroc", "calibrate", "chosen", "mask_scores", "spearman"]


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 along the last axis; ties by position."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()


def auroc(score: Tensor, mask: Tensor) -> Tensor:
    """Chance that a masked position scores above another, of each row; NaN where a row has only one kind.

    Args:
        score: ``[B, N]``.
        mask: ``[B, N]`` bool.
    """
    inside, total = mask.sum(-1).double(), mask.shape[-1]
    above = (_ranks(score) * mask).sum(-1) - inside * (inside - 1) / 2
    return above / (inside * (total - inside))


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of each row of ``[B, N]``."""
    a, b = (_ranks(x) - (x.shape[-1] - 1) / 2 for x in (first, second))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


@torch.no_grad()
def mask_scores(host: Host, images: int, scale: int, seed: int, *, batch: int = 64) -> Tensor:
    """AUROC ``[images, blocks]`` of each block's map at real scenes against what is textured in them.

    Args:
        host: Reads the scenes teacher-forced.
        images: How many.
        scale: Whose tokens are to be chosen; the map is of the scale before.
        seed: Of the scenes.
        batch: At a time.
    """
    generator = torch.Generator().manual_seed(70_000 + seed)
    grid, before = SCHEDULE.grids[scale], SCHEDULE.grids[scale - 1]
    begin = SCHEDULE.start(scale - 1)
    tokens = slice(begin, begin + SCHEDULE.tokens(scale - 1))
    found = []
    for at in range(0, images, batch):
        labels = random_labels(min(batch, images - at), generator)
        drawn = render(labels, generator)
        features = host.tokenizer.features(drawn.images.to(host.device) * 2 - 1).float()
        inputs, total = [], torch.zeros_like(features)
        for k, bits in enumerate(host.tokenizer.to_scales(features, SCHEDULE)[0][:-1]):
            codes = host.tokenizer.embed(bits.movedim(1, -1)).movedim(-1, 1)
            total = total + host.tokenizer.spread(codes, (16, 16), scale=k, scales=len(SCHEDULE))
            inputs.append(host.tokenizer.shrink(total, SCHEDULE.grids[k + 1]).flatten(2).transpose(1, 2))
        changes: list[Tensor] = []
        condition = host.transformer.condition(*words(labels.to(host.device), host.table), guided=False)
        host.transformer(
            condition,
            torch.cat(inputs, 1),
            SCHEDULE,
            observe=lambda n, a, b, changes=changes: changes.append(change_map(a[:, tokens], b[:, tokens])),
        )
        share = F.adaptive_avg_pool2d(drawn.textured[:, None].float(), grid).flatten(1).to(host.device)
        scores = [auroc(resize_map(c.unflatten(1, before), grid).flatten(1), share > 0.25) for c in changes]
        found.append(torch.stack(scores, 1))
    return torch.cat(found)


class Watch(Policy):
    """Everything runs, and every block's change at a scale is kept: ``[B, h, w]`` of each.

    Args:
        scale: Number.

    Attributes:
        last: The changes of the last generation, in the order of the blocks.
    """

    def __init__(self, scale: int) -> None:
        self.scale_ = scale
        self.last: list[Tensor] = []

    def begin(self, run: Generation) -> list[Tensor]:
        """See the base class."""
        self.last = []
        return self.last

    def scale(self, run: Generation, scale: int, state: list[Tensor]) -> Tensor | None:
        """See the base class."""
        if scale != self.scale_:
            return super().scale(run, scale, state)
        images, grid = run.condition.images, run.schedule.grids[scale]
        hidden = run.run(
            run.embed(scale),
            scale,
            observe=lambda n, a, b: state.append(change_map(a[:images], b[:images]).unflatten(1, grid)),
        )
        return run.codes(run.logits(hidden, scale), scale)


@torch.no_grad()
def image_scores(host: Host, images: int, scale: int, seed: int, *, batch: int = 64) -> Tensor:
    """Rank correlation ``[images, blocks]`` of each block's map with the Laplacian energy of the image drawn."""
    generator = torch.Generator().manual_seed(80_000 + seed)
    found = []
    for at in range(0, images, batch):
        labels = random_labels(min(batch, images - at), generator)
        watch = Watch(scale - 1)
        run = host.draw(labels, range(seed + at, seed + at + len(labels)), policy=watch)
        found.append(_correlation((run.image() + 1) / 2, watch.last, SCHEDULE.grids[scale]))
    return torch.cat(found)


def chosen(host: Host, settings: SparseVARConfig, images: int = 16) -> SparseVARConfig:
    """Settings with the block that drawn images call best, where they name none.

    Args:
        host: Draws the images, of seeds of their own.
        settings: Of the method.
        images: How many.
    """
    if settings.detector is not None or settings.start_scale == len(SCHEDULE):
        return settings
    by_image = image_scores(host, images, SCHEDULE.resolve(settings.start_scale), 9).nanmean(0)
    return replace(settings, detector=int(by_image.argmax()))


def _correlation(image_01: Tensor, changes: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """``[B, blocks]`` of maps ``[B, h, w]`` at the scale before ``grid``."""
    energy = F.adaptive_avg_pool2d(texture_energy(image_01)[:, None], grid).flatten(1)
    return torch.stack([spearman(resize_map(change, grid).flatten(1), energy) for change in changes], 1)


def pipeline_scores(cfg: CalibrateConfig, prompts: list[str], run: Run) -> Tensor:
    """As ``image_scores``, of a saved pipeline's images."""
    assert cfg.model is not None
    schedule = infinity_schedule(cfg.image.pixels, cfg.image.aspect)
    scale = schedule.resolve(cfg.start)
    pipe, watch, found = drawer(cfg.model, cfg.image, run.device), Watch(scale - 1), []
    with progress_bar(len(prompts), desc="images", quiet=run.quiet) as bar:
        for at in range(0, len(prompts), cfg.batch):
            part = prompts[at : at + cfg.batch]
            images = pipe(part, seeds=cfg.seed + at, policy=watch, output_type="pt").images
            found.append(_correlation(images, watch.last, schedule.grids[scale]).cpu())
            bar.update(len(part))
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class CalibrateReport(Report):
    """Result of ``calibrate``.

    Attributes:
        file: The choice, as JSON.
    """

    file: Path

    @classmethod
    def of(cls, run: Run) -> CalibrateReport:
        """Return the report of a run whose rows are written."""
        return cls(path=run.path, rows=tuple(run.rows), file=run.artifacts / "detector.json")

    def __str__(self) -> str:
        values = {(row.variant, row.metric): row.value for row in self.rows}
        lines = [f"{'block':<8}{'rank correlation, drawn':>26}{'AUROC, known masks':>20}"]
        for name in dict.fromkeys(row.variant for row in self.rows):
            known = values.get((name, "auroc"))
            lines.append(
                f"{name:<8}{values[name, 'rank_correlation']:>26.3f}{'-' if known is None else f'{known:.3f}':>20}"
            )
        return "\n".join([*lines, f"detector {self.file}"])


def calibrate(cfg: CalibrateConfig, run: Run) -> CalibrateReport:
    """Score every block and name the best.

    The choice is by rank correlation with drawn images, which needs no known mask; on the host the masks check it.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: There is no host, no pipeline or no prompts.
        ValueError: The scale has none before it, or a prompt is too long.
    """
    schedule = SCHEDULE if cfg.model is None else infinity_schedule(cfg.image.pixels, cfg.image.aspect)
    scale = schedule.resolve(cfg.start)
    if scale < 1:
        raise ValueError(f"start_scale must leave a scale before it to be measured; got {cfg.start}")
    choice: dict[str, Any] = {"grid": list(schedule.last), "start_scale": cfg.start}
    by_mask: Tensor | None = None
    if cfg.model is None:
        host = load_host(resolve_device(run.device), path=cfg.host)
        by_mask = mask_scores(host, cfg.limit, scale, cfg.seed).nanmean(0)
        by_image, count = image_scores(host, cfg.limit, scale, cfg.seed).nanmean(0), cfg.limit
        choice |= {"model": "tiny", "auroc": [round(float(x), 4) for x in by_mask]}
    else:
        assert cfg.prompt_file is not None
        prompts = list(read_prompts(cfg.prompt_file)[: cfg.limit])
        check_inputs(cfg.model, prompts, cfg.image, SparseVARConfig(start_scale=cfg.start))
        by_image, count = pipeline_scores(cfg, prompts, run).nanmean(0), len(prompts)
        choice |= {"model": cfg.model.name}
    best = int(by_image.argmax())
    for block, value in enumerate(by_image.tolist()):
        run.row("rank_correlation", value, better="higher", n=count, variant=str(block))
        if by_mask is not None:
            run.row("auroc", float(by_mask[block]), better="higher", n=count, variant=str(block))
    choice |= {"detector": best, "images": count, "rank_correlation": [round(float(x), 4) for x in by_image]}
    atomic_write_json(run.artifacts / "detector.json", choice)
    return CalibrateReport.of(run)
