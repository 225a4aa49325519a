"""Training masks: the method's, MoMask's cosine ratio, controls, and the loss of hidden tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .config import MotionAnythingConfig
from .method import Condition, attention_mask, random_mask

__all__ = ["choose_masks", "cosine_mask", "inside", "masked_loss", "refuse_recomputation"]


def inside(model: Any) -> Any:
    """The masked transformer in what peft, ``torch.compile`` or a trainer wrapped around it; else the model itself."""
    if not isinstance(model, nn.Module):
        return model
    return next((part for part in model.modules() if hasattr(type(part), "scores") and hasattr(part, "masking")), model)


def refuse_recomputation(name: str) -> None:
    """Refuse to draw within a backward: gradient checkpointing runs a forward again there, and a generator goes on.

    Raises:
        RuntimeError: It is one.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name} ran again within backward, by gradient checkpointing, and would draw other numbers than in the "
            "forward. Checkpoint the model or its blocks alone, and call draw_mask and masked_loss outside"
        )


def cosine_mask(
    valid: Bool[Tensor, "batch time"], parts: int, generator: torch.Generator
) -> Bool[Tensor, "batch time parts"]:
    """A share ``cos(pi u / 2)`` of the tokens at random, u uniform, and one at least.

    Source: MoMask. Differs: over the tokens that are there, where the release counts padding too.
    """
    u = torch.rand(len(valid), generator=generator, device=valid.device)
    places = valid[..., None].expand(*valid.shape, parts).flatten(1)
    count = (places.sum(1) * torch.cos(math.pi / 2 * u)).round().clamp(min=1)
    drawn = torch.rand(places.shape, generator=generator, device=valid.device).masked_fill(~places, 2.0)
    rank = drawn.argsort(dim=1).argsort(dim=1)
    return ((rank < count[:, None]) & places).view(*valid.shape, parts)


def choose_masks(
    cfg: MotionAnythingConfig,
    scores: Callable[[], tuple[Tensor, Tensor]],
    valid: Bool[Tensor, "batch time"],
    generator: torch.Generator,
    events: Bool[Tensor, "batch time parts"] | None = None,
    parts: int = 6,
) -> tuple[Bool[Tensor, "batch time parts"], Bool[Tensor, " batch"]]:
    """Tokens to hide in a batch, and the rows whose mask is the method's and not the cosine ratio's.

    The paper hides a fixed share, and a model trained so never sees the empty grid that generation begins from; so
    each row takes the method's mask with probability ``p_attention``, else MoMask's (ours).

    Args:
        cfg: ``masking`` says by what: attention, random, events (the known ones, a control).
        scores: Attention of time steps and parts; called for ``masking="attention"`` alone.
        valid: Time steps that are there.
        generator: On the device of ``valid``.
        events: Known cells, for ``masking="events"``.
        parts: Columns of the grid.

    Raises:
        ValueError: ``masking="events"`` and no events are given.
    """
    cosine = cosine_mask(valid, parts, generator)
    rows = torch.rand(len(valid), generator=generator, device=valid.device) < cfg.p_attention
    if cfg.masking == "cosine" or not bool(rows.any()):
        return cosine, torch.zeros_like(rows)
    if cfg.masking == "attention":
        mask = attention_mask(*scores(), valid, cfg.alpha_time, cfg.alpha_parts)
    elif cfg.masking == "events":
        if events is None:
            raise ValueError("masking='events' needs the known events of the batch; only generated motions have them")
        mask = _events_mask(events, valid, cfg, generator)
    else:
        mask = random_mask(valid, parts, cfg.alpha_time, cfg.alpha_parts, generator)
    return torch.where(rows[:, None, None], mask, cosine), rows


def _events_mask(events: Tensor, valid: Tensor, cfg: MotionAnythingConfig, generator: torch.Generator) -> Tensor:
    """The known cells first, then others at random, as many tokens as a random mask of the same shares takes."""
    budget = (
        random_mask(valid, events.shape[-1], cfg.alpha_time, cfg.alpha_parts, generator).flatten(1).sum(1, keepdim=True)
    )
    places = valid[..., None].expand_as(events).flatten(1)
    drawn = torch.rand(places.shape, generator=generator, device=valid.device) - 2.0 * events.flatten(1)
    rank = drawn.masked_fill(~places, 2.0).argsort(dim=1).argsort(dim=1)
    return ((rank < budget) & places).view(events.shape)


def masked_loss(
    model: Any,
    ids: Int[Tensor, "batch time parts"],
    condition: Condition,
    valid: Bool[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time parts"],
    generator: torch.Generator,
    corrupt: float = 0.1,
) -> Float[Tensor, ""]:
    """Cross-entropy of the hidden tokens of a ``MotionTransformer`` or a published one.

    Of them a share ``corrupt`` gets a wrong id, 88 % of the rest the mask's, and the others stay, as in MoMask; with a
    share of 0 all get the mask's.

    Args:
        model: Also one that peft, ``torch.compile`` or ``DistributedDataParallel`` wrapped.
        ids: Tokens.
        condition: Of the batch.
        valid: Time steps that are there.
        mask: Tokens to hide, of ``draw_mask``.
        generator: On their device.
        corrupt: Share of the hidden tokens that get a wrong id.

    Raises:
        ValueError: No token is hidden.
        RuntimeError: Gradient checkpointing runs it again.
    """
    refuse_recomputation("masked_loss")
    own = inside(model)
    ids = torch.where(valid[..., None], ids, own.pad_id)
    u = torch.rand(ids.shape, generator=generator, device=ids.device)
    wrong = (torch.rand(ids.shape, generator=generator, device=ids.device) * own.mask_id).long()
    wrong = wrong.clamp(max=own.mask_id - 1)
    shown = torch.where(mask & (u < corrupt), wrong, ids)
    last = corrupt + 0.88 * (1 - corrupt) if corrupt else 1.0
    hidden = mask & (u >= corrupt) & (u < last)
    shown = torch.where(hidden, own.mask_id, shown)
    asked = ids[mask]
    if not len(asked):
        raise ValueError("the mask hides no token, so that there is nothing to learn; take one of draw_mask")
    logits = model(shown, condition, valid)
    return F.cross_entropy(logits[mask].float(), asked)
