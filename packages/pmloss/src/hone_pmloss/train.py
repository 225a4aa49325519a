"""Train the tiny host: by pictures and depths first, then in two arms of equally many steps from the same weights.

Pictures alone teach so small a host colours before depths, and the published ones begin with a depth network. One arm
goes on by pictures alone, which is the control that extra steps need; the other with the point maps' loss
beside them. One command makes the host that ships: ``hone-pmloss train-host``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from hone_core.config import to_dict
from hone_core.devices import resolve_device
from hone_core.errors import CheckpointError
from hone_core.hosts import save_host
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, finish_host
from hone_splat.mvsplat import MVSplat
from hone_splat.rendering import render
from hone_splat.rooms import RoomStream
from torch import Tensor, nn

from .config import ARMS, PMLossConfig, TrainHostConfig
from .data import Scene, graded_rooms, training_batch
from .grading import METRICS, grade
from .host import PACKAGE, load_host
from .method import pm_loss
from .models import tiny

__all__ = ["GATES", "STAGES", "begun", "scene_loss", "train_host"]

STAGES = ("base", *ARMS)
LEAST = {"psnr_between": 17.0, "depth_close": 0.6, "on_surface": 0.4}
GATES = {f"photometric {name}": least for name, least in LEAST.items()}
"""What the arm of pictures alone must reach on graded rooms before the host says anything: PSNR in dB between the
context views, of which the mean colour of the true pictures reaches 12 to 13; the share of pixels of close depth, and
that of centres that do not fly, of which one depth for all pixels reaches at most 0.44 and 0.16. The arm with the loss
has no gate: if the loss spoils it, that is an answer."""
FREE_TO_DIFFER = (
    *("pm", "teacher_noise", "teacher_blur", "start"),
    *("graded", "graded_targets", "log_every", "checkpoint_seconds"),
)
"""Settings that a run may have of its own and yet begin with another's weights."""


class _Count(nn.Module):
    """How often the cap fired, over all parts of a run."""

    capped: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("capped", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def add(self, capped: Tensor) -> None:
        self.capped += capped.sum().to(self.capped)
        self.seen += len(capped)


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade the arms; a stopped run goes on where it was.

    Raises:
        CheckpointError: The folder's checkpoint is of another config, or the run to begin with is.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    arms = {name: tiny(cfg.host, seed=cfg.seed).to(device) for name in STAGES}
    fused = device.type == "cuda"
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(arm.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        for name, arm in arms.items()
    }
    count = _Count()
    parts: dict[str, Any] = {**arms, "count": count}
    parts |= {f"{name} optimizer": optimizer for name, optimizer in optimizers.items()}
    training = Training(cfg, run.artifacts / "checkpoint.pt", parts)
    if not training.resume() and cfg.start is not None:
        before = begun(cfg)
        for stage in ("base", "photometric"):
            arms[stage].load_state_dict(before[stage])
        training.step = cfg.steps - stage_steps(cfg)["pm"]
    training.follow(_train(cfg, training, arms, optimizers, count, device), run)
    path = run.artifacts / HOST
    save_host(path, cfg.host, {f"{arm}.": arms[arm].eval() for arm in ARMS}, package=PACKAGE)
    scenes = [graded_rooms([seed], cfg.graded_targets, cfg.host.size, device=device) for seed in range(cfg.graded)]
    result = {}
    for arm in ARMS:
        grades = grade(load_host(arm, path=path, device=device).host, scenes)
        for metric, (unit, better) in METRICS.items():
            values = grades[metric]
            result[f"{arm} {metric}"] = float(values.mean())
            n, spread = cfg.graded, float(values.std(correction=0))
            run.row(metric, float(values.mean()), unit=unit, better=better, n=n, spread=spread, variant=arm)
        result[f"{arm} on_surface"] = 1 - result[f"{arm} flying"]
    run.row("capped", float(count.capped) / max(1, int(count.seen)), better="lower", n=int(count.seen), variant="pm")
    details = {
        "graded": f"{cfg.graded_targets} views between and as many beyond the two given ones, of {cfg.graded} rooms",
        "teacher": "points of the rooms, exact"
        if not cfg.teacher_noise and not cfg.teacher_blur
        else f"points of the rooms, errors of {cfg.teacher_noise:g}, blurred over {cfg.teacher_blur} pixels",
        "parameters": sum(part.numel() for part in arms["pm"].parameters()),
    }
    return finish_host(run, training, result, gates=GATES, details=details)


def stage_steps(cfg: TrainHostConfig) -> dict[str, int]:
    """Steps of each stage."""
    each = max(1, round(cfg.steps * (1 - cfg.base_share) / len(ARMS)))
    return {"base": max(1, cfg.steps - each * len(ARMS))} | dict.fromkeys(ARMS, each)


def begun(cfg: TrainHostConfig) -> dict[str, Any]:
    """The parts of the checkpoint that a run begins with."""
    path = cfg.start
    assert path is not None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, step, parts = state["config"], state["step"], state["parts"]
    except Exception as error:  # torch raises whatever the damage makes it meet
        raise CheckpointError(
            f"start: {path} is no checkpoint of train-host ({type(error).__name__}); expected a run's "
            "artifacts/checkpoint.pt"
        ) from error
    now = json.loads(json.dumps(to_dict(cfg)))
    keys = {*before, *now} - {*FREE_TO_DIFFER}
    if changed := sorted(key for key in keys if before.get(key) != now.get(key)):
        raise CheckpointError(f"start: {path} is of a run with another {', '.join(changed)}; repeat its settings")
    expected = cfg.steps - stage_steps(cfg)["pm"]
    if step < expected:
        raise CheckpointError(f"start: {path} stands at step {step}; expected {expected}, where its second arm begins")
    return parts


def _train(
    cfg: TrainHostConfig,
    training: Training,
    arms: dict[str, MVSplat],
    optimizers: dict[str, torch.optim.Optimizer],
    count: _Count,
    device: torch.device,
) -> Iterator[dict[str, float] | None]:
    """One stage after the other; yields what to log, or None, after each step."""
    training.start()
    begins = 0
    for stage, steps in stage_steps(cfg).items():
        host = arms[stage].train()
        if stage != "base" and training.step == begins:
            host.load_state_dict(arms["base"].state_dict())
        rooms = _rooms(cfg, stage, device)
        while training.step < begins + steps:
            step = training.step - begins
            logged = _advance(cfg, stage, host, optimizers[stage], count, rooms.at(step), step, steps)
            training.step += 1
            stage_number = {"stage": float(STAGES.index(stage))}
            yield {name: float(value) for name, value in logged.items()} | stage_number if training.due() else None
        begins += steps


def _rooms(cfg: TrainHostConfig, stage: str, device: torch.device) -> RoomStream[Scene]:
    def draw(seeds: range) -> Scene:
        return training_batch(seeds, cfg.targets, cfg.gap, cfg.host.size, device=device)

    # Arms see the same rooms and views.
    return RoomStream(draw, (cfg.seed * 4 + (stage != "base")) * 100_000, cfg.scenes)


def _advance(
    cfg: TrainHostConfig,
    stage: str,
    host: MVSplat,
    optimizer: torch.optim.Optimizer,
    count: _Count,
    scene: Scene,
    step: int,
    steps: int,
) -> dict[str, Tensor]:
    pm, depth = (cfg.pm if stage == "pm" else None), (cfg.base_depth if stage == "base" else 0.0)
    points = None
    if pm is not None:
        points = scene.taught(noise=cfg.teacher_noise, blur=cfg.teacher_blur, seed=cfg.seed * 1_000_000 + step)
    loss, logged = scene_loss(host, scene, pm, depth=depth, points=points)
    if "capped" in logged:
        count.add(logged.pop("capped"))
        logged["capped"] = count.capped / count.seen
    peak = 1.0 if stage == "base" else cfg.fine_tune_lr
    factor = peak * min(1.0, (step + 1) / cfg.warmup_steps, max(0.02, (steps - step) / steps * 1.5))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(host.parameters(), 0.5)
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * factor
    optimizer.step()
    return {"loss": loss.detach(), **logged}


def scene_loss(
    host: MVSplat, scene: Scene, pm: PMLossConfig | None, *, depth: float = 0.0, points: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the pictures between the context views, and the weighted terms beside it.

    Args:
        host: In training mode.
        scene: Rooms.
        pm: Of the point maps' term; None without.
        depth: Weight of the mean absolute error of the depths' logarithms.
        points: The teacher's, ``[B, V, H, W, 3]``; the true ones if None.

    Returns:
        The loss, and what to log: the terms before their weights, and which scenes were capped.
    """
    output = host(scene.context)
    targets = scene.between
    picture = render(output.gaussians, targets.cam_to_world, targets.intrinsics_norm, targets.size)
    loss = (picture.image_01 - targets.image_01).square().mean()
    logged: dict[str, Tensor] = {}
    if depth:
        error = (output.depth.log() - scene.distance.log()).abs().mean()
        loss, logged = loss + depth * error, {"depth": error.detach()}
    if pm is not None:
        points = scene.points() if points is None else points
        term = pm_loss(output.gaussians.means, points.flatten(1, 3), pm)
        logged |= {"pm": term.raw.mean(), "capped": term.capped}
        loss = loss + pm.weight * term.loss.mean()
    return loss, logged
