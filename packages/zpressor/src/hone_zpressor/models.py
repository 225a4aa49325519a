"""How ZPressor enters host networks: a compressor between a host's features and everything that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from hone_core.handles import CallState, Handle, resolve
from hone_splat.captures import overlap
from hone_splat.mvsplat import MVSplat, tiny_mvsplat
from hone_splat.views import Views
from torch import Tensor, nn

from .anchors import cluster_views, farthest_points, least_seen
from .config import PRESETS, HostConfig, ZPressorConfig
from .method import Attention, ZPressor

__all__ = ["Host", "ViewCompressor", "ZPressorHandle", "attach", "tiny"]


class Host(Protocol):
    """A network that a compressor can stand in, such as hone_splat's MVSplat and DepthSplat."""

    @property
    def channels(self) -> int:
        """Of the features that the compressor gets."""

    @property
    def join(self) -> Any:
        """Module whose attribute ``zipmatch`` is the compressor, or None."""


def attention_for(config: ZPressorConfig, features: Tensor) -> Attention:
    """What the cross-attention runs on these features, where the settings leave it open."""
    if config.attention != "auto":
        return config.attention
    ragged = config.precision == "bfloat16" and features.is_cuda
    return "varlen" if ragged and torch.cuda.get_device_capability(features.device) >= (8, 0) else "padded"


Fold = Callable[[Tensor, Views], tuple[Tensor, Tensor]]
"""What compresses in place of the module within one forward, see ``streaming``."""


class ViewCompressor(ZPressor):
    """ZPressor with its settings, as it stands in a host.

    Args:
        config: How many anchors, and how they are made.
        channels: Of the host's features.
    """

    def __init__(self, config: ZPressorConfig, channels: int) -> None:
        super().__init__(channels, config.layers if config.fuse else 0)
        self.config = config
        self.state: CallState[Fold] = CallState()

    def forward(self, features: Tensor, views: Views) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        """Features ``[B, N, C, h, w]`` and numbers ``[B, N]`` of the anchors; None while disabled.

        Where there are no more views than anchors, each view is one, and only self-attention is applied: the weights of
        the host expect it.

        Raises:
            ValueError: A scene of a batch has fewer views than there are anchors, and others have more.
        """
        if self.state.disabled:
            return None
        if self.state.current is not None:
            return self.state.current(features, views)
        centres, anchors = views.cam_to_world[..., :3, 3], self.anchors_of(views)
        clusters = cluster_views(centres, anchors, views.present)
        if self.config.fuse:
            attention = attention_for(self.config, features)
            return super().forward(features, clusters, self.config.precision, attention), anchors
        rows = torch.arange(len(anchors), device=anchors.device)[:, None]
        return features[rows, anchors], anchors

    def anchors_of(self, views: Views) -> Tensor:
        """Numbers of the anchors, ``[B, N]``, as the settings say."""
        return self.choose_by_overlap(views) if self.config.selection == "overlap" else self.choose(views)

    def choose_by_overlap(self, views: Views) -> Tensor:
        """Numbers of the anchors, ``[B, N]``, by what the cameras see.

        Raises:
            ValueError: Scenes have different numbers of views.
        """
        if views.present is not None and not bool(views.present.all()):
            raise ValueError("anchors by overlap need scenes of equally many views; pass them one by one")
        count = min(self.config.anchors, views.count)
        scenes = zip(views.cam_to_world, views.intrinsics_norm, views.near, views.far, strict=True)
        return torch.stack(
            [
                least_seen(overlap(poses, inner, float(near.min()), float(far.max())), count)
                for poses, inner, near, far in scenes
            ]
        )

    def choose(self, views: Views) -> Tensor:
        """Numbers of the anchors, ``[B, N]``, farthest or at random.

        Raises:
            ValueError: A scene of the batch has fewer views than anchors.
        """
        centres, present = views.cam_to_world[..., :3, 3], views.present
        count = min(self.config.anchors, centres.shape[1])
        if self.config.selection == "distance":
            return farthest_points(centres, count, present)
        present = torch.ones_like(centres[..., 0], dtype=torch.bool) if present is None else present
        if int(present.sum(1).min()) < count:
            raise ValueError(f"each scene needs at least {count} views; got {present.sum(1).tolist()}")
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = torch.rand(centres.shape[:2], generator=generator).to(centres.device).masked_fill(~present, 2.0)
        return drawn.argsort(1)[:, :count]


class ZPressorHandle(Handle[ZPressorConfig]):
    """ZPressor on a host.

    Attributes:
        compressor: The module, whose weights may be loaded or trained.
    """

    def __init__(self, host: Any, compressor: ViewCompressor) -> None:
        super().__init__(compressor.config, [host])
        self.compressor = compressor
        self._join: Any = host.join

    @property
    def attached(self) -> bool:
        """Whether the host compresses its views."""
        return self._join.zipmatch is self.compressor

    def detach(self) -> None:
        """Let the host see all views again."""
        if self.attached:
            self._join.zipmatch = None

    def _states(self) -> Iterable[CallState[Any]]:
        return [self.compressor.state]


def attach(
    host: Any, config: str | ZPressorConfig = "mvsplat", *, weights: Mapping[str, Tensor] | None = None
) -> ZPressorHandle:
    """Put a compressor into a host.

    Args:
        host: A ``Host``.
        config: A preset's name, or settings.
        weights: State of the compressor; its initial values if None, which are no identity.

    Raises:
        ValueError: There is no such preset, the host has a compressor, or the weights are of another shape.
        TypeError: The host has no place for one.
    """
    config = resolve(config, PRESETS, ZPressorConfig)
    join = getattr(host, "join", None)
    if not isinstance(host, nn.Module) or join is None or not hasattr(join, "zipmatch"):
        raise TypeError(f"{type(host).__name__} has no place for a compressor; expected one of hone_splat's hosts")
    if join.zipmatch is not None:
        raise ValueError("the host has a compressor already: detach() its handle first")
    channels: Any = host.channels
    compressor = ViewCompressor(config, channels)
    if weights is not None:
        try:
            compressor.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"these weights are of no ZPressor of {config.layers} layers: {error}") from error
    parameter = next(host.parameters())
    join.zipmatch = compressor.to(parameter.device, parameter.dtype).train(host.training)
    return ZPressorHandle(host, compressor)


def tiny(cfg: HostConfig | None = None, *, seed: int = 0) -> MVSplat:
    """A small MVSplat with random weights, see ``tiny_mvsplat``."""
    cfg = cfg or HostConfig()
    return tiny_mvsplat(cfg.channels, cfg.layers, cfg.candidates, cfg.refine_channels, nearest=4, seed=seed)
