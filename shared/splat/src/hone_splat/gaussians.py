"""A cloud of Gaussians in the units of its scene, colours in the standard SH basis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .cameras import quat_to_matrix

__all__ = ["Gaussians"]


@dataclass(frozen=True)
class Gaussians:
    """Gaussians of one scene, or of several with a leading batch axis.

    Attributes:
        means: ``[*, G, 3]``.
        scales: ``[*, G, 3]``, standard deviations along the axes.
        quats_wxyz: ``[*, G, 4]``, of any length.
        opacities: ``[*, G]`` in [0, 1].
        sh: ``[*, G, 3, (degree + 1)^2]`` in the standard 3DGS basis.
    """

    means: Tensor
    scales: Tensor
    quats_wxyz: Tensor
    opacities: Tensor
    sh: Tensor

    def __post_init__(self) -> None:
        lead = self.means.shape[:-1]
        shapes = {
            "means": (*lead, 3),
            "scales": (*lead, 3),
            "quats_wxyz": (*lead, 4),
            "opacities": lead,
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {list(getattr(self, name).shape)}")
        if self.sh.shape[:-1] != (*lead, 3) or self.sh.shape[-1] not in (1, 4, 9, 16):
            raise ValueError(f"sh must be {[*lead, 3]} with 1, 4, 9 or 16 coefficients; got {list(self.sh.shape)}")

    def __len__(self) -> int:
        return self.means.shape[-2]

    @property
    def degree(self) -> int:
        """Of the spherical harmonics."""
        return round(self.sh.shape[-1] ** 0.5) - 1

    @property
    def covariances(self) -> Tensor:
        """``[*, G, 3, 3]``."""
        half = quat_to_matrix(self.quats_wxyz) * self.scales[..., None, :]
        return half @ half.mT

    def map(self, function: Callable[[Tensor], Tensor]) -> Gaussians:
        """Apply a function, such as indexing or ``to``, to every tensor."""
        return Gaussians(*(function(getattr(self, field.name)) for field in fields(self)))

    def __getitem__(self, index: Any) -> Gaussians:
        return self.map(lambda part: part[index])

    def scaled(self, factor: float) -> Gaussians:
        """The same cloud in other units: positions and sizes times ``factor``."""
        return Gaussians(self.means * factor, self.scales * factor, self.quats_wxyz, self.opacities, self.sh)

    def pruned(self, *, opacity: float = 0.0, scale: float | None = None) -> Gaussians:
        """One scene's cloud without what is fainter than ``opacity`` or larger than ``scale`` along an axis."""
        keep = self.opacities >= opacity
        if scale is not None:
            keep &= self.scales.amax(-1) <= scale
        return self[keep]

    def finite(self) -> bool:
        """Whether every number is."""
        return all(bool(torch.isfinite(getattr(self, field.name)).all()) for field in fields(self))
