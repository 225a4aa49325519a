"""RealEstate10K and DL3DV as pixelSplat's family stores them: chunks of scenes, an index, and evaluation indices.

A folder holds ``000000.torch`` and so on, each a list of scenes, and ``index.json``, which says where they are. Cameras
are 18 numbers: fx, fy, cx, cy (normalised), two zeros, and the first three rows of world-to-camera.

Source: the datasets of pixelSplat, MVSplat and DepthSplat. Nothing in a file is executed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.io import atomic_write_json, save_state
from PIL import Image
from torch import Tensor

from .cameras import check_cameras
from .captures import check_bits, fit_picture
from .places import read_chunk_index, read_evaluation_index
from .views import Views

__all__ = ["ChunkScene", "ChunkSet", "read_evaluation_index", "write_chunks"]


@dataclass(frozen=True)
class ChunkScene:
    """A scene of a chunk.

    Attributes:
        key: Its name.
        cameras: ``[V, 18]``, float32, see the module.
        images: JPEG or PNG bytes, ``[bytes]`` of uint8 each.
    """

    key: str
    cameras: Tensor
    images: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if self.cameras.shape != (len(self.images), 18):
            raise ValueError(f"{self.key}: expected cameras [{len(self.images)}, 18]; got {list(self.cameras.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(cls, key: str, image_01: Tensor, cam_to_world: Tensor, intrinsics_norm: Tensor) -> ChunkScene:
        """From pictures ``[V, 3, H, W]``, stored as PNG, poses and intrinsics."""
        images = []
        for picture in image_01:
            pixels = (picture.movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
            images.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
        return cls.of_pictures(key, tuple(images), cam_to_world, intrinsics_norm)

    @classmethod
    def of_pictures(
        cls, key: str, images: tuple[Tensor, ...], cam_to_world: Tensor, intrinsics_norm: Tensor
    ) -> ChunkScene:
        """From the bytes of pictures, poses and intrinsics."""
        inner = intrinsics_norm[:, [0, 1, 0, 1], [0, 1, 2, 2]]
        world_to_cam = torch.linalg.inv(cam_to_world.double())[:, :3].flatten(1)
        cameras = torch.cat([inner.double(), torch.zeros(len(inner), 2), world_to_cam], 1)
        return cls(key, cameras.float(), images)

    def views(self, index: Sequence[int], size: tuple[int, int], near: float, far: float) -> Views:
        """Some of the views, scaled by Lanczos so that they cover ``size``, and cut.

        Raises:
            ValueError: There is no such view, a picture cannot be read or has more than 8 bits a value, or a camera is
                impossible.
        """
        wrong = [i for i in index if not 0 <= i < len(self)]
        if wrong:
            raise ValueError(f"{self.key} has {len(self)} views; view {wrong[0]} was asked for")
        cameras = self.cameras[list(index)].double()
        inner = torch.zeros(len(index), 3, 3, dtype=torch.float64)
        inner[:, [0, 1, 0, 1], [0, 1, 2, 2]] = cameras[:, :4]
        inner[:, 2, 2] = 1
        world_to_cam = torch.eye(4, dtype=torch.float64).repeat(len(index), 1, 1)
        world_to_cam[:, :3] = cameras[:, 6:].unflatten(1, (3, 4))
        names = [f"{self.key}, {i}" for i in index]
        # The rows are checked before they are inverted, where a singular one would stop without a name.
        check_cameras(world_to_cam, inner, names)
        pictures = []
        for place, name in enumerate(names):
            try:
                with Image.open(io.BytesIO(self.images[index[place]].numpy().tobytes())) as image:
                    check_bits(image, f"{name}: the picture")
                    picture, inner[place] = fit_picture(image.convert("RGB"), inner[place], size)
            except OSError as error:
                raise ValueError(f"{name}: the picture cannot be read: {error}") from error
            pictures.append(picture)
        bounds = torch.ones(1, len(index))
        poses = torch.linalg.inv(world_to_cam).float()
        return Views(torch.stack(pictures)[None], poses[None], inner.float()[None], near * bounds, far * bounds)


class ChunkSet:
    """A folder of chunks; one of them is held in memory.

    Args:
        folder: Holds ``index.json``.

    Raises:
        FileNotFoundError: It does not.
        ValueError: The index is no index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_chunk_index(self.folder)
        self._held: tuple[str, dict[str, ChunkScene]] = "", {}

    def scene(self, key: str) -> ChunkScene:
        """Read one; in the order of ``index``, each chunk is read once.

        Raises:
            KeyError: There is no such scene.
            ValueError: Its chunk is cut short, or is none.
        """
        if key not in self.index:
            raise KeyError(f"{self.folder} has no scene {key!r} among its {len(self.index)}")
        name = self.index[key]
        if self._held[0] != name:
            self._held = name, {scene.key: scene for scene in _read_chunk(self.folder / name)}
        if key not in self._held[1]:
            raise ValueError(f"{self.folder / name} does not hold {key!r}, as index.json says. Make the index again.")
        return self._held[1][key]


def _read_chunk(path: Path) -> list[ChunkScene]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, which index.json names")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is cut short, or no chunk: {cause} Copy it again.") from error
    wanted = {"key", "cameras", "images"}
    if not isinstance(data, list) or not all(isinstance(scene, dict) and wanted <= scene.keys() for scene in data):
        raise ValueError(f"{path} is no chunk: expected a list of scenes with key, cameras and images")
    return [ChunkScene(scene["key"], scene["cameras"], tuple(scene["images"])) for scene in data]


def write_chunks(scenes: Iterable[ChunkScene], folder: str | Path, *, chunk_bytes: int = 100_000_000) -> Path:
    """Write scenes and their index; returns the folder.

    Args:
        scenes: Read one by one.
        folder: New or empty.
        chunk_bytes: A chunk is closed when its pictures reach this.

    Raises:
        FileExistsError: The folder has an index already.
        OSError: A chunk cannot be written, such as for a disk that is full.
        ValueError: Two scenes have one name.
    """
    folder = Path(folder)
    if (folder / "index.json").exists():
        raise FileExistsError(f"{folder} holds chunks already; name another folder")
    index: dict[str, str] = {}
    waiting: list[dict[str, Any]] = []
    size = number = 0

    def close() -> None:
        nonlocal waiting, size, number
        save_state(waiting, folder / f"{number:06d}.torch")
        waiting, size, number = [], 0, number + 1

    for scene in scenes:
        if scene.key in index:
            raise ValueError(f"two scenes are called {scene.key!r}")
        index[scene.key] = f"{number:06d}.torch"
        times = torch.arange(len(scene))
        waiting.append(
            {"url": "", "timestamps": times, "cameras": scene.cameras, "images": list(scene.images), "key": scene.key}
        )
        size += sum(image.numel() for image in scene.images)
        if size >= chunk_bytes:
            close()
    if waiting:
        close()
    atomic_write_json(folder / "index.json", index)
    return folder
