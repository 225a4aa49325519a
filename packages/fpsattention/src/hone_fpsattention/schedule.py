"""Regimes along the denoising trajectory, and the schedule file. Imports no torch.

The paper counts steps: with D of them, t = 1 the noisiest, regime i holds for ``boundaries[i - 1] * D < t <=
boundaries[i] * D`` (equation 6). A model sees no step but a noise level sigma, and step t of D starts from

    u = 1 - (t - 1) / D,    sigma = s u / (1 + (s - 1) u),

so a boundary b lies at ``sigma(1 - b)``, whatever D is: training on continuous noise levels, a sampler of few steps and
both branches of guidance all find the same regime. Where ``b * D`` is no whole number, the step that the boundary
falls into belongs to the regime that it starts in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hone_core.config import load_config, to_dict
from hone_core.io import atomic_write_json

from .config import FPSAttentionConfig, Size

__all__ = [
    "HALF_TIMESTEP",
    "Schedule",
    "boundary_sigmas",
    "flow_sigma",
    "regime_index",
    "regime_share",
    "step_regimes",
    "step_sigmas",
]

HALF_TIMESTEP = 0.0005
"""Samplers hand over timesteps of 1/1000, some of them rounded: a boundary counts as reached that near to it."""


def flow_sigma(u: float, shift: float) -> float:
    """Noise level in [0, 1] at the unshifted flow time u in [0, 1], 1 noise."""
    return shift * u / (1 + (shift - 1) * u)


def boundary_sigmas(config: FPSAttentionConfig) -> tuple[float, ...]:
    """Noise levels at and below which the second, third ... regime holds; descending."""
    return tuple(flow_sigma(1 - b, config.shift) for b in config.boundaries)


def regime_index(config: FPSAttentionConfig, sigma: float) -> int:
    """Number of the regime at a noise level.

    Args:
        config: ``boundaries`` and ``shift``.
        sigma: In [0, 1]: the timestep over the number of training timesteps.

    Raises:
        ValueError: ``sigma`` is not in [0, 1], up to rounding.
    """
    if not -HALF_TIMESTEP <= sigma <= 1 + HALF_TIMESTEP:
        raise ValueError(
            f"sigma must lie in [0, 1], the timestep over the number of training timesteps (1000); got {sigma}"
        )
    return sum(sigma <= bound + HALF_TIMESTEP for bound in boundary_sigmas(config))


def step_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels that a flow sampler's steps start from: 1 first.

    Raises:
        ValueError: There is no step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return tuple(flow_sigma(1 - step / steps, shift) for step in range(steps))


def step_regimes(config: FPSAttentionConfig, steps: int) -> tuple[int, ...]:
    """The regime of each of a sampler's steps."""
    return tuple(regime_index(config, sigma) for sigma in step_sigmas(steps, config.shift))


def regime_share(config: FPSAttentionConfig) -> tuple[float, ...]:
    """Share of the steps in each regime, in the limit of many."""
    edges = (0.0, *config.boundaries, 1.0)
    return tuple(high - low for low, high in pairwise(edges))


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A calibrated config with what it was calibrated on, as ``calibrate`` writes and ``attach`` reads it."""

    config: FPSAttentionConfig
    model: str
    """Class and shape of the transformer, as ``describe`` words it."""
    sampler: str
    """Class of the scheduler."""
    steps: int
    """Denoising steps of the calibration."""
    grid: Size
    """Video tokens along (frames, height, width)."""
    budget: float
    """Mean density over the steps that the search was allowed, of tiles."""
    provenance: str
    """Command, commit and date."""

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically."""
        return atomic_write_json(path, to_dict(self))

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a file that ``save`` wrote.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no schedule, or holds a bad value.
        """
        return load_config(cls, path)

    def check(self, *, model: str, sampler: str, shift: float) -> None:
        """Refuse a schedule of something else.

        Args:
            model: Of the transformer at hand, worded as ``self.model``.
            sampler: Class of the scheduler at hand.
            shift: Its timestep shift.

        Raises:
            ValueError: Model, sampler or shift are not those of the calibration.
        """
        for name, have, want in (
            ("model", model, self.model),
            ("sampler", sampler, self.sampler),
            ("shift", shift, self.config.shift),
        ):
            if have != want:
                raise ValueError(
                    f"this schedule was calibrated with {name} {want!r}, but here it is {have!r}; calibrate again, or "
                    "pass the schedule's config alone to use it all the same"
                )
