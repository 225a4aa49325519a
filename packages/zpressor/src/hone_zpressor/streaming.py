"""A scene to which views are added: each is folded into the nearest anchor, and Gaussians are made of the anchors anew.

Source: ours; see ``method.ViewStream``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hone_splat.hosts import HostOutput
from hone_splat.views import Views
from torch import Tensor

from .method import ViewStream
from .models import ViewCompressor

__all__ = ["SceneStream"]


class SceneStream:
    """One scene on a host that compresses its views.

    The anchors are chosen of the first views and stay. The result is that of all views at once with these anchors; what
    a new view costs does not grow with those before it, but for the support of its own anchor.

    Args:
        host: With a compressor that fuses, see ``attach``. Its weights and settings must stay as they are.
        views: Of one scene, at least two.

    Attributes:
        output: Gaussians of all views so far; ``anchors`` counts views in the order in which they came.

    Raises:
        ValueError: The host has no compressor that fuses, or there are several scenes.
    """

    output: HostOutput

    def __init__(self, host: Any, views: Views) -> None:
        compressor = getattr(getattr(host, "join", None), "zipmatch", None)
        if not isinstance(compressor, ViewCompressor) or not compressor.config.fuse:
            raise ValueError("the host has no compressor that fuses; attach(host, config) gives it one")
        self._host, self._compressor = host, compressor
        self._stream: ViewStream | None = None
        self._check(views)
        self.output = self._run(views)

    def add(self, views: Views) -> HostOutput:
        """Fold views in; returns ``output``.

        Raises:
            ValueError: They are of several scenes, or of another size.
        """
        self._check(views)
        if views.size != self.output.views.size:
            raise ValueError(f"expected pictures of {self.output.views.size}; got {views.size}")
        fixed, chosen = self.output.views, self.output.anchors
        parts = ("image_01", "cam_to_world", "intrinsics_norm", "near", "far")
        both = Views(*(torch.cat([getattr(fixed, name), getattr(views, name)], 1) for name in parts))
        self.output = replace(self._run(both), anchors=chosen)
        return self.output

    @staticmethod
    def _check(views: Views) -> None:
        if len(views) != 1 or (views.present is not None and not bool(views.present.all())):
            raise ValueError(f"a stream holds one scene, of views that are present; got {len(views)} scenes")

    def _run(self, views: Views) -> HostOutput:
        self._compressor.state.current = self._fold
        try:
            return self._host(views)
        finally:
            self._compressor.state.current = None

    def _fold(self, features: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Take in all views but the anchors."""
        centres, precision = views.cam_to_world[0, :, :3, 3], self._compressor.config.precision
        if self._stream is None:
            anchors = self._compressor.anchors_of(views)[0]
            self._stream = ViewStream(self._compressor, features[0, anchors], centres[anchors], precision)
        else:
            anchors = torch.arange(len(self._stream.centres), device=features.device)
        own = anchors.tolist()
        for view in range(views.count):
            if view not in own:
                self._stream.add(features[0, view], centres[view])
        return self._stream.features[None], anchors[None]
