"""MVSplat (ECCV 2024, arXiv 2403.14627): a cost volume per view, and one Gaussian per pixel.

Keys and shapes are those of the published checkpoints, without their prefix ``encoder.``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import raw_channels, to_gaussians
from .cameras import DepthConvention, intrinsics_px
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

__all__ = ["MVSPLAT", "MVSplat", "MVSplatConfig", "tiny_mvsplat"]

STRIDE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MVSplatConfig:
    """Architecture; the defaults are the published one."""

    channels: tuple[int, int, int] = (64, 96, 128)
    """Of the feature network at a half, a quarter and a quarter of the picture."""
    layers: int = 6
    """Of the multi-view transformer."""
    candidates: int = 128
    """Depths that are compared."""
    cost_channels: int = 128
    """Of the U-Net over the cost volume."""
    cost_mults: tuple[int, ...] = (1, 1, 1)
    """Its levels; attention is at the lowest."""
    refine_channels: int = 32
    """Of the U-Net at full resolution, and of what it reads of the features."""
    refine_mults: tuple[int, ...] = (1, 1, 1, 1, 1)
    """Its levels; likewise."""
    sh_degree: int = 4
    """Of the colour that is predicted."""
    scale_range: tuple[float, float] = (0.5, 15.0)
    """Sizes of a Gaussian over a tenth of the pixel's, at its depth."""
    depth_convention: DepthConvention = "distance"
    """What depth means when it is unprojected."""
    sh_rotation: ShRotation = "official"
    """How colours turn from camera to world."""
    swin_mask: SwinMask = "official"
    """Mask of shifted windows."""
    sweep: SweepBackend = "reference"
    """What computes the cost volume; ``triton`` keeps no warped features, and is faster on a GPU."""
    geometry: SweepGeometry = "official"
    """How the cost volume projects."""
    pixel_colour: bool = False
    """Add the pixel's colour to the Gaussian's; not in the published weights."""
    offset: Literal["bounded", "unconstrained"] = "bounded"
    """How far a Gaussian may lie from its pixel's ray: half a pixel, or anywhere, as PM-Loss frees it."""
    nearest: int | None = None
    """Views that are compared with each, itself included; None for all."""


MVSPLAT = MVSplatConfig()


class Backbone(nn.Module):
    """Features of each view, compressed where something is attached, then aware of the other views."""

    zipmatch: Compressor | None

    def __init__(self, cfg: MVSplatConfig) -> None:
        super().__init__()
        self.backbone = FeatureNet(cfg.channels, (2, 1))
        self.transformer = MultiViewTransformer(cfg.channels[2], cfg.layers)
        self.zipmatch = None


class DepthPredictor(nn.Module):
    """Depth, opacity and raw Gaussians of every pixel."""

    def __init__(self, cfg: MVSplatConfig) -> None:
        super().__init__()
        width, planes, small = cfg.channels[2], cfg.candidates, cfg.refine_channels
        gaussian = raw_channels(cfg.sh_degree)

        def conv(channels_in: int, channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels_in, channels, 3, 1, 1)

        self.corr_refine_net = nn.ModuleList(
            [
                conv(planes + width, cfg.cost_channels),
                nn.GroupNorm(8, cfg.cost_channels),
                nn.GELU(),
                UNet(cfg.cost_channels, cfg.cost_mults, (2 ** (len(cfg.cost_mults) - 1),), "post"),
                conv(cfg.cost_channels, planes),
            ]
        )
        self.regressor_residual = nn.Conv2d(planes + width, planes, 1)
        self.depth_head_lowres = nn.Sequential(conv(planes, 2 * planes), nn.GELU(), conv(2 * planes, planes))
        self.upsampler = nn.ModuleList([conv(2 * width, width)])
        self.proj_feature = conv(width, small)
        self.refine_unet = nn.ModuleList(
            [
                conv(small + 5, small),
                nn.GroupNorm(4, small),
                nn.GELU(),
                UNet(small, cfg.refine_mults, (2 ** (len(cfg.refine_mults) - 1),), "post"),
            ]
        )
        self.to_gaussians = nn.Sequential(
            conv(small + 3 + width, 2 * gaussian), nn.GELU(), conv(2 * gaussian, gaussian)
        )
        self.to_disparity = nn.Sequential(conv(small, 2 * small), nn.GELU(), conv(2 * small, 2))


def _run(blocks: nn.ModuleList, x: Tensor, views: int) -> Tensor:
    for block in blocks:
        x = block(x, views) if isinstance(block, UNet) else block(x)
    return x


class MVSplat(nn.Module):
    """Posed views to Gaussians.

    ``attach`` of hone-zpressor puts a compressor at ``backbone.zipmatch``.
    """

    def __init__(self, cfg: MVSplatConfig = MVSPLAT) -> None:
        super().__init__()
        self.config = cfg
        self.backbone = Backbone(cfg)
        self.depth_predictor = DepthPredictor(cfg)

    @property
    def multiple(self) -> int:
        """What both sides of a picture must be multiples of."""
        cfg = self.config
        return max(STRIDE * 2 ** (len(cfg.cost_mults) - 1), 2 * STRIDE, 2 ** (len(cfg.refine_mults) - 1))

    @property
    def channels(self) -> int:
        """Of the features that a compressor gets."""
        return self.config.channels[2]

    @property
    def join(self) -> nn.Module:
        """Module whose ``zipmatch`` is the compressor."""
        return self.backbone

    def forward(self, views: Views) -> HostOutput:
        """Gaussians of each scene.

        Raises:
            ValueError: See ``check_views``; or there is only one view left to match.
        """
        cfg, compress = self.config, self.backbone.zipmatch
        dtype = self.depth_predictor.proj_feature.weight.dtype
        check_views(views, self.multiple, compressed=compress is not None, dtype=dtype)
        count = views.count
        features = self.backbone.backbone(normalise(views.image_01).flatten(0, 1))[2].unflatten(0, (-1, count))
        anchors = None
        if compress is not None and (compressed := compress(features, views)) is not None:
            features, anchors = compressed
            views = views.take(anchors)
            count = views.count
        index = neighbours(views.cam_to_world, cfg.nearest)
        matched = self.backbone.transformer(
            window_position(features.flatten(0, 1)).unflatten(0, (-1, count)), index, cfg.swin_mask
        )
        candidates = plane_candidates(views.near, views.far, cfg.candidates)
        inner = intrinsics_px(views.intrinsics_norm, *matched.shape[-2:])
        cost = cost_volume(matched, views.cam_to_world, inner, candidates, index, cfg.geometry, cfg.sweep)
        return self._gaussians(views, features, matched, cost, candidates, anchors)

    def _gaussians(
        self, views: Views, features: Tensor, matched: Tensor, cost: Tensor, candidates: Tensor, anchors: Tensor | None
    ) -> HostOutput:
        cfg, net, count = self.config, self.depth_predictor, views.count
        features, matched, cost, candidates = (part.flatten(0, 1) for part in (features, matched, cost, candidates))
        image = views.image_01.flatten(0, 1)
        joint = torch.cat([cost, matched], 1)
        logits = net.depth_head_lowres(_run(net.corr_refine_net, joint, count) + net.regressor_residual(joint))
        share = torch.softmax(logits.float(), 1)
        coarse = upsample((share * candidates).sum(1, keepdim=True), STRIDE)
        sure = F.interpolate(share.amax(1, keepdim=True), scale_factor=STRIDE, mode="nearest")
        full = F.gelu(upsample(net.upsampler[0](torch.cat([matched, features], 1)), STRIDE))
        refined = _run(net.refine_unet, torch.cat([image, net.proj_feature(full), coarse, sure], 1), count)
        raw = net.to_gaussians(torch.cat([refined, image, full], 1)).unflatten(0, (-1, count))
        change, density = net.to_disparity(refined).unbind(1)
        near, far = (bound.flatten()[:, None, None] for bound in (views.near, views.far))
        depth = 1 / torch.minimum(torch.maximum(coarse[:, 0] + change, 1 / far), 1 / near)
        depth = depth.unflatten(0, (-1, count))
        offset, scale, quat, colour = raw.split([2, 3, 4, raw.shape[2] - 9], 2)
        low, high = cfg.scale_range
        height, width = views.size
        side = views.near.new_tensor([1 / width, 1 / height])
        pixel = (torch.linalg.inv(views.intrinsics_norm[..., :2, :2]) * side).sum(-1)
        scale = (low + (high - low) * scale.sigmoid()) * depth[:, :, None] * 0.1 * pixel.sum(-1)[..., None, None, None]
        gaussians = to_gaussians(
            offset.sigmoid() - 0.5 if cfg.offset == "bounded" else 0.5 * offset,
            scale,
            quat,
            colour,
            density.sigmoid().unflatten(0, (-1, count)),
            depth,
            views.cam_to_world,
            views.intrinsics_norm,
            convention=cfg.depth_convention,
            sh_rotation=cfg.sh_rotation,
            image_01=views.image_01 if cfg.pixel_colour else None,
        )
        return HostOutput(gaussians, depth, views, anchors, full.unflatten(0, (-1, count)))


def tiny_mvsplat(
    channels: tuple[int, int, int],
    layers: int,
    candidates: int,
    refine_channels: int,
    *,
    nearest: int | None = None,
    offset: Literal["bounded", "unconstrained"] = "bounded",
    seed: int = 0,
) -> MVSplat:
    """A small MVSplat with random weights, to be trained on generated rooms; the global generator is left as it was.

    It differs from the published one where that only repeats what its weights were trained with: masks, intrinsics and
    rotations are the right ones.

    Args:
        channels: See ``MVSplatConfig``, as the next four.
        layers: Of the transformer.
        candidates: Depths.
        refine_channels: Of the U-Net at full resolution.
        nearest: Views that are compared.
        offset: See ``MVSplatConfig``.
        seed: Of the weights.
    """
    settings = MVSplatConfig(
        channels=channels,
        layers=layers,
        candidates=candidates,
        cost_channels=32,
        cost_mults=(1, 1),
        refine_channels=refine_channels,
        refine_mults=(1, 1, 1),
        sh_degree=0,
        sh_rotation="right",
        swin_mask="correct",
        geometry="exact",
        pixel_colour=True,
        offset=offset,
        nearest=nearest,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MVSplat(settings).eval()
