"""Train the tiny host: flow matching on generated clips, then a graded set of samples.

One command makes the checkpoint that ships in ``assets/``: ``hone-blade train-host --device cuda``. Batches are
rendered on the device; nothing is read from disk but scikit-learn's digits.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from hone_core.devices import resolve_device
from hone_core.errors import CheckpointError
from hone_core.plots import Sheet, to_pixels
from hone_core.runs import Run
from hone_core.timing import Stopwatch
from hone_core.training import HOST, Training, TrainReport, average_into, finish_host, matrix_optimizers
from hone_video.clips import Glyphs, load_glyphs, random_labels, render, segment_glyphs
from hone_video.flow import PatchLinear, flow_loss, sample_sigma
from hone_video.grader import grade, train_classifier
from hone_video.host import Host, grade_samples, load_host, save_host, to_latents
from hone_video.means import write_grades
from hone_video.prompts import COLORS, FIELDS
from torch import Tensor, nn

from .config import TrainHostConfig

__all__ = ["train_host"]

log = logging.getLogger(__name__)

GATES = {"digit": 0.90, "direction": 0.90}
"""Accuracy that the host must reach with its own sampler before it is worth attaching a method to."""


@torch.no_grad()
def classifier_accuracy(host: Host, glyphs: Glyphs, *, clips: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Grade real renders; see :func:`hone_video.grader.grade`."""
    parts = []
    for start in range(0, clips, 256):
        labels = random_labels(min(256, clips - start), generator, glyphs.images.device)
        batch = render(glyphs, labels, host.config.clip, generator)
        parts.append(grade(host.classifier, batch.clips, labels))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade the tiny host.

    A run that was stopped continues from its checkpoint when it is started again with the same folder.

    Args:
        cfg: the run.
        run: the run, entered; its command line is kept in ``host.json``.

    Raises:
        CheckpointError: if the folder's checkpoint belongs to another config.
    """
    device = resolve_device(run.device)
    handwritten = cfg.glyphs == "handwritten"
    glyphs = (load_glyphs("train", device) if handwritten else segment_glyphs(device)).to(device)
    held_out = load_glyphs("held_out", device) if handwritten else glyphs
    generator = torch.Generator(device).manual_seed(cfg.seed)
    host = Host.untrained(cfg.host, seed=cfg.seed).to(device)
    if cfg.start is not None:
        _start_from(host, load_host(device, path=cfg.start), cfg.start)
    state = _TrainState(cfg, host, run.artifacts / "checkpoint.pt", generator)
    if not state.training.resume():
        with Stopwatch(device) as watch:
            train_classifier(
                host.classifier,
                glyphs,
                cfg.host.clip,
                steps=cfg.classifier_steps,
                batch=cfg.classifier_batch,
                generator=generator,
            )
        log.info("classifier trained in %.0f s", watch.seconds)
    real = classifier_accuracy(
        host, held_out, clips=4 * cfg.eval_clips, generator=torch.Generator(device).manual_seed(1)
    )
    write_grades(run, real, variant="renders", split="held_out" if handwritten else "segments")
    log.info("on held-out renders: %s", {name: round(float(v.mean()), 4) for name, v in real.items()})

    state.training.follow(state.train(glyphs), run)
    host.transformer.load_state_dict(state.ema.state_dict())
    exported = save_host(host, run.artifacts / HOST)
    # graded as shipped: 16-bit weights read back, fp32 arithmetic
    result, shown = _grade_export(cfg, run, exported, device)
    _save_samples(shown, run.figures / "samples.png")
    details = {
        "clips_seen": state.training.step * cfg.batch,
        "sampler": {"solver": cfg.host.solver, "steps": cfg.host.steps, "guidance": cfg.host.guidance},
        "classifier_on_held_out_renders": {
            name: round(float(real[name].float().mean()), 4) for name in FIELDS if name in real
        },
        "parameters": {"transformer": host.num_parameters, "colors": len(COLORS)},
    }
    return finish_host(run, state.training, result, gates=GATES, details=details)


class _TrainState:
    """Everything that a resumed run needs to go on, and the loop that changes it."""

    def __init__(self, cfg: TrainHostConfig, host: Host, path: Path, generator: torch.Generator) -> None:
        self.cfg, self.host, self.generator = cfg, host, generator
        self.device = host.device
        model = host.transformer
        conv = model.patch_embedding
        linear = PatchLinear(conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride).to(self.device)
        linear.load_state_dict(conv.state_dict())
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        model.patch_embedding = linear
        self.model = model.train()
        self.optimizers = muon, adamw = matrix_optimizers(
            model,
            "blocks.",
            lr=cfg.lr,
            adamw_lr=cfg.adamw_lr,
            weight_decay=cfg.weight_decay,
            betas=(0.9, 0.99),
            fused=self.device.type == "cuda",
        )
        parts = {"model": model, "ema": self.ema, "muon": muon, "adamw": adamw}
        self.training = Training(cfg, path, {**parts, "classifier": host.classifier, "generator": generator})
        self.marked = (0, 0.0)

    def lr_factor(self) -> float:
        """Warm-up, then half a cosine down to 1 %."""
        warmup = min(1.0, (self.training.step + 1) / self.cfg.warmup_steps)
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.training.spent())))

    def rate(self) -> float:
        """Samples per second since the last call."""
        (step, seconds), self.marked = self.marked, (self.training.step, self.training.elapsed())
        return (self.marked[0] - step) * self.cfg.batch / max(self.marked[1] - seconds, 1e-9)

    def train(self, glyphs: Glyphs) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; yield what is to be logged after each step, or None."""
        cfg, device, training = self.cfg, self.device, self.training
        cuda = device.type == "cuda"
        if cuda and cfg.compile:
            self.model.compile_repeated_blocks()
        training.start()
        self.marked = (training.step, training.elapsed())
        while training.spent() < 1:
            labels = random_labels(cfg.batch, self.generator, device)
            latents = to_latents(render(glyphs, labels, cfg.host.clip, self.generator).clips)
            drop = torch.rand(cfg.batch, generator=self.generator, device=device) < cfg.drop
            text = self.host.encode_labels(labels, drop)
            sigma = sample_sigma(
                cfg.batch, shift=cfg.train_shift, uniform=cfg.uniform, generator=self.generator, device=device
            )
            noise = torch.randn(latents.shape, generator=self.generator, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = flow_loss(self.model, latents, text, sigma, noise)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            factor = self.lr_factor()
            for optimizer, peak in zip(self.optimizers, (cfg.lr, cfg.adamw_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
                optimizer.step()
            training.step += 1
            decay = min(cfg.ema, (1 + training.step) / (10 + training.step))
            average_into(self.ema, self.model, decay)
            values = None
            if training.due():
                values = {"loss": loss.item(), "lr": cfg.lr * self.lr_factor()}
                values |= {"samples_per_second": self.rate(), "seconds": training.elapsed()}
            yield values


def _start_from(host: Host, earlier: Host, path: Path) -> None:
    shapes = {name: value.shape for name, value in host.transformer.state_dict().items()}
    theirs = {name: value.shape for name, value in earlier.transformer.state_dict().items()}
    if shapes != theirs:
        raise CheckpointError(f"{path} has another architecture: {earlier.config}; this run trains {host.config}")
    host.transformer.load_state_dict(earlier.transformer.state_dict())
    host.words = earlier.words


def _grade_export(cfg: TrainHostConfig, run: Run, path: Path, device: torch.device) -> tuple[dict[str, float], Tensor]:
    host = load_host(device, path=path)
    own = (cfg.host.solver, cfg.host.steps, cfg.host.guidance)
    accuracies: dict[str, float] = {}
    shown = torch.empty(0)
    for solver, steps, guidance in (own, *(sampler for sampler in cfg.eval_samplers if sampler != own)):
        grades, clips = grade_samples(
            host, clips=cfg.eval_clips, seed=cfg.seed + 1, solver=solver, steps=steps, guidance=guidance
        )
        variant = f"{solver}-{steps}-guidance{guidance:g}"
        means = write_grades(run, grades, variant=variant)
        log.info("%s: %s", variant, {name: round(value, 4) for name, value in means.items()})
        if not accuracies:
            accuracies, shown = means, clips
    return accuracies, shown


def _save_samples(clips: Tensor, path: Path) -> None:
    """Write a contact sheet: a clip per row, every other frame, pixels doubled."""
    pixels = to_pixels(torch.cat([torch.cat(list(clip[:, ::2].unbind(1)), -1) for clip in clips], -2))
    sheet = Sheet(2 * pixels.shape[1], 2 * pixels.shape[0])
    sheet.image(0, 0, pixels, scale=2)
    sheet.save(path)
