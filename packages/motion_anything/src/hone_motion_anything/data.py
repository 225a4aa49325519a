"""Generated clips as batches."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .features import Columns
from .grammar import Scenes, draw_scenes, event_cells, motions, scene_ids, scene_music

__all__ = ["Clips", "fake_batch", "generated", "statistics"]

_PART = 512
"""Motions that are made at a time."""


@dataclass(frozen=True)
class Clips:
    """Generated motions, all standing or all dancing.

    Attributes:
        scenes: What happens.
        features: ``[N, 80, 263]``.
        words: ``[N, words]`` captions.
        music: ``[N, 20, 35]`` pooled features of the music; None for who stands.
        cells: ``[N, 20, 6]`` what an event moves.
    """

    scenes: Scenes
    features: Float[Tensor, "clips frames 263"]
    words: Int[Tensor, "clips words"]
    music: Float[Tensor, "clips tokens 35"] | None
    cells: Bool[Tensor, "clips tokens 6"]

    def __len__(self) -> int:
        return len(self.features)


def _rows(scenes: Scenes, at: slice) -> Scenes:
    return replace(scenes, **{field.name: getattr(scenes, field.name)[at] for field in fields(scenes)})


def generated(count: int, seed: int, *, dance: bool, device: torch.device | str = "cpu") -> Clips:
    """Motions of the grammar; the same seed gives the same scenes on every device.

    Args:
        count: How many.
        seed: Of the scenes.
        dance: All to music, or all without.
        device: Where.
    """
    scenes = draw_scenes(count, torch.Generator().manual_seed(2 * seed + dance), dance=dance)
    scenes = replace(scenes, **{field.name: getattr(scenes, field.name).to(device) for field in fields(scenes)})
    parts = [motions(_rows(scenes, slice(begin, begin + _PART))) for begin in range(0, count, _PART)]
    music = scene_music(scenes) if dance else None
    return Clips(scenes, torch.cat(parts), scene_ids(scenes), music, event_cells(scenes))


def fake_batch(count: int = 4, seed: int = 0, *, dance: bool = False) -> Clips:
    """A few generated motions, to try things on."""
    return generated(count, seed, dance=dance)


def statistics(features: Float[Tensor, "clips frames 263"], bias: float = 5.0) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column.

    Deviations are averaged within the groups of the row, and those of root and contacts divided by ``bias``, so that
    they weigh more. No deviation is less than a thousandth: what stands still would be divided by nothing.

    Source: HumanML3D's statistics, and T2M's ``feat_bias``.
    """
    flat = features.flatten(0, 1)
    mean, deviation = flat.mean(0), flat.std(0)
    columns = Columns((features.shape[-1] + 1) // 12)
    groups = [slice(0, 1), slice(1, 3), slice(3, 4), columns.places, columns.turns, columns.speeds, columns.contacts]
    for group in groups:
        deviation[group] = deviation[group].mean()
    for group in (columns.root, columns.contacts):
        deviation[group] = deviation[group] / bias
    return mean, deviation.clamp(min=1e-3)
