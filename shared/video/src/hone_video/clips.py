"""Generated, labelled clips of one moving digit: the data of tiny hosts.

Every clip is drawn from five labels (digit, color, direction, speed, background), so that what a model made of a
prompt can be checked without a judge. A glyph keeps its handwriting through the clip and never leaves the frame; its
position is sub-pixel. Rendering is one ``grid_sample`` over the batch, on whatever device the glyphs are on.

Axes: x to the right, y down, as in images. Clips are ``[B, 3, F, H, W]`` with values in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import COLORS, DIRECTIONS, FIELDS, SPEEDS, VOCABULARY, ClipConfig

__all__ = [
    "Batch",
    "Glyphs",
    "fake_batch",
    "label_words",
    "load_glyphs",
    "random_labels",
    "render",
    "segment_glyphs",
]

_MAX_BACKGROUND = 0.4
_ATLAS_PX = 32


@dataclass(frozen=True)
class Glyphs:
    """Digit images to draw with.

    Attributes:
        images: ``[N, S, S]`` coverage in [0, 1], sorted by digit.
        digits: ``[N]`` label of each image, ascending.
    """

    images: Tensor
    digits: Tensor

    def to(self, device: torch.device | str) -> Glyphs:
        """Return the same glyphs on ``device``."""
        return Glyphs(self.images.to(device), self.digits.to(device))


@dataclass(frozen=True)
class Batch:
    """Rendered clips with everything known about them.

    Attributes:
        clips: ``[B, 3, F, H, W]`` in [0, 1].
        labels: ``[B, 5]`` int64, columns as in ``hone_video.prompts.FIELDS``.
        centers: ``[B, F, 2]`` center of the digit in pixels, (x, y).
    """

    clips: Tensor
    labels: Tensor
    centers: Tensor


def _atlas(images: Tensor, digits: Tensor) -> Glyphs:
    """Up-scale 8x8 digits to crisp 32x32 coverage masks.

    Args:
        images: ``[N, 8, 8]`` ink in [0, 1].
        digits: ``[N]`` labels.
    """
    large = F.interpolate(images[:, None], size=(_ATLAS_PX, _ATLAS_PX), mode="bicubic", align_corners=False)[:, 0]
    x = ((large - 0.38) / 0.36).clamp(0, 1)
    order = torch.argsort(digits, stable=True)
    return Glyphs((x * x * (3 - 2 * x))[order], digits[order])


def load_glyphs(split: Literal["train", "held_out"], device: torch.device | str = "cpu") -> Glyphs:
    """Load scikit-learn's handwritten digits (1,797 images of 8x8), four fifths of them in ``train``.

    Args:
        split: ``train`` or ``held_out``; no image is in both.
        device: where to put them.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
        ValueError: on another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out'; got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        from hone_core.errors import MissingExtraError

        raise MissingExtraError("digits", "hone-video", "the handwritten digits that clips are made of") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    digits = torch.from_numpy(bunch.target).long()
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    held_out[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[: len(digits) // 5]] = True
    keep = held_out if split == "held_out" else ~held_out
    return _atlas(images[keep], digits[keep]).to(device)


def segment_glyphs(device: torch.device | str = "cpu") -> Glyphs:
    """Return ten seven-segment digits, for tests and smoke runs without scikit-learn."""
    #           top, upper left, upper right, middle, lower left, lower right, bottom
    lit = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")
    areas = (
        (slice(0, 1), slice(2, 6)),
        (slice(1, 4), slice(1, 2)),
        (slice(1, 4), slice(6, 7)),
        (slice(4, 5), slice(2, 6)),
        (slice(5, 7), slice(1, 2)),
        (slice(5, 7), slice(6, 7)),
        (slice(7, 8), slice(2, 6)),
    )
    images = torch.zeros(10, 8, 8)
    for digit, segments in enumerate(lit):
        for on, area in zip(segments, areas, strict=True):
            if on == "1":
                images[(digit, *area)] = 1.0
    return _atlas(images, torch.arange(10)).to(device)


def random_labels(count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Draw independent uniform labels, ``[count, 5]`` int64."""
    columns = [torch.randint(len(VOCABULARY[field]), (count,), generator=generator, device=device) for field in FIELDS]
    return torch.stack(columns, dim=1)


def render(
    glyphs: Glyphs, labels: Tensor, cfg: ClipConfig | None = None, generator: torch.Generator | None = None
) -> Batch:
    """Draw one clip per row of labels.

    What the labels leave open (handwriting, start position, background) is drawn from ``generator``.

    Args:
        glyphs: digit images; the clips are made on their device.
        labels: ``[B, 5]`` int64, columns as in ``hone_video.prompts.FIELDS``.
        cfg: clip size.
        generator: of the same device; the global one if omitted. Equal seeds give equal clips on one device type.

    Raises:
        ValueError: if labels have another shape.
    """
    cfg = cfg or ClipConfig()
    if labels.ndim != 2 or labels.shape[1] != len(FIELDS):
        raise ValueError(f"labels must be [B, {len(FIELDS)}] ({', '.join(FIELDS)}); got {list(labels.shape)}")
    device = glyphs.images.device
    labels = labels.to(device)
    num, frames, height, width = len(labels), cfg.frames, cfg.height, cfg.width
    digit, color, direction, speed, background = labels.unbind(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    counts = torch.bincount(glyphs.digits, minlength=10)
    first = torch.cumsum(counts, 0) - counts
    pick = first[digit] + (uniform(num) * counts[digit]).long().clamp(max=counts[digit] - 1)
    atlas = glyphs.images[pick]

    sign = torch.tensor(list(DIRECTIONS.values()), device=device, dtype=torch.float32)[direction]
    velocity = sign * torch.tensor(list(SPEEDS.values()), device=device)[speed, None]  # [B, 2] px per frame
    travel = velocity * (frames - 1)
    slack = torch.tensor([width - cfg.glyph_px, height - cfg.glyph_px], device=device)
    low, high = (-travel).clamp(min=0), slack - travel.clamp(min=0)
    start = low + uniform(num, 2) * (high - low)
    corner = start[:, None] + velocity[:, None] * torch.arange(frames, device=device)[:, None]  # [B, F, 2] top left

    def axis(size: int, offset: Tensor) -> Tensor:
        # grid_sample coordinates of pixel centers, -1 and 1 being the edges of the glyph's box
        centers = torch.arange(size, device=device) + 0.5
        return (centers - offset[..., None]) / cfg.glyph_px * 2 - 1

    gx, gy = axis(width, corner[..., 0]), axis(height, corner[..., 1])  # [B, F, W], [B, F, H]
    shape = (num, frames, height, width)
    grid = torch.stack([gx[:, :, None].expand(shape), gy[..., None].expand(shape)], dim=-1)
    # one batch entry per clip: its frames are stacked along the height of the sampling grid
    alpha = F.grid_sample(
        atlas[:, None], grid.reshape(num, frames * height, width, 2), padding_mode="zeros", align_corners=False
    ).reshape(num, 1, frames, height, width)

    base = 0.05 + 0.15 * uniform(num, 1, 1, 1) + 0.08 * uniform(num, 3, 1, 1)
    noise = F.interpolate(uniform(num, 3, 6, 6) - 0.5, size=(height, width), mode="bilinear", align_corners=False)
    textured = (background == 1).view(-1, 1, 1, 1)
    still = (base + torch.where(textured, 0.35 * noise, 0.0)).clamp(0, _MAX_BACKGROUND)[:, :, None]  # [B, 3, 1, H, W]

    rgb = torch.tensor(list(COLORS.values()), device=device)[color].view(num, 3, 1, 1, 1)
    return Batch(still * (1 - alpha) + rgb * alpha, labels, corner + cfg.glyph_px / 2)


def fake_batch(cfg: ClipConfig | None = None, seed: int = 0, *, count: int = 8) -> Batch:
    """Render ``count`` clips of seven-segment digits on the CPU; needs nothing but torch."""
    generator = torch.Generator().manual_seed(seed)
    return render(segment_glyphs(), random_labels(count, generator), cfg, generator)


def label_words(labels: Tensor) -> Tensor:
    """Map labels ``[B, 5]`` to word ids ``[B, 5]``, unique over fields: the row of each word in the embedding table."""
    sizes = torch.tensor([len(VOCABULARY[field]) for field in FIELDS], device=labels.device)
    return labels + torch.cumsum(sizes, 0) - sizes
