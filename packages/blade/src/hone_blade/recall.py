"""How much of dense attention's mass a mask keeps, on queries and keys of the trained teacher.

By score and density, beside static masks and the best mask that there is; by sampled tokens; by order of tokens. Each
panel changes one thing. The teacher draws with dense attention, so all masks are measured on the same queries and keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Row, Run
from hone_video.attachment import Method
from hone_video.clips import random_labels
from hone_video.grids import ORDERS, Order
from hone_video.handle import VideoHandle, attach_method
from hone_video.host import Host, load_host
from hone_video.means import write_mean
from hone_video.orders import token_order
from torch import Tensor

from . import plots
from .config import BladeConfig, ReproduceConfig
from .method import select_blocks, sparse_layout
from .prober import probe

__all__ = ["ORACLE", "Setting", "block_mass", "compare_recall", "dense_queries", "describe_recall", "is_recall"]
__all__ += ["recalls", "settings"]

SCORES = ("paper", "official", "lse", "mean")
STATIC = ("window", "random")
ORACLE = "oracle"
"""The mask of the blocks that hold most of a row's mass: none of the same size keeps more."""
DENSITIES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
SAMPLES = (4, 8, 16, 32)
SHUFFLED = "random"
"""The order that is none."""
MOMENTS = (0.0, 0.4, 0.8)
"""Where in the denoising it is measured, as shares of the steps."""


@dataclass(frozen=True)
class Setting:
    """One point of a panel.

    Attributes:
        panel: ``density``, ``samples`` or ``order``.
        mask: A score's name, a static mask's, or the oracle's.
        config: Of the mask; its order is ``order``, which can be no order of a config.
        order: Of the tokens.
    """

    panel: str
    mask: str
    config: BladeConfig
    order: str

    @property
    def key(self) -> str:
        """What tells it from the others."""
        cfg = self.config
        return f"{self.panel} {self.mask} {cfg.max_density} {cfg.samples} {self.order}"


def settings(cfg: ReproduceConfig, tokens: int, seed: int) -> list[Setting]:
    """The points of the three panels; all masks keep blocks by rank, so that counts are equal.

    Args:
        cfg: ``students.comparison`` gives blocks, and the density and samples of panels that do not change them.
        tokens: Of the host.
        seed: Of samples and random masks.
    """
    base = cfg.students.comparison.configs(tokens)["asa"]
    assert base is not None
    base = replace(base, seed=seed)

    def mask(name: Any, config: BladeConfig) -> BladeConfig:
        if name in STATIC:
            return replace(config, mask=name)
        return config if name == ORACLE else replace(config, score=name)

    found = [
        Setting("density", name, mask(name, replace(base, max_density=density)), base.order)
        for name in (*SCORES, *STATIC, ORACLE)
        for density in DENSITIES
    ]
    found += [
        Setting("samples", name, mask(name, replace(base, samples=count)), base.order)
        for name in SCORES[:-1]  # mean takes none
        for count in SAMPLES
        if count <= base.block
    ]
    for order in (*ORDERS, SHUFFLED):
        found += [Setting("order", name, mask(name, base), order) for name in (*SCORES, ORACLE)]
    return found


class _Tap(Method):
    """Dense attention, which shows its queries and keys to ``record``."""

    name = "the tap"
    counts_steps = True

    def __init__(self, steps: frozenset[int]) -> None:
        self.config, self.steps = None, steps

    def plan(self, step: int, timestep: float | None) -> bool | None:
        return True if step in self.steps else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def measure(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.attend(q, k, v), (q.clone(), k.clone())


class _TapHandle(VideoHandle[None]):
    """Of the tap."""


def dense_queries(host: Host, labels: Tensor, *, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Layer, queries and keys ``[N, H, T, D]``, in raster order, of the teacher as it draws.

    Guided steps give those of the prompts.

    Args:
        host: What draws, with its own sampler.
        labels: ``[N, 5]`` what to draw.
        seed: Of the noise.
    """
    moments = frozenset(int(share * host.config.steps) for share in MOMENTS)
    with attach_method(host.transformer, _Tap(moments), _TapHandle) as handle, handle.record() as rows:
        host.sample(host.encode_labels(labels), host.noise(len(labels), seed))
    for row in rows:
        q, k = row.stats
        yield row.layer, q[: len(labels)], k[: len(labels)]


def block_mass(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Share of a query block's dense attention that lies on each key block, ``[B, H, blocks, blocks]``; rows sum to 1.

    Args:
        q: ``[B, H, T, D]``.
        k: Likewise.
        block: Tokens in a block, which divide T.

    Raises:
        ValueError: They do not.
    """
    tokens = q.shape[2]
    if tokens % block:
        raise ValueError(f"block must divide the {tokens} tokens, so that rows weigh alike; got {block}")
    rows = []
    for one, other in zip(q, k, strict=True):  # a clip at a time: the map is large
        weights = (one.float() @ other.float().transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1)
        rows.append(weights.unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, block)).mean(-2))
    return torch.stack(rows)


def recalls(
    q: Tensor, k: Tensor, layer: int, points: Sequence[Setting], host: Host, *, seed: int
) -> Iterator[tuple[Setting, Tensor]]:
    """Each setting with the mass that its mask keeps, mean over heads and rows, ``[B]``.

    Args:
        q: Queries ``[B, H, T, D]`` in raster order.
        k: Keys, likewise.
        layer: Of the model.
        points: Of one size of blocks.
        host: For its grid.
        seed: Of the random order.
    """
    grid = host.config.grid
    for order in dict.fromkeys(point.order for point in points):
        if order == SHUFFLED:
            at = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(seed)).to(q.device)
        else:
            at = token_order(cast(Order, order), *grid, device=q.device, tile=points[0].config.tile)
        own_q, own_k = q[:, :, at], k[:, :, at]
        mass = block_mass(own_q, own_k, points[0].config.block)
        scores: dict[tuple[str, int], Tensor] = {}
        for point in (point for point in points if point.order == order):
            cfg = point.config
            if point.mask in STATIC:
                kept = sparse_layout(own_q, own_k, cfg=cfg, layer=layer, grid=grid).to_mask()
            else:
                key = point.mask, cfg.samples
                if key not in scores:
                    scores[key] = mass if point.mask == ORACLE else probe(own_q, own_k, cfg, layer=layer)
                # No block is given to the oracle that it would not take.
                chosen = select_blocks(scores[key], replace(cfg, keep_diagonal=False) if point.mask == ORACLE else cfg)
                kept = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, chosen.kv_idx.long(), True)
            yield point, (mass * kept).sum(-1).mean((1, 2))


def compare_recall(cfg: ReproduceConfig, run: Run) -> None:
    """Measure every setting with every seed; write rows, and the figure as PNG and SVG.

    Args:
        cfg: Prompts, seeds, blocks.
        run: The run, entered. Its artifacts hold a file per seed, so that a run that was cut off goes on with the next.

    Raises:
        CheckpointError: There is no such host.
        ValueError: The blocks do not divide the host's tokens.
    """
    host = load_host(resolve_device(run.device), path=cfg.host)
    batches = -(-cfg.prompts // cfg.batch)
    found: list[dict[str, list[float]]] = []
    with progress_bar(cfg.seeds * batches, desc="batches", quiet=run.quiet) as bar:
        for seed in range(cfg.seeds):
            file = run.artifacts / f"recall-{seed}.json"
            if not file.is_file():
                points = settings(cfg, host.config.tokens, seed)
                labels = random_labels(cfg.prompts, torch.Generator().manual_seed(4000 + seed))
                values: dict[str, list[float]] = {point.key: [] for point in points}
                for at in range(0, cfg.prompts, cfg.batch):
                    for key, value in _batch(host, labels[at : at + cfg.batch], points, seed).items():
                        values[key] += value.tolist()
                    bar.update()
                atomic_write_json(file, values)
            found.append(json.loads(file.read_text(encoding="utf-8")))
    for point in settings(cfg, host.config.tokens, 0):
        clips = torch.tensor([value for values in found for value in values[point.key]])
        labels_of = {"density": f"{point.config.max_density:g}", "order": point.order}
        if point.mask in SCORES[:-1]:
            labels_of["samples"] = str(point.config.samples)
        write_mean(run, "recall", clips, variant=point.mask, split=point.panel, labels=labels_of)
    for ending in ("png", "svg"):
        plots.recall_chart(run.rows, run.figures / f"recall.{ending}")


def _batch(host: Host, labels: Tensor, points: Sequence[Setting], seed: int) -> dict[str, Tensor]:
    """Recall of each clip by setting, mean over layers and moments."""
    sums = {point.key: torch.zeros(len(labels)) for point in points}
    count = 0
    for layer, q, k in dense_queries(host, labels, seed=seed):
        count += 1
        for point, value in recalls(q, k, layer, points, host, seed=seed):
            sums[point.key] += value.cpu()
    return {key: value / count for key, value in sums.items()}


def is_recall(rows: Sequence[Row]) -> bool:
    """Whether the rows are of this comparison."""
    return any(row.split == "order" and row.metric == "recall" for row in rows)


def describe_recall(rows: Sequence[Row]) -> str:
    """The three panels as tables, with what the best score leaves to the oracle."""
    lines = []
    for panel, axis in (("density", "density"), ("samples", "samples"), ("order", "order")):
        shown = [row for row in rows if row.split == panel]
        columns = list(dict.fromkeys(str(row.labels[axis]) for row in shown))
        lines.append(f"recall by {panel:<12}" + "".join(f"{column:>9}" for column in columns))
        for mask in dict.fromkeys(row.variant for row in shown):
            values = {str(row.labels[axis]): row.value for row in shown if row.variant == mask}
            lines.append(f"  {mask:<20}" + "".join(f"{values[column]:>9.3f}" for column in columns))
        lines.append("")
    at = [row for row in rows if row.split == "order" and row.labels["order"] == "gilbert"]
    best = max((row for row in at if row.variant in SCORES), key=lambda row: row.value)
    bound = next(row for row in at if row.variant == ORACLE)
    lines.append(
        f"at density {best.labels['density']} the score that keeps most is {best.variant}: {best.value:.3f} of the "
        f"mass, where the best mask keeps {bound.value:.3f}"
    )
    return "\n".join(lines)
