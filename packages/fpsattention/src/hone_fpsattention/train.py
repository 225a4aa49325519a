"""Fine-tuning with the attention in the forward pass, so that the weights absorb rounding and window together.

A forward has one regime, so a step draws noise levels of one: the first level as ever, the others from the same
distribution within its regime. Over many steps the levels are distributed as without regimes.

Source: the paper's section 3 and appendix B (rectified flow, decay, EMA, dropped prompts).
Differs: matrices of the blocks take Muon's steps and the rest AdamW's, as the dense host's did.
    ``loss="distillation"`` trains on the velocity of the dense model, frozen, instead of the data's: it asks for
    nothing but the dense model's own function, and is not pulled away by data that the model was not made for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, average_into, finish_host, matrix_optimizers
from hone_video.clips import Glyphs, load_glyphs, random_labels, render, segment_glyphs
from hone_video.flow import sample_sigma
from hone_video.host import NUM_TRAIN_TIMESTEPS, Host, load_host, to_latents
from hone_video.means import GRADES, write_grades, write_mean
from torch import Tensor, nn

from . import host as tuned_host
from .config import FPSAttentionConfig, TrainHostConfig
from .evaluate import Variant, compare
from .models import attach
from .schedule import regime_index

__all__ = ["Tuning", "regime_sigmas", "train_host"]

GATES = {"digit": 0.80, "direction": 0.80}
"""Accuracy that the trained host must reach with the attention on it before it is worth showing."""

ADAMW_SHARE = 0.4
"""Learning rate of what is no matrix, over that of the matrices: as the dense host was trained."""


def regime_sigmas(
    config: FPSAttentionConfig, count: int, *, uniform: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Noise levels ``[count]`` of one regime, which is as likely as its share of the levels.

    Args:
        config: Boundaries, and the shift of the levels.
        count: How many.
        uniform: See ``hone_video.flow.sample_sigma``.
        generator: Of ``device``.
        device: Where.
    """

    def draw(number: int) -> Tensor:
        return sample_sigma(number, shift=config.shift, uniform=uniform, generator=generator, device=device)

    found = draw(1)
    regime = regime_index(config, float(found))
    while len(found) < count:
        more = draw(4 * count)
        same = [regime_index(config, value) == regime for value in more.tolist()]
        found = torch.cat([found, more[torch.tensor(same, device=device)]])
    return found[:count]


class Tuning:
    """A host in training, its frozen original, and everything that an exact continuation needs.

    Args:
        cfg: The run.
        host: Dense; it is the teacher and stays as it is.
        path: File of the resumable state.
    """

    def __init__(self, cfg: TrainHostConfig, host: Host, path: Path) -> None:
        self.cfg, self.teacher = cfg, host
        self.device = host.device
        self.generator = torch.Generator(self.device).manual_seed(cfg.seed)
        self.student = copy.deepcopy(host.transformer).train().requires_grad_(True)
        if cfg.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.ema = copy.deepcopy(host.transformer)
        muon, adamw = matrix_optimizers(
            self.student,
            "blocks.",
            lr=cfg.lr,
            adamw_lr=ADAMW_SHARE * cfg.lr,
            weight_decay=cfg.weight_decay,
            betas=(0.9, 0.99),
            fused=self.device.type == "cuda",
        )
        self.optimizers = {muon: 1.0, adamw: ADAMW_SHARE}
        parts = {"model": self.student, "ema": self.ema, "muon": muon, "adamw": adamw, "generator": self.generator}
        self.training = Training(cfg, path, parts)

    def result(self) -> Host:
        """The host with the averaged weights."""
        return Host(self.teacher.config, self.ema, self.teacher.words, self.teacher.classifier)

    def learning_rate(self) -> float:
        """Of the coming step's matrices: a rise, then half a cosine down to a hundredth."""
        rise = min(1.0, (self.training.step + 1) / self.cfg.warmup_steps)
        return self.cfg.lr * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.training.spent())))

    def draw(self, glyphs: Glyphs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, text and target velocity of a step."""
        cfg, config = self.cfg, self.teacher.config
        labels = random_labels(cfg.batch, self.generator, self.device)
        latents = to_latents(render(glyphs, labels, config.clip, self.generator).clips)
        drop = torch.rand(cfg.batch, generator=self.generator, device=self.device) < cfg.drop
        text = self.teacher.encode_labels(labels, drop)
        sigma = regime_sigmas(
            cfg.settings, cfg.batch, uniform=cfg.uniform, generator=self.generator, device=self.device
        )
        noise = torch.randn(latents.shape, generator=self.generator, device=self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy, timestep = (1 - level) * latents + level * noise, sigma * NUM_TRAIN_TIMESTEPS
        target = noise - latents
        if cfg.loss == "distillation":
            with torch.no_grad():
                target = self.teacher.transformer(noisy, timestep, text, return_dict=False)[0].float()
        return noisy, timestep, text, target

    def train(self, glyphs: Glyphs) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; yield what is to be logged after each step, or None."""
        cfg, training = self.cfg, self.training
        cuda = self.device.type == "cuda"
        training.start()
        with attach(self.student, cfg.settings) as handle:
            while training.spent() < 1:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
                    noisy, timestep, text, target = self.draw(glyphs)
                    handle.begin_step(0, sigma=float(timestep[0]) / NUM_TRAIN_TIMESTEPS)
                    velocity = self.student(noisy, timestep, text, return_dict=False)[0]
                    loss = F.mse_loss(velocity.float(), target)
                self.student.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
                rate = self.learning_rate()
                for optimizer, share in self.optimizers.items():
                    for group in optimizer.param_groups:
                        group["lr"] = share * rate
                    optimizer.step()
                training.step += 1
                decay = min(cfg.ema, (1 + training.step) / (10 + training.step))
                average_into(self.ema, self.student, decay)
                values = None
                if training.due():
                    seconds = training.elapsed()
                    values = {"loss": loss.item(), "lr": rate, "clips": training.step * cfg.batch, "seconds": seconds}
                yield values


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Fine-tune the tiny host, export it with its attention beside it, and grade it as stored.

    A run that was stopped continues from its checkpoint when it is started again with the same folder.

    Args:
        cfg: The run.
        run: The run, entered.

    Raises:
        CheckpointError: The folder's checkpoint belongs to another config, or there is no host.
    """
    device = resolve_device(run.device)
    tuning = Tuning(cfg, load_host(device, path=cfg.host), run.artifacts / "checkpoint.pt")
    tuning.training.resume()
    tuning.training.follow(tuning.train(glyphs_of(cfg.glyphs, device)), run)
    exported = tuned_host.save_host(tuning.result(), cfg.settings, run.artifacts / HOST)
    tuned = tuned_host.load_host(device, path=exported)
    labels = random_labels(cfg.eval_clips, torch.Generator().manual_seed(cfg.seed + 1))
    variants = {"dense": Variant(tuning.teacher, None), "both": Variant(tuning.teacher, tuned.attention)}
    outcomes = compare(variants | {"trained": Variant(tuned, tuned.attention)}, labels, batch=64, quiet=run.quiet)
    result: dict[str, float] = {}
    for variant, outcome in outcomes.items():
        means = write_grades(run, outcome.grades, variant=variant)
        if variant == "trained":
            result = {name: means[name] for name in GRADES}
        write_mean(run, "psnr", outcome.psnr, unit="dB", variant=variant)
    details = {"loss": cfg.loss, "clips_seen": tuning.training.step * cfg.batch}
    return finish_host(run, tuning.training, result, gates=GATES, details=details)


def glyphs_of(kind: str, device: torch.device) -> Glyphs:
    """Digit images to train on."""
    return (load_glyphs("train", device) if kind == "handwritten" else segment_glyphs(device)).to(device)
