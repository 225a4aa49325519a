"""Fine-tuning of a pipeline's transformer with the attention in its forward pass: ``train``.

The transformer learns to absorb rounding and window. With a LoRA its dense teacher is itself, adapters and attention
off; trained whole, a frozen copy. Each sample of a batch is in the regime of its own noise level.

Source: the paper's section 3 and appendix B (rectified-flow loss, learning rate, decay, EMA, dropped prompts).
Differs: LoRA, and ``loss="distillation"``, the velocity of the frozen dense model, are ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_dtype
from hone_core.environment import code_version
from hone_core.errors import CheckpointError
from hone_core.runs import Report, Run
from hone_video.caching import Cache, fill_cache, fingerprint
from hone_video.denoising import Denoiser
from hone_video.host import NUM_TRAIN_TIMESTEPS
from hone_video.listings import read_clips
from hone_video.lora import add_lora
from hone_video.pipeline_index import find_pipeline
from hone_video.pipelines import load_pipeline, pipeline_on_meta
from hone_video.training import Group, Loop, Part
from torch import Tensor

from .config import FPSAttentionConfig, TrainConfig
from .models import attach, describe_model, preset_for, scheduler_shift
from .sample import check_windows, default_preset, set_shift
from .schedule import Schedule, regime_share
from .tuned import export_tuned
from .windows import density

__all__ = ["TrainedReport", "Tuning", "open_cache", "schedule_of", "train"]

TUNED = "tuned"
"""Where a run's artifacts hold what was trained."""


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """What a run trained.

    Attributes:
        tuned: The folder to pass to ``generate --tuned``.
    """

    tuned: Path

    @classmethod
    def of(cls, run: Run) -> TrainedReport:
        """Return the report of a run whose weights are exported."""
        return cls(path=run.path, rows=tuple(run.rows), tuned=run.artifacts / TUNED)

    def __str__(self) -> str:
        values = {row.metric: row.value for row in self.rows}
        return (
            f"tuned    {self.tuned}\nloss     {values['loss']:.4g}, mean of the last tenth of {values['steps']:.0f} "
            f"steps\nresults  {self.path / 'results.json'}"
        )


def schedule_of(cfg: TrainConfig) -> tuple[Schedule, tuple[int, int, int]]:
    """The schedule that is trained with, and the grid, once both are known to fit the pipeline; loads no weights.

    Raises:
        CheckpointError: There is no such pipeline, or it lacks the transformer.
        ValueError: The schedule is of another model or sampler, the shift is not the pipeline's, the size cannot be
            made, or the windows are larger than the grid.
    """
    name = find_pipeline(cfg.model, local_files_only=cfg.local_files_only)
    bare = pipeline_on_meta(cfg.model, name, local_files_only=cfg.local_files_only)
    model = getattr(bare, cfg.part, None)
    if model is None:
        raise CheckpointError(f"{cfg.model} has no {cfg.part}")
    data = cfg.data
    frames, height, width = data.frames, data.height, data.width
    time, space = bare.vae_scale_factor_temporal, bare.vae_scale_factor_spatial
    if (frames - 1) % time or height % space or width % space:
        raise ValueError(
            f"frames must be a multiple of {time} plus 1, height and width of {space} for this model; got {frames}, "
            f"{height} and {width}"
        )
    channels, sizes = model.config.in_channels, ((frames - 1) // time + 1, height // space, width // space)
    denoiser = Denoiser(bare, cfg.part)
    shape = (channels, *sizes) if denoiser.flow else (sizes[0], channels, *sizes[1:])
    grid = denoiser.grid(torch.empty(shape, device="meta"))
    set_shift(bare, cfg.flow_shift)
    shift, sampler = scheduler_shift(bare.scheduler), type(bare.scheduler).__name__
    if cfg.schedule is not None:
        schedule = Schedule.load(cfg.schedule)
        schedule.check(model=describe_model(model), sampler=sampler, shift=shift or schedule.config.shift)
    else:
        config = cfg.attention or preset_for(cfg.preset or default_preset(name), shift)
        if shift is not None and len(config.regimes) > 1 and shift != config.shift:
            raise ValueError(
                f"the pipeline's scheduler has shift {shift:g}, but these settings map steps to noise levels by "
                f"{config.shift:g}; take a preset, or a schedule of this shift"
            )
        shares = zip(config.regimes, regime_share(config), strict=True)
        tiles = [density(grid, config.tile, r.window, border=config.border).tiles * share for r, share in shares]
        schedule = Schedule(
            config=config, model=describe_model(model), sampler=sampler, steps=cfg.loop.steps, grid=grid,
            budget=min(1.0, sum(tiles)), provenance="",
        )  # fmt: skip
    config = replace(schedule.config, delta=cfg.straight_through)
    check_windows(config, grid)
    return replace(schedule, config=config), grid


def train(cfg: TrainConfig, run: Run) -> TrainedReport:
    """Train, and export what ``generate --tuned``, ``load_lora_weights`` and ``from_pretrained`` read.

    A run that was stopped goes on from its checkpoint when it is started again with the same folder. Several processes
    do what one does, see ``hone_video.training``.

    Args:
        cfg: The training.
        run: The run, entered.

    Raises:
        CheckpointError: There is no such pipeline, or the folder holds something else.
        ValueError: See ``schedule_of``; or videos cannot be used, or the cache is of another size.
        RuntimeError: The loss became infinite.
    """
    schedule, grid = schedule_of(cfg)
    loop = Loop(cfg.loop, run, bf16={"auto": None, "bfloat16": True, "float32": False}[cfg.dtype])
    dtype = resolve_dtype(cfg.dtype, loop.device)
    cache = _cache(cfg, run, loop, dtype)
    name = find_pipeline(cfg.model, local_files_only=cfg.local_files_only)
    other = "transformer_2" if cfg.part == "transformer" else "transformer"
    pipe = load_pipeline(
        cfg.model, name, device=torch.device("cpu"), dtype=torch.float32 if cfg.lora_rank == 0 else dtype,
        local_files_only=cfg.local_files_only, leave_out=(other, "text_encoder", "tokenizer", "vae"),
    )  # fmt: skip
    tuning = Tuning(cfg, schedule.config, pipe, cache, loop)
    assert tuning.denoiser.grid(cache.item(0)["latents"]) == grid
    loop.resume()
    with tuning.attached():
        loop.follow(tuning.update)
    weights = loop.weights("student")
    if run.processes.main:
        made = f"{run.command or 'hone-fpsattention train'}, commit {code_version()[0]}"
        stated = replace(schedule, provenance=f"{schedule.provenance}; {made}".removeprefix("; "))
        export_tuned(run.artifacts / TUNED, weights, tuning.model, stated, part=cfg.part, dtype=dtype)
        run.row_of_end("loss", variant=cfg.loss)
        run.row("steps", loop.step, better="none")
    return TrainedReport.of(run)


class Tuning:
    """A transformer in training.

    Args:
        cfg: The training.
        config: The attention.
        pipe: Holds the transformer, on the CPU.
        cache: Latents and text.
        loop: Prepared here.
    """

    def __init__(self, cfg: TrainConfig, config: FPSAttentionConfig, pipe: Any, cache: Cache, loop: Loop) -> None:
        self.cfg, self.config, self.cache, self.loop = cfg, config, cache, loop
        self.denoiser = Denoiser(pipe, cfg.part)
        boundary = pipe.config.get("boundary_ratio")
        # Wan2.2: the first transformer does the noisy steps, the second the others.
        edge = 0.0 if boundary is None else boundary * NUM_TRAIN_TIMESTEPS
        self.times = (edge, float(NUM_TRAIN_TIMESTEPS)) if cfg.part == "transformer" else (0.0, edge)
        model = getattr(pipe, cfg.part)
        self.teacher: Any = None
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, targets=cfg.lora_targets, seed=cfg.loop.seed)
        else:
            if cfg.loss == "distillation":
                dtype = resolve_dtype(cfg.dtype, loop.device)
                self.teacher = copy.deepcopy(model).to(loop.device, dtype).requires_grad_(False)
            model.requires_grad_(True)
        model.train()
        group = Group(lr=cfg.loop.lr, ema=cfg.loop.ema, weight_decay=cfg.loop.weight_decay)
        loop.prepare(model, {"student": group})
        self.model: Any = loop.accelerator.unwrap_model(loop.model)
        self.handle: Any = None
        self.null = cache.null()

    def attached(self) -> Any:
        """The attention on the student, until the block ends."""
        self.handle = attach(self.model, self.config)
        return self.handle

    def draw(self, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean latents, noise, timesteps and text of a part, on the device."""
        items = [self.cache.item(index) for index in part.items(len(self.cache))]
        latents = torch.stack([item["latents"].float() for item in items])
        times, (low, high) = [], self.times
        for generator in part.generators("time"):
            while True:
                time = self.denoiser.sample_timestep(generator, shift=self.config.shift, uniform=self.cfg.uniform)
                if low <= time <= high:
                    break
            times.append(time)
        dropped = [float(torch.rand((), generator=generator)) < self.cfg.drop for generator in part.generators("drop")]
        text = torch.stack([self.null if drop else item["text"] for drop, item in zip(dropped, items, strict=True)])
        noise = part.randn(latents.shape[1:], "noise")
        device = self.loop.device
        return latents.to(device), noise.to(device), torch.tensor(times).to(device), text.to(device)

    def update(self) -> dict[str, float]:
        """One step."""
        total = 0.0
        for part in self.loop.parts():
            latents, noise, times, text = self.draw(part)
            noisy = self.denoiser.add_noise(latents, noise, times)
            self.handle.begin_step(0, sigma=[time / NUM_TRAIN_TIMESTEPS for time in times.tolist()])
            target = noisy.target if self.cfg.loss == "flow" else self._dense(noisy.latents, noisy.timestep, text)
            velocity = self.denoiser(self.loop.model, noisy.latents, noisy.timestep, text)
            total += self.loop.backward(F.mse_loss(velocity, target), part)
        return {"loss": total, "gradient_norm": self.loop.apply("student")}

    @torch.no_grad()
    def _dense(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Velocity of the frozen dense model."""
        if self.teacher is not None:
            with self.loop.accelerator.autocast():
                return self.denoiser(self.teacher, latents, timestep, text)
        self.model.disable_adapters()
        try:
            with self.handle.disabled():
                return self.denoiser(self.loop.model, latents, timestep, text)
        finally:
            self.model.enable_adapters()


def open_cache(cfg: TrainConfig) -> Cache:
    """The encoded videos that are given without their folder.

    Raises:
        CheckpointError: They are none, not whole, or of another encoder.
        ValueError: They are of another size.
    """
    data = cfg.data
    assert data.cache is not None
    size = [data.frames, data.height, data.width]
    encoder = fingerprint(cfg.model, "text_encoder", local_files_only=cfg.local_files_only)
    cache = Cache.open(data.cache, encoder=encoder)
    if cache.header["size"] != size:
        raise ValueError(
            f"{data.cache} holds videos of {cache.header['size']} (frames, height, width); asked for {size}"
        )
    return cache


def _cache(cfg: TrainConfig, run: Run, loop: Loop, dtype: torch.dtype) -> Cache:
    """Encoded videos: filled from the folder, or as they are."""
    data = cfg.data
    size = (data.frames, data.height, data.width)
    if data.videos is None:
        return open_cache(cfg)
    return fill_cache(
        data.cache or run.path / "cache", read_clips(data.videos, caption=data.caption), cfg.model,
        device=loop.device, dtype=dtype, size=size, processes=run.processes, local_files_only=cfg.local_files_only,
        quiet=run.quiet,
    )  # fmt: skip
