"""Generation from the empty grid, or of some tokens of a known motion: guidance and iterative unmasking."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from hone_kernels.backends import Backend
from hone_kernels.guided_draw import draw_tokens
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import UnmaskConfig
from .method import Condition, MotionTransformer
from .skeletons import PARTS

__all__ = ["Passes", "check_finite", "draw", "draw_motion", "edited", "guided", "passes", "unmask"]


class Passes(NamedTuple):
    """Logits of one pass under several settings of the condition, and how guidance weighs them.

    Attributes:
        logits: ``[S, B, T, P, codes]``.
        weights: ``[S]``; they sum to one.
    """

    logits: Float[Tensor, "settings batch time parts codes"]
    weights: tuple[float, ...]


def passes(
    model: MotionTransformer,
    ids: Int[Tensor, "batch time parts"],
    condition: Condition,
    valid: Bool[Tensor, "batch time"],
    text_scale: float,
    music_scale: float,
) -> Passes:
    """Logits under each setting of the condition; all settings go through the model as one batch."""
    batch = condition.batch
    both = condition.text is not None and condition.music is not None
    # (text left out, music left out, weight) of each setting.
    if both:
        settings = [
            (True, True, 1 - music_scale),
            (True, False, music_scale - text_scale),
            (False, False, text_scale),
        ]
    else:
        scale = text_scale if condition.text is not None else music_scale
        settings = [(True, True, 1 - scale), (False, False, scale)]
    settings = [item for item in settings if item[2]]
    # Nothing is copied from the host: a CUDA graph can hold the pass.
    text, music = (
        torch.cat([torch.full((batch,), item[modality], device=ids.device) for item in settings]) for modality in (0, 1)
    )
    many = len(settings)
    rows = condition.rows(torch.arange(batch, device=ids.device).repeat(many)).dropped(text, music)
    logits = model(ids.repeat(many, 1, 1), rows, valid.repeat(many, 1))
    return Passes(logits.unflatten(0, (many, batch)), tuple(item[2] for item in settings))


def guided(
    model: MotionTransformer,
    ids: Int[Tensor, "batch time parts"],
    condition: Condition,
    valid: Bool[Tensor, "batch time"],
    text_scale: float,
    music_scale: float,
) -> Float[Tensor, "batch time parts codes"]:
    """Logits with guidance: ``l + w_music (l_music - l) + w_text (l_all - l_music)``, l without a condition (ours)."""
    logits, weights = passes(model, ids, condition, valid, text_scale, music_scale)
    return torch.stack([part * weight for part, weight in zip(logits, weights, strict=True)]).sum(0)


def draw(
    found: Passes, generator: torch.Generator, keep: float, temperature: float, backend: Backend = "auto"
) -> tuple[Int[Tensor, "batch time parts"], Float[Tensor, "batch time parts"]]:
    """Ids drawn from guided logits, and their probabilities.

    Args:
        found: Of a pass.
        generator: On its device.
        keep: Share of the ids that may be drawn, the likeliest.
        temperature: Of the draws; 0 takes the likeliest.
        backend: Of ``hone_kernels.guided_draw``.
    """
    shape, codes = found.logits.shape[1:-1], found.logits.shape[-1]
    uniform = torch.rand(shape.numel(), generator=generator, device=found.logits.device)
    ids, chance = draw_tokens(
        found.logits.flatten(1, -2),
        found.weights,
        uniform,
        keep=max(1, math.ceil(keep * codes)),
        temperature=temperature,
        backend=backend,
    )
    return ids.view(shape), chance.view(shape)


def check_finite(logits: Float[Tensor, "settings batch time parts codes"], valid: Bool[Tensor, "batch time"]) -> None:
    """Refuse tokens that were drawn of what is no number: they are ids like any other.

    Args:
        logits: Of the last pass.
        valid: Time steps that are there.

    Raises:
        RuntimeError: They are not finite.
    """
    if not bool((logits.isfinite() | ~valid[..., None, None]).all()):
        raise RuntimeError(
            f"the transformer's logits are not finite in {logits.dtype}; take bfloat16 or float32, or look at its "
            "weights, and at the texts' vectors and the music"
        )


def edited(time: int, seconds: tuple[float, float], parts: Sequence[str]) -> Bool[Tensor, "1 time 6"]:
    """Cells that an edit makes anew: some parts of the body, all if none is named, in an interval.

    Args:
        time: Time steps of four frames, at 20 a second.
        seconds: Start and end; a token that reaches into them is made anew.
        parts: Of ``skeletons.PARTS``.
    """
    cells = torch.zeros(1, time, len(PARTS), dtype=torch.bool)
    own = [PARTS.index(part) for part in parts] or list(range(len(PARTS)))
    cells[:, int(seconds[0] * 5) : -int(-seconds[1] * 5 // 1), own] = True
    return cells


@torch.no_grad()
def unmask(
    logits_of: Callable[[Tensor], Tensor | Passes],
    valid: Bool[Tensor, "batch time"],
    parts: int,
    mask_id: int,
    generator: torch.Generator,
    *,
    steps: int = 10,
    temperature: float = 1.0,
    keep: float = 0.1,
    start: Int[Tensor, "batch time parts"] | None = None,
    edit: Bool[Tensor, "batch time parts"] | None = None,
    rank: Callable[[Tensor], Tensor] | None = None,
    backend: Backend = "auto",
) -> Int[Tensor, "batch time parts"]:
    """Iterative unmasking: draw all hidden tokens, hide again the least sure, fewer each time. MoMask's loop.

    Args:
        logits_of: Ids to logits ``[B, T, P, codes]``, or to those of several settings.
        valid: Time steps that are there; the others keep ``mask_id + 1``.
        parts: Columns.
        mask_id: Of a hidden token.
        generator: On the device of ``valid``.
        steps: Passes.
        temperature: Of the draws; 0 takes the likeliest.
        keep: Share of the ids that may be drawn, the likeliest.
        start: Known tokens, of which those outside ``edit`` stay.
        edit: Tokens to make; all without ``start``.
        rank: What of the grid to hide again first, ``[B, T, P]`` of the ids, in place of the least sure: the largest.
        backend: Of the draws, see ``draw``.

    Raises:
        ValueError: Only one of ``start`` and ``edit`` is given, or they are not of the grid's shape.
        TypeError: ``edit`` is not bool.
    """
    if (start is None) != (edit is None):
        raise ValueError("an edit needs both start, the known tokens, and edit, what to make anew")
    shape = (*valid.shape, parts)
    if start is not None and edit is not None:
        if start.shape != shape or edit.shape != shape:
            raise ValueError(
                f"start and edit must be {list(shape)}, batch, time and parts; got {list(start.shape)} and "
                f"{list(edit.shape)}"
            )
        if edit.dtype != torch.bool:
            raise TypeError(f"edit must be bool, true at what to make anew; got {edit.dtype}")
    places = valid[..., None].expand(shape)
    made = places if edit is None else edit & places
    ids = torch.full(shape, mask_id, device=valid.device) if start is None else start
    ids = torch.where(places, torch.where(made, mask_id, ids), mask_id + 1)
    total = made.flatten(1).sum(1)
    sure = torch.zeros(shape, device=valid.device)
    for step in range(steps):
        ratio = math.cos(math.pi / 2 * step / max(1, steps - 1))
        count = (total * ratio).round().clamp(min=1).minimum(total)
        order = sure.masked_fill(~made, math.inf).flatten(1)
        hidden = (order.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]).view(shape) & made
        ids = torch.where(hidden, mask_id, ids)
        logits = logits_of(ids)
        found = logits if isinstance(logits, Passes) else Passes(logits[None], (1.0,))
        drawn, chance = draw(found, generator, keep, temperature, backend)
        ids = torch.where(hidden, drawn, ids)
        # What was fixed in an earlier step stays, as in MoMask.
        sure = torch.where(hidden, chance, torch.full_like(chance, 1e5))
        if rank is not None:
            sure = torch.where(hidden, -rank(ids), sure)
    return ids


@torch.no_grad()
def draw_motion(
    model: MotionTransformer,
    condition: Condition,
    valid: Bool[Tensor, "batch time"],
    generator: torch.Generator,
    settings: UnmaskConfig | None = None,
    *,
    start: Int[Tensor, "batch time parts"] | None = None,
    edit: Bool[Tensor, "batch time parts"] | None = None,
) -> Int[Tensor, "batch time parts"]:
    """Tokens by Motion Anything's transformer; with ``start`` and ``edit`` the marked ones anew, the others kept.

    Args:
        model: Asked in every pass.
        condition: What to follow.
        valid: Time steps that are there.
        generator: On the device of ``valid``.
        settings: Of the generation; the defaults if None.
        start: Tokens of a motion.
        edit: What to make anew.

    Raises:
        ValueError: Only one of ``start`` and ``edit`` is given, they are not of the grid's shape, or what is kept of
            ``start`` is no code.
        TypeError: ``edit`` is not bool.
        RuntimeError: The transformer's logits are not finite.
    """
    settings = settings or UnmaskConfig()
    last: list[Tensor] = []

    def attended(ids: Tensor) -> Tensor:
        temporal, spatial = model.scores(ids, condition, valid)
        return temporal[..., None] * spatial

    def asked(ids: Tensor) -> Passes:
        found = passes(model, ids, condition, valid, settings.text_guidance, settings.music_guidance)
        last[:] = [found.logits]
        return found

    if start is not None and edit is not None and start.shape == edit.shape == (*valid.shape, model.cfg.parts):
        # Out of range an embedding's kernel on a GPU would end the process's use of it.
        wrong = (start < 0) | (start >= model.mask_id)
        wrong = wrong & valid[..., None] & ~edit.bool()
        if bool(wrong.any()):
            row, time, part = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"what an edit keeps must be codes from 0 to {model.mask_id - 1}; row {row}, time step {time}, part "
                f"{part} of start has {int(start[row, time, part])}"
            )
    ids = unmask(
        asked,
        valid,
        model.cfg.parts,
        model.mask_id,
        generator,
        steps=settings.steps,
        temperature=settings.temperature,
        keep=settings.keep,
        start=start,
        edit=edit,
        rank=attended if settings.remask == "attention" else None,
    )
    check_finite(last[0], valid)
    return ids
