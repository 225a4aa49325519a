"""The arms of ``reproduce``: what each is, and the jobs that train, draw and grade them, one per arm and seed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from hone_core.io import save_state
from hone_core.training import LogFile
from hone_video.clips import load_glyphs, random_labels, render, segment_glyphs
from hone_video.host import NUM_TRAIN_TIMESTEPS, Host, load_host, to_latents
from torch import Tensor

from .calibration import candidate_regimes
from .config import PRESETS, FPSAttentionConfig, Loss, Regime, ReproduceConfig, TrainHostConfig
from .evaluate import Variant, compare, mean_density
from .models import attach
from .schedule import step_sigmas
from .train import Tuning, glyphs_of
from .windows import density

__all__ = ["Arm", "Job", "arms_of", "constant_window", "guided_host", "held_out_loss", "work"]

SHOWN = 4
"""Clips of each arm on the sheet."""


class Arm(NamedTuple):
    """What is attached (None: nothing), and the loss that the host is fine-tuned on with it (None: it is not)."""

    attention: FPSAttentionConfig | None
    loss: Loss | None = None


class Job(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int

    def file(self, folder: Path) -> Path:
        """Where its results are."""
        return folder / f"{self.arm}-{self.seed}.pt"


def guided_host(cfg: ReproduceConfig, device: torch.device | str = "cpu") -> Host:
    """The dense host, guided at every step: then the mean density of the calls is that of the steps.

    Raises:
        CheckpointError: There is no such host.
    """
    host = load_host(device, path=cfg.host)
    host.config = replace(host.config, guidance_interval=(0.0, 1.0))
    return host


def arms_of(cfg: ReproduceConfig, host: Host) -> dict[str, Arm]:
    """The arms by name; ``config.ARMS`` says what they are.

    Args:
        cfg: Which presets.
        host: As ``guided_host`` gives it.
    """
    both, staged = PRESETS[cfg.preset].config, PRESETS[cfg.schedule_preset].config
    same = staged.constant(constant_window(host, staged))
    arms = {"dense": Arm(None)} | {name: Arm(config) for name, config in both.parts().items()}
    arms |= {"flow": Arm(both, "flow"), "distillation": Arm(both, "distillation")}
    for name, config in (("schedule", staged), ("constant", same)):
        arms |= {name: Arm(config), f"{name}-trained": Arm(config, "distillation")}
    # No kernel gives each token its own scale: all three in the emulation, or kernels would be compared with it.
    emulated = replace(both, backend="reference")
    return arms | {kind: Arm(emulated.constant(Regime(scales=kind))) for kind in ("tensor", "tile", "token")}


def constant_window(host: Host, staged: FPSAttentionConfig) -> Regime:
    """The window that at every step reads as much as the schedule does on average, or the next less.

    Raises:
        ValueError: No window reads as little.
    """
    goal = mean_density(host, staged)
    choices = candidate_regimes(host.config.grid, staged.tile)

    def share(regime: Regime) -> float:
        return density(host.config.grid, staged.tile, regime.window, border=staged.border).tokens

    fitting = [regime for regime in choices if share(regime) <= goal + 1e-9]
    if not fitting:
        raise ValueError(f"no window reads as little as the schedule does on average, {goal:.3g}; take another preset")
    return max(fitting, key=share)


def work(cfg: ReproduceConfig, folder: Path, job: Job, device: str) -> None:
    """Do one job and write its file; the dense job of its seed has to be done.

    Args:
        cfg: The comparison.
        folder: Of the files.
        job: Which.
        device: Where.
    """
    host = guided_host(cfg, device)
    arm = arms_of(cfg, host)[job.arm]
    checkpoint = folder / f"{job.arm}-{job.seed}.checkpoint"
    if arm.loss is not None:
        host = _tuned(host, arm, cfg, job, checkpoint)
    dense = job.arm == "dense"
    reference = None if dense else torch.load(Job("dense", job.seed).file(folder), weights_only=True)["clips"]
    labels = random_labels(cfg.prompts, torch.Generator().manual_seed(1000 + job.seed))
    outcome = compare(
        {job.arm: Variant(host, arm.attention)}, labels, batch=cfg.batch, seed=job.seed, reference=reference, quiet=True
    )[job.arm]
    found: dict[str, Tensor] = {"psnr": outcome.psnr, "ssim": outcome.ssim, **outcome.grades}
    found["flow_loss"] = held_out_loss(host, arm.attention, labels, cfg, seed=job.seed)
    found["density"] = torch.tensor(outcome.density, dtype=torch.float64)
    found["shown"] = (outcome.clips[:SHOWN] * 255).round().byte()
    if dense:
        found["clips"] = outcome.clips
    save_state(found, job.file(folder))
    checkpoint.unlink(missing_ok=True)


def _tuned(host: Host, arm: Arm, cfg: ReproduceConfig, job: Job, checkpoint: Path) -> Host:
    assert arm.loss is not None
    training = TrainHostConfig(
        attention=arm.attention, loss=arm.loss, seed=job.seed, steps=cfg.train_steps, batch=cfg.train_batch,
        lr=cfg.lr, glyphs=cfg.glyphs,
    )  # fmt: skip
    tuning = Tuning(training, host, checkpoint)
    tuning.training.resume()
    tuning.training.follow(tuning.train(glyphs_of(cfg.glyphs, host.device)), LogFile(checkpoint.with_suffix(".jsonl")))
    return tuning.result()


@torch.no_grad()
def held_out_loss(
    host: Host, attention: FPSAttentionConfig | None, labels: Tensor, cfg: ReproduceConfig, *, seed: int
) -> Tensor:
    """Rectified-flow loss ``[N]`` of clips with handwriting that no training saw, mean over the sampler's noise levels.

    Clips and noise depend on the labels and the seed alone, so arms compare clip by clip.

    Args:
        host: The model.
        attention: On it; None for dense.
        labels: ``[N, 5]`` what the clips show.
        cfg: ``glyphs`` (``segments`` has none held out) and ``batch``.
        seed: Of what labels leave open, and of the noise.
    """
    glyphs = load_glyphs("held_out") if cfg.glyphs == "handwritten" else segment_glyphs()
    drawn = render(glyphs, labels, host.config.clip, torch.Generator().manual_seed(seed)).clips
    clean, noise, text = (
        to_latents(drawn).to(host.device),
        host.noise(len(labels), 2000 + seed),
        host.encode_labels(labels),
    )
    levels = step_sigmas(host.config.steps, host.config.shift)
    total = torch.zeros(len(labels), device=host.device)
    with nullcontext() if attention is None else attach(host.transformer, attention):
        for sigma in levels:
            for at in range(0, len(labels), cfg.batch):
                part = slice(at, at + cfg.batch)
                noisy = (1 - sigma) * clean[part] + sigma * noise[part]
                timestep = torch.full((len(noisy),), sigma * NUM_TRAIN_TIMESTEPS, device=host.device)
                velocity = host.transformer(noisy, timestep, text[part], return_dict=False)[0].float()
                total[part] += (velocity - (noise[part] - clean[part])).square().flatten(1).mean(1)
    return (total / len(levels)).cpu()
