"""Quaternions ``quat_wxyz``, rotation matrices, and the 6-D form that motion features hold."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "axis_angle_to_quat",
    "between",
    "conjugate",
    "continuous",
    "from_six",
    "kabsch",
    "matrix_to_axis_angle",
    "multiply",
    "rotate",
    "to_matrix",
    "to_six",
]


def conjugate(quat: Float[Tensor, "*dims 4"]) -> Float[Tensor, "*dims 4"]:
    """The inverse of unit quaternions."""
    return torch.cat([quat[..., :1], -quat[..., 1:]], -1)


def multiply(left: Float[Tensor, "*dims 4"], right: Float[Tensor, "*dims 4"]) -> Float[Tensor, "*dims 4"]:
    """Hamilton product: ``right`` is applied first."""
    w, v = left[..., :1], left[..., 1:]
    x, u = right[..., :1], right[..., 1:]
    v, u = torch.broadcast_tensors(v, u)
    return torch.cat([w * x - (v * u).sum(-1, keepdim=True), w * u + x * v + torch.linalg.cross(v, u)], -1)


def rotate(quat: Float[Tensor, "*dims 4"], vector: Float[Tensor, "*dims 3"]) -> Float[Tensor, "*dims 3"]:
    """Vectors turned by unit quaternions."""
    w, v = quat[..., :1], quat[..., 1:]
    v, vector = torch.broadcast_tensors(v, vector)
    once = torch.linalg.cross(v, vector)
    return vector + 2 * (w * once + torch.linalg.cross(v, once))


def between(start: Float[Tensor, "*dims 3"], end: Float[Tensor, "*dims 3"]) -> Float[Tensor, "*dims 4"]:
    """The shortest rotation from one direction to another.

    Differs: opposite directions turn about some axis at right angles; HumanML3D's code gives NaN there.
    """
    start, end = torch.broadcast_tensors(start, end)
    length = (start.square().sum(-1, keepdim=True) * end.square().sum(-1, keepdim=True)).sqrt()
    quat = torch.cat([length + (start * end).sum(-1, keepdim=True), torch.linalg.cross(start, end)], -1)
    norm = quat.norm(dim=-1, keepdim=True)
    least = start.abs().argmin(-1, keepdim=True)
    axis = torch.linalg.cross(start, torch.zeros_like(start).scatter(-1, least, 1.0))
    half_turn = torch.cat([torch.zeros_like(length), axis / axis.norm(dim=-1, keepdim=True).clamp(min=1e-12)], -1)
    opposite = norm <= 1e-6 * length.clamp(min=1e-12)
    return torch.where(opposite, half_turn, quat / torch.where(opposite, torch.ones_like(norm), norm))


def continuous(quat: Float[Tensor, "*dims frames 4"]) -> Float[Tensor, "*dims frames 4"]:
    """Signs chosen so that each frame is near the one before."""
    flips = (quat[..., 1:, :] * quat[..., :-1, :]).sum(-1) < 0
    odd = torch.cumsum(flips, -1) % 2 == 1
    signs = torch.cat([torch.zeros_like(odd[..., :1]), odd], -1)
    return torch.where(signs[..., None], -quat, quat)


def to_matrix(quat: Float[Tensor, "*dims 4"]) -> Float[Tensor, "*dims 3 3"]:
    """Rotation matrices of unit quaternions."""
    w, x, y, z = quat.unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)


def to_six(quat: Float[Tensor, "*dims 4"]) -> Float[Tensor, "*dims 6"]:
    """First column, then second column of the matrix."""
    matrix = to_matrix(quat)
    return torch.cat([matrix[..., 0], matrix[..., 1]], -1)


def from_six(six: Float[Tensor, "*dims 6"]) -> Float[Tensor, "*dims 3 3"]:
    """The rotation whose first column has the given direction, and whose second is the nearest to the given one."""
    x = six[..., :3] / six[..., :3].norm(dim=-1, keepdim=True)
    z = torch.linalg.cross(x, six[..., 3:])
    z = z / z.norm(dim=-1, keepdim=True)
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def axis_angle_to_quat(vector: Float[Tensor, "*dims 3"]) -> Float[Tensor, "*dims 4"]:
    """Unit quaternions of rotation vectors in radians."""
    half = vector.norm(dim=-1, keepdim=True) / 2
    # sinc(x) = sin(pi x) / (pi x), and 1 at 0.
    return torch.cat([half.cos(), 0.5 * torch.sinc(half / torch.pi) * vector], -1)


def matrix_to_axis_angle(matrix: Float[Tensor, "*dims 3 3"]) -> Float[Tensor, "*dims 3"]:
    """Rotation vectors in radians, of length 0 to pi."""
    m = matrix
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Four candidates, each without loss where its own component is the largest.
    squares = torch.stack(
        [
            1 + trace,
            1 + 2 * m[..., 0, 0] - trace,
            1 + 2 * m[..., 1, 1] - trace,
            1 + 2 * m[..., 2, 2] - trace,
        ],
        -1,
    )
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    candidates = torch.stack(
        [
            torch.stack([squares[..., 0], a, b, c], -1),
            torch.stack([a, squares[..., 1], d, e], -1),
            torch.stack([b, d, squares[..., 2], f], -1),
            torch.stack([c, e, f, squares[..., 3]], -1),
        ],
        -2,
    )
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quat = candidates.gather(-2, best)[..., 0, :]
    quat = quat / quat.norm(dim=-1, keepdim=True)
    quat = torch.where(quat[..., :1] < 0, -quat, quat)
    sine = quat[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quat[..., :1])
    return torch.where(sine > 1e-9, quat[..., 1:] / sine.clamp(min=1e-9) * angle, 2 * quat[..., 1:])


def kabsch(rest: Float[Tensor, "*dims n 3"], now: Float[Tensor, "*dims n 3"]) -> Float[Tensor, "*dims 3 3"]:
    """The rotation that takes vectors at rest nearest to the vectors now, in the sense of least squares.

    Source: Kabsch (1976).
    """
    u, _, vh = torch.linalg.svd(now.mT @ rest)
    sign = torch.linalg.det(u @ vh)
    fix = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
    return (u * fix[..., None, :]) @ vh
