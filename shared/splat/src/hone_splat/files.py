"""Splats as files that viewers open: 3DGS ``.ply`` with all spherical harmonics, and ``.splat`` with colours alone.

Both hold standard axes and SH; nothing is turned, so that a file still fits the cameras that it came from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hone_core.io import atomic_write_bytes
from torch import Tensor

from .gaussians import Gaussians
from .harmonics import C0

__all__ = ["check_cloud", "read_ply", "read_splat", "write_ply", "write_splat"]

LEAST = 1e-6
"""Opacities are stored as logits, so that 0 and 1 are moved in by this much; sizes of 0 likewise before a logarithm."""
SPLAT = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])


def write_ply(gaussians: Gaussians, path: str | Path) -> Path:
    """Write one scene's cloud as binary 3DGS ``.ply``; returns the path.

    Raises:
        ValueError: It is a batch, or a value is not finite.
    """
    check_cloud(gaussians)
    count = len(gaussians)
    opacity = torch.logit(gaussians.opacities.double(), LEAST)
    scale = gaussians.scales.double().clamp(min=LEAST).log()
    rotation = F.normalize(gaussians.quats_wxyz.double(), dim=-1)
    rest = gaussians.sh[..., 1:].flatten(1)  # channel-major: all of red, of green, of blue
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
    names += [f"f_rest_{i}" for i in range(rest.shape[1])]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    parts = [gaussians.means, torch.zeros_like(gaussians.means), gaussians.sh[..., 0], rest]
    parts += [opacity[:, None], scale, rotation]
    table = torch.cat([part.detach().cpu().double() for part in parts], 1)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property float {name}" for name in names]
    head = "\n".join([*header, "end_header", ""]).encode("ascii")
    return atomic_write_bytes(path, head + table.numpy().astype("<f4").tobytes())


def read_ply(path: str | Path) -> Gaussians:
    """Read a 3DGS ``.ply``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or is cut short.
    """
    data = Path(path).read_bytes()
    end = data.find(b"end_header\n")
    if not data.startswith(b"ply\n") or end < 0:
        raise ValueError(f"{path} is no .ply file: its header is missing")
    lines = data[:end].decode("ascii", errors="replace").splitlines()
    if "format binary_little_endian 1.0" not in lines:
        raise ValueError(f"{path}: expected binary_little_endian; got {' '.join(lines[1:2])!r}")
    elements = [line.split() for line in lines if line.startswith("element ")]
    if len(elements) != 1 or elements[0][1:2] != ["vertex"] or not elements[0][-1].isdigit():
        raise ValueError(f"{path}: expected one element, vertex; got {[' '.join(element) for element in elements]}")
    properties = [line.split() for line in lines if line.startswith("property ")]
    if any(len(entry) != 3 or entry[1] not in ("float", "float32") for entry in properties):
        raise ValueError(f"{path}: expected properties of type float alone, as 3DGS files have; is this a point cloud?")
    names, count = [entry[2] for entry in properties], int(elements[0][2])
    body = data[end + len(b"end_header\n") :]
    if len(body) != 4 * count * len(names):
        raise ValueError(
            f"{path} is damaged: {count} Gaussians need {4 * count * len(names)} bytes; it holds {len(body)}"
        )
    table = torch.from_numpy(np.frombuffer(body, "<f4").reshape(count, len(names)).copy())
    rest = sum(name.startswith("f_rest_") for name in names)
    wanted = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest))]
    wanted += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    missing = [name for name in wanted if name not in names]
    if missing or rest not in (0, 9, 24, 45):
        raise ValueError(f"{path} is no 3DGS file: it lacks {', '.join(missing) or 'a whole number of SH bands'}")
    column = {name: index for index, name in enumerate(names)}

    def take(*keys: str) -> Tensor:
        return table[:, [column[key] for key in keys]]

    constant = take(*(f"f_dc_{i}" for i in range(3)))[..., None]
    higher = take(*(f"f_rest_{i}" for i in range(rest))).view(count, 3, rest // 3)
    return Gaussians(
        take("x", "y", "z"),
        take(*(f"scale_{i}" for i in range(3))).exp(),
        take(*(f"rot_{i}" for i in range(4))),
        take("opacity")[:, 0].sigmoid(),
        torch.cat([constant, higher], -1),
    )


def write_splat(gaussians: Gaussians, path: str | Path) -> Path:
    """Write ``.splat`` of antimatter15's viewer, 32 bytes each, the most visible first; colours lose their direction.

    Raises:
        ValueError: It is a batch, or a value is not finite.
    """
    check_cloud(gaussians)
    visible = gaussians.scales.prod(-1) * gaussians.opacities
    ordered = gaussians[visible.argsort(descending=True)].map(lambda part: part.detach().cpu())
    table = np.zeros(len(ordered), SPLAT)
    table["position"], table["scale"] = ordered.means.numpy(), ordered.scales.numpy()
    colour = torch.cat([0.5 + C0 * ordered.sh[..., 0], ordered.opacities[:, None]], -1)
    table["rgba"] = (colour.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    rotation = F.normalize(ordered.quats_wxyz, dim=-1)
    table["rotation"] = (rotation * 128 + 128).round().clamp(0, 255).to(torch.uint8).numpy()
    return atomic_write_bytes(path, table.tobytes())


def read_splat(path: str | Path) -> Gaussians:
    """Read ``.splat``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole number of Gaussians.
    """
    data = Path(path).read_bytes()
    if len(data) % SPLAT.itemsize:
        raise ValueError(f"{path} is damaged: {len(data)} bytes are no multiple of {SPLAT.itemsize}")
    table = np.frombuffer(data, SPLAT)

    def take(name: str) -> Tensor:
        return torch.from_numpy(table[name].astype(np.float32))

    colour = take("rgba") / 255
    return Gaussians(
        take("position"),
        take("scale"),
        (take("rotation") - 128) / 128,
        colour[:, 3],
        ((colour[:, :3] - 0.5) / C0)[..., None],
    )


def check_cloud(gaussians: Gaussians) -> None:
    """Refuse what no file holds.

    Raises:
        ValueError: It is a batch, or a value is not finite.
    """
    if gaussians.means.ndim != 2:
        raise ValueError(f"a file holds one scene; got a batch {list(gaussians.means.shape[:-2])}. Index it first.")
    if not gaussians.finite():
        raise ValueError("the cloud holds values that are not finite; nothing was written")
