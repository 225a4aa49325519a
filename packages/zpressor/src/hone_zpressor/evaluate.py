"""Evaluation on the sets that hosts are published with: each scene's targets drawn from its contexts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hone_core.devices import resolve_device
from hone_core.io import atomic_write_json
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.statistics import bootstrap_interval
from hone_splat.chunks import ChunkSet, read_evaluation_index
from hone_splat.metrics import Lpips, psnr, ssim
from hone_splat.ranges import HOSTS
from hone_splat.rendering import render

from .config import EvalConfig
from .photographs import load_model

__all__ = ["EvalReport", "evaluate", "open_chunks"]

Index = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """PSNR, SSIM and LPIPS, means over scenes of means over targets."""


def open_chunks(cfg: EvalConfig) -> tuple[ChunkSet, Index]:
    """The chunks, and views of the scenes that are asked for, in the order of the chunks.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is no index, or no scene is in both.
    """
    if cfg.chunks is None or cfg.index is None:
        raise ValueError("name the folder of chunks and the evaluation index: --chunks DIR --index FILE")
    chunks, index = ChunkSet(cfg.chunks), read_evaluation_index(cfg.index)
    keys = [key for key in chunks.index if key in index][: cfg.scenes]
    if not keys:
        raise ValueError(f"no scene of {cfg.index} is in {cfg.chunks}")
    return chunks, {key: index[key] for key in keys}


@torch.inference_mode()
def evaluate(cfg: EvalConfig, run: Run) -> EvalReport:
    """Grade scene after scene; a run that was broken off goes on with the next one.

    Differs: SSIM is torchmetrics', with the release's window of 11 x 11 Gaussian weights; it may differ from
    scikit-image's, which the release uses, at the borders.
    """
    device = resolve_device(run.device)
    chunks, index = open_chunks(cfg)
    file = run.artifacts / "scenes.json"
    done: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    host, limits = load_model(cfg, device), HOSTS[cfg.model]
    lpips = None if cfg.vgg is None else Lpips.load(cfg.vgg).to(device)
    near, far = cfg.near or limits.near, cfg.far or limits.far
    size = cfg.size or limits.size
    with progress_bar(len(index), desc="scenes", quiet=run.quiet) as bar:
        for key, (context, target) in index.items():
            if key not in done:
                scene = chunks.scene(key)
                given, asked = (scene.views(part, size, near, far) for part in (context, target))
                given.check()
                cloud = host(given.map(lambda part: part.to(device))).gaussians
                poses, inner = asked.cam_to_world.to(device), asked.intrinsics_norm.to(device)
                drawn = render(cloud, poses, inner, size, near=0.2 * near, backend=cfg.backend).image_01[0]
                true = asked.image_01[0].to(device)
                done[key] = {"psnr": float(psnr(drawn, true).mean()), "ssim": float(ssim(drawn, true).mean())}
                if lpips is not None:
                    done[key]["lpips"] = float(lpips(drawn.clamp(0, 1), true).mean())
                done[key] |= {"gaussians": len(cloud), "contexts": len(context)}
                atomic_write_json(file, done)
            bar.update()
    graded: list[tuple[str, str, Literal["higher", "lower"]]] = [("psnr", "dB", "higher"), ("ssim", "", "higher")]
    if lpips is not None:
        graded.append(("lpips", "", "lower"))
    for metric, unit, better in graded:
        values = torch.tensor([done[key][metric] for key in index], dtype=torch.float64)
        several = len(values) > 1  # one scene says nothing of others
        run.row(
            metric, float(values.mean()), unit=unit, better=better, n=len(values), variant=cfg.arm,
            spread=float(values.std()) if several else None, interval=bootstrap_interval(values) if several else None,
        )  # fmt: skip
    counts = torch.tensor([float(done[key]["gaussians"]) for key in index])
    run.row("gaussians", float(counts.mean()), better="lower", n=len(index), variant=cfg.arm)
    return EvalReport.of(run)
