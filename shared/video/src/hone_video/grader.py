"""The grader of generated clips: reads digit and color with a small classifier, and motion off the pixels.

It says whether a clip shows what its prompt asked for, which a clip that is merely another good one does not lose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clips import Glyphs, random_labels, render
from .prompts import COLORS, DIRECTIONS, FIELDS, SPEEDS, ClipConfig

__all__ = ["ClipClassifier", "Motion", "estimate_motion", "grade", "train_classifier"]


class ClipClassifier(nn.Module):
    """Small convolutional net that reads digit and color from frames.

    Args:
        channels: width of the first layer.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = (channels, 2 * channels, 3 * channels, 4 * channels)
        layers: list[nn.Module] = []
        previous = 3
        for index, width in enumerate(widths):
            layers += [
                nn.Conv2d(previous, width, 3, stride=1 if index in (0, 2) else 2, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            previous = width
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten())
        self.digit = nn.Linear(4 * previous, 10)
        self.color = nn.Linear(4 * previous, len(COLORS))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of digit ``[N, 10]`` and color ``[N, 7]``.

        Args:
            frames: ``[N, 3, H, W]`` in [0, 1].
        """
        features = self.features(frames * 2 - 1)
        return self.digit(features), self.color(features)

    @torch.no_grad()
    def classify(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Return digit ``[B]`` and color ``[B]`` of clips by the mean log-probability over their frames.

        Args:
            clips: ``[B, 3, F, H, W]`` in [0, 1].
        """
        batch, _, frames = clips.shape[:3]
        flat = clips.transpose(1, 2).flatten(0, 1).to(self.digit.weight.dtype)
        digit, color = (F.log_softmax(logits.float(), -1).view(batch, frames, -1).mean(1) for logits in self(flat))
        return digit.argmax(-1), color.argmax(-1)


@dataclass(frozen=True)
class Motion:
    """Motion read off clips.

    Attributes:
        seen: ``[B]`` bool, whether a digit was there in at least three quarters of the frames; without one the rest
            means nothing.
        direction: ``[B]`` index into ``DIRECTIONS``.
        speed: ``[B]`` index into ``SPEEDS``.
        velocity: ``[B, 2]`` pixels per frame, (x, y).
        residual: ``[B]`` root mean square distance of the centers from the fitted line, in pixels.
    """

    seen: Tensor
    direction: Tensor
    speed: Tensor
    velocity: Tensor
    residual: Tensor


def estimate_motion(clips: Tensor, *, threshold: float = 0.5) -> Motion:
    """Fit a straight line to the digit's centers.

    A pixel belongs to the digit as far as its brightest channel exceeds ``threshold`` (backgrounds stay under 0.4).

    Args:
        clips: ``[B, 3, F, H, W]`` in [0, 1].
        threshold: brightness of the strongest channel where the digit starts.
    """
    weight = (clips.float().amax(1) - threshold).clamp(min=0)  # [B, F, H, W]
    mass = weight.sum((-2, -1))
    y = torch.arange(clips.shape[-2], device=clips.device) + 0.5
    x = torch.arange(clips.shape[-1], device=clips.device) + 0.5
    centers = (
        torch.stack([(weight.sum(-2) * x).sum(-1), (weight.sum(-1) * y).sum(-1)], -1) / mass.clamp(min=1e-6)[..., None]
    )
    seen = (mass > 3.0).float()  # a digit covers 30 to 90 of the 1,024 pixels; three bright ones are noise
    count = seen.sum(1).clamp(min=1)
    time = torch.arange(clips.shape[2], device=clips.device, dtype=torch.float32).expand_as(seen)
    mean_time = (time * seen).sum(1) / count
    offset = (time - mean_time[:, None]) * seen
    mean_center = (centers * seen[..., None]).sum(1) / count[:, None]
    deviation = (centers - mean_center[:, None]) * seen[..., None]
    velocity = (offset[..., None] * deviation).sum(1) / offset.square().sum(1).clamp(min=1e-6)[:, None]
    error = deviation - offset[..., None] * velocity[:, None]
    residual = (error.square().sum(-1).sum(1) / count).sqrt()

    angles = torch.tensor([math.atan2(dy, dx) for dx, dy in DIRECTIONS.values()], device=clips.device)
    gap = torch.atan2(velocity[:, 1], velocity[:, 0])[:, None] - angles
    direction = torch.cos(gap).argmax(1)
    speeds = torch.tensor(list(SPEEDS.values()), device=clips.device)
    speed = (velocity.abs().amax(1, keepdim=True) - speeds).abs().argmin(1)
    return Motion(seen.mean(1) >= 0.75, direction, speed, velocity, residual)


def grade(classifier: ClipClassifier, clips: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compare what clips show with what was asked for.

    Args:
        classifier: reads digit and color; the clips are graded on its device.
        clips: ``[B, 3, F, H, W]`` in [0, 1].
        labels: ``[B, 5]``.

    Returns:
        Per clip, ``[B]`` float (1 right, 0 wrong): ``digit``, ``color``, ``direction``, ``speed``, and ``accuracy``,
        which is 1 where digit and direction are both right; ``residual_px``, the root mean square distance of the
        digit's centers from a straight line.
    """
    device = next(classifier.parameters(), clips).device
    clips, labels = clips.to(device), labels.to(device)
    digit, color = classifier.classify(clips)
    motion = estimate_motion(clips)

    def right(name: str, value: Tensor) -> Tensor:
        return (value == labels[:, FIELDS.index(name)]).float()

    grades = {"digit": right("digit", digit), "color": right("color", color)}
    grades["direction"] = right("direction", motion.direction) * motion.seen
    grades["speed"] = right("speed", motion.speed) * motion.seen
    grades["accuracy"] = grades["digit"] * grades["direction"]
    return grades | {"residual_px": motion.residual}


def train_classifier(
    classifier: ClipClassifier,
    glyphs: Glyphs,
    clip: ClipConfig,
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Train the classifier on distorted single frames, in place.

    Args:
        classifier: on the glyphs' device.
        glyphs: training glyphs.
        clip: size of the clips that it will read.
        steps: optimiser steps.
        batch: frames of a step.
        generator: of the glyphs' device.
    """
    device = glyphs.images.device
    still = ClipConfig(frames=2, height=clip.height, width=clip.width, glyph_px=clip.glyph_px)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    classifier.train()
    for _ in range(steps):
        labels = random_labels(batch, generator, device)
        frames = _distort(render(glyphs, labels, still, generator).clips[:, :, 0], generator)
        digit, color = classifier(frames)
        loss = F.cross_entropy(digit, labels[:, 0], label_smoothing=0.05) + F.cross_entropy(color, labels[:, 1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


def _distort(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear, blur and add noise, so that such flaws of a generator alone change no grade."""
    count, device = len(frames), frames.device

    def spread(width: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=device) * 2 - 1) * width

    angle, scale, shear = spread(0.15), 1 + spread(0.12), spread(0.12)
    cos, sin, zero = torch.cos(angle) * scale, torch.sin(angle) * scale, torch.zeros_like(scale)
    matrix = torch.stack([cos, shear - sin, zero, sin, cos, zero], 1).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(frames.shape), align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = (torch.rand(count, generator=generator, device=device) * 0.7).view(-1, 1, 1, 1)
    level = (torch.rand(count, generator=generator, device=device) * 0.12).view(-1, 1, 1, 1)
    noise = torch.randn(frames.shape, generator=generator, device=device)
    return (frames + mix * (blurred - frames) + level * noise).clamp(0, 1)
