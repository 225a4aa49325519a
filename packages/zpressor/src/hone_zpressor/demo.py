"""The demo: many views of generated rooms compressed to a few, beside the host alone and the anchors alone.

Runs on the packaged host on a two-core CPU and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.runs import Report, Run
from hone_splat.cameras import fly_through
from hone_splat.files import write_ply
from hone_splat.metrics import psnr
from hone_splat.rendering import render
from hone_splat.videos import write_video
from torch import Tensor

from . import plots
from .config import DemoConfig
from .data import Scene, graded_rooms
from .grading import Grades, draw_targets, grade, with_settings
from .host import load_host

__all__ = ["DemoReport", "demo"]


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, a table.

    Attributes:
        sheet: True and drawn pictures of the room with the median gain of PSNR over the host.
        splat: Its cloud, from the arm with fusion.
        video: A flight through it.
    """

    sheet: Path
    splat: Path
    video: Path

    @classmethod
    def of(cls, run: Run) -> DemoReport:
        """Return the report of a finished run."""
        splat, video = run.artifacts / "scene.ply", run.artifacts / "fly.mp4"
        return cls(path=run.path, rows=tuple(run.rows), sheet=run.figures / "views.png", splat=splat, video=video)

    def __str__(self) -> str:
        found = {(row.variant, row.metric): row for row in self.rows}
        lines = [f"{'setting':<34} {'PSNR, dB':>9} {'SSIM':>6} {'Gaussians':>10}"]
        for name in dict.fromkeys(row.variant for row in self.rows):
            values = [found[name, metric].value for metric in ("psnr", "ssim", "gaussians")]
            lines.append(f"{name:<34} {values[0]:>9.2f} {values[1]:>6.3f} {values[2]:>10.0f}")
        lines += ["", f"pictures {self.sheet}", f"splat    {self.splat}", f"video    {self.video}"]
        return "\n".join([*lines, f"results  {self.path / 'results.json'}"])


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Draw each room from views that no arm was given, and grade the pictures."""
    device = resolve_device(run.device)
    arms: dict[str, tuple[str, Any]] = {
        f"host alone, {cfg.views} views": ("host", {}),
        f"anchors alone, {cfg.views} to {cfg.anchors}": ("anchors", {"anchors": cfg.anchors}),
        f"ZPressor, {cfg.views} to {cfg.anchors}": ("zpressor", {"anchors": cfg.anchors}),
    }
    loaded = {name: load_host(arm, path=cfg.host, device=device) for name, (arm, _) in arms.items()}
    size = next(iter(loaded.values())).config.size
    seeds = range(100 * cfg.seed, 100 * cfg.seed + cfg.rooms)
    scenes = [graded_rooms([seed], cfg.views, cfg.targets, size, device=device) for seed in seeds]
    found: dict[str, Grades] = {}
    for name, (_, settings) in arms.items():
        if settings:
            with_settings(loaded[name], **settings)
        grades = found[name] = grade(loaded[name], scenes)
        for metric, unit, values in (("psnr", "dB", grades.psnr), ("ssim", "", grades.ssim)):
            spread = float(values.std(correction=0))
            run.row(metric, float(values.mean()), unit=unit, better="higher", n=cfg.rooms, spread=spread, variant=name)
        run.row("gaussians", grades.gaussians, better="lower", variant=name)
    host, _, fused = found.values()
    shown = typical(fused.psnr - host.psnr)
    true = scenes[shown].targets.image_01[0]
    rows = {"true": true}
    for name, tiny in loaded.items():
        images = draw_targets(tiny, scenes[shown])[0].image_01[0]
        rows[f"{name.split(',')[0]}\n{float(psnr(images, true).mean()):.1f} dB"] = images
    plots.sheet(
        {name: [image.movedim(0, -1).cpu().numpy() for image in images] for name, images in rows.items()},
        run.figures / "views.png",
        title=f"{cfg.views} views given; the room of the median gain over the host, of {cfg.rooms} not trained on",
    )
    *_, last = loaded.values()
    _leave(cfg, run, last, scenes[shown])
    return DemoReport.of(run)


def typical(gain: Tensor) -> int:
    """Number of the room with the median gain, the lower one of two."""
    return int(gain.argsort()[(len(gain) - 1) // 2])


@torch.inference_mode()
def _leave(cfg: DemoConfig, run: Run, tiny: Any, scene: Scene) -> None:
    """The cloud of a room and a flight along its path."""
    output = tiny.host(scene.context)
    write_ply(output.gaussians[0], run.artifacts / "scene.ply")
    path = fly_through(scene.context.cam_to_world[0], cfg.frames)[None]
    inner = scene.context.intrinsics_norm[:, :1].expand(-1, cfg.frames, -1, -1)
    frames = render(output.gaussians, path, inner, (tiny.config.size, tiny.config.size)).image_01[0]
    # Larger pixels, not more: between the Gaussians of the given pixels there is nothing.
    write_video(frames.repeat_interleave(4, -1).repeat_interleave(4, -2), run.artifacts / "fly.mp4", fps=12)
