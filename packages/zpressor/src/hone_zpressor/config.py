"""Settings of the method and of every verb; nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hone_core.config import Preset, flag
from hone_core.training import check_budget
from hone_splat.ranges import HOSTS
from hone_splat.training_config import FitConfig

__all__ = [
    "ARMS",
    "PRESETS",
    "BenchConfig",
    "ConvertConfig",
    "DemoConfig",
    "DoctorConfig",
    "EvalConfig",
    "HostConfig",
    "RenderConfig",
    "ReproduceConfig",
    "TrainConfig",
    "TrainHostConfig",
    "ViewConfig",
    "ZPressorConfig",
]

ARMS = ("host", "zpressor", "anchors")
"""Variants of the tiny host: all views; many fused into a few; the same few, without fusion."""
Selection = Literal["distance", "overlap", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZPressorConfig:
    """How many views are left, and how they are made."""

    anchors: int = 6
    """Views that are left."""
    fuse: bool = True
    """Fold the other views in; without it they are dropped, which is the control that matters."""
    layers: int = 6
    """Pairs of cross- and self-attention."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """As released, bfloat16 holds of the cross-attention, and on a CUDA device of the self-attention too."""
    attention: Literal["auto", "padded", "varlen"] = "auto"
    """Of the cross-attention: over lists of support padded to the longest; or torch's over ragged ones, in bfloat16 on
    a CUDA device. ``auto``: ragged ones where they can be, which is faster there and takes less memory."""
    selection: Selection = "distance"
    """How anchors are chosen: farthest points among camera centres, by what the cameras see, or at random."""
    seed: int = 0
    """Of random anchors."""

    def __post_init__(self) -> None:
        if self.anchors < 2:
            raise ValueError(f"hosts match views with each other: anchors must be at least 2; got {self.anchors}")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1; got {self.layers}")
        if self.attention == "varlen" and self.precision != "bfloat16":
            raise ValueError(f'attention="varlen" needs precision="bfloat16"; got {self.precision}')


PRESETS: dict[str, Preset[ZPressorConfig]] = {
    "depthsplat": Preset(ZPressorConfig(), "DepthSplat 256x448", "Released config dl3dv.yaml: 6 anchors, 6 layers"),
    "mvsplat": Preset(ZPressorConfig(), "MVSplat 256x256", "Released config re10k.yaml: 6 anchors, 6 layers"),
    "pixelsplat": Preset(
        ZPressorConfig(anchors=4), "pixelSplat 256x256", "Released config re10k_12_4_view.yaml: 4 anchors, 6 layers"
    ),
    "tiny": Preset(
        ZPressorConfig(layers=2, precision="float32"), "The tiny host 64x64", "Ours: the trained host of this package"
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(FitConfig):
    """A host with ZPressor trained on chunks; by itself the second stage of the released run, on DL3DV."""

    model: str = "depthsplat-oct-zpressor-256x448"
    """Host, see info; ``start`` may hold it alone or with ZPressor."""
    context: tuple[int, int] = (12, 12)
    """Least and largest number of context views, drawn for each scene."""
    drop_error: float | None = None
    """Squared error of a channel from which it is left out of the mean (default: never, as released)."""
    skip_loss: float | None = None
    """Loss of the pictures above which a step after the first 301 counts a hundred millionth (default: never)."""
    steps: int = 100_000
    """Optimiser steps."""
    zpressor: ZPressorConfig = field(default_factory=lambda: PRESETS["depthsplat"].config)
    """What stands in the host."""
    information: float = 1e-5
    """Weight of the information loss, as in the released configs."""

    def __post_init__(self) -> None:
        # A dataclass with slots is made twice, and super() would look for the first.
        FitConfig.__post_init__(self)
        if self.information < 0 or self.context[0] < self.zpressor.anchors:
            raise ValueError(
                f"information must be at least 0, and context views no fewer than anchors; got {self.information}, "
                f"{self.context} and {self.zpressor.anchors}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host: an MVSplat of the same parts, smaller."""

    channels: tuple[int, int, int] = (24, 32, 64)
    """Of the feature network."""
    layers: int = 2
    """Of the multi-view transformer."""
    candidates: int = 32
    """Depths that are compared."""
    refine_channels: int = 32
    """Of the U-Net at full resolution."""
    zpressor: ZPressorConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """Of the arm with fusion."""
    size: int = 64
    """Side of the pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Many generated views compressed to a few, beside the host alone and the anchors alone."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    views: int = 24
    """Context views."""
    anchors: int = 6
    """Views that are left."""
    rooms: int = field(default=2, metadata=flag("limit"))
    """Generated rooms, none of them trained on."""
    targets: int = 4
    """Views per room that are looked at from, none of them a context view."""
    frames: int = 24
    """Of the fly-through."""
    seed: int = 0
    """Of the rooms."""

    def __post_init__(self) -> None:
        if not 2 <= self.anchors <= self.views or self.views > 40:
            raise ValueError(f"expected 2 <= anchors <= views <= 40; got {self.anchors} and {self.views}")
        if min(self.rooms, self.targets) < 1 or self.frames < 2 or self.views + self.targets > 50:
            raise ValueError(
                "expected at least one room and target, two frames, and at most 50 views with the targets; got "
                f"{self.rooms}, {self.targets}, {self.frames} and {self.views + self.targets}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """How the tiny host and its three arms are trained on generated rooms."""

    host: HostConfig = field(default_factory=HostConfig)
    """Architecture."""
    base_share: float = 0.5
    """Share of the steps that the host trains alone; the three arms start from it and share the rest equally."""
    scenes: int = 4
    """Rooms per step."""
    context: int = 12
    """Views of the arms zpressor and anchors; the host takes as many as there are anchors."""
    targets: int = 4
    """Views per room that the loss looks at."""
    gap: tuple[int, int] = (16, 50)
    """Frames of the path, of 50, that the context views of a step span, drawn from this range."""
    lr: float = 4e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises, at the start of each stage."""
    steps: int = 8000
    """Optimiser steps in all."""
    minutes: float = field(default=math.inf, metadata=flag(hidden=True))
    """No bound: the arms share steps equally."""
    graded: int = 32
    """Rooms, none of them trained on, that the host is graded on."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    seed: int = 0
    """Of weights and rooms."""

    def __post_init__(self) -> None:
        check_budget(self, "scenes", "targets", "graded", "lr", "warmup_steps")
        if not 0 < self.base_share < 1:
            raise ValueError(f"base_share must lie in (0, 1); got {self.base_share}")
        anchors = self.host.zpressor.anchors
        if not anchors <= self.context or not self.context <= self.gap[0] <= self.gap[1] <= 50:
            raise ValueError(f"expected anchors <= context <= gap <= 50; got {anchors}, {self.context} and {self.gap}")
        if self.context + self.targets > self.gap[1]:
            raise ValueError(
                f"expected context and targets to fit into the largest gap, {self.gap[1]} frames; got {self.context} "
                f"and {self.targets}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time and memory of host, host with ZPressor, anchors alone, and the loop form of the same module."""

    model: Literal["tiny", "mvsplat", "depthsplat"] = "tiny"
    """``tiny``: the tiny host's architecture. ``mvsplat``, ``depthsplat``: those that ZPressor was published for, with
    random weights."""
    size: tuple[int, int] | None = None
    """Height and width of the pictures (default: the model's own)."""
    views: tuple[int, ...] = (6, 12)
    """Context views."""
    anchors: int = 6
    """Views that are left."""
    host_views: int = 12
    """Most views that the host alone is given."""
    sweeps: tuple[Literal["reference", "triton"], ...] = ("reference",)
    """What computes the host's cost volume, each in turn."""
    matmuls: tuple[Literal["float32", "tf32"], ...] = ("float32",)
    """Precision of matrix products on a CUDA device, each in turn; convolutions are in TF32 there always, as torch has
    it."""
    rounds: int = 5
    """Turns that each variant gets once it is warm; the module alone, which is short, gets twice as many."""
    seed: int = 0
    """Of weights and rooms."""

    def __post_init__(self) -> None:
        if not self.views or min(self.views) < self.anchors or self.anchors < 2 or self.rounds < 1:
            raise ValueError(
                "expected at least one round and 2 <= anchors <= each number of views; got "
                f"{self.rounds}, {self.anchors} and {self.views}"
            )
        for name in ("views", "sweeps", "matmuls"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"expected {name} that differ, and at least one; got {given}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The paper's claims on tiny hosts: fusion against anchors alone, and against the host with all views."""

    hosts: tuple[Path, ...] = ()
    """Files made by train-host, of several seeds (default: the packaged one)."""
    rooms: int = field(default=48, metadata=flag("limit"))
    """Generated rooms per host, none of them trained on."""
    views: tuple[int, ...] = (6, 12, 24, 36)
    """Context views."""
    judged: tuple[int, ...] = (24, 36)
    """Of them, those at which the claims are judged."""
    anchor_counts: tuple[int, ...] = (3, 6, 9, 12)
    """Anchors of the sweep over their number, at 24 views."""
    targets: int = 8
    """Views per room that are looked at from."""
    seed: int = 0
    """Of the rooms."""

    def __post_init__(self) -> None:
        if self.rooms < 2 or self.targets < 1 or not set(self.judged) <= set(self.views) or not self.judged:
            raise ValueError(
                "expected at least two rooms, a target, and judged views that are among views; got "
                f"{self.rooms}, {self.targets}, and {self.judged} of {self.views}"
            )
        most = max(*self.views, 24 if self.anchor_counts else 0)
        if min(self.views) < 6 or most + self.targets > 50:
            raise ValueError(
                "expected from 6 views (24 where there are anchor_counts) to 50 with the targets; got "
                f"{self.views} and {self.targets} targets"
            )
        if self.anchor_counts and not 2 <= min(self.anchor_counts) <= max(self.anchor_counts) <= 24:
            raise ValueError(f"anchor_counts must lie in 2..24; got {self.anchor_counts}")
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError("hosts: one is named twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What a host would make of your photographs; no weights are needed."""

    colmap: Path | None = None
    """Folder of a COLMAP model, binary or text, itself or in sparse/0."""
    transforms: Path | None = None
    """A ``transforms.json`` of nerfstudio or Blender."""
    images: Path | None = None
    """Folder of the pictures, where a COLMAP model has them elsewhere than in images."""
    model: str = "mvsplat"
    """Host to ask for, see info."""
    views: int = 24
    """Context views, the farthest cameras; all if the capture has fewer."""
    anchors: int = 6
    """Of them, those that are left."""
    near: float | None = None
    """Least depth of the scene in the capture's units (default: found)."""
    far: float | None = None
    """Largest; given together with near."""

    def __post_init__(self) -> None:
        _check_capture(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderConfig:
    """From your photographs to a splat and a flight through it."""

    colmap: Path | None = None
    """Folder of a COLMAP model, binary or text, itself or in sparse/0."""
    transforms: Path | None = None
    """A ``transforms.json`` of nerfstudio or Blender."""
    images: Path | None = None
    """Folder of the pictures, where a COLMAP model has them elsewhere than in images."""
    model: str = "mvsplat"
    """Host, see info."""
    checkpoint: Path | None = None
    """Its weights: a published file, or for ``tiny`` a ``host.safetensors`` of train-host or train."""
    arm: Literal["zpressor", "anchors", "host"] = "zpressor"
    """All views fused into the anchors; the anchors alone; or all views, one Gaussian for each of their pixels."""
    views: int = 24
    """Context views, the farthest cameras; all if the capture has fewer."""
    anchors: int = 6
    """Of them, those that are left."""
    budget_seconds: float | None = None
    """In place of anchors: as many as a forward of this length has time for, found by trying."""
    budget_gib: float | None = None
    """Likewise, as many as this much memory of a CUDA device holds, weights included."""
    near: float | None = None
    """Least depth of the scene in the capture's units (default: found)."""
    far: float | None = None
    """Largest; given together with near."""
    size: tuple[int, int] | None = None
    """Height and width that pictures are cut to (default: the host's own)."""
    frames: int = 120
    """Of the flight along the context cameras."""
    fps: int = 30
    """Of its video."""
    prune: float = 0.005
    """Gaussians of less opacity are left out of the splat."""
    splat: Path | None = None
    """Copy of the splat, by its suffix .ply, .splat or .spz; artifacts/scene.ply is always written."""
    video: Path | None = None
    """Copy of the flight, .mp4; artifacts/fly.mp4 is always written."""
    backend: Literal["torch", "gsplat"] = "torch"
    """Renderer; gsplat needs the extra gpu."""

    def __post_init__(self) -> None:
        _check_capture(self)
        if self.frames < 2 or self.fps < 1 or not 0 <= self.prune < 1:
            raise ValueError(
                "expected at least two frames, one per second, and prune in [0, 1); got "
                f"{self.frames}, {self.fps} and {self.prune}"
            )
        budgets = [value for value in (self.budget_seconds, self.budget_gib) if value is not None]
        if any(value <= 0 for value in budgets):
            raise ValueError(
                f"budget_seconds and budget_gib must be positive; got {self.budget_seconds} and {self.budget_gib}"
            )
        if budgets and self.arm == "host":
            raise ValueError("a budget chooses the number of anchors, and the arm host has none")
        if self.splat is not None and self.splat.suffix not in (".ply", ".splat", ".spz"):
            raise ValueError(f"splat: expected a path ending in .ply, .splat or .spz; got {self.splat}")
        if self.video is not None and self.video.suffix != ".mp4":
            raise ValueError(f"video: expected a path ending in .mp4; got {self.video}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """A page in the browser: a splat, or one of your photographs whose number of anchors you set there."""

    splat: Path | None = None
    """File to show, .ply, .splat or .spz (default: made of the photographs)."""
    colmap: Path | None = None
    """Folder of a COLMAP model, binary or text, itself or in sparse/0; beside a splat its cameras are shown."""
    transforms: Path | None = None
    """A ``transforms.json`` of nerfstudio or Blender; likewise."""
    images: Path | None = None
    """Folder of the pictures, where a COLMAP model has them elsewhere than in images."""
    model: str = "mvsplat"
    """Host, see info."""
    checkpoint: Path | None = None
    """Its weights: a published file, or for ``tiny`` a ``host.safetensors`` of train-host or train."""
    arm: Literal["zpressor", "anchors", "host"] = "zpressor"
    """All views fused into the anchors; the anchors alone; or all views."""
    views: int = 24
    """Context views, the farthest cameras; all if the capture has fewer."""
    anchors: int = 6
    """Of them, those that are left, at first."""
    near: float | None = None
    """Least depth of the scene in the capture's units (default: found)."""
    far: float | None = None
    """Largest; given together with near."""
    size: tuple[int, int] | None = None
    """Height and width that pictures are cut to (default: the host's own)."""
    prune: float = 0.005
    """Gaussians of less opacity are left out."""
    address: str = "127.0.0.1"
    """To listen at; others than this machine reach the page at 0.0.0.0."""
    port: int = 8080
    """To listen at."""
    seconds: float | None = None
    """After which the page closes (default: when the command is interrupted)."""

    def __post_init__(self) -> None:
        _check_capture(self)
        if not 0 <= self.prune < 1 or (self.seconds is not None and self.seconds <= 0):
            raise ValueError(f"expected prune in [0, 1), and positive seconds; got {self.prune} and {self.seconds}")
        if self.splat is not None and self.splat.suffix not in (".ply", ".splat", ".spz"):
            raise ValueError(f"splat: expected a path ending in .ply, .splat or .spz; got {self.splat}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Your photographs as chunks of RealEstate10K and DL3DV, with an evaluation index."""

    captures: tuple[Path, ...] = ()
    """Scenes: folders of COLMAP models, or ``transforms.json`` files; each is called by its folder."""
    model: str = "mvsplat"
    """Host whose depths the cameras are scaled to, see info."""
    context: int = 12
    """Views of the evaluation index that are given."""
    targets: int = 8
    """Views that are asked for."""
    frames: int = 50
    """First views of a scene that the index chooses from."""

    def __post_init__(self) -> None:
        if self.model not in HOSTS:
            raise ValueError(f"model: no host {self.model!r}; there are {', '.join(HOSTS)}")
        if self.context < 2 or self.targets < 1 or self.frames < self.context + self.targets:
            raise ValueError(
                "expected two contexts, a target, and frames for both; got "
                f"{self.context}, {self.targets} and {self.frames}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """PSNR, SSIM and LPIPS on a folder of chunks, with the views of an evaluation index."""

    chunks: Path | None = None
    """Folder with index.json and its .torch files: RealEstate10K or DL3DV as pixelSplat stores them."""
    index: Path | None = None
    """Evaluation index: scene to context and target views."""
    model: str = "mvsplat"
    """Host, see info."""
    checkpoint: Path | None = None
    """Its weights: a published file, or for ``tiny`` a ``host.safetensors`` of train-host or train."""
    arm: Literal["zpressor", "anchors", "host"] = "zpressor"
    """All contexts fused into the anchors; the anchors alone; or all contexts."""
    anchors: int = 6
    """Contexts that are left."""
    near: float | None = None
    """Least depth (default: the host's own)."""
    far: float | None = None
    """Largest; given together with near."""
    size: tuple[int, int] | None = None
    """Height and width that pictures are cut to (default: the host's own)."""
    vgg: Path | None = None
    """VGG-16's weights as torchvision publishes them, for LPIPS; without them it is left out."""
    scenes: int | None = field(default=None, metadata=flag("limit"))
    """First scenes of the index (default: all)."""
    backend: Literal["torch", "gsplat"] = "torch"
    """Renderer; gsplat needs the extra gpu."""

    def __post_init__(self) -> None:
        if self.model not in HOSTS:
            raise ValueError(f"model: no host {self.model!r}; there are {', '.join(HOSTS)}")
        if self.anchors < 2 or (self.scenes is not None and self.scenes < 1):
            raise ValueError(f"expected at least two anchors and one scene; got {self.anchors} and {self.scenes}")
        if (self.near is None) != (self.far is None):
            raise ValueError("near and far are given together, or not at all")
        if self.near is not None and self.far is not None and not 0 < self.near < self.far:
            raise ValueError(f"expected 0 < near < far; got {self.near} and {self.far}")


def _check_capture(cfg: DoctorConfig | RenderConfig | ViewConfig) -> None:
    if cfg.colmap is not None and cfg.transforms is not None:
        raise ValueError("name your photographs by one of colmap and transforms")
    if cfg.images is not None and cfg.transforms is not None:
        raise ValueError("images belongs to colmap; transforms.json names its pictures itself")
    if cfg.model not in HOSTS:
        raise ValueError(f"model: no host {cfg.model!r}; there are {', '.join(HOSTS)}")
    if not 2 <= cfg.anchors <= cfg.views:
        raise ValueError(f"expected 2 <= anchors <= views; got {cfg.anchors} and {cfg.views}")
    if (cfg.near is None) != (cfg.far is None):
        raise ValueError("near and far are given together, or not at all")
