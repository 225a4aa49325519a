"""Generated clips with questions, labelled by construction; files of questions are read by ``hone_lm``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hone_lm.question_sets import Item
from hone_lm.video import Clip
from torch import Tensor

from .config import QUESTIONS, ClipConfig

__all__ = [
    "COLORS",
    "CORNERS",
    "DIRECTIONS",
    "SHAPES",
    "Scenes",
    "draw_scenes",
    "fake_batch",
    "generated_items",
    "questions",
    "render",
]

COLORS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 240), "yellow": (235, 210, 40)}
SHAPES = ("square", "disc", "cross", "triangle")
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


@dataclass(frozen=True)
class Scenes:
    """What a batch of clips shows.

    Attributes:
        color: ``[clips, 2]``, index into ``COLORS``; the two differ.
        shape: ``[clips, 2]``, index into ``SHAPES``.
        direction: ``[clips, 2]``, index into ``DIRECTIONS``.
        row: ``[clips, 2]``, cell at the first frame.
        column: likewise.
        appears: ``[clips, 2]``, first frame in which it is seen; the two differ.
        corner: ``[clips]``, quarter of the frame with the white dot, index into ``CORNERS``.
        dot: ``[clips, 2]``, its cell (row, column).
    """

    color: Tensor
    shape: Tensor
    direction: Tensor
    row: Tensor
    column: Tensor
    appears: Tensor
    corner: Tensor
    dot: Tensor

    def __len__(self) -> int:
        return len(self.corner)

    def path(self, cfg: ClipConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column ``[clips, 2, frames]`` of each shape, and whether it is seen."""
        device = self.corner.device
        ways = torch.tensor(list(DIRECTIONS.values()), device=device)[self.direction]
        time = torch.arange(cfg.frames, device=device)
        moved = time // 2
        row = self.row[..., None] + ways[..., 0, None] * moved
        column = self.column[..., None] + ways[..., 1, None] * moved
        return row, column, time >= self.appears[..., None]


def draw_scenes(count: int, cfg: ClipConfig, generator: torch.Generator) -> Scenes:
    """Draw what clips show; every attribute is uniform, on the generator's device."""
    device = generator.device

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator, device=device)

    def two_of(high: int) -> Tensor:
        first = integers(high)
        return torch.stack([first, (first + 1 + integers(high - 1)) % high], 1)

    direction = integers(len(DIRECTIONS), 2)
    ways = torch.tensor(list(DIRECTIONS.values()), device=device)[direction]
    free = cfg.grid - cfg.steps
    along, across = integers(free, 2), integers(cfg.grid, 2)

    def start(axis: int) -> Tensor:
        way = ways[..., axis]
        return torch.where(way == 0, across, torch.where(way > 0, along, along + cfg.steps))

    corner, half = integers(len(CORNERS)), cfg.grid // 2
    inside = integers(half, 2)
    edge = cfg.grid - half
    dot = torch.stack([inside[:, 0] + (corner // 2) * edge, inside[:, 1] + (corner % 2) * edge], 1)
    return Scenes(
        color=two_of(len(COLORS)),
        shape=integers(len(SHAPES), 2),
        direction=direction,
        row=start(0),
        column=start(1),
        appears=two_of(cfg.frames // 2),
        corner=corner,
        dot=dot,
    )


def render(scenes: Scenes, cfg: ClipConfig, generator: torch.Generator) -> Tensor:
    """Draw clips as bytes ``[clips, frames, 3, size, size]``; the later shape is drawn over the earlier."""
    device, count = scenes.corner.device, len(scenes)
    masks = _shape_masks(cfg.cell).to(device)
    colors = torch.tensor(list(COLORS.values()), device=device, dtype=torch.float32) / 255
    # Cells first: [clips, frames, rows, columns, 3, cell, cell].
    canvas = torch.full((count, cfg.frames, cfg.grid, cfg.grid, 3, cfg.cell, cfg.cell), 0.15, device=device)
    row, column, seen = scenes.path(cfg)
    clips, frames = torch.arange(count, device=device)[:, None], torch.arange(cfg.frames, device=device)[None]
    for which in (0, 1):
        mask = masks[scenes.shape[:, which]][:, None, None] * seen[:, which, :, None, None, None]
        paint = colors[scenes.color[:, which]][:, None, :, None, None]
        place = (clips, frames, row[:, which], column[:, which])
        canvas[place] = canvas[place] * (1 - mask) + paint * mask
    middle = slice(cfg.cell // 2 - 1, cfg.cell // 2 + 1)
    canvas[torch.arange(count, device=device), :, scenes.dot[:, 0], scenes.dot[:, 1], :, middle, middle] = 1.0
    video = canvas.permute(0, 1, 4, 2, 5, 3, 6).reshape(count, cfg.frames, 3, cfg.size, cfg.size)
    if cfg.noise:
        video = video + cfg.noise * torch.randn(video.shape, generator=generator, device=device)
    return (video.clamp(0, 1) * 255).round().to(torch.uint8)


def _shape_masks(cell: int) -> Tensor:
    """``[shapes, cell, cell]`` in {0, 1}."""
    axis = (torch.arange(cell) + 0.5) / cell * 2 - 1
    y, x = axis[:, None].expand(cell, cell), axis[None, :].expand(cell, cell)
    square = (x.abs() < 0.8) & (y.abs() < 0.8)
    disc = x**2 + y**2 < 0.85
    cross = ((x.abs() < 0.3) | (y.abs() < 0.3)) & (x.abs() < 0.95) & (y.abs() < 0.95)
    triangle = (y > -0.9) & (y < 0.8) & (x.abs() < (y + 0.9) / 1.9)
    return torch.stack([square, disc & (x**2 + y**2 > 0.2), cross, triangle]).float()


def questions(scenes: Scenes, index: int) -> list[tuple[str, str, tuple[str, ...], int]]:
    """Questions about a clip as (kind, text, options, answer): shape and direction of both, order, place."""
    names = [list(COLORS)[value] for value in scenes.color[index].tolist()]
    shapes, ways = scenes.shape[index].tolist(), scenes.direction[index].tolist()
    first = int(scenes.appears[index].argmin())
    asked: list[tuple[str, str, tuple[str, ...], int]] = []
    for which, name in enumerate(names):
        asked.append(("shape", f"what shape is the {name} one ?", SHAPES, shapes[which]))
        asked.append(("direction", f"where does the {name} one move ?", tuple(DIRECTIONS), ways[which]))
    # The two names stand in one order or the other, whichever is first.
    swap = bool(scenes.corner[index] % 2)
    pair = names[::-1] if swap else names
    asked.append(("order", f"which appears first , {pair[0]} or {pair[1]} ?", tuple(pair), pair.index(names[first])))
    asked.append(("place", "where is the white dot ?", CORNERS, int(scenes.corner[index])))
    return asked


def generated_items(count: int, cfg: ClipConfig | None = None, *, seed: int = 0) -> list[Item]:
    """Generated clips with a question each, the kinds in turn.

    Args:
        count: Number of items.
        cfg: Size of the clips.
        seed: Of everything.
    """
    cfg = cfg or ClipConfig()
    generator = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(count, cfg, generator)
    video = render(scenes, cfg, generator)
    items = []
    for index in range(count):
        kind = QUESTIONS[index % len(QUESTIONS)]
        asked = [entry for entry in questions(scenes, index) if entry[0] == kind]
        _, text, options, answer = asked[(index // len(QUESTIONS)) % len(asked)]
        clip = Clip(video[index], tuple(float(t) for t in range(cfg.frames)), float(cfg.frames), 1.0)
        items.append(
            Item(id=f"{seed}-{index}", question=text, options=options, answer=answer, category=kind, clip=clip)
        )
    return items


def fake_batch(count: int = 4, seed: int = 0) -> list[Item]:
    """A few generated items, for tests and smoke runs."""
    return generated_items(count, seed=seed)
