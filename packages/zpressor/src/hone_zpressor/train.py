"""Train the tiny host: alone first, then in three arms of equally many steps, each from the same weights.

The arms are the host on as many views as there are anchors, the host with ZPressor on twice as many, and the host on
the anchors of those without fusion. One command makes the host that ships: ``hone-zpressor train-host``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.hosts import save_host
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, finish_host
from hone_splat.rendering import render
from hone_splat.rooms import RoomStream
from torch import nn

from .config import ARMS, TrainHostConfig
from .data import Scene, graded_rooms, training_batch
from .grading import grade
from .host import PACKAGE, TinyHost, build_arm, load_host
from .method import information_loss

__all__ = ["GATES", "STAGES", "train_host"]

STAGES = ("base", *ARMS)
GATES = dict.fromkeys(ARMS, 17.0)
"""PSNR in dB at 12 views of graded rooms that each arm must reach before the host says anything; the mean colour of the
true pictures reaches 12 to 13."""
GRADED_VIEWS = 12
INFORMATION = 1e-5
"""Weight of the information loss of the arm with fusion, as in the release."""


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade the arms; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    arms = {name: build_arm(cfg.host, "host" if name == "base" else name, seed=cfg.seed) for name in STAGES}
    for built in arms.values():
        built.host.to(device)
    fused = device.type == "cuda"
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(arm.host.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        for name, arm in arms.items()
    }
    parts: dict[str, Any] = {name: arm.host for name, arm in arms.items()}
    parts |= {f"{name} optimizer": optimizer for name, optimizer in optimizers.items()}
    training = Training(cfg, run.artifacts / "checkpoint.pt", parts)
    training.resume()
    training.follow(_train(cfg, training, arms, optimizers, device), run)
    path = run.artifacts / HOST
    save_host(path, cfg.host, {f"{arm}.": arms[arm].host.eval() for arm in ARMS}, package=PACKAGE)
    scenes = [
        graded_rooms([seed], GRADED_VIEWS, cfg.targets, cfg.host.size, device=device) for seed in range(cfg.graded)
    ]
    result = {}
    for arm in ARMS:
        grades = grade(load_host(arm, path=path, device=device), scenes)
        result[arm] = float(grades.psnr.mean())
        for metric, unit in (("psnr", "dB"), ("ssim", "")):
            values = getattr(grades, metric)
            spread = float(values.std(correction=0))
            run.row(metric, float(values.mean()), unit=unit, better="higher", n=cfg.graded, spread=spread, variant=arm)
    details = {
        "graded": f"PSNR at {cfg.targets} views of {cfg.graded} rooms that were not trained on, {GRADED_VIEWS} given",
        "parameters": {arm: sum(part.numel() for part in arms[arm].host.parameters()) for arm in ARMS},
    }
    return finish_host(run, training, result, gates=GATES, details=details)


def stage_steps(cfg: TrainHostConfig) -> dict[str, int]:
    """Steps of each stage."""
    each = max(1, round(cfg.steps * (1 - cfg.base_share) / len(ARMS)))
    return {"base": max(1, cfg.steps - each * len(ARMS))} | dict.fromkeys(ARMS, each)


def _train(
    cfg: TrainHostConfig,
    training: Training,
    arms: dict[str, TinyHost],
    optimizers: dict[str, torch.optim.Optimizer],
    device: torch.device,
) -> Iterator[dict[str, float] | None]:
    """One stage after the other; yields what to log, or None, after each step."""
    training.start()
    begins = 0
    for stage, steps in stage_steps(cfg).items():
        host = arms[stage].host.train()
        if stage != "base" and training.step == begins:
            # Only the compressor is new; it keeps its initial weights.
            host.load_state_dict(host.state_dict() | arms["base"].host.state_dict())
        rooms = _rooms(cfg, stage, device)
        while training.step < begins + steps:
            step = training.step - begins
            loss = _advance(cfg, stage, host, optimizers[stage], rooms.at(step), step, steps)
            training.step += 1
            yield {"loss": float(loss), "stage": STAGES.index(stage)} if training.due() else None
        begins += steps


def _rooms(cfg: TrainHostConfig, stage: str, device: torch.device) -> RoomStream[Scene]:
    context = cfg.host.zpressor.anchors if stage in ("base", "host") else cfg.context

    def draw(seeds: range) -> Scene:
        return training_batch(seeds, context, cfg.targets, cfg.gap, cfg.host.size, device=device)

    # Arms see the same rooms and parts of their paths.
    return RoomStream(draw, (cfg.seed * 4 + (stage != "base")) * 100_000, cfg.scenes)


def _advance(
    cfg: TrainHostConfig,
    stage: str,
    host: nn.Module,
    optimizer: torch.optim.Optimizer,
    scene: Scene,
    step: int,
    steps: int,
) -> torch.Tensor:
    loss = scene_loss(host, scene, information=INFORMATION if stage == "zpressor" else 0.0)
    factor = min(1.0, (step + 1) / cfg.warmup_steps, max(0.02, (steps - step) / steps * 1.5))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(host.parameters(), 0.5)
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * factor
    optimizer.step()
    return loss.detach()


def scene_loss(host: nn.Module, scene: Scene, *, information: float) -> torch.Tensor:
    """Mean squared error of the pictures at the targets, and what the compression is charged for."""
    output = host(scene.context)
    targets = scene.targets
    picture = render(output.gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size)
    loss = (picture.image_01 - targets.image_01).square().mean()
    return loss + information * information_loss(output.features) if information else loss
