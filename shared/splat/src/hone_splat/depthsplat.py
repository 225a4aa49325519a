"""DepthSplat (CVPR 2025, arXiv 2410.13862) in both published generations: matching and a monocular prior to Gaussians.

Keys and shapes are those of the published checkpoints, without their prefix ``encoder.``. Weights of one generation do
not fit the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import raw_channels, to_gaussians
from .cameras import intrinsics_px
from .dpt import DPT, resize
from .features import FeatureNet, normalise, upsample, window_position
from .harmonics import ShRotation
from .hosts import Compressor, HostOutput, check_views
from .matching import (
    MultiViewTransformer,
    SweepBackend,
    SweepGeometry,
    SwinMask,
    cost_volume,
    neighbours,
    plane_candidates,
)
from .unet import UNet
from .views import Views
from .vit import PATCH, VITS, ViT, ViTConfig

__all__ = ["DEPTHSPLATS", "DepthSplat", "DepthSplatConfig"]

CHANNELS = (64, 96, 128)
CANDIDATES = 128
SMALL_COUNT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthSplatConfig:
    """Architecture."""

    generation: Literal["oct", "head"]
    """Of the release: October 2024, which ZPressor and PM-Loss build on, or April 2025."""
    num_scales: int
    """At which depth is looked for."""
    upsample_factor: int
    """From the finest of them to the picture."""
    lowest: int
    """Stride of the coarsest features."""
    vit: ViTConfig
    """Of the monocular prior."""
    depth_channels: tuple[int, int, int, int]
    """Levels of the dense heads."""
    depth_width: int
    """Of the depth's head."""
    feature_width: int
    """Of the features that Gaussians are made of."""
    regressor_width: int
    """Of the network before the Gaussians' head."""
    head_expansion: int
    """Hidden channels of the Gaussians' head over those of its output."""
    sh_degree: int
    """Of the colour that is predicted."""
    scale_max: float
    """Largest deviation of a Gaussian."""
    nearest: int | None
    """Views that are compared with each, itself included; None for all. The later generation takes all of three."""
    offset: Literal["bounded", "unconstrained"] = "bounded"
    """Of each Gaussian from its pixel: within half of it, or free as in the weights of PM-Loss."""
    sh_rotation: ShRotation = "official"
    """How colours turn from camera to world."""
    swin_mask: SwinMask = "official"
    """Mask of shifted windows."""
    sweep: SweepBackend = "reference"
    """What computes the cost volume; ``triton`` keeps no warped features, and is faster on a GPU."""
    geometry: SweepGeometry = "official"
    """How the cost volume projects."""


def _oct(vit: str, scales: int, factor: int, lowest: int, width: int = 128) -> DepthSplatConfig:
    wide = width == 128
    return _family(vit, scales, factor, lowest, generation="oct", feature_width=width, scale_max=0.3,
                   regressor_width=32 if wide else 64, head_expansion=2 if wide else 1, sh_degree=4)  # fmt: skip


def _head(vit: str, scales: int, factor: int, lowest: int, scale_max: float = 3.0) -> DepthSplatConfig:
    width = {"vits": 64, "vitb": 96, "vitl": 128}[vit]
    return _family(vit, scales, factor, lowest, generation="head", feature_width=width, regressor_width=64,
                   head_expansion=1, sh_degree=2, scale_max=scale_max)  # fmt: skip


def _family(vit: str, scales: int, factor: int, lowest: int, **rest: Any) -> DepthSplatConfig:
    channels = {"vits": (48, 96, 192, 384), "vitb": (96, 192, 384, 768), "vitl": (128, 256, 512, 1024)}[vit]
    width = {"vits": 32, "vitb": 48, "vitl": 64}[vit]
    return DepthSplatConfig(num_scales=scales, upsample_factor=factor, lowest=lowest, vit=VITS[vit],
                            depth_channels=channels, depth_width=width, nearest=3, **rest)  # fmt: skip


DEPTHSPLATS = {
    "depthsplat-head-small-256x256": _head("vits", 1, 4, 4),
    "depthsplat-head-base-256x256": _head("vitb", 2, 2, 4),
    "depthsplat-head-large-256x256": _head("vitl", 2, 2, 4),
    "depthsplat-head-base-256x448": _head("vitb", 2, 4, 8),
    # The release draws with these two at a largest deviation of its own.
    "depthsplat-head-small-448x768": _head("vits", 1, 8, 8, 0.1),
    "depthsplat-head-base-448x768": _head("vitb", 2, 4, 8, 0.1),
    "depthsplat-oct-small-256x256": _oct("vits", 1, 4, 4, 64),
    "depthsplat-oct-base-256x448": _oct("vitb", 2, 4, 8),
    "depthsplat-oct-pmloss-256x448": replace(_oct("vitb", 2, 4, 8), offset="unconstrained"),
    "depthsplat-oct-zpressor-256x448": _oct("vitb", 1, 8, 8),
}
"""Published architectures."""


def _replicate(channels_in: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, 1, 1, padding_mode="replicate")


def _conv(channels_in: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, 1, 1)


class Pyramid(nn.Module):
    """A map, and one of twice its sides with half its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.stages = nn.ModuleList(
            [
                nn.Identity(),
                nn.Sequential(nn.ConvTranspose2d(channels, half, 2, 2), nn.GELU(), _conv(half, half)),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [stage(x) for stage in self.stages]


class Regressor(nn.ModuleList):
    """Convolution, normalisation, GELU, U-Net over all views, convolution."""

    def __init__(self, channels_in: int, channels: int, mults: tuple[int, ...], attention: int) -> None:
        net = UNet(channels, mults, (attention,), "pre")
        super().__init__(
            [_conv(channels_in, channels), nn.GroupNorm(8, channels), nn.GELU(), net, _conv(channels, channels)]
        )

    def forward(self, x: Tensor, views: int) -> Tensor:
        for part in self:
            x = part(x, views) if isinstance(part, UNet) else part(x)
        return x


class DepthPredictor(nn.Module):
    """Features, matching and depth."""

    zipmatch: Compressor | None

    def __init__(self, cfg: DepthSplatConfig) -> None:
        super().__init__()
        width, scales = cfg.vit.width, range(cfg.num_scales)
        self.backbone = FeatureNet(CHANNELS, (1 if cfg.lowest == 4 else 2, 2))
        self.transformer = MultiViewTransformer(CHANNELS[2])
        self.pretrained = ViT(cfg.vit)
        self.zipmatch = None
        if cfg.num_scales == 2:
            self.mv_pyramid, self.mono_pyramid = Pyramid(CHANNELS[2]), Pyramid(width)
        self.regressor, self.regressor_residual, self.depth_head = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in scales:
            channels, planes = CHANNELS[2] // 2**i, CANDIDATES // 4**i
            given = planes + CHANNELS[2 - i] + channels + width // 2**i
            self.regressor.append(Regressor(given, channels, (1,) * (3 + i), 4 * 2**i))
            self.regressor_residual.append(nn.Conv2d(given, channels, 1))
            self.depth_head.append(
                nn.Sequential(_replicate(channels, 2 * channels), nn.GELU(), _replicate(2 * channels, planes))
            )
        self.upsampler = _dense(cfg, cfg.depth_width, depth=True)


def _dense(cfg: DepthSplatConfig, width: int, *, depth: bool) -> DPT:
    matched = [CHANNELS[2] // 2**i for i in reversed(range(cfg.num_scales))]
    return DPT(cfg.vit.width, cfg.depth_channels, width, CHANNELS, matched, cfg.upsample_factor, depth=depth)


class ResizeConv(nn.Module):
    """Features of the earlier generation: each scale is enlarged by itself."""

    def __init__(self, cfg: DepthSplatConfig) -> None:
        super().__init__()
        out = cfg.feature_width // cfg.num_scales
        self.upsampler = nn.ModuleList()
        for i in range(cfg.num_scales):
            steps = int(math.log2(cfg.lowest // 2**i))
            width = 2 * out if steps == 1 else 2 * out * (steps - 1)
            parts: list[nn.Module] = [
                nn.Conv2d(CHANNELS[2 - i] + CHANNELS[2] // 2**i + cfg.vit.width // 2**i, width, 1)
            ]
            for step in range(steps):
                last = step == steps - 1
                after = out if last else width // 2
                parts += [nn.Upsample(scale_factor=2, mode="nearest"), _replicate(width, after)]
                parts += [] if last else [nn.GELU()]
                width = after
            self.upsampler.append(nn.Sequential(*parts))

    def forward(self, scales: list[Tensor]) -> Tensor:
        return torch.cat([grow(x) for grow, x in zip(self.upsampler, scales, strict=True)], 1)


class DepthSplat(nn.Module):
    """Posed views to Gaussians.

    ``attach`` of hone-zpressor puts a compressor at ``depth_predictor.zipmatch``.
    """

    def __init__(self, cfg: DepthSplatConfig) -> None:
        super().__init__()
        self.config = cfg
        self.depth_predictor = DepthPredictor(cfg)
        given, raw = 5 + cfg.feature_width, 1 + raw_channels(cfg.sh_degree)
        self.feature_upsampler: nn.Module
        self.gaussian_regressor: nn.Module
        if cfg.generation == "head":
            self.feature_upsampler = _dense(cfg, cfg.feature_width, depth=False)
            wide = cfg.regressor_width
            self.gaussian_regressor = nn.Sequential(_conv(given, wide), nn.GELU(), _conv(wide, wide))
        else:
            self.feature_upsampler = ResizeConv(cfg)
            mults = (1, 2, 4, 4, 4) if cfg.regressor_width == 32 else (1,) * 5
            self.gaussian_regressor = Regressor(given, cfg.regressor_width, mults, 16)
        hidden, last = cfg.head_expansion * raw, _replicate(cfg.head_expansion * raw, raw)
        with torch.no_grad():
            assert last.bias is not None
            for rows in (slice(3, 6), slice(10, None)):
                last.weight[rows] = 0
                last.bias[rows] = 0
        self.gaussian_head = nn.Sequential(
            _replicate(cfg.regressor_width + cfg.feature_width + 4, hidden), nn.GELU(), last
        )

    @property
    def multiple(self) -> int:
        """What both sides of a picture must be multiples of."""
        return 4 * self.config.lowest

    @property
    def channels(self) -> int:
        """Of the features that a compressor gets."""
        return CHANNELS[2]

    @property
    def join(self) -> nn.Module:
        """Module whose ``zipmatch`` is the compressor."""
        return self.depth_predictor

    def forward(self, views: Views) -> HostOutput:
        """Gaussians of each scene.

        Raises:
            ValueError: See ``check_views``; or there is only one view left to match.
        """
        cfg, net = self.config, self.depth_predictor
        dtype = net.backbone.conv1.weight.dtype
        check_views(views, self.multiple, compressed=net.zipmatch is not None, dtype=dtype)
        count = views.count
        features = net.backbone(normalise(views.image_01).flatten(0, 1))
        placed = window_position(features[2]).unflatten(0, (-1, count))
        anchors = None
        if net.zipmatch is not None and (compressed := net.zipmatch(placed, views)) is not None:
            placed, anchors = compressed
            rows = torch.arange(len(views), device=anchors.device)[:, None]
            features = [part.unflatten(0, (-1, count))[rows, anchors].flatten(0, 1) for part in features]
            views = views.take(anchors)
            count = views.count
        index = neighbours(views.cam_to_world, self._nearest(count))
        matched = net.transformer(placed, index, cfg.swin_mask).flatten(0, 1)
        mono = self._mono(views)
        near = mono[3] if cfg.lowest == 8 else upsample(mono[3])
        two = cfg.num_scales == 2
        matches, monos = (net.mv_pyramid(matched), net.mono_pyramid(near)) if two else ([matched], [near])
        joint = [
            torch.cat([features[2 - i], match, prior], 1)
            for i, (match, prior) in enumerate(zip(matches, monos, strict=True))
        ]
        coarse, share = self._depth(views, index, matches, joint)
        low, high = (1 / bound.flatten()[:, None, None, None] for bound in (views.far, views.near))
        change = net.upsampler(mono, features, matches[::-1], coarse)
        depth = 1 / torch.maximum(torch.minimum(upsample(coarse, cfg.upsample_factor) + change, high), low)
        sure = F.interpolate(share.amax(1, keepdim=True), size=views.size, mode="nearest")
        if cfg.generation == "head":
            full = self.feature_upsampler(mono, features, matches[::-1], None)
        else:
            full = self.feature_upsampler(joint)
        return self._gaussians(views, depth, sure, full, anchors)

    def _nearest(self, count: int) -> int | None:
        cfg = self.config
        return None if cfg.generation == "head" and count <= SMALL_COUNT else cfg.nearest

    def _mono(self, views: Views) -> list[Tensor]:
        """Maps of the monocular prior, at an eighth of the picture."""
        height, width = views.size
        image = normalise(views.image_01).flatten(0, 1)
        maps = self.depth_predictor.pretrained(resize(image, (height // PATCH * PATCH, width // PATCH * PATCH)))
        return [resize(part, (height // 8, width // 8)) for part in maps]

    def _depth(self, views: Views, index: Tensor, matches: list[Tensor], joint: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Inverse depth of the finest scale, ``[B * V, 1, h, w]``, and the share of each of its candidates."""
        cfg, net, count = self.config, self.depth_predictor, views.count
        low, high = (1 / bound.flatten()[:, None, None, None] for bound in (views.far, views.near))
        parts: Any = net.regressor, net.regressor_residual, net.depth_head
        coarse = share = None
        for i, (regressor, residual, head) in enumerate(zip(*parts, strict=True)):
            planes = CANDIDATES // 4**i
            if coarse is None:
                candidates = plane_candidates(views.near, views.far, planes).flatten(0, 1)
            else:
                around = upsample(coarse).detach()
                step = (high - low) / (CANDIDATES - 1) / 2**i
                first = torch.maximum(around - step * (planes // 2), low)
                last = torch.minimum(around + step * (planes // 2 - 1), high)
                ramp = torch.linspace(0, 1, planes, device=around.device, dtype=around.dtype).view(1, planes, 1, 1)
                candidates = first + ramp * (last - first)
            maps = matches[i].unflatten(0, (-1, count))
            inner = intrinsics_px(views.intrinsics_norm, *maps.shape[-2:])
            tried = candidates.unflatten(0, (-1, count))
            cost = cost_volume(maps, views.cam_to_world, inner, tried, index, cfg.geometry, cfg.sweep).flatten(0, 1)
            given = torch.cat([cost, joint[i]], 1)
            share = torch.softmax(head(regressor(given, count) + residual(given)).float(), 1)
            coarse = (share * candidates).sum(1, keepdim=True)
        assert coarse is not None
        assert share is not None
        return coarse, share

    def _gaussians(self, views: Views, depth: Tensor, sure: Tensor, full: Tensor, anchors: Tensor | None) -> HostOutput:
        cfg, count = self.config, views.count
        image = views.image_01.flatten(0, 1)
        given = torch.cat([image, depth, sure, full], 1)
        net = self.gaussian_regressor
        refined = net(given, count) if isinstance(net, Regressor) else net(given)
        raw = self.gaussian_head(torch.cat([refined, image, full, sure], 1)).unflatten(0, (-1, count))
        opacity, offset, scale, quat, colour = raw.split([1, 2, 3, 4, raw.shape[2] - 10], 2)
        if cfg.generation == "head":
            scale = F.softplus(scale - 4).clamp(1e-10, cfg.scale_max)
        else:
            scale = torch.exp(scale - 4).clamp(max=cfg.scale_max)
        depth = depth[:, 0].unflatten(0, (-1, count))
        gaussians = to_gaussians(
            offset.sigmoid() - 0.5 if cfg.offset == "bounded" else 0.5 * offset,
            scale,
            quat,
            colour,
            opacity[:, :, 0].sigmoid(),
            depth,
            views.cam_to_world,
            views.intrinsics_norm,
            convention="depth_z" if cfg.generation == "head" else "distance",
            sh_rotation=cfg.sh_rotation,
            image_01=views.image_01,
        )
        return HostOutput(gaussians, depth, views, anchors, full.unflatten(0, (-1, count)))
