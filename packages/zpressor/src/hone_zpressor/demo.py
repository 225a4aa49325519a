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

from . import plots
from .config import DemoConfig
from .data import Scene, graded_rooms
from .grading import draw_targets, grade, with_settings
from .host import load_host

__all__ = ["DemoReport", "demo", "prepare"]


@dataclass(frozen=True, kw_only=True)
class DemoReport(Report):
    """Result of the demo; as text, a table.

    Attributes:
        sheet: True and drawn pictures of the first room.
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


def prepare(cfg: DemoConfig) -> DemoConfig:
    """Look for the host.

    Raises:
        CheckpointError: There is none.
    """
    from .host import open_tiny

    open_tiny(cfg.host)
    return cfg


def demo(cfg: DemoConfig, run: Run) -> DemoReport:
    """Draw each room from views that no arm was given, and grade the pictures."""
    device = resolve_device(run.device)
    arms: dict[str, tuple[str, Any]] = {
        f"host alone, {cfg.views} views": ("host", {}),
        f"anchors alone, {cfg.views} to {cfg.anchors}": ("anchors", {"anchors": cfg.anchors}),
        f"ZPressor, {cfg.views} to {cfg.anchors}": ("zpressor", {"anchors": cfg.anchors}),
    }
    seeds = range(100 * cfg.seed, 100 * cfg.seed + cfg.rooms)
    pictures: dict[str, Any] = {}
    scenes: list[Scene] = []
    for name, (arm, settings) in arms.items():
        tiny = load_host(arm, path=cfg.host, device=device)
        if not scenes:
            size = tiny.config.size
            scenes = [graded_rooms([seed], cfg.views, cfg.targets, size, device=device) for seed in seeds]
            pictures["true"] = scenes[0].targets.image_01[0]
        if settings:
            with_settings(tiny, **settings)
        grades = grade(tiny, scenes)
        for metric, unit, values in (("psnr", "dB", grades.psnr), ("ssim", "", grades.ssim)):
            spread = float(values.std(correction=0))
            run.row(metric, float(values.mean()), unit=unit, better="higher", n=cfg.rooms, spread=spread, variant=name)
        run.row("gaussians", grades.gaussians, better="lower", variant=name)
        picture, _ = draw_targets(tiny, scenes[0])
        pictures[name] = picture.image_01[0]
    _leave(cfg, run, tiny, scenes[0])
    true = pictures["true"]
    shown = {
        name if name == "true" else f"{name.split(',')[0]}\n{float(psnr(images, true).mean()):.1f} dB": [
            image.movedim(0, -1).cpu().numpy() for image in images
        ]
        for name, images in pictures.items()
    }
    plots.sheet(shown, run.figures / "views.png", title=f"a room that was not trained on, {cfg.views} views given")
    return DemoReport.of(run)


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
