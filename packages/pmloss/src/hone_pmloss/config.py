"""Settings of the method and of every verb; nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hone_core.config import Preset, check_least, flag
from hone_core.training import check_budget
from hone_splat.training_config import FitConfig

__all__ = [
    "ARMS",
    "PRESETS",
    "BenchConfig",
    "DemoConfig",
    "EvalConfig",
    "HostConfig",
    "PMLossConfig",
    "ReproduceConfig",
    "TrainConfig",
    "TrainHostConfig",
]

ARMS = ("photometric", "pm")
"""Variants of the tiny host: fine-tuned by pictures alone, and with the point maps' loss beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PMLossConfig:
    """How a prediction is compared with a point map; the defaults are the paper's."""

    weight: float = 0.005
    """Of the term beside the photometric losses."""
    align: Literal["umeyama", "umeyama_detached", "pose", "none"] = "umeyama"
    """How the teacher is moved onto the prediction: the best similarity, with its gradient or without; by camera
    centres; not at all."""
    direction: Literal["pred2gt", "gt2pred", "both", "paired"] = "pred2gt"
    """Whose nearest neighbours count; ``paired`` compares each pixel with its own."""
    robust: Literal["huber"] | None = None
    """Squared distances, or Huber's, which grow linearly beyond ``huber_delta``."""
    huber_delta: float = 1.0
    """In the prediction's units."""
    cap: float | None = 100.0
    """Loss of a scene above which it is multiplied by ``cap_factor``; None for never."""
    cap_factor: float = 1e-5
    """See ``cap``."""
    confidence: bool = False
    """Weight pixels by the teacher's confidence, in the alignment and in the mean."""
    trim: float = 0.0
    """Share of pairs, those that fit worst at first, that the alignment leaves out."""
    scale_normalised: Literal["detached", "full"] | None = None
    """Divide by the variance of the moved teacher, so that the value does not depend on the scene's scale; ``full``
    with its gradient, which takes away the pull to shrink the scene."""

    def __post_init__(self) -> None:
        check_least(self, 0, "weight", "cap_factor")
        if not self.huber_delta > 0 or (self.cap is not None and not self.cap > 0):
            raise ValueError(f"huber_delta and cap must be positive; got {self.huber_delta} and {self.cap}")
        if not 0 <= self.trim < 1:
            raise ValueError(f"trim must lie in [0, 1); got {self.trim}")
        if self.trim and self.align not in ("umeyama", "umeyama_detached"):
            raise ValueError(f"trim belongs to align='umeyama'; got align={self.align!r}")

    @property
    def label(self) -> str:
        """Short name, such as ``weight 0.005, umeyama, pred2gt``."""
        return f"weight {self.weight:g}, {self.align}, {self.direction}"


PRESETS: dict[str, Preset[PMLossConfig]] = {
    "paper": Preset(
        PMLossConfig(), "DepthSplat 256x448", "Released config loss/pcd.yaml: weight 0.005; ignore_large_loss 100"
    ),
    "detached": Preset(
        PMLossConfig(align="umeyama_detached"), "Any host", "Ours: the similarity is a constant of the step"
    ),
    "paired": Preset(PMLossConfig(direction="paired"), "Any host", "Ours: the control without nearest neighbours"),
    "known": Preset(
        PMLossConfig(align="none"), "Any host", "Ours: for a teacher in the frame and scale of the cameras"
    ),
    "tiny": Preset(PMLossConfig(), "The tiny host 64x64", "Ours: the paper's settings on this package's host"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(FitConfig):
    """A host trained on chunks with PM-Loss; by itself the released run on DL3DV."""

    model: str = "depthsplat-oct-pmloss-256x448"
    """Host, see info; depthsplat-oct-base-256x448, with bounded offsets, is the release's control."""
    teacher: Literal["vggt", "depth", "precomputed"] = "vggt"
    """What gives points: VGGT; a metric depth model of transformers; files that you have."""
    points: str = ""
    """VGGT's model.safetensors; the depth model's folder or address; or the folder of files."""
    metres_per_unit: float = 1.0
    """Size of the chunks' unit, for a depth model."""
    cache: Path | None = None
    """Folder that keeps the teacher's answers; with draws, each is asked for once."""
    pm: PMLossConfig = field(default_factory=PMLossConfig)
    """The term; of weight 0, no teacher is asked, which is the control."""

    def __post_init__(self) -> None:
        # A dataclass with slots is made twice, and super() would look for the first.
        FitConfig.__post_init__(self)
        if self.pm.weight and not self.points:
            raise ValueError(f"name what the teacher {self.teacher} reads: --points, or --weight 0 for none")
        if self.pm.weight and self.teacher == "precomputed" and self.flip:
            raise ValueError("points in files are of scenes as they are: give --flip 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host: an MVSplat of the same parts, smaller."""

    channels: tuple[int, int, int] = (24, 32, 64)
    """Of the feature network."""
    layers: int = 2
    """Of the multi-view transformer."""
    candidates: int = 64
    """Depths that are compared; half of them lie nearer or further than anything in a room."""
    refine_channels: int = 32
    """Of the U-Net at full resolution."""
    offset: Literal["bounded", "unconstrained"] = "bounded"
    """How far a Gaussian may lie from its pixel's ray: half a pixel, or anywhere, as the release frees it together with
    the loss."""
    size: int = 64
    """Side of the pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """How the tiny host and its two arms are trained on generated rooms."""

    host: HostConfig = field(default_factory=HostConfig)
    """Architecture."""
    pm: PMLossConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """Loss of the arm that has it."""
    teacher_noise: float = 0.0
    """Slow errors of the teacher's distances, as a share of them; 0 for exact points."""
    teacher_blur: int = 0
    """Pixels to either side over which the teacher's distances are blurred, over edges too."""
    start: Path | None = None
    """``checkpoint.pt`` of another run, from which the weights before the arms part and the arm of pictures alone are
    taken, so that only the arm with the loss is trained: for a sweep. But for the loss and the teacher, its settings
    are these."""
    base_share: float = 0.6
    """Share of the steps before the arms part; the two start from the same weights and share the rest."""
    base_depth: float = 0.1
    """Weight, before the arms part, of the mean error of the depths' logarithms beside the pictures': it stands for the
    depth network that published hosts begin with. The arms themselves see no depth; 0 for pictures alone throughout."""
    scenes: int = 4
    """Rooms per step."""
    targets: int = 4
    """Views per room that the loss looks at."""
    gap: tuple[int, int] = (8, 18)
    """Frames of the path, of 50, from one context view to the other, drawn from this range."""
    lr: float = 4e-4
    """Peak learning rate of AdamW."""
    fine_tune_lr: float = 0.5
    """Peak of the arms, as a share of it."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises, at the start of each stage."""
    steps: int = 10_000
    """Optimiser steps in all."""
    minutes: float = field(default=math.inf, metadata=flag(hidden=True))
    """No bound: the arms share steps equally."""
    graded: int = 48
    """Rooms, none of them trained on, that the arms are graded on."""
    graded_targets: int = 5
    """Views of each between the context views, and beyond them."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    seed: int = 0
    """Of weights and rooms."""

    def __post_init__(self) -> None:
        check_budget(self, "scenes", "targets", "graded", "lr", "fine_tune_lr", "warmup_steps")
        if not 0 < self.base_share < 1:
            raise ValueError(f"base_share must lie in (0, 1); got {self.base_share}")
        check_least(self, 0, "base_depth")
        if not 0 <= self.teacher_noise < 1 or not 0 <= self.teacher_blur < self.host.size:
            raise ValueError(
                f"expected teacher_noise in [0, 1) and 0 <= teacher_blur < size; got {self.teacher_noise} and "
                f"{self.teacher_blur}"
            )
        if not 2 <= self.gap[0] <= self.gap[1] < 50:
            raise ValueError(f"expected 2 <= gap < 50; got {self.gap}")
        if not 1 <= self.graded_targets <= 13:
            raise ValueError(f"graded_targets must lie in 1 to 13; got {self.graded_targets}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The paper's claims on tiny hosts: pictures alone against PM-Loss, with bounded offsets and with free ones."""

    hosts: tuple[Path, ...] = ()
    """Files made by train-host, of several seeds (default: the packaged one)."""
    free: tuple[Path, ...] = ()
    """Files of the same seeds in the same order, made by train-host with --offset unconstrained; without them the
    loss cannot be told from the freed offset."""
    sweep: tuple[Path, ...] = ()
    """Files made by train-host with another loss or teacher: what each gains over its pictures alone is reported under
    what it has of its own, and does not enter the verdict."""
    rooms: int = field(default=96, metadata=flag("limit"))
    """Generated rooms per host, none of them trained on."""
    targets: int = 8
    """Views between the context views, and beyond them, that are looked from."""
    seed: int = 0
    """Of the rooms."""

    def __post_init__(self) -> None:
        if self.rooms < 2 or not 1 <= self.targets <= 13:
            raise ValueError("expected at least two rooms, and 1 to 13 targets")
        if self.free and len(self.free) != max(1, len(self.hosts)):
            raise ValueError(f"free: expected a file for each of hosts; got {len(self.free)} for {len(self.hosts)}")
        if len({*self.hosts, *self.free, *self.sweep}) < len(self.hosts) + len(self.free) + len(self.sweep):
            raise ValueError("hosts, free, sweep: one is named twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What the term costs: nearest neighbours by every backend, and the parts of a training step."""

    model: Literal["tiny", "depthsplat"] = "tiny"
    """Host of the step: the tiny one, or the published DepthSplat of the paper with random weights."""
    size: tuple[int, int] | None = None
    """Height and width of the pictures (default: the model's own)."""
    views: tuple[int, ...] = (2,)
    """Context views; a cloud has a point for each of their pixels."""
    targets: int = 8
    """Views that the pictures' loss looks at."""
    rounds: int = 5
    """Turns that each variant gets after two that warm up."""
    only: Literal["neighbours", "step"] | None = None
    """One of the two alone (default: both)."""
    pairs: int = 1 << 29
    """Distances that torch computes in a comparison of all pairs: of a larger one it is asked about evenly spread
    points alone, and timed for these."""
    vggt: bool = False
    """Time the paper's teacher beside a step, with random weights: 5 GB of them."""
    seed: int = 0
    """Of the room and of the order."""

    def __post_init__(self) -> None:
        if not self.views or not 2 <= min(self.views) <= max(self.views) <= 24:
            raise ValueError(f"expected 2 to 24 views; got {self.views}")
        if min(self.rounds, self.pairs) < 1 or not 1 <= self.targets <= 24:
            raise ValueError("expected at least one round and pair, and 1 to 24 targets")
        if self.vggt and self.only == "neighbours":
            raise ValueError("vggt is timed beside a step: leave --only out, or give --only step")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Depths of a room's pixels, blurred at edges as networks blur them, optimised with and without PM-Loss."""

    size: int = 48
    """Side of the pictures."""
    views: int = 3
    """Context views, whose pixels are the Gaussians."""
    targets: int = 4
    """Views between them that the pictures' loss looks at."""
    steps: int = 100
    """Optimiser steps of each arm."""
    blur: int = 5
    """Pixels over which the first depths are blurred."""
    weight: float = 1.0
    """Of PM-Loss beside the mean squared error of the pictures."""
    lr: float = 0.02
    """Of Adam, on logarithms of depth."""
    rooms: int = 8
    """Rooms on which both arms of the packaged host are graded; the first is drawn."""
    seed: int = 0
    """Of the rooms."""

    def __post_init__(self) -> None:
        if self.size < 16 or not 2 <= self.views <= 6 or min(self.targets, self.steps, self.rooms) < 1:
            raise ValueError("expected size >= 16, 2 to 6 views, and at least one target, step and room")
        if self.blur < 1 or self.blur % 2 == 0 or not self.weight > 0 or not self.lr > 0:
            raise ValueError(f"blur must be odd, weight and lr positive; got {self.blur}, {self.weight} and {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """A geometry report of a splat against known depth, a teacher's depth, or a scanned cloud."""

    ply: Path
    """The splat: 3DGS ``.ply``, ``.splat`` or ``.spz``."""
    truth: Path | None = None
    """Safetensors file with cam_to_world [V, 4, 4] (OpenCV axes), intrinsics_norm [V, 3, 3] and depth_z [V, H, W] in
    the splat's frame and unit; 0 where no depth is known."""
    colmap: Path | None = None
    """Folder of a COLMAP model whose frame and unit are the splat's; with depths or a teacher."""
    transforms: Path | None = None
    """A ``transforms.json`` of nerfstudio or Blender; likewise."""
    images: Path | None = None
    """Folder of the pictures, where a COLMAP model has them elsewhere than in images."""
    depths: Path | None = None
    """Folder of the pictures' depths along the axis, by their names: COLMAP's .geometric.bin, .npy, or .png."""
    depth_unit: float = 0.001
    """Of a .png's values, in the capture's units."""
    teacher: str | None = None
    """In place of depths: folder or address of a metric depth model of transformers."""
    metres_per_unit: float = 1.0
    """Size of the capture's unit, for the teacher."""
    side: int = 640
    """Largest side at which a capture's depths are looked at."""
    cloud: Path | None = None
    """A scanned cloud, .ply, in place of cameras and depth, such as DTU's stl*_total.ply."""
    observed: Path | None = None
    """DTU's ObsMask*.mat: centres elsewhere do not count."""
    plane: Path | None = None
    """DTU's Plane*.mat: true points below it do not count."""
    thin: float = 0.0
    """Least spacing that centres are thinned to before a cloud's report; DTU's rule has 0.2."""
    most: float | None = None
    """Larger distances are left out of a cloud's report; DTU's rule has 20."""
    opacity: float = 0.05
    """Fainter Gaussians are left out."""
    band: int = 5
    """Pixels from a depth edge that belong to its band."""
    jump: float = 0.1
    """Relative step between neighbouring depths that is an edge."""
    flying: float = 0.02
    """Share of the depth from which a centre counts as flying."""

    def __post_init__(self) -> None:
        ways = (self.truth, self.colmap, self.transforms, self.cloud)
        if sum(way is not None for way in ways) != 1:
            raise ValueError("name what the splat is measured against by one of truth, colmap, transforms and cloud")
        captured = self.colmap is not None or self.transforms is not None
        if int(captured) != (self.depths is not None) + (self.teacher is not None):
            raise ValueError("colmap and transforms need --depths or --teacher, one of them; nothing else takes either")
        if self.images is not None and self.colmap is None:
            raise ValueError("images belongs to colmap: all others name their pictures themselves, or have none")
        if self.cloud is None and (self.observed or self.plane or self.thin or self.most is not None):
            raise ValueError("observed, plane, thin and most belong to a scanned cloud: give --cloud, or none of them")
        if min(self.depth_unit, self.metres_per_unit, self.side) <= 0 or self.thin < 0:
            raise ValueError("expected positive depth_unit, metres_per_unit and side, and thin >= 0")
        if self.most is not None and self.most <= 0:
            raise ValueError(f"most must be positive; got {self.most}")
        if not 0 <= self.opacity < 1 or self.band < 0 or self.jump <= 0 or self.flying <= 0:
            raise ValueError("expected 0 <= opacity < 1, band >= 0, and positive jump and flying")
