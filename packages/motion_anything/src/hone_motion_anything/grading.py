"""How good generated motions are: the grammar's rules, and the metrics of text to motion with the host's evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from .config import UnmaskConfig
from .data import Clips, generated
from .features import recover
from .grammar import right
from .host import Host
from .method import attention_mask
from .metrics import frechet, matching, r_precision

__all__ = ["Overlap", "draw_clips", "embed", "grade_host", "mask_overlap"]

Grade = tuple[float, str, Literal["higher", "lower", "none"]]
_BATCH = 256


def _parts(count: int) -> Iterator[slice]:
    for begin in range(0, count, _BATCH):
        yield slice(begin, min(count, begin + _BATCH))


@torch.no_grad()
def draw_clips(host: Host, clips: Clips, seed: int, settings: UnmaskConfig | None = None) -> Float[Tensor, "n 80 263"]:
    """Motions for the captions, and the music, of clips."""
    generator = torch.Generator(host.device).manual_seed(seed)
    found = []
    for part in _parts(len(clips)):
        music = None if clips.music is None else clips.music[part]
        found.append(host.draw(host.condition(clips.words[part], music), generator, settings))
    return torch.cat(found)


@torch.no_grad()
def embed(host: Host, clips: Clips, features: Tensor) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Vectors of captions and of motions ``[N, D]``."""
    normal = host.tokenizer.normalise(features)
    texts = [host.evaluator.text(clips.words[part]) for part in _parts(len(clips))]
    moved = [host.evaluator.motion(normal[part]) for part in _parts(len(clips))]
    return torch.cat(texts).cpu().numpy(), torch.cat(moved).cpu().numpy()


@dataclass(frozen=True)
class Overlap:
    """Masks beside the cells that are known to move.

    Attributes:
        precision: Share of hidden cells that an event moves, ``[N]``.
        recall: Share of the event's cells that are hidden, ``[N]``.
        share: Share of all cells that are hidden: what a random mask's recall would be, ``[N]``.
    """

    precision: Float[Tensor, " clips"]
    recall: Float[Tensor, " clips"]
    share: Float[Tensor, " clips"]


@torch.no_grad()
def mask_overlap(host: Host, clips: Clips, alpha_time: float = 0.3, alpha_parts: float = 0.3) -> Overlap:
    """How well attention finds the known key frames and parts of clips."""
    masks = []
    for part in _parts(len(clips)):
        ids = host.tokenizer.encode(clips.features[part])
        valid = torch.ones_like(ids[..., 0], dtype=torch.bool)
        condition = host.condition(clips.words[part], None if clips.music is None else clips.music[part])
        masks.append(attention_mask(*host.transformer.scores(ids, condition, valid), valid, alpha_time, alpha_parts))
    mask: Bool[Tensor, "n t p"] = torch.cat(masks)
    both = (mask & clips.cells).flatten(1).sum(1).float()
    hidden = mask.flatten(1).sum(1).float()
    return Overlap(both / hidden, both / clips.cells.flatten(1).sum(1), hidden / mask[0].numel())


@torch.no_grad()
def grade_host(host: Host, count: int, *, seed: int, settings: UnmaskConfig | None = None) -> dict[str, Grade]:
    """Grades on held-out scenes: name to value, unit, and which way is better."""
    plain = generated(count, seed, dance=False, device=host.device)
    dance = generated(count, seed, dance=True, device=host.device)
    back = torch.cat([host.tokenizer.decode(host.tokenizer.encode(plain.features[part])) for part in _parts(count)])
    error = (recover(back) - recover(plain.features)).norm(dim=-1).mean()
    drawn, danced = draw_clips(host, plain, seed, settings), draw_clips(host, dance, seed + 1, settings)
    texts, real = embed(host, plain, plain.features)
    _, made = embed(host, plain, drawn)
    _, rebuilt = embed(host, plain, back)
    pool = min(32, count)
    found = mask_overlap(host, plain)
    return {
        "reconstruction_mm": (1000 * float(error), "mm", "lower"),
        "reconstructed": (float(right(recover(back), plain.scenes).float().mean()), "", "higher"),
        "events": (float(right(recover(drawn), plain.scenes).float().mean()), "", "higher"),
        "dance_events": (float(right(recover(danced), dance.scenes).float().mean()), "", "higher"),
        "r1_real": (float(r_precision(texts, real, pool=pool)[0]), "", "higher"),
        "r1": (float(r_precision(texts, made, pool=pool)[0]), "", "higher"),
        "mm_dist_real": (matching(texts, real), "", "lower"),
        "mm_dist": (matching(texts, made), "", "lower"),
        "frechet_reconstructed": (frechet(rebuilt, real), "", "lower"),
        "frechet": (frechet(made, real), "", "lower"),
        "mask_precision": (float(found.precision.mean()), "", "higher"),
        "mask_recall": (float(found.recall.mean()), "", "higher"),
        "mask_share": (float(found.share.mean()), "", "none"),
    }
