"""Distil the tiny host: few sparse steps without guidance in place of its many guided ones, from prompts alone.

Each update rolls the student out, trains the fake score on what the student makes, then the student on where teacher
and fake score differ (``tdm``). What is random is drawn from seed, step and part of the batch, so that a run that was
stopped goes on exactly, and the same batch in other parts is the same batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hone_core.devices import resolve_device
from hone_core.environment import environment
from hone_core.io import atomic_write_json
from hone_core.runs import Report, Run
from hone_core.training import Training
from hone_video.clips import random_labels
from hone_video.flow import PatchLinear
from hone_video.grader import grade
from hone_video.host import Host, load_host, to_clips
from hone_video.means import write_grades
from torch import Tensor, nn

from .config import BladeConfig, DistillConfig, TDMConfig
from .graphs import Replayed
from .lora import load_blade_lora, save_blade_lora
from .models import attach
from .objective import Objective
from .scheduler import TDMScheduler, rollout_timesteps
from .tdm import Draw, rollout
from .trio import Trio

__all__ = ["LORA", "DistillReport", "Distillation", "Task", "distill", "host_task", "rollout_clips", "student_host"]

log = logging.getLogger(__name__)

LORA = "lora.safetensors"
"""Where a run's artifacts hold the student."""


@dataclass(frozen=True)
class Task:
    """What is distilled.

    Attributes:
        model: The transformer.
        process: Noise levels and ``eta``.
        shape: Of one video's latents.
        call: How the transformer is called, for states, times and text.
        draw: Texts ``[B, ...]`` and as many empty ones, from a generator.
    """

    model: Any
    process: TDMScheduler
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def call_wan(model: nn.Module, state: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """Velocity of a ``WanTransformer3DModel``."""
    return model(state, time, text, return_dict=False)[0]


def host_process(tdm: TDMConfig) -> TDMScheduler:
    """The noise process of the tiny host."""
    return TDMScheduler(prediction_type="flow_prediction", eta=tdm.eta)


def host_task(host: Host, tdm: TDMConfig) -> Task:
    """The tiny host's drawing, from random prompts.

    Args:
        host: The teacher; its patch embedding becomes a matrix product.
        tdm: For ``eta``.
    """
    cfg, model = host.config, host.transformer
    conv = model.patch_embedding
    if not isinstance(conv, PatchLinear):
        linear = PatchLinear(conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride)
        linear.load_state_dict(conv.state_dict())
        linear.to(host.device).to(conv.weight.dtype)
        model.patch_embedding = linear

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        text = host.encode_labels(random_labels(count, generator, host.device))
        return text.to(host.dtype), host.encode_null(count).to(host.dtype)

    return Task(model, host_process(tdm), (3, cfg.frames, cfg.height, cfg.width), call_wan, draw)


class Distillation:
    """Student and fake score in training, and everything that an exact continuation needs.

    Args:
        cfg: The run.
        task: What is distilled.
        path: File of the resumable state.
    """

    def __init__(self, cfg: DistillConfig, task: Task, path: Path) -> None:
        self.cfg, self.task = cfg, task
        self.device = next(task.model.parameters()).device
        self.handle = attach(task.model, cfg.settings)
        self.trio = Trio(
            task.model, task.call, self.handle, rank=cfg.lora_rank, seed=cfg.seed,
            fake_sparse=cfg.tdm.fake_attention == "sparse",
        )  # fmt: skip
        if cfg.gradient_checkpointing:
            task.model.enable_gradient_checkpointing()
        task.model.train()
        self.objective = Objective(self.trio, task.process, cfg.tdm)
        self.student, self.fake = (self._optimizer(a.parameters, lr) for a, lr in (
            (self.trio.student, cfg.lr), (self.trio.fake, cfg.fake_lr)))  # fmt: skip
        parts = {"student": self.trio.student, "fake": self.trio.fake}
        self.generator = torch.Generator(self.device)
        self._graphs: dict[tuple[str, bool], Replayed] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.training = Training(cfg, path, {**parts, "student optimizer": self.student, "fake optimizer": self.fake})

    def _optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
        cfg = self.cfg
        return torch.optim.AdamW(
            parameters, lr, betas=(0.0, cfg.beta2), weight_decay=cfg.weight_decay, fused=self.device.type == "cuda"
        )

    def seed(self, part: int, stage: int) -> torch.Generator:
        """The generator, at the beginning of a stage of one part of this step's batch."""
        seed = ((self.cfg.seed * 1_000_003 + self.training.step) * 4096 + part) * 2 + stage
        return self.generator.manual_seed(seed)

    def rates(self) -> tuple[float, float]:
        """Learning rates of student and fake score: both warm up, and the student's falls by half a cosine to 0.

        Differs: the release starts the fake score at its full rate, by which Adam moves every weight at once.
        """
        cfg = self.cfg
        warmup = min(1.0, (self.training.step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
        return warmup * cfg.lr * 0.5 * (1 + math.cos(math.pi * self.training.spent())), warmup * cfg.fake_lr

    def update(self) -> dict[str, Tensor]:
        """One update of the fake score and one of the student; what there is to log."""
        cfg, task, trio, objective = self.cfg, self.task, self.trio, self.objective
        count = cfg.batch // cfg.accumulate
        trio.dense = self.training.spent() < cfg.dense_share or cfg.dense_share == 1
        seen: dict[str, Tensor] = {name: torch.zeros((), device=self.device) for name in ("fake_loss", "loss", "gap")}
        for optimizer, lr in zip((self.student, self.fake), self.rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr
        parts = []
        for part in range(cfg.accumulate):
            generator = self.seed(part, 0)
            text, empty = task.draw(count, generator)
            noise = torch.randn(count, *task.shape, generator=generator, device=self.device)
            drawn = objective.draw(count, generator, self.device)
            states, loss, *gradients = self._run(self._fake_stage, text, noise, *drawn.all())
            _add(trio.fake.parameters, gradients)
            seen["fake_loss"] += loss
            parts.append((text, empty, states.clone()))
        seen["fake_norm"] = self._step(self.fake, trio.fake.parameters, skip=self._skips(seen["fake_loss"]))
        for part, given in enumerate(parts):
            drawn = objective.draw(count, self.seed(part, 1), self.device)
            loss, gap, *gradients = self._run(self._student_stage, *given, *drawn.all())
            _add(trio.student.parameters, gradients)
            seen["loss"] += loss
            seen["gap"] += gap
        seen["norm"] = self._step(self.student, trio.student.parameters)
        return seen

    def _run(self, stage: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        """A stage, on a GPU as a graph; one for dense attention and one for sparse."""
        if not self.cfg.graphs or self.device.type != "cuda":
            return stage(*inputs)
        key = stage.__name__, self.trio.dense
        if key not in self._graphs:
            self._graphs[key] = Replayed(stage, self.generator, self._pool)
        return self._graphs[key](*inputs)

    def _fake_stage(self, text: Tensor, noise: Tensor, *drawn: Tensor) -> Sequence[Tensor]:
        """States of a rollout, the fake score's loss on them, and its gradients."""
        with self._precision():
            states = self.objective.states(text, noise, self.generator)
            loss = self.objective.fake_loss(text, states, Draw(*drawn), self.generator).mean() / self.cfg.accumulate
        return states, loss.detach(), *torch.autograd.grad(loss, self.trio.fake.parameters)

    def _student_stage(self, text: Tensor, empty: Tensor, states: Tensor, *drawn: Tensor) -> Sequence[Tensor]:
        """The student's loss, the distance of teacher and fake score, and the student's gradients."""
        with self._precision():
            loss, gap = self.objective.student_loss(text, empty, states, Draw(*drawn), self.generator)
            loss, gap = (x.mean() / self.cfg.accumulate for x in (loss, gap))
        return loss.detach(), gap, *torch.autograd.grad(loss, self.trio.student.parameters)

    def _precision(self) -> torch.autocast:
        # Cached casts would be those of weights from before an update.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def _skips(self, loss: Tensor) -> bool:
        limit = self.cfg.tdm.skip_above
        return limit is not None and loss.item() > limit

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *, skip: bool = False) -> Tensor:
        norm = nn.utils.clip_grad_norm_(parameters, self.cfg.clip)
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def train(self) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; yield what is to be logged after each step, or None."""
        training = self.training
        training.start()
        while training.spent() < 1:
            seen = self.update()
            training.step += 1
            values = None
            if training.due():
                values = {name: value.item() for name, value in seen.items()}
                values |= {"lr": self.student.param_groups[0]["lr"], "seconds": training.elapsed()}
            yield values

    def export(self, path: Path) -> Path:
        """Write the student as a LoRA file with its attention and its sampling in the header."""
        return save_blade_lora(
            self.task.model, path, adapter_name="student", config=self.cfg.settings, rollout=self.cfg.rollout
        )


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Add to gradients; the first ones are copied, since a graph's next replay writes over its own."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


def student_host(host: Host, file: Path) -> BladeConfig:
    """Load a distilled student onto a host; returns the attention that it was trained with.

    Raises:
        CheckpointError: The file is of another model or states no attention.
    """
    config = load_blade_lora(host.transformer, file, adapter_name="student").config
    assert config is not None
    return config


def rollout_clips(
    host: Host, labels: Tensor, tdm: TDMConfig, *, seed: int, batch: int = 64, steps: int | None = None
) -> Tensor:
    """Draw with the rollout that distillation trains, and the host as it is, adapters and attention included.

    Args:
        host: What draws, without guidance.
        labels: ``[N, 5]`` what to draw.
        tdm: Steps and ``eta``.
        seed: Of the first states, which are those of ``host.noise``, and of the noise in between.
        batch: Clips drawn at once.
        steps: In place of ``tdm.student_steps``.

    Returns:
        ``[N, 3, F, H, W]`` in [0, 1], on the CPU.
    """
    process, times = host_process(tdm), rollout_timesteps(steps or tdm.student_steps)
    text, noise = host.encode_labels(labels).to(host.dtype), host.noise(len(labels), seed)
    generator = torch.Generator(host.device).manual_seed(seed)
    clips = []
    for start in range(0, len(labels), batch):
        words = text[start : start + batch]

        def network(state: Tensor, time: Tensor, words: Tensor = words) -> Tensor:
            return call_wan(host.transformer, state.to(host.dtype), time, words).float()

        clips.append(to_clips(rollout(network, process, noise[start : start + batch], times, generator=generator)[1]))
    return torch.cat(clips).cpu()


@dataclass(frozen=True, kw_only=True)
class DistillReport(Report):
    """A distilled student; as text, what it draws beside its teacher.

    Attributes:
        lora: The student's weights.
    """

    lora: Path

    @classmethod
    def of(cls, run: Run) -> DistillReport:
        """Return the report of a run whose rows are written."""
        return cls(path=run.path, rows=tuple(run.rows), lora=run.artifacts / LORA)

    def __str__(self) -> str:
        cells: dict[str, dict[str, float]] = {}
        for row in self.rows:
            cells.setdefault(row.variant, {})[row.metric] = row.value
        lines = [f"{'':<44} {'calls':>5} {'both right':>10} {'digit':>6} {'direction':>9} {'color':>6}"]
        for name, values in cells.items():
            if "accuracy" in values:
                marks = (values[key] for key in ("accuracy", "digit_accuracy", "direction_accuracy", "color_accuracy"))
                both, digit, direction, color = (f"{mark:.0%}" for mark in marks)
                lines.append(f"{name:<44} {values['nfe']:>5.0f} {both:>10} {digit:>6} {direction:>9} {color:>6}")
        return "\n".join([*lines, f"student  {self.lora}", f"results  {self.path / 'results.json'}"])


def distill(cfg: DistillConfig, run: Run) -> DistillReport:
    """Distil the tiny host, export the student with a sidecar of how it was made, and grade it as stored.

    A run that was stopped continues from its checkpoint when it is started again with the same folder.

    Args:
        cfg: The run.
        run: The run, entered.

    Raises:
        CheckpointError: There is no such host, or the folder's checkpoint belongs to another config.
    """
    device = resolve_device(run.device)
    host = load_host(device, torch.bfloat16 if device.type == "cuda" else torch.float32, path=cfg.host)
    distillation = Distillation(cfg, host_task(host, cfg.tdm), run.artifacts / "checkpoint.pt")
    distillation.training.resume()
    distillation.training.follow(distillation.train(), run, show=("loss", "fake_loss", "gap"))
    run.row("seconds", distillation.training.elapsed(), unit="s", better="lower", variant="training")
    file = distillation.export(run.artifacts / LORA)
    _grade(cfg, run, file, device)
    student = {row.metric: round(row.value, 4) for row in run.rows if row.variant.startswith("student")}
    training = distillation.training
    facts = {"command": run.command, "seed": cfg.seed, "steps": training.step, "seconds": round(training.elapsed(), 1)}
    atomic_write_json(file.with_suffix(".json"), {**facts, "result": student, "environment": environment()})
    return DistillReport.of(run)


def _grade(cfg: DistillConfig, run: Run, file: Path, device: torch.device) -> None:
    host = load_host(device, path=cfg.host)
    labels = random_labels(cfg.eval_clips, torch.Generator().manual_seed(cfg.seed + 1))
    seed, steps = cfg.seed + 1, cfg.tdm.student_steps
    text, noise = host.encode_labels(labels), host.noise(cfg.eval_clips, seed)
    own = [host.sample(text[i : i + 64], noise[i : i + 64]).cpu() for i in range(0, len(labels), 64)]
    clips = {"teacher, its own sampler": torch.cat(own)}
    clips[f"teacher, {steps} steps of the rollout"] = rollout_clips(host, labels, cfg.tdm, seed=seed)
    sparse = cfg.settings if cfg.dense_share < 1 else None
    if sparse is not None:
        with attach(host.transformer, sparse):
            clips["the same, sparse"] = rollout_clips(host, labels, cfg.tdm, seed=seed)
    settings = student_host(host, file)
    name = "student, dense" if sparse is None else "student, sparse"
    with attach(host.transformer, settings) as handle:
        if sparse is None:
            with handle.disabled():
                clips[name] = rollout_clips(host, labels, cfg.tdm, seed=seed)
        else:
            clips[name] = rollout_clips(host, labels, cfg.tdm, seed=seed)
    for variant, made in clips.items():
        calls = sum(host.evaluations()) if variant == "teacher, its own sampler" else steps
        run.row("nfe", calls, better="lower", variant=variant)
        write_grades(run, grade(host.classifier, made, labels), variant=variant)
