"""glTF 2.0: an animated skeleton with a body of octahedra, for Blender and web viewers, in one file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.io import atomic_write_json
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .config import Bones
from .exports import fit_rig
from .skeletons import HUMANML3D, Skeleton

__all__ = ["write_gltf"]

_FLOAT, _SHORT, _BYTE = 5126, 5123, 5121
_KINDS = {np.dtype(np.float32): _FLOAT, np.dtype(np.uint16): _SHORT, np.dtype(np.uint8): _BYTE}
_SHAPES = {1: "SCALAR", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


class _Buffer:
    """Arrays one after another, each from a multiple of four bytes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, values: NDArray[Any], *, bounds: bool = False) -> int:
        """Number of the accessor."""
        flat = np.ascontiguousarray(values).reshape(len(values), -1)
        self.data += b"\0" * (-len(self.data) % 4)
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": flat.nbytes})
        self.data += flat.tobytes()
        entry = {
            "bufferView": len(self.views) - 1,
            "componentType": _KINDS[flat.dtype],
            "count": len(flat),
            "type": _SHAPES[flat.shape[1]],
        }
        if bounds:
            entry |= {"min": flat.min(0).tolist(), "max": flat.max(0).tolist()}
        self.accessors.append(entry)
        return len(self.accessors) - 1


def _body(rest: NDArray[np.floating], skeleton: Skeleton) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Places, indices and joints of an octahedron along each bone; it moves with the joint that it begins at."""
    places: list[NDArray[np.floating]] = []
    faces: list[int] = []
    owners: list[int] = []
    for joint in range(1, skeleton.count):
        parent = skeleton.parents[joint]
        start, end = rest[parent], rest[joint]
        way = (end - start) / max(1e-6, float(np.linalg.norm(end - start)))
        side = np.cross(way, np.eye(3)[int(np.abs(way).argmin())])
        side /= np.linalg.norm(side)
        other = np.cross(way, side)
        middle, wide = start + 0.2 * (end - start), 0.12 * float(np.linalg.norm(end - start))
        ring = [middle + wide * turn for turn in (side, other, -side, -other)]
        first = len(places)
        places += [start, *ring, end]
        owners += [parent] * 6
        for corner in range(4):
            one, two = first + 1 + corner, first + 1 + (corner + 1) % 4
            faces += [first, two, one, first + 5, one, two]
    return np.array(places, np.float32), np.array(faces, np.uint16), np.array(owners, np.uint8)


def write_gltf(
    joints: Float[Tensor, "frames joints 3"],
    path: str | Path,
    skeleton: Skeleton = HUMANML3D,
    *,
    fps: float | None = None,
    bones: Bones = "fixed",
) -> Path:
    """Write a ``.gltf`` with its data inside; returns the path.

    Rotations are as in a BVH, without a twist.

    Args:
        joints: In metres, +y up.
        path: File to write.
        skeleton: Of the joints.
        fps: Frames a second; the set's if None.
        bones: ``fixed`` moves the root and turns the others; ``stretched`` moves each joint in a track of its own.

    Raises:
        ValueError: The joints are of another skeleton, of several motions, or not finite; ``bones`` is neither.
    """
    offsets, turns, moves = fit_rig(joints, skeleton, bones)
    # glTF has x, y, z, w.
    rotations, translations = (x.numpy().astype(np.float32) for x in (turns[..., [1, 2, 3, 0]], moves))
    rest = torch.zeros(skeleton.count, 3, dtype=torch.float64)
    for joint in range(1, skeleton.count):
        rest[joint] = rest[skeleton.parents[joint]] + offsets[joint]

    buffer = _Buffer()
    places, faces, owners = _body(rest.numpy(), skeleton)
    bound, weights = np.zeros((len(owners), 4), np.uint8), np.zeros((len(owners), 4), np.float32)
    bound[:, 0], weights[:, 0] = owners, 1
    inverse = np.tile(np.eye(4, dtype=np.float32), (skeleton.count, 1, 1))
    inverse[:, 3, :3] = -rest.numpy()  # matrices are stored column by column
    attributes = {
        "POSITION": buffer.add(places, bounds=True),
        "JOINTS_0": buffer.add(bound),
        "WEIGHTS_0": buffer.add(weights),
    }
    indices, binds = buffer.add(faces), buffer.add(inverse.reshape(-1, 16))
    times = buffer.add((np.arange(len(joints)) / (fps or skeleton.fps)).astype(np.float32), bounds=True)
    samplers: list[dict[str, Any]] = []
    channels: list[dict[str, Any]] = []
    tracks = [("translation", joint, translations) for joint in range(skeleton.count if bones == "stretched" else 1)]
    tracks += [("rotation", joint, rotations) for joint in range(skeleton.count)]
    for number, (what, joint, values) in enumerate(tracks):
        samplers.append({"input": times, "output": buffer.add(values[:, joint])})
        channels.append({"sampler": number, "target": {"node": joint, "path": what}})
    nodes: list[dict[str, Any]] = []
    for joint, name in enumerate(skeleton.joints):
        node: dict[str, Any] = {"name": name, "translation": offsets[joint].tolist()}
        if skeleton.children[joint]:
            node["children"] = list(skeleton.children[joint])
        nodes.append(node)
    nodes.append({"name": "body", "mesh": 0, "skin": 0})
    data = base64.b64encode(bytes(buffer.data)).decode("ascii")
    return atomic_write_json(
        path,
        {
            "asset": {"version": "2.0", "generator": "hone-motion-anything"},
            "scene": 0,
            "scenes": [{"nodes": [0, skeleton.count]}],
            "nodes": nodes,
            "meshes": [{"primitives": [{"attributes": attributes, "indices": indices}]}],
            "skins": [{"joints": list(range(skeleton.count)), "inverseBindMatrices": binds, "skeleton": 0}],
            "animations": [{"samplers": samplers, "channels": channels}],
            "accessors": buffer.accessors,
            "bufferViews": buffer.views,
            "buffers": [{"byteLength": len(buffer.data), "uri": f"data:application/octet-stream;base64,{data}"}],
        },
    )
