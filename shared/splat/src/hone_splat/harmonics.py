"""Spherical harmonics up to degree 3: the standard basis of splat files, and the one that published hosts speak.

Coefficients are ``[..., 3, (degree + 1)^2]``, colour first. Hosts of the pixelSplat family predict them in the camera's
frame and rotate them to the world by a Wigner matrix of e3nn's basis, while their rasteriser evaluates another one. The
two disagree, so their rotation is not equivariant; published weights were trained with it and need it (``official``).
``right`` is the rotation of a colour that turns with its camera.

Source: signs and matrices are derived by least squares on fixed directions, exact to rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["C0", "ShRotation", "evaluate_sh", "rotate_sh", "sh_basis"]

ShRotation = Literal["official", "right"]
C0 = 0.28209479177387814
"""Value of the constant basis function; rgb = 0.5 + C0 * DC."""
MAX_DEGREE = 3
DIRECTIONS = 64


def sh_basis(directions: Float[Tensor, "*batch 3"], degree: int) -> Float[Tensor, "*batch coefficient"]:
    """Standard 3DGS basis functions at unit directions.

    Args:
        directions: Of unit length.
        degree: At most 3.

    Raises:
        ValueError: The degree is above 3.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree must be in 0..{MAX_DEGREE}; got {degree}")
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    bands = [
        [torch.full_like(x, C0)],
        [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x],
        [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ],
        [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ],
    ]
    return torch.stack([value for band in bands[: degree + 1] for value in band], -1)


def evaluate_sh(
    sh: Float[Tensor, "*batch 3 coefficient"], directions: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 3"]:
    """Colour seen along unit directions from camera to Gaussian: 0.5 + SH, clamped at 0 from below."""
    degree = round(sh.shape[-1] ** 0.5) - 1
    return (0.5 + (sh * sh_basis(directions, degree)[..., None, :]).sum(-1)).clamp(min=0)


def rotate_sh(
    sh: Float[Tensor, "*batch gaussian 3 coefficient"], rotation: Float[Tensor, "*batch 3 3"], kind: ShRotation
) -> Float[Tensor, "*batch gaussian 3 coefficient"]:
    """Coefficients of camera frames as standard ones of the world.

    Args:
        sh: As the network gives them, degree at most 3.
        rotation: Camera to world.
        kind: ``official`` also takes them out of the basis of the hosts' own rasteriser.

    Raises:
        ValueError: The degree is above 3.
    """
    degree = round(sh.shape[-1] ** 0.5) - 1
    directions, inverse, change = (part.to(sh) for part in _tables(degree))
    rotation = rotation.detach().to(sh)
    if kind == "official":
        # Both the Wigner matrix and the change of basis, band by band.
        moved = sh_basis(_e3nn(directions @ rotation.mT), degree)
        matrix = change @ _bands(inverse[1] @ moved, degree).mT
    else:
        moved = sh_basis(directions @ rotation, degree)
        matrix = _bands(inverse[0] @ moved, degree)
    return torch.einsum("...ij,...gcj->...gci", matrix, sh)


def _e3nn(directions: Tensor) -> Tensor:
    """Directions at which the standard basis equals e3nn's."""
    return torch.stack([-directions[..., 2], -directions[..., 0], directions[..., 1]], -1)


def _raster(directions: Tensor) -> Tensor:
    """Directions at which the standard basis equals that of the hosts' rasteriser."""
    return directions[..., [2, 0, 1]]


def _bands(matrix: Tensor, degree: int) -> Tensor:
    """Clear what rounding left outside the blocks of the bands."""
    band = torch.cat([torch.full((2 * l + 1,), l) for l in range(degree + 1)]).to(matrix.device)
    return torch.where(band[:, None] == band, matrix, torch.zeros_like(matrix))


@lru_cache(maxsize=8)
def _tables(degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, pseudo-inverses of the standard and e3nn's basis on them, and raster-to-standard, in float64."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        directions = F.normalize(torch.randn(DIRECTIONS, 3, generator=generator, dtype=torch.float64), dim=-1)
        inverse = torch.stack([torch.linalg.pinv(sh_basis(d, degree)) for d in (directions, _e3nn(directions))])
        change = _bands(inverse[0] @ sh_basis(_raster(directions), degree), degree)
        return directions, inverse, change
