"""ZPressor (arXiv 2505.23734): many views of a scene, fused into a few anchors.

Anchors are the farthest points among camera centres. Every other view supports the anchor that stands nearest to it,
and its features flow into that anchor's by cross-attention; what follows in the host sees anchors only. All functions
take batches whose scenes may have different numbers of views.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from .anchors import Clusters, Lists, assign, one_list

__all__ = ["Attention", "Precision", "ViewStream", "ZPressor", "information_loss"]

Precision = Literal["bfloat16", "float32"]
"""Of the queries, keys and values. As released, bfloat16 holds of the cross-attention everywhere, and of the
self-attention on a CUDA device."""

Attention = Literal["padded", "varlen"]
"""One attention over lists of support that are padded to the longest, with a mask; or torch's over ragged ones, which
computes nothing for padding, in bfloat16 on a CUDA device."""


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
        support: Float[Tensor, "view token channels"],
        lists: Lists,
        precision: Precision,
        attention: Attention = "padded",
    ) -> Float[Tensor, "pair token channels"]:
        """Every (scene, anchor) pair at once; one without support keeps its tokens.

        Args:
            anchor: Tokens of each anchor.
            support: Raw tokens of the supporting views, in the order of the lists.
            lists: Who supports whom.
            precision: Of the attention.
            attention: See ``Attention``.
        """
        kind = torch.bfloat16 if precision == "bfloat16" else anchor.dtype
        reading = anchor if lists.pairs is None else anchor[lists.pairs]
        query = self.projq(self.norm1(reading)).to(kind)
        # Each half is cast by itself, which leaves it in one piece.
        key, value = (part.to(kind).contiguous() for part in self.proj_kv(self.norm2(support)).chunk(2, -1))
        if attention == "padded":
            found = _attend_padded(query, key, value, lists)
        elif torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
            found = _attend_lists(query, key, value, lists)
        else:
            found = _attend_views(query, key, value, lists)
        reading = reading + self.proj(found.to(anchor.dtype))
        return reading if lists.pairs is None else anchor.index_copy(0, lists.pairs, reading)


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, lists: Lists) -> Tensor:
    """Lists of one length, of which padding is masked; ``query [P, T, C]``, ``key`` and ``value [S, T, C]``."""
    pairs, tokens, channels = query.shape
    mask = None
    if lists.padding is not None:
        key, value = key[lists.slots], value[lists.slots]
        mask = ~lists.padding.repeat_interleave(tokens, 1)[:, None, None].expand(-1, -1, tokens, -1)
    key, value = (part.view(pairs, 1, -1, channels) for part in (key, value))
    return F.scaled_dot_product_attention(query[:, None], key, value, attn_mask=mask)[:, 0]


def _attend_lists(query: Tensor, key: Tensor, value: Tensor, lists: Lists) -> Tensor:
    """Lists as they are, each one sequence of torch's kernel, with gradients."""
    pairs, tokens, channels = query.shape
    starts = torch.arange(0, (pairs + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    longest = lists.slots.shape[1] * tokens
    query, key, value = (part.view(-1, 1, channels) for part in (query, key, value))
    found = varlen_attn(query, key, value, starts, lists.limits * tokens, tokens, longest)
    assert isinstance(found, Tensor)
    return found.view(pairs, tokens, channels)


def _attend_views(query: Tensor, key: Tensor, value: Tensor, lists: Lists) -> Tensor:
    """Each supporting view by itself, joined by the weight that its keys have in its list.

    An anchor's list takes as long as it has views, and a GPU has more processors than anchors: this way all are busy.
    torch gives no gradient of the weights.
    """
    pairs, tokens, channels = query.shape
    views = len(key)
    starts = torch.arange(0, (views + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    query, key, value = (part.view(-1, 1, channels) for part in (query[lists.owner], key, value))
    found, lse = varlen_attn(query, key, value, starts, starts, tokens, tokens, return_aux=AuxRequest(lse=True))
    share = lse.view(views, tokens)[lists.slots]  # [P, L, T]
    if lists.padding is not None:
        share = share.masked_fill(lists.padding[..., None], -torch.inf)
    share = share.softmax(1).flatten(0, 1)[lists.places]
    weighed = found.view(views, tokens, channels) * share[..., None]
    return (lists.member.to(weighed) @ weighed.flatten(1)).view(pairs, tokens, channels)


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
        own = views.index_select(0, (clusters.anchors + first).flatten())
        support = None if clusters.lists is None else views.index_select(0, clusters.lists.views)
        fused = self.fuse(own, support, clusters.lists, precision, attention)
        return fused.mT.unflatten(-1, (height, width)).unflatten(0, (batch, -1))

    def fuse(
        self,
        anchor: Float[Tensor, "pair token channels"],
        support: Float[Tensor, "view token channels"] | None,
        lists: Lists | None,
        precision: Precision,
        attention: Attention = "padded",
    ) -> Float[Tensor, "pair token channels"]:
        """The layers, on tokens of the anchors and, in the order of the lists, of what supports them, if anything."""
        cross_layers: Any = self.cross_attn_layers[0]
        self_layers: Any = self.self_attn_layers[0]
        for cross, within in zip(cross_layers, self_layers, strict=True):
            if lists is not None:
                anchor = cross(anchor, support, lists, precision, attention)
            anchor = within(anchor, precision)
        return anchor


class ViewStream:
    """Views that come one by one: each is folded into its nearest anchor, and only that anchor is fused again.

    The result is that of all views at once with the same anchors. Raw tokens are kept, since each layer reads them.

    Args:
        module: The weights.
        features: ``[N, C, H, W]`` of the anchors.
        centres: ``[N, 3]``, their camera centres.
        precision: See ``Precision``.

    Raises:
        ValueError: Features and centres are not of these shapes.

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
        """Fold a view in; returns the number of the anchor that took it.

        Raises:
            ValueError: The features are of another shape than the anchors'.
        """
        if features.shape != (self.fused.shape[-1], *self.size):
            raise ValueError(f"expected features {[self.fused.shape[-1], *self.size]}; got {list(features.shape)}")
        own = torch.arange(len(self.centres), device=centre.device)[None]
        anchor = int(assign(torch.cat([self.centres, centre[None]])[None], own)[0, -1])
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
        own, *others = self.tokens[anchor]
        lists = one_list(len(others), own.device)
        return self.module.fuse(own, torch.cat(others) if others else None, lists, self.precision)[0]


def information_loss(features: Float[Tensor, "batch anchor channels height width"]) -> Float[Tensor, ""]:
    """Bits by which each view's feature maps, taken as Gaussians over pixels, differ from the standard normal.

    Source: the release's loss_ib.py, weight 1e-5 in its configs.
    """
    mean = features.mean((-2, -1))
    variance = features.var((-2, -1), correction=0) + 1e-8
    divergence = -0.5 * (1 + variance.log() - mean.square() - variance).sum(-1)
    return divergence.mean() / torch.log(divergence.new_tensor(2.0))
