"""Architecture and sampler of the tiny host. Imports no torch, so a verb's config may import it."""

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from .grids import Grid
from .prompts import ClipConfig

__all__ = ["PACKAGE", "PACKAGED", "HostConfig", "Solver"]

PACKAGE = "hone-blade"
"""Distribution whose verb ``train-host`` makes it."""

PACKAGED = Path(str(files("hone_video") / "assets" / "host.safetensors"))
"""The host that ships."""

Solver = Literal["euler", "unipc"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture and default sampler of the tiny host."""

    frames: int = 16
    height: int = 32
    width: int = 32
    patch: int = 4
    """Side of the square spatial patch in pixels; time is not patched."""
    layers: int = 6
    heads: int = 3
    head_dim: int = 64
    ffn_dim: int = 640
    text_dim: int = 64
    freq_dim: int = 128
    """Sinusoidal channels of the timestep."""
    classifier_channels: int = 32
    steps: int = 8
    """Denoising steps."""
    shift: float = 3.0
    """Timestep shift ``s``: sigma = s u / (1 + (s - 1) u). Frames repeat each other, so the layout of a clip is decided
    at high noise, and more steps are spent there."""
    solver: Solver = "unipc"
    guidance: float = 3.0
    """Classifier-free guidance scale; a guided step needs two network evaluations, with 1 none is guided."""
    guidance_interval: tuple[float, float] = (0.6, 0.96)
    """Noise levels (sigma) between which steps are guided: there the digit takes shape. With the defaults these are
    five of the eight steps, so that a clip costs 13 evaluations."""

    def __post_init__(self) -> None:
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"height and width must be multiples of patch={self.patch}; got {self.height} x {self.width}"
            )
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1; got {self.guidance_interval}")
        if self.steps < 1 or self.shift <= 0:
            raise ValueError(f"steps must be at least 1 and shift positive; got {self.steps} and {self.shift}")

    @property
    def clip(self) -> ClipConfig:
        """Clip size; the digit takes half of the frame's side."""
        return ClipConfig(
            frames=self.frames, height=self.height, width=self.width, glyph_px=min(self.height, self.width) // 2
        )

    @property
    def grid(self) -> Grid:
        """Token grid (frames, height, width)."""
        return self.frames, self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)
