"""How PM-Loss enters training: a callable for any trainer, and a hook that adds the term to a host's output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from hone_core.handles import CallState, Handle, resolve
from hone_splat.hosts import HostOutput
from hone_splat.mvsplat import MVSplat, tiny_mvsplat
from hone_splat.views import Views
from torch import Tensor, nn

from .config import PRESETS, HostConfig, PMLossConfig
from .method import PMTerm, pm_loss
from .teachers import PointMap, Teacher

__all__ = ["PMLoss", "PMLossHandle", "TaughtOutput", "attach", "tiny"]


class PMLoss:
    """The term for a trainer of one's own: ``loss = photometric + term.loss.mean() * pm.config.weight``.

    Args:
        teacher: Asked for points where views are given; not needed where points are.
        config: A preset's name, or settings.
    """

    def __init__(self, teacher: Teacher | None = None, config: str | PMLossConfig = "paper") -> None:
        self.teacher = teacher
        self.config = resolve(config, PRESETS, PMLossConfig)

    def __call__(self, means: Tensor, given: Views | PointMap | Tensor, *, anchors: Tensor | None = None) -> PMTerm:
        """Compare predicted centres with the teacher's points.

        Args:
            means: ``[B, N * H * W, 3]`` in the order view, row, column, or ``[B, N, H, W, 3]``.
            given: The context views, which the teacher is asked about, or their pictures ``[B, V, 3, H, W]`` in [0, 1]
                if it needs no cameras, such as VGGT; its answer; or points ``[B, N, H, W, 3]`` or
                ``[B, N * H * W, 3]``.
            anchors: ``[B, N]``, the views that have Gaussians, where a compressor such as ZPressor chose some.

        Raises:
            ValueError: Views are given and there is no teacher, pictures are and it needs cameras or they are not in
                [0, 1], shapes are others or numbers of pixels differ, or see ``pm_loss``.
        """
        for what, part in (("centres", means), ("points", given)):
            if isinstance(part, Tensor) and part.ndim not in (3, 5):
                raise ValueError(f"expected {what} [B, N * H * W, 3] or [B, N, H, W, 3]; got {list(part.shape)}")
        centres = None
        pictures = isinstance(given, Tensor) and given.ndim == 5 and given.shape[2] == 3 != given.shape[4]
        if isinstance(given, Tensor) and pictures:
            given = _without_cameras(given)
        if isinstance(given, Views):
            if self.teacher is None:
                raise ValueError(
                    "views were given and there is no teacher to ask. Pass its points, or make PMLoss(teacher)"
                )
            with torch.no_grad():
                answer = self.teacher(given).resized(given.size)
            if pictures and (self.config.align == "pose" or not bool(answer.points.isfinite().any())):
                raise ValueError("pictures were given, and what is asked for needs their cameras too: give Views")
            true = given.cam_to_world[..., :3, 3]
            if anchors is not None:
                rows = torch.arange(len(anchors), device=anchors.device)[:, None]
                answer, true = answer.take(anchors), true[rows, anchors]
            if self.config.align == "pose":
                if answer.centres is None:
                    raise ValueError(f'{self.teacher.name} gives no camera centres, which align="pose" needs')
                centres = (answer.centres, true)
        elif isinstance(given, PointMap):
            answer = given if anchors is None else given.take(anchors)
        else:
            answer = PointMap(given) if anchors is None else PointMap(given).take(anchors)
        if means.ndim == answer.points.ndim == 5 and means.shape != answer.points.shape:
            raise ValueError(
                f"expected centres and teacher points of the same views and pixels; got {list(means.shape)} and "
                f"{list(answer.points.shape)}"
            )
        points = answer.points.flatten(1, -2)
        confidence = None if answer.confidence is None else answer.confidence.flatten(1)
        return pm_loss(
            means.flatten(1, -2), points.to(means.device), self.config, confidence=confidence, centres=centres
        )


def _without_cameras(image_01: Tensor) -> Views:
    """Views whose cameras are not known, so that no point that follows from them is finite.

    Raises:
        ValueError: Pictures are not in [0, 1], or little beside, as after scaling by Lanczos.
    """
    low, high = (float(end) for end in image_01.aminmax())
    if not image_01.is_floating_point() or not -0.5 <= low <= high <= 1.5:
        raise ValueError(
            f"expected pictures of floating-point numbers in [0, 1]; got {image_01.dtype} from {low:g} to {high:g}"
        )
    lead = image_01.shape[:2]
    unknown = image_01.new_full((*lead, 4, 4), torch.nan)
    return Views(image_01, unknown, unknown[..., :3, :3], unknown[..., 0, 0], unknown[..., 0, 0])


@dataclass(frozen=True)
class TaughtOutput(HostOutput):
    """A host's output with the term.

    Attributes:
        pm: Loss of each scene; ``pm_loss`` times the weight of the settings is what a trainer adds.
        weight: That weight.
    """

    pm: PMTerm
    weight: float

    @property
    def pm_loss(self) -> Tensor:
        """Weighted mean over the scenes."""
        return self.weight * self.pm.loss.mean()


class _Hook:
    """Adds the term to the output of a forward that trains."""

    def __init__(self, loss: PMLoss) -> None:
        self.loss = loss
        self.state: CallState[None] = CallState()

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.state.disabled or not host.training or not torch.is_grad_enabled():
            return None
        if not isinstance(output, HostOutput):
            raise TypeError(f"expected a HostOutput of hone_splat; {type(host).__name__} gave {type(output).__name__}")
        views = args[0] if args else kwargs["views"]
        term = self.loss(output.gaussians.means, views, anchors=output.anchors)
        parts = {field.name: getattr(output, field.name) for field in fields(HostOutput)}
        return TaughtOutput(**parts, pm=term, weight=self.loss.config.weight)


class PMLossHandle(Handle[PMLossConfig]):
    """PM-Loss on a host: in training its output is a ``TaughtOutput``; otherwise nothing is added."""

    def __init__(self, host: nn.Module, hook: _Hook) -> None:
        super().__init__(hook.loss.config, [host])
        self._hook = hook
        self._placed: Any = host.register_forward_hook(hook, with_kwargs=True)

    @property
    def attached(self) -> bool:
        """Whether the host's training forwards carry the term."""
        return self._hook in self.models[0]._forward_hooks.values()

    def detach(self) -> None:
        """Take the hook off."""
        self._placed.remove()

    def _states(self) -> Iterable[CallState[Any]]:
        return [self._hook.state]


def attach(host: nn.Module, config: str | PMLossConfig = "paper", *, teacher: Teacher) -> PMLossHandle:
    """Add the term to the output of a host's training forwards.

    Args:
        host: A network that takes ``Views`` and gives a ``HostOutput``, such as hone_splat's MVSplat.
        config: A preset's name, or settings.
        teacher: Asked about all views of a forward; where a compressor keeps a few of them, their rows are taken.

    Raises:
        ValueError: There is no such preset, or the host has the term already.
    """
    config = resolve(config, PRESETS, PMLossConfig)
    if any(isinstance(hook, _Hook) for hook in host._forward_hooks.values()):
        raise ValueError("the host carries PM-Loss already: detach() its handle first")
    return PMLossHandle(host, _Hook(PMLoss(teacher, config)))


def tiny(cfg: HostConfig | None = None, *, seed: int = 0) -> MVSplat:
    """A small MVSplat with random weights, see ``tiny_mvsplat``."""
    cfg = cfg or HostConfig()
    return tiny_mvsplat(cfg.channels, cfg.layers, cfg.candidates, cfg.refine_channels, offset=cfg.offset, seed=seed)
