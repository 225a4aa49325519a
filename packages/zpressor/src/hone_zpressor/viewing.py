"""A splat in the browser, with the cameras that it came from; where it is made here, a slider sets its anchors."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_splat.captures import load_views
from hone_splat.formats import read_cloud
from hone_splat.ranges import HOSTS
from hone_splat.viewer import Viewer
from hone_splat.views import Views

from .config import ViewConfig
from .photographs import contexts, load_model, read_capture

__all__ = ["ViewReport", "view"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ViewReport(Report):
    """What was shown."""

    def __str__(self) -> str:
        lines = [f"{row.metric.replace('_', ' '):<20} {row.value:g}" for row in self.rows]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


class _Scene:
    """What the page shows; a change of the slider makes it anew, one change at a time."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.gaussians = self.made = 0
        self.lock = threading.Lock()

    def make(self, cfg: ViewConfig, host: Any, views: Views, scale: float, anchors: int) -> None:
        """Run the host and show what it gives, in the capture's units."""
        with self.lock, torch.inference_mode():
            started = time.perf_counter()
            compressor = host.join.zipmatch
            if compressor is not None:
                compressor.config = replace(compressor.config, anchors=anchors)
            output = host(views)
            cloud = output.gaussians[0].pruned(opacity=cfg.prune).scaled(1 / scale)
            marked = () if output.anchors is None else output.anchors[0].tolist()
            poses = views.cam_to_world[0].clone()
            poses[:, :3, 3] /= scale
            self.viewer.splat(cloud)
            self.viewer.cameras(poses, views.intrinsics_norm[0], views.size, images_01=views.image_01[0], marked=marked)
            self.gaussians, self.made = len(cloud), self.made + 1
            kept, seconds = len(marked) or views.count, time.perf_counter() - started
            log.info("%d views kept, %d Gaussians, %.1f s", kept, len(cloud), seconds)


def view(cfg: ViewConfig, run: Run) -> ViewReport:
    """Show it until the time is over or the command is interrupted.

    Raises:
        MissingExtraError: viser is not installed.
    """
    device = resolve_device(run.device)
    captured = cfg.colmap is not None or cfg.transforms is not None
    viewer = Viewer(cfg.address, cfg.port)
    try:
        scene = _Scene(viewer)
        if captured:
            capture, fitted = read_capture(cfg)
            chosen = capture.take(contexts(capture, cfg.views))
        if cfg.splat is not None:
            cloud = read_cloud(cfg.splat)
            viewer.splat(cloud)
            scene.gaussians = len(cloud)
            if captured:
                viewer.cameras(chosen.cam_to_world, chosen.intrinsics_norm, chosen.size)
        else:
            views = load_views(chosen, cfg.size or HOSTS[cfg.model].size, fitted)
            views.check()
            views = views.map(lambda part: part.to(device))
            host = load_model(cfg, device)
            count = min(cfg.anchors, views.count)
            scene.make(cfg, host, views, fitted.scale, count)
            if cfg.arm != "host" and views.count > 2:
                viewer.slider("anchors", 2, views.count, count, lambda n: scene.make(cfg, host, views, fitted.scale, n))
        log.info("open %s in a browser; Ctrl-C closes it", viewer.url)
        ends = None if cfg.seconds is None else time.monotonic() + cfg.seconds
        with contextlib.suppress(KeyboardInterrupt):
            while ends is None or time.monotonic() < ends:
                time.sleep(0.1)
    finally:
        viewer.stop()
    with scene.lock:  # what the slider asked for last may still be made
        run.row("gaussians", scene.gaussians, better="none")
        run.row("made", scene.made, better="none")
    return ViewReport.of(run)
