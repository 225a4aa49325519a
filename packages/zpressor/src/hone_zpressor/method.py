"""ZPressor (arXiv 2505.23734): many views of a scene, fused into a few anchors.

Anchors are the farthest points among camera centres. Every other view supports the anchor that stands nearest to it,
and its features flow into that anchor's by cross-attention; what follows in the host sees anchors only. All functions
take batches whose scenes may have different numbers of views.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

__all__ = ["Attention", "Clusters", "Precision", "ViewStream", "ZPressor", "assign", "cluster_views", "farthest_points"]
__all__ += ["information_loss", "least_seen"]

Precision = Literal["bfloat16", "float32"]
"""Of the queries, keys and values. As released, bfloat16 holds of the cross-attention everywhere, and of the
self-attention on a CUDA device."""

Attention = Literal["padded", "varlen"]
"""One attention over lists of support that are padded to the longest, with a mask; or torch's over ragged ones, which
computes nothing for padding, in bfloat16 on a CUDA device."""


# Sec. 2.2 of the release's zpressor.py: anchors -----------------------------------------------------------------------


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
        ValueError: A scene has fewer views than that.

    Differs: the release returns a view twice where ``count`` is larger than the number of views, or where all that are
    left stand on anchors; here each is taken once.
    """
    batch, views = centres.shape[:2]
    present = torch.ones(batch, views, dtype=torch.bool, device=centres.device) if present is None else present
    if count < 1 or int(present.sum(1).min()) < count:
        raise ValueError(f"each scene needs at least {count} views for {count} anchors; got {present.sum(1).tolist()}")
    weight = present[..., None].to(centres)
    mean = (centres * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    rows = torch.arange(batch, device=centres.device)
    free = present.clone()
    current = _first_largest((centres - mean).square().sum(-1), free)
    nearest = torch.full((batch, views), torch.inf, dtype=centres.dtype, device=centres.device)
    chosen = []
    for _ in range(count):
        chosen.append(current)
        free[rows, current] = False
        distance = (centres - centres[rows, current, None]).square().sum(-1)
        nearest = torch.minimum(nearest, distance)
        current = _first_largest(nearest, free)
    return torch.stack(chosen, 1)


def _first_largest(value: Tensor, free: Tensor) -> Tensor:
    value = value.masked_fill(~free, -1)
    places = torch.arange(value.shape[1], device=value.device)
    return torch.where(value == value.amax(1, keepdim=True), places, value.shape[1] - 1).amin(1)


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
        anchors: ``[B, N]``, numbers of views.
        support: ``[B * N, S]``, numbers of views among all ``B * V``, padded by 0.
        real: ``[B * N, S]``, whether an entry of ``support`` is one.
    """

    anchors: Tensor
    support: Tensor
    real: Tensor

    # What every layer asks, found once: each of these waits for the device.

    @cached_property
    def full(self) -> bool:
        """Whether no list is padded."""
        return bool(self.real.all())

    @cached_property
    def ragged(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lists one after the other, where each begins and the last ends, and the pairs that have one."""
        counts = self.real.sum(1)
        kept = counts.nonzero()[:, 0]
        return self.support[self.real], F.pad(counts[kept].cumsum(0), (1, 0)).int(), kept


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
    rows = torch.arange(batch, device=centres.device)[:, None]
    nearest = assign(centres, anchors)
    # An anchor is no support of itself; one that shares its place with an earlier one supports that.
    own = torch.full((batch, views), -1, device=centres.device)
    own[rows, anchors] = torch.arange(count, device=centres.device).expand(batch, -1)
    supports = nearest != own
    if present is not None:
        supports &= present
    member = (nearest[:, None] == torch.arange(count, device=centres.device)[:, None]) & supports[:, None]
    member = member.flatten(0, 1)  # [B * N, V]
    longest = int(member.sum(1).max())
    order = member.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    real = member.gather(1, order)
    first = torch.arange(batch, device=centres.device).repeat_interleave(count)[:, None] * views
    return Clusters(anchors, torch.where(real, order + first, 0), real)


# The module -----------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """An anchor reads its support: one head over all tokens of all its views, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projq = nn.Linear(channels, channels, bias=False)
        self.proj_kv = nn.Linear(channels, 2 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(
        self,
        anchor: Float[Tensor, "pair token channels"],
        views: Float[Tensor, "view token channels"],
        clusters: Clusters,
        precision: Precision,
        attention: Attention = "padded",
    ) -> Float[Tensor, "pair token channels"]:
        """Every (scene, anchor) pair at once.

        Args:
            anchor: Tokens of each anchor.
            views: Raw tokens of all views; keys and values are made once per view, which supports one anchor at most.
            clusters: Who supports whom.
            precision: Of the attention.
            attention: See ``Attention``.
        """
        if clusters.support.shape[1] == 0:
            return anchor
        kind = torch.bfloat16 if precision == "bfloat16" else anchor.dtype
        query = self.projq(self.norm1(anchor)).to(kind)
        key_value = self.proj_kv(self.norm2(views)).to(kind)
        some = clusters.real.any(1)
        if attention == "varlen":
            found = _attend_ragged(query, key_value, clusters)
        else:
            found = _attend_padded(query, key_value, clusters, some)
        return torch.where(some[:, None, None], anchor + self.proj(found.to(anchor.dtype)), anchor)


def _attend_padded(query: Tensor, key_value: Tensor, clusters: Clusters, some: Tensor) -> Tensor:
    tokens = query.shape[1]
    key, value = key_value[clusters.support].flatten(1, 2)[:, None].chunk(2, -1)  # [pairs, 1, S * T, C]
    mask = None
    if not clusters.full:
        # A pair without support attends to padding, and drops what it found.
        seen = clusters.real | ~some[:, None]
        mask = seen.repeat_interleave(tokens, 1)[:, None, None].expand(-1, -1, tokens, -1)
    return F.scaled_dot_product_attention(query[:, None], key, value, attn_mask=mask)[:, 0]


def _attend_ragged(query: Tensor, key_value: Tensor, clusters: Clusters) -> Tensor:
    pairs, tokens, channels = query.shape
    support, limits, kept = clusters.ragged
    key, value = key_value[support].view(-1, 1, 2 * channels).chunk(2, -1)
    starts = torch.arange(len(kept) + 1, dtype=torch.int32, device=query.device) * tokens
    found = varlen_attn(
        query[kept].view(-1, 1, channels),
        key.contiguous(),
        value.contiguous(),
        starts,
        limits * tokens,
        tokens,
        clusters.support.shape[1] * tokens,
    )
    assert isinstance(found, Tensor)
    return query.new_zeros(pairs, tokens, channels).index_copy(0, kept, found.view(-1, tokens, channels))


class Mlp(nn.Module):
    """Two layers with a norm before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class SelfAttention(nn.Module):
    """Attention within each anchor, without a projection of its output, and an MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.mlp = Mlp(channels)

    def forward(
        self, x: Float[Tensor, "pair token channels"], precision: Precision
    ) -> Float[Tensor, "pair token channels"]:
        kind = torch.bfloat16 if precision == "bfloat16" and x.is_cuda else x.dtype
        query, key, value = self.to_qkv(self.norm(x)).to(kind)[:, None].chunk(3, -1)
        x = x + F.scaled_dot_product_attention(query, key, value)[:, 0].to(x.dtype)
        return x + self.mlp(x)


class ZPressor(nn.Module):
    """Features of the anchors, with those of their support folded in.

    Each layer reads the support's raw features, never updated ones; layers of self-attention see one anchor each. Keys
    are the published ones.

    Args:
        channels: Of the features.
        layers: Pairs of cross- and self-attention.
    """

    def __init__(self, channels: int = 128, layers: int = 6) -> None:
        super().__init__()
        # One list per feature level in the release; its hosts have one level.
        self.self_attn_layers = nn.ModuleList([nn.ModuleList(SelfAttention(channels) for _ in range(layers))])
        self.cross_attn_layers = nn.ModuleList([nn.ModuleList(CrossAttention(channels) for _ in range(layers))])

    def forward(
        self,
        features: Float[Tensor, "batch view channels height width"],
        clusters: Clusters,
        precision: Precision = "bfloat16",
        attention: Attention = "padded",
    ) -> Float[Tensor, "batch anchor channels height width"]:
        """Fuse.

        Args:
            features: Of all views.
            clusters: See ``cluster_views``.
            precision: See ``Precision``.
            attention: Of the cross-attention.

        Raises:
            ValueError: ``varlen`` is asked for elsewhere than in bfloat16 on a CUDA device.
        """
        if attention == "varlen" and (precision != "bfloat16" or not features.is_cuda):
            raise ValueError(
                f'attention="varlen" needs precision="bfloat16" and a CUDA device; got {precision} on '
                f'{features.device}. Use "padded".'
            )
        batch, _, _, height, width = features.shape
        views = features.flatten(0, 1).flatten(2).mT
        first = torch.arange(batch, device=features.device)[:, None] * features.shape[1]
        fused = self.fuse(views[(clusters.anchors + first).flatten()], views, clusters, precision, attention)
        return fused.mT.unflatten(-1, (height, width)).unflatten(0, (batch, -1))

    def fuse(
        self,
        anchor: Float[Tensor, "pair token channels"],
        views: Float[Tensor, "view token channels"],
        clusters: Clusters,
        precision: Precision,
        attention: Attention = "padded",
    ) -> Float[Tensor, "pair token channels"]:
        """The layers, on tokens of the anchors and of all views."""
        cross_layers: Any = self.cross_attn_layers[0]
        self_layers: Any = self.self_attn_layers[0]
        for cross, within in zip(cross_layers, self_layers, strict=True):
            anchor = within(cross(anchor, views, clusters, precision, attention), precision)
        return anchor


class ViewStream:
    """Views that come one by one: each is folded into its nearest anchor, and only that anchor is fused again.

    The result is that of all views at once with the same anchors. Raw tokens are kept, since each layer reads them.

    Args:
        module: The weights.
        features: ``[N, C, H, W]`` of the anchors.
        centres: ``[N, 3]``, their camera centres.
        precision: See ``Precision``.

    Source: ours; that an anchor reads its support in no order makes it possible.
    """

    def __init__(self, module: ZPressor, features: Tensor, centres: Tensor, precision: Precision = "bfloat16") -> None:
        if features.ndim != 4 or centres.shape != (len(features), 3):
            raise ValueError(
                f"expected features [N, C, H, W] and centres [N, 3]; got {list(features.shape)} and "
                f"{list(centres.shape)}"
            )
        self.module, self.centres, self.precision = module, centres, precision
        self.size = features.shape[2:]
        self.tokens = [[part[None]] for part in features.flatten(2).mT]
        self.fused = torch.stack([self._fuse(anchor) for anchor in range(len(centres))])

    def add(self, features: Float[Tensor, "channels height width"], centre: Float[Tensor, " 3"]) -> int:
        """Fold a view in; returns the number of the anchor that took it."""
        if features.shape != (self.fused.shape[-1], *self.size):
            raise ValueError(f"expected features {[self.fused.shape[-1], *self.size]}; got {list(features.shape)}")
        anchor = int((self.centres - centre).square().sum(-1).argmin())
        self.tokens[anchor].append(features.flatten(1).mT[None])
        self.fused = self.fused.index_copy(
            0, torch.tensor([anchor], device=self.fused.device), self._fuse(anchor)[None]
        )
        return anchor

    @property
    def features(self) -> Float[Tensor, "anchor channels height width"]:
        """Of the anchors, with everything so far folded in."""
        return self.fused.mT.unflatten(-1, tuple(self.size))

    def _fuse(self, anchor: int) -> Tensor:
        views = torch.cat(self.tokens[anchor])
        support = torch.arange(1, len(views), device=views.device)[None]
        own = Clusters(support.new_zeros(1, 1), support, torch.ones_like(support, dtype=torch.bool))
        return self.module.fuse(views[:1], views, own, self.precision)[0]


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


def information_loss(features: Float[Tensor, "batch anchor channels height width"]) -> Float[Tensor, ""]:
    """Bits by which each view's feature maps, taken as Gaussians over pixels, differ from the standard normal.

    Source: the release's loss_ib.py, weight 1e-5 in its configs.
    """
    mean = features.mean((-2, -1))
    variance = features.var((-2, -1), correction=0) + 1e-8
    divergence = -0.5 * (1 + variance.log() - mean.square() - variance).sum(-1)
    return divergence.mean() / torch.log(divergence.new_tensor(2.0))
