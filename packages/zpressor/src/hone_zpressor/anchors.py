"""Which views are anchors, and whom every other view supports. Small and one step after another: on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Clusters", "Lists", "assign", "cluster_views", "farthest_points", "least_seen", "one_list"]


@torch.no_grad()
def farthest_points(
    centres: Float[Tensor, "batch view 3"], count: int, present: Bool[Tensor, "batch view"] | None = None
) -> Int[Tensor, "batch anchor"]:
    """Numbers of the anchors, in the order in which they are chosen: the first is the farthest from the mean.

    Ties go to the lower number, on every device.

    Args:
        centres: Camera centres.
        count: Anchors per scene.
        present: Views that exist; all if None.

    Raises:
        ValueError: A scene has fewer views than that, or a centre that is not finite.

    Differs: the release returns a view twice where ``count`` is larger than the number of views, or where all that are
    left stand on anchors; here each is taken once.
    """
    # A few hundred small steps, one after another: on the CPU, which also makes every device choose alike.
    device, centres = centres.device, centres.cpu()
    batch, views = centres.shape[:2]
    present = torch.ones(batch, views, dtype=torch.bool) if present is None else present.cpu()
    if count < 1 or int(present.sum(1).min()) < count:
        raise ValueError(f"each scene needs at least {count} views for {count} anchors; got {present.sum(1).tolist()}")
    # What stands in padding is not looked at, be it a number or none.
    centres = torch.where(present[..., None], centres, 0.0)
    lost = ~centres.isfinite().all(-1)
    if bool(lost.any()):
        scene, view = lost.nonzero()[0].tolist()
        raise ValueError(f"scene {scene}, view {view}: the camera's centre is not finite; remove the view")
    weight = present[..., None].to(centres)
    mean = (centres * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    rows = torch.arange(batch)
    free = present.clone()
    current = _first_largest((centres - mean).square().sum(-1), free)
    nearest = torch.full((batch, views), torch.inf, dtype=centres.dtype)
    chosen = []
    for _ in range(count):
        chosen.append(current)
        free[rows, current] = False
        distance = (centres - centres[rows, current, None]).square().sum(-1)
        nearest = torch.minimum(nearest, distance)
        current = _first_largest(nearest, free)
    return torch.stack(chosen, 1).to(device)


def _first_largest(value: Tensor, free: Tensor) -> Tensor:
    value = value.masked_fill(~free, -1)
    places = torch.arange(value.shape[1])
    return torch.where(value == value.amax(1, keepdim=True), places, value.shape[1] - 1).amin(1)


@torch.no_grad()
def least_seen(overlap: Float[Tensor, "view view"], count: int) -> Int[Tensor, " anchor"]:
    """Anchors by what cameras see: first the view that the others see most of, then always the one least seen yet.

    Args:
        overlap: Share of each view, by row, that each other one sees.
        count: Anchors.

    Raises:
        ValueError: There are fewer views.

    Source: ours; the paper's anchors know nothing of where a camera looks.
    """
    if not 1 <= count <= len(overlap):
        raise ValueError(f"expected 1 to {len(overlap)} anchors; got {count}")
    current = int(overlap.sum(1).argmax())
    chosen = [current]
    seen = overlap[:, current].clone()
    while len(chosen) < count:
        seen[chosen] = torch.inf
        current = int(seen.argmin())
        chosen.append(current)
        seen = torch.maximum(seen, overlap[:, current])
    return torch.tensor(chosen, device=overlap.device)


@torch.no_grad()
def assign(centres: Float[Tensor, "batch view 3"], anchors: Int[Tensor, "batch anchor"]) -> Int[Tensor, "batch view"]:
    """Which anchor, counted in their order, stands nearest to each view; the first of equals."""
    rows = torch.arange(len(centres), device=centres.device)[:, None]
    distance = (centres[:, :, None] - centres[rows, anchors][:, None]).square().sum(-1)
    places = torch.arange(anchors.shape[1], device=centres.device)
    least = distance == distance.amin(-1, keepdim=True)
    return torch.where(least, places, anchors.shape[1] - 1).amin(-1)


@dataclass(frozen=True)
class Clusters:
    """Anchors of a batch of scenes and the views that support them.

    Attributes:
        anchors: ``[B, N]``, numbers of views, on the device of the features.
        support: ``[B * N, S]``, numbers of views among all ``B * V``, padded by 0; on the CPU.
        real: ``[B * N, S]``, whether an entry of ``support`` is one; on the CPU.
    """

    anchors: Tensor
    support: Tensor
    real: Tensor

    @cached_property
    def lists(self) -> Lists | None:
        """What every layer asks, found once; None where no anchor has support."""
        counts = self.real.sum(1)
        pairs = counts.nonzero()[:, 0]
        if not len(pairs):
            return None
        real = self.real[pairs]
        slots = torch.zeros_like(self.support[pairs])
        slots[real] = torch.arange(int(counts.sum()))
        owner = torch.arange(len(pairs)).repeat_interleave(counts[pairs])
        device = self.anchors.device
        return Lists(
            views=self.support[self.real].to(device),
            pairs=None if len(pairs) == len(counts) else pairs.to(device),
            owner=owner.to(device),
            member=(owner == torch.arange(len(pairs))[:, None]).float().to(device),
            limits=F.pad(counts[pairs].cumsum(0), (1, 0)).int().to(device),
            slots=slots.to(device),
            padding=None if bool(real.all()) else (~real).to(device),
            places=real.flatten().nonzero()[:, 0].to(device),
        )


@dataclass(frozen=True)
class Lists:
    """The support of the pairs that have some, list after list.

    Attributes:
        views: ``[S]``, numbers of the views.
        pairs: ``[P]``, numbers of the pairs; None where each has support.
        owner: ``[S]``, which of these pairs a view supports.
        member: ``[P, S]``, the same as ones and zeros.
        limits: ``[P + 1]``, int32, where each list begins and the last ends.
        slots: ``[P, L]``, places in ``views``, padded by 0 to the longest list.
        padding: ``[P, L]``, where ``slots`` is padded; None where nothing is.
        places: ``[S]``, where ``slots``, flattened, is not.
    """

    views: Tensor
    pairs: Tensor | None
    owner: Tensor
    member: Tensor
    limits: Tensor
    slots: Tensor
    padding: Tensor | None
    places: Tensor


def one_list(count: int, device: torch.device) -> Lists | None:
    """Of one anchor, which so many views support."""
    support = torch.arange(count)[None]
    anchor = torch.zeros(1, 1, dtype=torch.long, device=device)
    return Clusters(anchor, support, torch.ones_like(support, dtype=torch.bool)).lists


def cluster_views(
    centres: Float[Tensor, "batch view 3"],
    anchors: Int[Tensor, "batch anchor"],
    present: Bool[Tensor, "batch view"] | None = None,
) -> Clusters:
    """The support of every anchor, as one padded list per (scene, anchor) pair.

    Args:
        centres: Camera centres.
        anchors: Of each scene.
        present: Views that exist; all if None.
    """
    batch, views = centres.shape[:2]
    count = anchors.shape[1]
    rows = torch.arange(batch)[:, None]
    chosen = anchors.cpu()
    nearest = assign(centres.cpu(), chosen)
    # An anchor is no support of itself; one that shares its place with an earlier one supports that.
    own = torch.full((batch, views), -1)
    own[rows, chosen] = torch.arange(count).expand(batch, -1)
    supports = nearest != own
    if present is not None:
        supports &= present.cpu()
    member = (nearest[:, None] == torch.arange(count)[:, None]) & supports[:, None]
    member = member.flatten(0, 1)  # [B * N, V]
    longest = int(member.sum(1).max())
    order = member.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    real = member.gather(1, order)
    first = torch.arange(batch).repeat_interleave(count)[:, None] * views
    return Clusters(anchors, torch.where(real, order + first, 0), real)
