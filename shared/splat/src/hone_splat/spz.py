"""Splats as ``.spz``: bytes per attribute, compressed, about a tenth of a ``.ply``; spherical harmonics are kept.

Axes of the file are right, up, back, those of a ``.ply`` right, down, forward: y and z change their signs here, so that
a file read back fits its cameras again.

Source: Niantic's format, versions 2 and 3 (MIT); 4, which needs another compression, is refused.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hone_core.io import atomic_write_bytes
from torch import Tensor

from .files import check_cloud
from .gaussians import Gaussians

__all__ = ["read_spz", "write_spz"]

HEAD = struct.Struct("<IIIBBBB")
MAGIC = 0x5053474E
VERSION = 3
EXTENSIONS = 2
"""Flag of a part that is not read here."""
COLOUR = 0.15
"""Of the constant coefficient, so that colours a little outside [0, 1] fit."""
FRACTION = 12
"""Bits of a position after the point, of 24; fewer where a scene is wider than 2,048 units."""
STEPS = (8, 16)
"""Of 256, for the coefficients of degree 1, and above."""
MASK = (1 << 9) - 1
FLIP = (1.0, -1.0, -1.0)
# Signs of the coefficients above degree 0 where y and z change theirs.
SH_FLIP = (-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1)


def write_spz(gaussians: Gaussians, path: str | Path) -> Path:
    """Write one scene's cloud; returns the path.

    Raises:
        ValueError: It is a batch, a value is not finite, or a position is further than 4 million units away.
    """
    check_cloud(gaussians)
    cloud = gaussians.map(lambda part: part.detach().cpu().double())
    largest = float(cloud.means.abs().max()) if len(cloud) else 0.0
    bits = min(FRACTION, 22 - math.ceil(math.log2(max(largest, 1.0))))
    if bits < 0:
        raise ValueError(
            f"a Gaussian lies {largest:g} units away; .spz holds at most {2**22:,}. Scale the scene first."
        )
    fixed = (cloud.means * cloud.means.new_tensor(FLIP) * 2**bits).round().long().numpy().astype("<i4")
    positions = fixed.view(np.uint8).reshape(-1, 4)[:, :3]
    higher = (cloud.sh[..., 1:] * _signs(cloud.sh)).mT.flatten(1)
    steps = torch.full((higher.shape[1],), STEPS[1])
    steps[:9] = STEPS[0]
    level = (higher * 128).round() + 128
    level = torch.div(level + steps // 2, steps, rounding_mode="floor") * steps
    parts = [
        positions,
        _byte(255 * cloud.opacities),
        _byte(255 * (COLOUR * cloud.sh[..., 0] + 0.5)),
        _byte(16 * (cloud.scales.clamp(min=1e-12).log() + 10)),
        _smallest_three(cloud.quats_wxyz),
        _byte(level),
    ]
    head = HEAD.pack(MAGIC, VERSION, len(cloud), cloud.degree, bits, 0, 0)
    data = head + b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return atomic_write_bytes(path, gzip.compress(data, mtime=0))


def read_spz(path: str | Path) -> Gaussians:
    """Read ``.spz`` of version 2 or 3.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, is damaged, or holds what is not read here.
    """
    try:
        data = gzip.decompress(Path(path).read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no .spz file, or is cut short: {error}") from error
    if len(data) < HEAD.size:
        raise ValueError(f"{path} is damaged: it ends within its header")
    magic, version, count, degree, bits, flags, _ = HEAD.unpack_from(data)
    if magic != MAGIC or version not in (2, 3) or degree > 3 or flags & EXTENSIONS:
        raise ValueError(
            f"{path}: expected .spz of version 2 or 3, degree at most 3, without extensions; got version {version}, "
            f"degree {degree}, flags {flags}"
        )
    terms = (degree + 1) ** 2 - 1
    widths = (9, 1, 3, 3, 4 if version == 3 else 3, 3 * terms)
    if len(data) != HEAD.size + count * sum(widths):
        raise ValueError(
            f"{path} is damaged: {count} Gaussians need {HEAD.size + count * sum(widths)} bytes; it holds {len(data)}"
        )
    parts, at = [], HEAD.size
    for width in widths:
        parts.append(np.frombuffer(data, np.uint8, count * width, at).reshape(count, width))
        at += count * width
    low, middle, high = np.moveaxis(parts[0].reshape(count, 3, 3).astype(np.int32), -1, 0)
    fixed = ((low | middle << 8 | high << 16) << 8) >> 8  # the sign of 24 bits
    opacity, colour, scale = (torch.from_numpy(part.astype(np.float32)) for part in parts[1:4])
    quats = _from_smallest_three(parts[4]) if version == 3 else _from_three(parts[4])
    higher = torch.from_numpy((parts[5].astype(np.float32) - 128) / 128).view(count, terms, 3).mT
    constant = ((colour / 255 - 0.5) / COLOUR)[..., None]
    means = torch.from_numpy(fixed.astype(np.float32)) / 2**bits * torch.tensor(FLIP)
    sh = torch.cat([constant, higher * _signs(torch.cat([constant, higher], -1))], -1)
    return Gaussians(means, (scale / 16 - 10).exp(), _flip(quats), opacity[:, 0] / 255, sh)


def _signs(sh: Tensor) -> Tensor:
    return sh.new_tensor(SH_FLIP[: sh.shape[-1] - 1])


def _flip(quats: Tensor) -> Tensor:
    """Rotations in axes whose y and z point the other way."""
    return quats * quats.new_tensor([1.0, *FLIP])


def _byte(values: Tensor) -> np.ndarray:
    return values.round().clamp(0, 255).to(torch.uint8).numpy()


def _smallest_three(quats: Tensor) -> np.ndarray:
    """Number of the largest of x, y, z, w, and sign and 9 bits of each of the others."""
    xyzw = _flip(F.normalize(quats, dim=-1))[:, [1, 2, 3, 0]]
    largest = xyzw.abs().argmax(-1, keepdim=True)
    xyzw = torch.where(xyzw.gather(-1, largest) < 0, -xyzw, xyzw)
    packed = largest[:, 0].clone()
    for place in range(4):
        part = xyzw[:, place]
        size = (MASK * part.abs() * math.sqrt(2) + 0.5).long().clamp(max=MASK)
        word = (packed << 10) | ((part < 0).long() << 9) | size
        packed = torch.where(largest[:, 0] == place, packed, word)
    return packed.numpy().astype("<u4").view(np.uint8).reshape(-1, 4)


def _from_smallest_three(data: np.ndarray) -> Tensor:
    word = torch.from_numpy(np.ascontiguousarray(data).view("<u4")[:, 0].astype(np.int64))
    largest = word >> 30
    xyzw = torch.zeros(len(word), 4)
    for place in (3, 2, 1, 0):
        size = (word & MASK) / (MASK * math.sqrt(2))
        value = torch.where((word >> 9) & 1 == 1, -size, size)
        here = largest == place
        xyzw[:, place] = torch.where(here, 0.0, value)
        word = torch.where(here, word, word >> 10)
    rest = (1 - xyzw.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    return xyzw.scatter(-1, largest[:, None], rest)[:, [3, 0, 1, 2]]


def _from_three(data: np.ndarray) -> Tensor:
    """x, y, z of a rotation whose w is not negative, as version 2 has them."""
    xyz = torch.from_numpy(data.astype(np.float32)) / 127.5 - 1
    return torch.cat([(1 - xyz.square().sum(-1, keepdim=True)).clamp(min=0).sqrt(), xyz], -1)
