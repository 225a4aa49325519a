"""Train the tiny host: tokenizer, grader, then the transformer on bits that were flipped and repaired.

One command makes it as it ships: ``hone-sparsevar train-host``.

Source of the transformer's loss: Infinity (arXiv 2412.04431): cross-entropy of bits, bitwise self-correction.
Differs: every scale weighs the same, where the release divides by the root of its tokens, and residual branches start
    at half their strength in place of 1e-5: a run of minutes has to learn early where things go.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.devices import resolve_device
from hone_core.runs import Run
from hone_core.training import HOST, Training, TrainReport, average_into, finish_host, rate_at, stage_at
from hone_visual_ar.layers import AttentionContext, attend
from hone_visual_ar.tokenizers import BSQVAE
from hone_visual_ar.transformer import scale_mask
from torch import Tensor, nn

from .config import TrainHostConfig
from .data import caption, random_labels, render, words
from .grader import grade, grader_loss
from .host import SCHEDULE, Host, load_host, save_host

__all__ = ["GATES", "Making", "check_scales", "grade_host", "self_corrected", "train_host"]

GATES = {"reconstruction_psnr": 20.0, "grader": 0.9, "objects": 0.5}
"""Decibels of the tokenizer, and shares: objects that the grader reads right in real scenes, and in generated ones."""


def self_corrected(
    tokenizer: BSQVAE, features: Tensor, flips: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step: each scale sees the earlier ones with flipped bits, and is taught to repair them.

    Args:
        tokenizer: Frozen.
        features: ``[B, d, H, W]`` latents before quantization.
        flips: ``[scales]`` share of bits to flip in each.
        generator: Of the features' device.

    Returns:
        The summed latent at each scale but the first ``[B, total - 1, d]``, and bits ``[B, total, d]``.

    Source: Infinity, bitwise self-correction.
    """
    total, inputs, targets = torch.zeros_like(features), [], []
    size = (features.shape[-2], features.shape[-1])
    for scale, grid in enumerate(SCHEDULE.grids):
        rest = features - total
        rest = rest if grid == size else F.interpolate(rest, size=grid, mode="area")
        bits = tokenizer.nearest(rest)
        targets.append(bits.flatten(2).transpose(1, 2))
        flip = torch.rand(bits.shape, generator=generator, device=bits.device) < flips[scale]
        codes = tokenizer.embed(torch.where(flip, 1 - bits, bits).movedim(1, -1)).movedim(-1, 1)
        total = total + tokenizer.spread(codes, size, scale=scale, scales=len(SCHEDULE))
        if scale < len(SCHEDULE) - 1:
            inputs.append(tokenizer.shrink(total, SCHEDULE.grids[scale + 1]).flatten(2).transpose(1, 2))
    return torch.cat(inputs, 1), torch.cat(targets, 1)


def scale_weights(device: torch.device) -> Tensor:
    """Weight ``[total]`` of each token, one over its scale's tokens; their mean is 1."""
    parts = [torch.full((n,), 1 / n) for n in (SCHEDULE.tokens(k) for k in range(len(SCHEDULE)))]
    weights = torch.cat(parts).to(device)
    return weights / weights.mean()


@torch.no_grad()
def check_scales(host: Host, device: torch.device) -> None:
    """Refuse a device whose attention gives a scale other than what it sees.

    A training reads each scale's keys as a slice of all scales'. It is held against one product that is masked and
    summed by hand, with weights large enough to matter; a training on the wrong sums looks well and draws nothing.

    Raises:
        RuntimeError: A scale differs, which names it.
    """
    generator = torch.Generator().manual_seed(0)
    heads, dim = host.config.heads, host.config.width // host.config.heads
    q, k, v = torch.randn(3, 2, heads, SCHEDULE.total, dim, generator=generator).to(device)
    q, k = 4 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    ends = tuple(SCHEDULE.start(scale + 1) for scale in range(len(SCHEDULE)))
    found = attend(q, k, v, AttentionContext(ends=ends), 0).double()
    scores = (q.double() @ k.double().mT).masked_fill(~scale_mask(SCHEDULE, device), -torch.inf)
    error = (found - scores.softmax(-1) @ v.double()).abs().amax((0, 1, 3))
    for scale, part in enumerate(error.split([SCHEDULE.tokens(k) for k in range(len(SCHEDULE))])):
        if part.max() > 0.02:
            raise RuntimeError(
                f"attention on {device} is wrong at scale {scale}, by {float(part.max()):.2g} where at most 0.02 is "
                "rounding: what would be trained is not what is drawn. Train on another device or version of torch"
            )


class Making:
    """A host in training, and everything that an exact continuation needs.

    Args:
        cfg: The run.
        device: Where.
        path: File of the resumable state.
    """

    def __init__(self, cfg: TrainHostConfig, device: torch.device, path: Path) -> None:
        self.cfg, self.device = cfg, device
        self.host = Host.untrained(cfg.host, cfg.seed).to(device)
        with torch.no_grad():
            for block in self.host.transformer.layers:
                block.ada_gss[:, :, :2] = 0.5
        self.ema = copy.deepcopy(self.host.transformer).requires_grad_(False)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        fused = device.type == "cuda"
        self.optimizers = {
            "tokenizer": torch.optim.AdamW(self.host.tokenizer.parameters(), cfg.tokenizer_lr, fused=fused),
            "grader": torch.optim.AdamW(self.host.grader.parameters(), cfg.tokenizer_lr, fused=fused),
            "transformer": torch.optim.AdamW(
                self.host.transformer.parameters(), cfg.lr, betas=(0.9, 0.97), weight_decay=0.01, fused=fused
            ),
        }
        parts: dict[str, Any] = {name.rstrip("."): module for name, module in self.host.modules.items()}
        parts |= {f"{name} optimizer": optimizer for name, optimizer in self.optimizers.items()}
        self.training = Training(cfg, path, parts | {"ema": self.ema, "generator": self.generator})
        self.weights = scale_weights(device)
        self.each = torch.empty(0)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Labels and images of a step."""
        labels = random_labels(self.cfg.batch, self.generator, self.device)
        return labels, render(labels, self.generator).images

    def stage(self, spent: float) -> tuple[str, float]:
        """Which part is trained at a share of the budget, and how far it is."""
        shares = {"tokenizer": self.cfg.tokenizer_share, "grader": self.cfg.grader_share}
        return stage_at(shares, "transformer", spent)

    def loss(self, stage: str) -> Tensor:
        """Of one batch, in float32 and by the code that draws: see ``check_scales``."""
        labels, images = self.batch()
        host = self.host
        if stage == "grader":
            noisy = images + 0.05 * torch.randn(images.shape, generator=self.generator, device=self.device)
            return grader_loss(host.grader, noisy, labels)
        image_pm1 = images * 2 - 1
        if stage == "tokenizer":
            features = host.tokenizer.features(image_pm1)
            _, latent = host.tokenizer.to_scales(features.float(), SCHEDULE)
            out = host.tokenizer.decoder(latent)
            commit = F.mse_loss(features.float(), latent.detach())
            edges = sum(F.l1_loss(out.diff(dim=d), image_pm1.diff(dim=d)) for d in (-1, -2))
            return F.l1_loss(out, image_pm1) + 0.5 * edges + 0.1 * commit
        with torch.no_grad():
            features = host.tokenizer.features(image_pm1).float()
            flips = self.cfg.flip * torch.rand(len(SCHEDULE), generator=self.generator, device=self.device)
            inputs, bits = self_corrected(host.tokenizer, features, flips, self.generator)
        drop = torch.rand(len(labels), generator=self.generator, device=self.device) < self.cfg.drop
        condition = host.transformer.condition(*words(labels, host.table), guided=False, drop=drop)
        logits = host.transformer(condition, inputs, SCHEDULE)
        each = F.cross_entropy(logits.float().flatten(0, 2), bits.flatten(), reduction="none").view(bits.shape).mean(-1)
        self.each = each.detach()
        return (each * self.weights).mean()

    def by_scale(self) -> dict[str, float]:
        """Mean loss of a bit at each scale, in nats, of the last batch: 0.69 is chance."""
        sizes = [SCHEDULE.tokens(scale) for scale in range(len(SCHEDULE))]
        return {f"nats_scale_{k}": part.mean().item() for k, part in enumerate(self.each.split(sizes, dim=1))}

    def train(self) -> Iterator[dict[str, float] | None]:
        """Run to the end of the budget; yield what is to be logged after each step, or None."""
        cfg, training = self.cfg, self.training
        for module in self.host.modules.values():
            module.train()
        check_scales(self.host, self.device)
        training.start()
        while training.spent() < 1:
            stage, done = self.stage(training.spent())
            optimizer = self.optimizers[stage]
            module = self.host.modules[f"{stage}."]
            loss = self.loss(stage)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            peak = cfg.lr if stage == "transformer" else cfg.tokenizer_lr
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_at(done)
            optimizer.step()
            training.step += 1
            if stage == "transformer":
                average_into(self.ema, module, cfg.ema)
            if not training.due():
                yield None
                continue
            values = {"loss": loss.item(), "stage": float(list(self.optimizers).index(stage))}
            yield values | (self.by_scale() if stage == "transformer" else {})

    def result(self) -> Host:
        """The host with the transformer's averaged weights."""
        host = self.host
        return Host(host.config, host.tokenizer, self.ema, host.grader, host.table)


@torch.no_grad()
def grade_host(host: Host, images: int, *, batch: int = 128) -> tuple[dict[str, float], str]:
    """Grades of a host, and the prompt of the first image.

    Returns:
        PSNR of the tokenizer in dB; objects read right in real, reconstructed and generated scenes, as shares.
    """
    generator = torch.Generator().manual_seed(10_000)
    sums: dict[str, float] = dict.fromkeys(("reconstruction_psnr", "grader", "reconstructed", "objects"), 0.0)
    shown = ""
    for begin in range(0, images, batch):
        labels = random_labels(min(batch, images - begin), generator)
        real = render(labels, generator).images.to(host.device)
        labels, shown = labels.to(host.device), shown or caption(labels[0])
        back = (host.tokenizer.decode(host.tokenizer.encode(real * 2 - 1, SCHEDULE)[1]) + 1) / 2
        drawn = (host.draw(labels, range(begin, begin + len(labels))).image() + 1) / 2
        error = (back - real).square().flatten(1).mean(1).clamp(min=1e-10)
        sums["reconstruction_psnr"] += float((-10 * error.log10()).sum())
        for name, pixels in (("grader", real), ("reconstructed", back), ("objects", drawn)):
            sums[name] += float(grade(host.grader, pixels, labels)["objects"].sum())
    return {name: value / images for name, value in sums.items()}, shown


def train_host(cfg: TrainHostConfig, run: Run) -> TrainReport:
    """Train, export and grade a host; a stopped run goes on where it was.

    Args:
        cfg: The run.
        run: The run, entered.

    Raises:
        CheckpointError: The folder's checkpoint is of another config.
        RuntimeError: The loss is not finite.
    """
    device = resolve_device(run.device)
    making = Making(cfg, device, run.artifacts / "checkpoint.pt")
    making.training.resume()
    making.training.follow(making.train(), run)
    path = save_host(making.result(), run.artifacts / HOST)
    grades, prompt = grade_host(load_host(device, path=path), cfg.eval_images)
    for name, value in grades.items():
        unit = "dB" if name.endswith("psnr") else ""
        run.row(name, value, unit=unit, better="higher", n=cfg.eval_images, split="held_out")
    details = {"graded": f"{cfg.eval_images} scenes, such as: {prompt}", "parameters": making.host.parameters}
    return finish_host(run, making.training, grades, gates=GATES, details=details)
