"""Generation from the empty grid, or of some tokens of a known motion: guidance and iterative unmasking."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .method import Condition, MotionTransformer

__all__ = ["guided", "unmask"]


def guided(
    model: MotionTransformer,
    ids: Int[Tensor, "batch time parts"],
    condition: Condition,
    valid: Bool[Tensor, "batch time"],
    text_scale: float,
    music_scale: float,
) -> Float[Tensor, "batch time parts codes"]:
    """Logits with guidance: ``l + w_music (l_music - l) + w_text (l_all - l_music)``, l without a condition (ours).

    All settings of the condition go through the model as one batch.
    """
    batch = condition.batch
    both = condition.text is not None and condition.music is not None
    # (text left out, music left out, weight) of each pass; the weights sum to one.
    if both:
        passes = [
            (True, True, 1 - music_scale),
            (True, False, music_scale - text_scale),
            (False, False, text_scale),
        ]
    else:
        scale = text_scale if condition.text is not None else music_scale
        passes = [(True, True, 1 - scale), (False, False, scale)]
    passes = [item for item in passes if item[2]]
    # Nothing is copied from the host: a CUDA graph can hold the pass.
    text, music = (
        torch.cat([torch.full((batch,), item[modality], device=ids.device) for item in passes]) for modality in (0, 1)
    )
    many = len(passes)
    rows = condition.rows(torch.arange(batch, device=ids.device).repeat(many)).dropped(text, music)
    logits = model(ids.repeat(many, 1, 1), rows, valid.repeat(many, 1))
    parts = [part * item[2] for part, item in zip(logits.chunk(many), passes, strict=True)]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def unmask(
    logits_of: Callable[[Tensor], Tensor],
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
) -> Int[Tensor, "batch time parts"]:
    """Iterative unmasking: draw all hidden tokens, hide again the least sure, fewer each time. MoMask's loop.

    Args:
        logits_of: Ids to guided logits ``[B, T, P, codes]``.
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

    Raises:
        ValueError: Only one of ``start`` and ``edit`` is given.
    """
    if (start is None) != (edit is None):
        raise ValueError("an edit needs both start, the known tokens, and edit, what to make anew")
    shape = (*valid.shape, parts)
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
        logits = logits_of(ids).float()
        least = logits.topk(max(1, math.ceil(keep * logits.shape[-1])), dim=-1).values[..., -1:]
        kept = logits.masked_fill(logits < least, -math.inf)
        if temperature > 0:
            noise = torch.rand(kept.shape, generator=generator, device=kept.device).clamp(1e-20, 1)
            # Gumbel's maximum draws from the softmax.
            drawn = (kept / temperature - (-noise.log()).log()).argmax(-1)
        else:
            drawn = kept.argmax(-1)
        ids = torch.where(hidden, drawn, ids)
        chance = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
        # What was fixed in an earlier step stays, as in MoMask.
        sure = torch.where(hidden, chance, torch.full_like(chance, 1e5))
        if rank is not None:
            sure = torch.where(hidden, -rank(ids), sure)
    return ids
