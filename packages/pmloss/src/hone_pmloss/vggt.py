"""VGGT, the paper's teacher: a point per pixel of pictures whose cameras nobody knows, in the first picture's frame.

Only what gives points is here: the alternating transformer and the point head. Keys are the published ones. Of the
other heads only names and shapes are known, so that a published file is looked at whole before anything of it is used.

Source: VGGT (arXiv 2503.11651) and its release.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.errors import CheckpointError
from hone_splat.dpt import Scratch, resize
from hone_splat.features import normalise
from hone_splat.published import read_state, state_difference
from hone_splat.views import Views
from hone_splat.vit import Block, LayerScale, Mlp, PatchEmbed
from jaxtyping import Float
from torch import Tensor, nn

from .teachers import PointMap, digest_of

__all__ = ["VGGT", "VGGT_1B", "VGGTConfig", "VGGTTeacher", "published_layout"]

log = logging.getLogger(__name__)

PATCH, GRID, REGISTERS = 14, 37, 4
SPECIAL = 1 + REGISTERS
"""Tokens of a picture before its patches: the camera's, and registers."""
BASE = 100.0
"""Of the frequencies of rotary position, and of the grid's embedding."""
GRID_SHARE = 0.1
"""With which the head adds the grid's embedding."""
CHUNK = 8
"""Pictures that the head takes at a time."""
OTHER_HEADS = ("camera_head", "depth_head", "track_head")
"""Of the published file, and without points."""
POSE, TRACK = 9, 384
"""Numbers of a camera, and channels of the layers that follow points."""
LICENCE = (
    "the published weights of VGGT-1B are under CC BY-NC 4.0, which forbids commercial use; a commercial checkpoint "
    "has terms of its own"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VGGTConfig:
    """Architecture; the defaults are the published one."""

    width: int = 1024
    """Channels of a token."""
    heads: int = 16
    """Of all attention."""
    patch_blocks: int = 24
    """Layers that look at each picture alone first."""
    blocks: int = 24
    """Pairs of layers: within a picture, then over all."""
    taps: tuple[int, int, int, int] = (4, 11, 17, 23)
    """Pairs whose tokens the head reads."""
    head_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    """Of the head's four levels."""
    head_width: int = 256
    """Of the fused ones."""


VGGT_1B = VGGTConfig()


class RotaryAttention(nn.Module):
    """Attention with norms of queries and keys, and rotary position in two dimensions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = (_rotate(part, turn).to(value.dtype) for part in (self.q_norm(query), self.k_norm(key)))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """Attention and MLP, each after a norm and scaled."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), RotaryAttention(width, heads), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width), Mlp(width), LayerScale(width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), turn))
        return x + self.ls2(self.mlp(self.norm2(x)))


def _rotate(x: Float[Tensor, "n heads token dim"], turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first half of each head by the row, the second by the column."""
    half = x.unflatten(-1, (2, 2, -1))  # [..., axis, half of the axis's channels, frequency]
    swapped = torch.stack([-half[..., 1, :], half[..., 0, :]], -2)
    return (half * turn[0] + swapped * turn[1]).flatten(-3)


def _turn(places: Float[Tensor, "token 2"], dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[token, 2, 1, dim / 4]`` of every token's row and column."""
    frequency = BASE ** (-torch.arange(0, dim // 2, 2, device=places.device) / (dim // 2))
    angle = places[:, :, None, None] * frequency
    return angle.cos(), angle.sin()


class PatchTransformer(nn.Module):
    """DINOv2 with registers, of one picture; its patches' tokens, normed."""

    def __init__(self, cfg: VGGTConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, REGISTERS, cfg.width))
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + GRID**2, cfg.width))
        self.patch_embed = PatchEmbed(cfg.width)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.patch_blocks))
        self.norm = nn.LayerNorm(cfg.width, 1e-6)

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n token width"]:
        patches = self.patch_embed.proj(x)
        size = patches.shape[-2:]
        place = self.pos_embed[:, 1:].unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        if tuple(size) != (GRID, GRID):
            place = F.interpolate(place, size=size, mode="bicubic", antialias=True)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        registers = self.register_tokens.expand(len(x), -1, -1)
        tokens = torch.cat([first, registers, (patches + place).flatten(2).mT], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, SPECIAL:]


class Aggregator(nn.Module):
    """Layers within each picture and over all of them, in turn."""

    def __init__(self, cfg: VGGTConfig) -> None:
        super().__init__()
        self.config = cfg
        # One for the first picture, in whose frame the points are, and one for all others.
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, cfg.width))
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, REGISTERS, cfg.width))
        self.patch_embed = PatchTransformer(cfg)
        self.frame_blocks = nn.ModuleList(RotaryBlock(cfg.width, cfg.heads) for _ in range(cfg.blocks))
        self.global_blocks = nn.ModuleList(RotaryBlock(cfg.width, cfg.heads) for _ in range(cfg.blocks))

    def forward(self, x: Float[Tensor, "batch view 3 height width"]) -> list[Float[Tensor, "batch view token twice"]]:
        """Tokens of normalised pictures after the tapped pairs, those of both layers of a pair side by side."""
        cfg, (batch, views), (height, width) = self.config, x.shape[:2], x.shape[3:]
        rows, columns = height // PATCH, width // PATCH
        patches = self.patch_embed(x.flatten(0, 1)).unflatten(0, (batch, views))
        which = (torch.arange(views, device=x.device) > 0).long()
        special = torch.cat([self.camera_token, self.register_token], 2)[:, which].expand(batch, -1, -1, -1)
        tokens = torch.cat([special.to(patches.dtype), patches], 2)
        y, z = torch.meshgrid(
            torch.arange(1, rows + 1, device=x.device), torch.arange(1, columns + 1, device=x.device), indexing="ij"
        )
        places = torch.cat([y.new_zeros(SPECIAL, 2), torch.stack([y, z], -1).flatten(0, 1)]).float()
        dim = cfg.width // cfg.heads
        within, over = _turn(places, dim), _turn(places.repeat(views, 1), dim)
        found = []
        for number, (frame, whole) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            alone = frame(tokens.flatten(0, 1), within).view_as(tokens)
            tokens = whole(alone.flatten(1, 2), over).view_as(alone)
            if number in cfg.taps:
                found.append(torch.cat([alone, tokens], -1))
        return found


class PointScratch(Scratch):
    """The head's part at one width, and its output."""

    def __init__(self, cfg: VGGTConfig, outputs: int) -> None:
        super().__init__(cfg.head_channels, cfg.head_width, output=False)
        half = cfg.head_width // 2
        self.output_conv1 = nn.Conv2d(cfg.head_width, half, 3, 1, 1)
        self.output_conv2 = nn.Sequential(nn.Conv2d(half, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, outputs, 1))


class PointHead(nn.Module):
    """From tokens to a point and a confidence per pixel."""

    def __init__(self, cfg: VGGTConfig, outputs: int = 4) -> None:
        super().__init__()
        channels = cfg.head_channels
        self.norm = nn.LayerNorm(2 * cfg.width)
        self.projects = nn.ModuleList(nn.Conv2d(2 * cfg.width, count, 1) for count in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, 4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, 2, 1),
            ]
        )
        self.scratch = PointScratch(cfg, outputs)

    def forward(self, taps: list[Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Points ``[n, H, W, 3]`` and confidence ``[n, H, W]`` of tokens ``[n, token, 2 * width]``."""
        aspect, scratch = columns / rows, self.scratch
        levels = []
        for level, (tokens, project, grow) in enumerate(zip(taps, self.projects, self.resize_layers, strict=True), 1):
            x = project(self.norm(tokens[:, SPECIAL:]).mT.unflatten(-1, (rows, columns)))
            levels.append(getattr(scratch, f"layer{level}_rn")(grow(_with_grid(x, aspect))))
        x = levels[3]
        for level in (4, 3, 2, 1):
            fuse: Any = getattr(scratch, f"refinenet{level}")
            if fuse.resConfUnit1 is not None:
                x = x + _unit(fuse.resConfUnit1, levels[level - 1])
            x = _unit(fuse.resConfUnit2, x)
            size = levels[level - 2].shape[-2:] if level > 1 else (2 * x.shape[-2], 2 * x.shape[-1])
            x = fuse.out_conv(resize(x, (size[0], size[1])))
        x = _with_grid(resize(scratch.output_conv1(x), (rows * PATCH, columns * PATCH)), aspect)
        x = scratch.output_conv2(x).movedim(1, -1)
        return x[..., :3].sign() * torch.expm1(x[..., :3].abs()), 1 + x[..., 3].exp()


def _unit(unit: Any, x: Tensor) -> Tensor:
    """Residual unit whose shortcut carries what the first ReLU left, as it works in place in the release."""
    x = F.relu(x)
    return unit.conv2(F.relu(unit.conv1(x))) + x


def _with_grid(x: Float[Tensor, "n channels height width"], aspect: float) -> Tensor:
    """Add a sine embedding of each place, columns in the first half of the channels and rows in the second."""
    channels, height, width = x.shape[1:]
    quarter = channels // 4
    frequency = BASE ** (-torch.arange(quarter, device=x.device, dtype=torch.float64) / quarter)
    diagonal = (aspect**2 + 1) ** 0.5

    def axis(extent: float, count: int) -> Tensor:
        edge = extent / diagonal * (count - 1) / count
        place = torch.linspace(-edge, edge, count, device=x.device, dtype=torch.float64)[:, None] * frequency
        return torch.cat([place.sin(), place.cos()], -1)

    columns = axis(aspect, width)[None].expand(height, -1, -1)
    rows = axis(1.0, height)[:, None].expand(-1, width, -1)
    return x + GRID_SHARE * torch.cat([columns, rows], -1).permute(2, 0, 1).to(x.dtype)


class VGGT(nn.Module):
    """Pictures to points."""

    def __init__(self, cfg: VGGTConfig = VGGT_1B) -> None:
        super().__init__()
        self.aggregator = Aggregator(cfg)
        self.point_head = PointHead(cfg)

    def forward(self, image_01: Float[Tensor, "batch view 3 height width"]) -> tuple[Tensor, Tensor]:
        """Points ``[B, V, H, W, 3]`` in the first picture's frame, of any scale, and confidence ``[B, V, H, W]`` > 1.

        Tokens are computed under the caller's autocast, the head in float32.

        Raises:
            ValueError: A side is no multiple of 14.
        """
        height, width = image_01.shape[3:]
        if height % PATCH or width % PATCH:
            raise ValueError(f"both sides must be multiples of {PATCH}; got {height} x {width}. Resize them first.")
        taps = [tokens.flatten(0, 1) for tokens in self.aggregator(normalise(image_01))]
        with torch.autocast(image_01.device.type, enabled=False):
            pieces = [
                self.point_head([part.float() for part in parts], height // PATCH, width // PATCH)
                for parts in zip(*(tokens.split(CHUNK) for tokens in taps), strict=True)
            ]
        points, trust = (torch.cat(part).unflatten(0, image_01.shape[:2]) for part in zip(*pieces, strict=True))
        return points, trust


class _Parts(nn.Module):
    """Modules and tensors by their names."""

    def __init__(self, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)


def _tracking(attention: str) -> nn.ModuleList:
    """Layers of the track head, whose attention has this name."""
    norms = ("norm1", "norm2", *(["norm_context"] if attention == "cross_attn" else []))
    parts = {attention: lambda: nn.MultiheadAttention(TRACK, 8), "mlp": lambda: Mlp(TRACK)}
    parts |= dict.fromkeys(norms, lambda: nn.LayerNorm(TRACK))
    return nn.ModuleList(_Parts(**{name: make() for name, make in parts.items()}) for _ in range(6))


def _camera_head(cfg: VGGTConfig) -> nn.Module:
    wide = 2 * cfg.width
    return _Parts(
        empty_pose_tokens=torch.zeros(1, 1, POSE),
        token_norm=nn.LayerNorm(wide),
        trunk=nn.Sequential(*(Block(wide, cfg.heads) for _ in range(4))),
        trunk_norm=nn.LayerNorm(wide),
        embed_pose=nn.Linear(POSE, wide),
        poseLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(wide, 3 * wide)),
        pose_branch=_Parts(fc1=nn.Linear(wide, cfg.width), fc2=nn.Linear(cfg.width, POSE)),
    )


def _track_head(cfg: VGGTConfig) -> nn.Module:
    found = cfg.head_width // 2
    features = PointHead(replace(cfg, head_width=found))
    features.scratch.output_conv1 = nn.Conv2d(found, found, 3, 1, 1)
    del features.scratch.output_conv2
    # Of a point that is followed: three vectors and four numbers, and 7 levels of 9 x 9 correlations.
    token, correlations = 3 * found + 4, 7 * 9 * 9
    tracker = _Parts(
        query_ref_token=torch.zeros(1, 2, token),
        corr_mlp=_Parts(fc1=nn.Linear(correlations, TRACK), fc2=nn.Linear(TRACK, found)),
        updateformer=_Parts(
            virual_tracks=torch.zeros(1, 64, 1, TRACK),
            input_norm=nn.LayerNorm(token),
            input_transform=nn.Linear(token, TRACK),
            output_norm=nn.LayerNorm(TRACK),
            flow_head=nn.Linear(TRACK, found + 2),
            time_blocks=_tracking("attn"),
            space_virtual_blocks=_tracking("attn"),
            space_point2virtual_blocks=_tracking("cross_attn"),
            space_virtual2point_blocks=_tracking("cross_attn"),
        ),
        fmap_norm=nn.LayerNorm(found),
        ffeat_norm=nn.LayerNorm(found),
        ffeat_updater=nn.Sequential(nn.Linear(found, found)),
        vis_predictor=nn.Sequential(nn.Linear(found, 1)),
        conf_predictor=nn.Sequential(nn.Linear(found, 1)),
    )
    return _Parts(feature_extractor=features, tracker=tracker)


def published_layout(cfg: VGGTConfig = VGGT_1B) -> VGGT:
    """Every tensor of the published file, on the meta device.

    The camera, depth and track heads are there for their names and shapes alone: nothing runs them.
    """
    with torch.device("meta"):
        layout = VGGT(cfg)
        layout.camera_head = _camera_head(cfg)
        layout.depth_head = PointHead(cfg, 2)
        layout.track_head = _track_head(cfg)
    return layout


class VGGTTeacher(nn.Module):
    """VGGT as a teacher; the cameras of the views are not looked at.

    Pictures are resized to the multiples of 14 below their sides; tokens are in bfloat16 on a GPU that has it, as in
    the release.

    Args:
        model: The network.
        name: What tells its answers from those of other weights, in the cache.
    """

    def __init__(self, model: VGGT, *, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = f"vggt:{name}"

    @classmethod
    def load(cls, path: str | Path, *, config: VGGTConfig = VGGT_1B, device: torch.device | str = "cpu") -> VGGTTeacher:
        """Load published weights strictly; their licence is logged, and which heads are left out.

        The camera, depth and track heads are not used. Each has to be whole, or not in the file at all.

        Args:
            path: ``model.safetensors`` or ``model.pt`` of the release.
            config: Architecture.
            device: Where it goes.

        Raises:
            CheckpointError: It cannot be read, or some tensors are missing, too many or of another shape.
        """
        log.warning("%s: %s", path, LICENCE)
        state = read_state(path, outside=())
        layout = published_layout(config)
        found = {name.partition(".")[0] for name in state}
        for head in OTHER_HEADS:
            if head not in found:
                delattr(layout, head)
        if wrong := state_difference(layout, state):
            raise CheckpointError(f"{path} is no checkpoint of VGGT: {wrong}")
        for head in OTHER_HEADS:
            if head in found:
                count = sum(value.numel() for value in getattr(layout, head).parameters())
                log.info("%s: %s is left out, %s parameters that give no points", path, head, f"{count:,}")
        with torch.device("meta"):
            model = VGGT(config)
        model.load_state_dict({name: state[name].float() for name in model.state_dict()}, assign=True)
        return cls(model.to(device), name=f"{Path(path).name}:{digest_of(model)}")

    @torch.no_grad()
    def forward(self, views: Views) -> PointMap:
        """See ``Teacher``.

        Raises:
            ValueError: The pictures are smaller than a patch.
        """
        size = tuple(side // PATCH * PATCH for side in views.size)
        if 0 in size:
            raise ValueError(f"pictures must be at least {PATCH} x {PATCH} pixels; got {views.size}")
        image = views.image_01
        if size != views.size:
            image = F.interpolate(image.flatten(0, 1), size, mode="bilinear").unflatten(0, image.shape[:2])
        half = image.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=half):
            return PointMap(*self.model(image))
