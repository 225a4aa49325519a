"""What each published host was trained with, and the tiny one; nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HOSTS", "HostRange"]


@dataclass(frozen=True, slots=True)
class HostRange:
    """What a host was trained with.

    Attributes:
        near: Least depth, in its units.
        far: Largest.
        size: Height and width of its pictures.
        fov_deg: Least and largest horizontal field of view; None where it is not known.
        provenance: Where it stands.
    """

    near: float
    far: float
    size: tuple[int, int]
    fov_deg: tuple[float, float] | None
    provenance: str

    def __str__(self) -> str:
        height, width = self.size
        return f"{height} x {width}, depths {self.near:g} to {self.far:g}. {self.provenance}"


HOSTS = {
    "tiny": HostRange(0.4, 12.0, (64, 64), (55.0, 70.0), "ours: generated rooms"),
    "mvsplat": HostRange(1.0, 100.0, (256, 256), None, "released config re10k.yaml: RealEstate10K"),
    **{
        f"depthsplat-{name}-256x256": HostRange(0.5, 100.0, (256, 256), None, "released config re10k.yaml")
        for name in ("head-small", "head-base", "head-large", "oct-small")
    },
    "depthsplat-head-base-256x448": HostRange(0.5, 200.0, (256, 448), None, "released config dl3dv.yaml of April 2025"),
    **{
        f"depthsplat-{name}-448x768": HostRange(
            0.5, 200.0, (448, 768), None, "released config dl3dv.yaml of April 2025"
        )
        for name in ("head-small", "head-base")
    },
    **{
        f"depthsplat-{name}-256x448": HostRange(
            1.0, 200.0, (256, 448), None, "released config dl3dv.yaml of October 2024"
        )
        for name in ("oct-base", "oct-pmloss", "oct-zpressor")
    },
}
"""Names of ``published.PUBLISHED``, and ``tiny``."""
