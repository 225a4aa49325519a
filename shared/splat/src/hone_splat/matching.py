"""How published hosts compare views: a windowed transformer over them, and a plane-sweep cost volume.

Source: UniMatch's multi-view transformer as MVSplat and DepthSplat train it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from hone_kernels.plane_sweep import sweep_planes
from jaxtyping import Float, Int
from torch import Tensor, nn

from .cameras import exact_geometry

__all__ = [
    "MultiViewTransformer",
    "SweepBackend",
    "SweepGeometry",
    "SwinMask",
    "cost_volume",
    "neighbours",
    "plane_candidates",
]

SwinMask = Literal["official", "correct"]
"""``official`` repeats the mask of shifted windows in the wrong order for more than one neighbour, as all published
weights were trained with; the order of the neighbours then matters."""
SweepGeometry = Literal["official", "exact"]
"""``official`` projects with the reference view's intrinsics and from integer pixels; ``exact`` with the other view's
own and from pixel centres."""
SweepBackend = Literal["reference", "triton", "auto"]
"""Of ``hone_kernels.plane_sweep``, which says what each does."""
BLOCKED = -100.0


def neighbours(
    cam_to_world: Float[Tensor, "batch view 4 4"], count: int | None = None
) -> Int[Tensor, "batch view other"]:
    """Which views each view is compared with.

    Args:
        cam_to_world: Poses.
        count: How many of the nearest, the view itself included; None for all others, in their order.

    Raises:
        ValueError: There is a single view, or ``count`` leaves none.
    """
    views = cam_to_world.shape[1]
    if views < 2 or (count is not None and count < 2):
        raise ValueError(f"matching needs at least two views; got {views} views and count {count}")
    if count is None:
        index = torch.arange(views, device=cam_to_world.device)
        others = index.expand(views, views)[~torch.eye(views, dtype=torch.bool, device=index.device)]
        return others.view(1, views, views - 1).expand(len(cam_to_world), -1, -1)
    centres = cam_to_world[..., :3, 3]
    distance = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    # A view is its own nearest also where another one stands at the same place.
    distance.diagonal(dim1=1, dim2=2).fill_(-1)
    return distance.argsort(dim=-1, stable=True)[..., 1 : min(count, views)]


def take_views(x: Tensor, index: Int[Tensor, "batch view other"]) -> Tensor:
    """``[B, V, ...]`` to ``[B, V, other, ...]``."""
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return x[rows, index]


class AttentionLayer(nn.Module):
    """Attention of one head inside 2 x 2 windows, with a feed-forward network or without."""

    def __init__(self, channels: int, *, expansion: int | None) -> None:
        super().__init__()
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels)
        self.mlp: nn.Module | None = None
        if expansion is not None:
            wide = 2 * channels
            self.mlp = nn.Sequential(
                nn.Linear(wide, expansion * wide, bias=False),
                nn.GELU(),
                nn.Linear(expansion * wide, channels, bias=False),
            )
            self.norm2 = nn.LayerNorm(channels)

    def forward(
        self,
        x: Float[Tensor, "batch view height width channels"],
        source: Float[Tensor, "batch view height width channels"],
        index: Int[Tensor, "batch view other"] | None,
        mask: Float[Tensor, "windows tokens keys"] | None,
    ) -> Float[Tensor, "batch view height width channels"]:
        """Update ``x`` with what it finds in ``source``.

        Args:
            x: One map per view.
            source: Maps that keys and values are made of.
            index: Of the views that each view attends to; itself if None.
            mask: Added to the scores of shifted windows; None for windows in place.
        """
        query, key, value = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        height, width = x.shape[2:4]
        shift = (height // 4, width // 4)
        if mask is not None:
            query, key, value = (torch.roll(part, (-shift[0], -shift[1]), (2, 3)) for part in (query, key, value))
        query, key, value = map(to_windows, (query, key, value))  # [B, V, 4, P, C]
        if index is not None:
            # Keys by pixel, the views of a pixel side by side: the order that the mask of published weights scrambles.
            key, value = (take_views(part, index).permute(0, 1, 3, 4, 2, 5).flatten(3, 4) for part in (key, value))
        # Windows stand where heads do, which all fused backends take.
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        message = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        message = from_windows(message.unflatten(0, x.shape[:2]), height, width)
        if mask is not None:
            message = torch.roll(message, shift, (2, 3))
        message = self.norm1(self.merge(message))
        if self.mlp is not None:
            message = self.norm2(self.mlp(torch.cat([x, message], -1)))
        return x + message


class Layer(nn.Module):
    """Attention within each view, then to its neighbours."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.self_attn = AttentionLayer(channels, expansion=None)
        self.cross_attn_ffn = AttentionLayer(channels, expansion=expansion)


class MultiViewTransformer(nn.Module):
    """Layers of windowed attention within and between views; every second one has shifted windows."""

    def __init__(self, channels: int = 128, layers: int = 6, expansion: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(channels, expansion) for _ in range(layers))

    def forward(
        self,
        x: Float[Tensor, "batch view channels height width"],
        index: Int[Tensor, "batch view other"],
        swin_mask: SwinMask,
    ) -> Float[Tensor, "batch view channels height width"]:
        """Features of each view that know its neighbours'.

        Args:
            x: Features with position.
            index: See ``neighbours``.
            swin_mask: Of shifted windows.
        """
        height, width = x.shape[-2:]
        mask = shift_mask(height, width, device=x.device, dtype=x.dtype)
        others = index.shape[-1]
        wide = mask.repeat(1, 1, others) if swin_mask == "official" else mask.repeat_interleave(others, -1)
        x = x.permute(0, 1, 3, 4, 2)
        layers: Any = self.layers
        for number, layer in enumerate(layers):
            shifted = number % 2 == 1
            before = x
            x = layer.self_attn(x, x, None, mask if shifted else None)
            x = layer.cross_attn_ffn(x, before, index, wide if shifted else None)
        return x.permute(0, 1, 4, 2, 3)


def to_windows(x: Tensor) -> Tensor:
    """``[B, V, H, W, C]`` to ``[B, V, 4, P, C]``."""
    batch, views, height, width, channels = x.shape
    x = x.view(batch, views, 2, height // 2, 2, width // 2, channels).transpose(3, 4)
    return x.reshape(batch, views, 4, -1, channels)


def from_windows(x: Tensor, height: int, width: int) -> Tensor:
    """``[B, V, 4, P, C]`` to ``[B, V, H, W, C]``."""
    batch, views, _, _, channels = x.shape
    x = x.view(batch, views, 2, 2, height // 2, width // 2, channels).transpose(3, 4)
    return x.reshape(batch, views, height, width, channels)


def shift_mask(
    height: int, width: int, *, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "4 tokens tokens"]:
    """-100 between tokens that a cyclic shift brought into one window from different parts of the map."""

    def region(count: int) -> Tensor:
        place = torch.arange(count, device=device)
        return (place >= count - count // 2).long() + (place >= count - count // 4).long()

    regions = (region(height)[:, None] * 3 + region(width)[None]).to(torch.float32)
    windows = to_windows(regions[None, None, :, :, None])[0, 0, :, :, 0]
    apart = windows[:, :, None] != windows[:, None, :]
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill(apart, BLOCKED)


def plane_candidates(near: Tensor, far: Tensor, count: int) -> Tensor:
    """Inverse depths from 1 / far to 1 / near, evenly spaced, ``[B, V]`` to ``[B, V, D, 1, 1]``."""
    low, high = 1 / far[..., None, None, None], 1 / near[..., None, None, None]
    step = torch.linspace(0, 1, count, device=near.device, dtype=near.dtype).view(count, 1, 1)
    return low + step * (high - low)


@exact_geometry
def cost_volume(
    features: Float[Tensor, "batch view channels height width"],
    cam_to_world: Float[Tensor, "batch view 4 4"],
    inner_px: Float[Tensor, "batch view 3 3"],
    inverse_depth: Float[Tensor, "batch view candidate height width"],
    index: Int[Tensor, "batch view other"],
    geometry: SweepGeometry,
    backend: SweepBackend = "reference",
) -> Float[Tensor, "batch view candidate height width"]:
    """Likeness of each view to its neighbours under each candidate depth, the mean over them.

    Args:
        features: To compare.
        cam_to_world: Poses.
        inner_px: Intrinsics in pixels of the feature map.
        inverse_depth: Candidates of each pixel; sizes of one are spread.
        index: See ``neighbours``.
        geometry: See ``SweepGeometry``.
        backend: Of ``hone_kernels.plane_sweep``.
    """
    batch, views, _, height, width = features.shape
    others = index.shape[-1]
    half = 0.0 if geometry == "official" else 0.5
    rows, columns = torch.meshgrid(
        torch.arange(height, device=features.device) + half,
        torch.arange(width, device=features.device) + half,
        indexing="ij",
    )
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1).to(features.dtype)
    relative = torch.linalg.inv(take_views(cam_to_world, index)) @ cam_to_world[:, :, None]  # [B, V, m, 4, 4]
    target = inner_px[:, :, None].expand(-1, -1, others, -1, -1)
    if geometry == "exact":
        target = take_views(inner_px, index)
    # A point at inverse depth s lies at (ray + s * shift) / s; dividing by its last entry loses the 1 / s.
    ray = target @ relative[..., :3, :3] @ (torch.linalg.inv(inner_px) @ pixels)[:, :, None]
    shift = target @ relative[..., :3, 3:]
    first = torch.arange(batch, device=features.device)[:, None, None] * views
    found = sweep_planes(
        features.flatten(0, 1),
        (index + first).flatten(0, 1),
        ray.flatten(0, 1),
        shift.flatten(0, 1),
        inverse_depth.flatten(0, 1),
        half=half,
        backend=backend,
    )
    return found.unflatten(0, (batch, views))
