"""A person's own photographs with their cameras: COLMAP models and nerfstudio's ``transforms.json``.

Files are checked before a picture is opened: what a host cannot use is named, with what to do about it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hone_core.io import in_order
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .cameras import check_cameras, opengl_to_opencv, quat_to_matrix
from .places import find_colmap, find_transforms, holding
from .views import Views

__all__ = [
    "Capture",
    "SceneRange",
    "check_bits",
    "check_pictures",
    "fit_picture",
    "fit_range",
    "load_views",
    "overlap",
    "read_colmap",
    "read_points",
    "read_transforms",
]

# Names, numbers of parameters and focal lengths of COLMAP's camera models, in the order of their numbers.
MODELS = (
    ("SIMPLE_PINHOLE", 3, 1),
    ("PINHOLE", 4, 2),
    ("SIMPLE_RADIAL", 4, 1),
    ("RADIAL", 5, 1),
    ("OPENCV", 8, 2),
    ("OPENCV_FISHEYE", 8, 0),
    ("FULL_OPENCV", 12, 2),
    ("FOV", 5, 0),
    ("SIMPLE_RADIAL_FISHEYE", 4, 0),
    ("RADIAL_FISHEYE", 5, 0),
    ("THIN_PRISM_FISHEYE", 12, 0),
)
UNDISTORT = (
    "Hosts take pinhole cameras: undistort the pictures first, by colmap image_undistorter --image_path IMAGES "
    "--input_path MODEL --output_path OUT, and name OUT as the COLMAP folder. nerfstudio leaves its MODEL in "
    "colmap/sparse/0."
)
MOST_AWAY = 1e4
"""Distance of the cameras from the origin over their spread from which 32 bits keep less than a thousandth of it."""
PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"},
    **{"int8": "i1", "uint8": "u1", "float": "<f4", "double": "<f8", "float32": "<f4", "float64": "<f8"},
}


@dataclass(frozen=True)
class Capture:
    """Photographs of one scene, in the order of their names, numbers in them as numbers.

    Attributes:
        images: Paths, none of them opened yet.
        cam_to_world: ``[V, 4, 4]``, float64, OpenCV axes, in the capture's own units.
        intrinsics_norm: ``[V, 3, 3]``, float64.
        size: Height and width in pixels that the intrinsics were given for.
        points: ``[N, 3]``, float64, sparse points of the scene; None where the capture has none.
    """

    images: tuple[Path, ...]
    cam_to_world: Tensor
    intrinsics_norm: Tensor
    size: tuple[int, int]
    points: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Sequence[int]) -> Capture:
        """Some of the views, in the order given."""
        images = tuple(self.images[i] for i in index)
        rows = list(index)
        return Capture(images, self.cam_to_world[rows], self.intrinsics_norm[rows], self.size, self.points)


@dataclass(frozen=True)
class SceneRange:
    """How a capture is brought into the units that a host was trained with.

    Attributes:
        scale: What lengths of the capture are multiplied by.
        near: Least depth, in the host's units.
        far: Largest.
        depths: 5th percentile, median and 95th of the scene's depth, in the capture's units.
        source: Where the depths come from.
    """

    scale: float
    near: float
    far: float
    depths: tuple[float, float, float]
    source: str

    @property
    def guessed(self) -> bool:
        """Whether depths are only those of where the cameras look."""
        return self.source.startswith("where the cameras look")


# COLMAP ---------------------------------------------------------------------------------------------------------------


def read_colmap(folder: str | Path, images: str | Path | None = None) -> Capture:
    """Read a COLMAP model, binary or text.

    Args:
        folder: Holds ``cameras``, ``images`` and, if any, ``points3D``, itself or in ``sparse/0`` or ``sparse``.
        images: Where the pictures lie; ``images`` beside the model if None.

    Raises:
        FileNotFoundError: There is no model or a picture is missing.
        ValueError: A file is cut short, or a camera is distorted, unknown or impossible.
    """
    place, suffix, images = find_colmap(folder, images)
    binary = suffix == ".bin"
    cameras = _read(_cameras_bin if binary else _cameras_txt, place / f"cameras{suffix}")
    poses = _read(_images_bin if binary else _images_txt, place / f"images{suffix}")
    poses = sorted(poses, key=lambda entry: in_order(entry[0]))
    path = place / f"points3D{suffix}"
    points = _read(_points_bin if binary else _points_txt, path) if path.is_file() else None
    names, quats, shifts, keys = zip(*poses, strict=True) if poses else ((), (), (), ())
    unknown = [name for name, key in zip(names, keys, strict=True) if key not in cameras]
    if unknown:
        raise ValueError(f"{place}: {unknown[0]} has no intrinsics: its camera is not in cameras{suffix}")
    world_to_cam = torch.eye(4, dtype=torch.float64).repeat(len(names), 1, 1)
    world_to_cam[:, :3, :3] = quat_to_matrix(torch.tensor(quats, dtype=torch.float64).view(-1, 4))
    world_to_cam[:, :3, 3] = torch.tensor(shifts, dtype=torch.float64).view(-1, 3)
    inner = [_pinhole(*cameras[key], name) for name, key in zip(names, keys, strict=True)]
    _find_pictures(names, Path(images), "Copy them there, or name their folder where there is an argument images")
    return _capture(names, Path(images), _inverse(world_to_cam), inner, points)


def _inverse(rigid: Tensor) -> Tensor:
    """Of rigid motions; not finite ones pass, to be named later."""
    out = rigid.clone()
    out[:, :3, :3] = rigid[:, :3, :3].mT
    out[:, :3, 3] = -(rigid[:, :3, :3].mT @ rigid[:, :3, 3:])[..., 0]
    return out


def _pinhole(model: str, width: int, height: int, params: Sequence[float], name: str) -> tuple[Tensor, tuple[int, int]]:
    """Normalised intrinsics and size of a COLMAP camera."""
    focals = next((entry[2] for entry in MODELS if entry[0] == model), 0)
    if not focals:
        raise ValueError(f"{name}: a camera of the model {model}. {UNDISTORT}")
    bent = params[focals + 2 :]
    if any(bent):
        raise ValueError(f"{name}: a distorted camera, {model} with {[round(value, 6) for value in bent]}. {UNDISTORT}")
    fx, fy = params[0], params[focals - 1]
    cx, cy = params[focals : focals + 2]
    return _matrix(fx, fy, cx, cy, width, height), (height, width)


def _matrix(fx: float, fy: float, cx: float, cy: float, width: float, height: float) -> Tensor:
    rows = [[fx / width, 0.0, cx / width], [0.0, fy / height, cy / height], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float64)


class _Bytes:
    """Little-endian values of a file, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + layout)
        self.need(size)
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += size
        return values

    def need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise ValueError(f"{self.path} is cut short: {size} more bytes were expected at {self.at}. Copy it again.")

    def skip(self, size: int) -> None:
        self.need(size)
        self.at += size

    def word(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError(f"{self.path} is cut short: a name has no end. Copy it again.")
        name = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return name


T = TypeVar("T")
Camera = tuple[str, int, int, tuple[float, ...]]
Pose = tuple[str, tuple[float, ...], tuple[float, ...], int]


def _cameras_bin(path: Path) -> dict[int, Camera]:
    file, cameras = _Bytes(path), {}
    for _ in range(file.take("Q")[0]):
        key, model, width, height = file.take("iiQQ")
        if not 0 <= model < len(MODELS):
            raise ValueError(f"{path}: camera {key} is of the unknown model {model}. {UNDISTORT}")
        name, count, _ = MODELS[model]
        cameras[key] = (name, width, height, file.take(f"{count}d"))
    return cameras


def _images_bin(path: Path) -> list[Pose]:
    file, poses = _Bytes(path), []
    for _ in range(file.take("Q")[0]):
        _, *pose, camera = file.take("i7di")
        name = file.word()
        file.skip(24 * file.take("Q")[0])
        poses.append((name, tuple(pose[:4]), tuple(pose[4:]), camera))
    return poses


def _points_bin(path: Path) -> Tensor:
    file, points = _Bytes(path), []
    for _ in range(file.take("Q")[0]):
        _, x, y, z, *_, track = file.take("Q3d3BdQ")
        file.skip(8 * track)
        points.append((x, y, z))
    return torch.tensor(points, dtype=torch.float64).view(-1, 3)


def _read(reader: Callable[[Path], T], path: Path) -> T:
    """What a reader finds; of a number that is none it names the file."""
    try:
        return reader(path)
    except (ValueError, IndexError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read: {error}. Copy it again.") from error


def _lines(path: Path) -> Iterator[str]:
    return (line for line in path.read_text("utf-8").splitlines() if not line.startswith("#"))


def _cameras_txt(path: Path) -> dict[int, Camera]:
    cameras: dict[int, Camera] = {}
    for words in (line.split() for line in _lines(path) if line.strip()):
        expected = {name: count for name, count, _ in MODELS}.get(words[1] if len(words) > 1 else "")
        if expected is not None and len(words) != 4 + expected:
            raise ValueError(f"{path}: camera {words[0]} of {words[1]} needs {expected} parameters; got {words[4:]}")
        if len(words) < 4:
            raise ValueError(f"{path}: expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS; got {' '.join(words)!r}")
        cameras[int(words[0])] = (words[1], int(words[2]), int(words[3]), tuple(map(float, words[4:])))
    return cameras


def _images_txt(path: Path) -> list[Pose]:
    poses: list[Pose] = []
    lines = iter(path.read_text("utf-8").splitlines())
    for line in lines:
        if line.startswith("#") or not line.strip():
            continue
        words = line.split(maxsplit=9)
        if len(words) != 10:
            raise ValueError(f"{path}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME; got {line!r}")
        # The next line lists the picture's points, and is empty where it has none.
        seen = next(lines, "").split()
        if len(seen) % 3 or not all(word.lstrip("-").isdecimal() for word in seen[2::3]):
            raise ValueError(
                f"{path}: expected a line of X Y POINT3D_ID for the points of {words[9].strip()}, empty where it has "
                f"none; got {' '.join(seen)[:80]!r}. Where empty lines were taken out, write the model again by colmap "
                "model_converter --output_type TXT"
            )
        values = tuple(map(float, words[1:8]))
        poses.append((words[9].strip(), values[:4], values[4:], int(words[8])))
    return poses


def _points_txt(path: Path) -> Tensor:
    points = [tuple(map(float, line.split()[1:4])) for line in _lines(path) if line.strip()]
    return torch.tensor(points, dtype=torch.float64).view(-1, 3)


# nerfstudio -----------------------------------------------------------------------------------------------------------


def read_transforms(path: str | Path) -> Capture:
    """Read nerfstudio's or Blender's ``transforms.json``, and the points that it names.

    Args:
        path: The file, or its folder.

    Raises:
        FileNotFoundError: The file, a picture or the points that it names are missing.
        ValueError: It is no such file, or a camera is distorted, without intrinsics or impossible.
    """
    path = find_transforms(path)
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is no JSON: {error}") from error
    frames = data.get("frames") if isinstance(data, dict) else None
    if not isinstance(frames, list) or not all(
        isinstance(f, dict) and isinstance(f.get("file_path"), str) for f in frames
    ):
        raise ValueError(f"{path}: expected frames, each with file_path and transform_matrix")
    frames = sorted(frames, key=lambda frame: in_order(frame["file_path"]))
    names = [_picture(path.parent, frame["file_path"]) for frame in frames]
    _find_pictures(names, path.parent, f"Copy them there, or mend file_path in {path.name}")
    inner = [
        _frame_intrinsics({**data, **frame}, path.parent / name) for frame, name in zip(frames, names, strict=True)
    ]
    matrices = [_matrix_of(frame, path) for frame in frames]
    poses = opengl_to_opencv(torch.tensor(np.array(matrices)).view(-1, 4, 4))
    return _capture(names, path.parent, poses, inner, _named_points(data, path))


def _named_points(data: dict[str, Any], path: Path) -> Tensor | None:
    """Of the file that ``ply_file_path`` names."""
    named = data.get("ply_file_path")
    if not named:
        return None
    if not isinstance(named, str) or not (path.parent / named).is_file():
        raise FileNotFoundError(
            f"{path} names {named!r} as its points (ply_file_path), and there is no such file. Copy it there; or "
            "delete the entry, and depths are guessed from where the cameras look"
        )
    return _read(read_points, path.parent / named)


def _matrix_of(frame: dict[str, Any], path: Path) -> np.ndarray[Any, Any]:
    try:
        matrix = np.array(frame.get("transform_matrix"), dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != (4, 4):
        raise ValueError(f"{path}: the transform_matrix of {frame['file_path']} must be 4 x 4 numbers")
    return matrix


def _picture(folder: Path, name: str) -> str:
    """Blender leaves the suffix out."""
    return next((name + end for end in ("", ".png", ".jpg") if (folder / (name + end)).is_file()), name)


def _frame_intrinsics(entry: dict[str, Any], image: Path) -> tuple[Tensor, tuple[int, int]]:
    bent = {key: entry[key] for key in ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2") if entry.get(key)}
    model = entry.get("camera_model", "OPENCV")
    if bent or model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(f"{image.name}: a distorted camera, {model} with {bent}. {UNDISTORT}")
    for key in ("w", "h", "fl_x", "fl_y", "camera_angle_x", "cx", "cy"):
        value = entry.get(key, 1)
        if not isinstance(value, int | float) or (value <= 0 and key not in ("cx", "cy")):
            raise ValueError(
                f"{image.name}: expected a number as {key}, and positive sizes and focal lengths; got {value!r}"
            )
    if "w" in entry and "h" in entry:
        width, height = int(entry["w"]), int(entry["h"])
    else:
        width, height = _image_size(image)
    if "fl_x" in entry:
        fx = float(entry["fl_x"])
    elif "camera_angle_x" in entry:
        fx = 0.5 * width / math.tan(0.5 * float(entry["camera_angle_x"]))
    else:
        raise ValueError(f"{image.name} has no intrinsics: expected fl_x or camera_angle_x, for all or for the frame")
    fy = float(entry.get("fl_y", fx))
    cx, cy = float(entry.get("cx", width / 2)), float(entry.get("cy", height / 2))
    return _matrix(fx, fy, cx, cy, width, height), (height, width)


def read_points(path: Path) -> Float[Tensor, "point 3"]:
    """Positions of a ``.ply``'s vertices, in float64.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no point cloud, is cut short, or holds a point that is not finite.
    """
    data = path.read_bytes()
    found = re.search(rb"^end_header\r?\n", data, re.MULTILINE)
    lines = data[: found.start() if found else 0].decode("ascii", errors="replace").splitlines()
    body = data[found.end() if found else 0 :]
    count, names = None, []
    for words in (line.split() for line in lines):
        if words[:1] == ["element"] and count is not None:
            break
        if words[:2] == ["element", "vertex"] and len(words) == 3 and words[2].isdecimal():
            count = int(words[2])
        elif words[:1] == ["element"]:
            raise ValueError(f"{path}: expected vertices first, element vertex COUNT; got {' '.join(words)!r}")
        elif words[:1] == ["property"]:
            # Where the next value begins is known of single numbers alone.
            if len(words) != 3 or words[1] not in PLY_TYPES:
                raise ValueError(f"{path}: expected single numbers at each vertex; got {' '.join(words)!r}")
            names.append((words[2], PLY_TYPES[words[1]]))
    if not count or not {"x", "y", "z"} <= {name for name, _ in names}:
        raise ValueError(f"{path} is no point cloud: expected a .ply of vertices with x, y and z")
    if any(line.startswith("format ascii") for line in lines):
        order = [[name for name, _ in names].index(axis) for axis in "xyz"]
        try:
            rows = [line.split() for line in body.decode("ascii").splitlines()[:count]]
            points = np.array([[float(row[i]) for i in order] for row in rows]).reshape(-1, 3)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error
        if len(points) < count:
            raise ValueError(f"{path} is cut short: it holds {len(points)} of {count} points. Copy it again.")
    else:
        kind = np.dtype(names)
        if "format binary_little_endian 1.0" not in lines or len(body) < count * kind.itemsize:
            raise ValueError(f"{path} is cut short or big-endian: {count} points need {count * kind.itemsize} bytes")
        table = np.frombuffer(body, kind, count)
        points = np.stack([table[axis].astype(np.float64) for axis in "xyz"], -1)
    lost = int((~np.isfinite(points).all(1)).sum())
    if lost:
        raise ValueError(f"{path}: {lost} of {count} points are not finite. Remove them first.")
    return torch.from_numpy(points)


# Both -----------------------------------------------------------------------------------------------------------------


def _find_pictures(names: Sequence[str], folder: Path, remedy: str) -> None:
    """Look whether all pictures that a model names are in their folder."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f"and {len(missing) - 1} more are missing" if len(missing) > 1 else "is missing"
        where, place = "" if folder.is_dir() else ", which is no folder", (folder / missing[0]).parent
        there = f" {holding(place)}." if place.is_dir() else ""
        raise FileNotFoundError(
            f"expected {len(names)} pictures in {folder}{where}: {missing[0]} {more}.{there} {remedy}"
        )


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height, without decoding."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"the picture {path} cannot be read, copy it again: {error}") from error


def _capture(
    names: Sequence[str],
    folder: Path,
    poses: Tensor,
    inner: Sequence[tuple[Tensor, tuple[int, int]]],
    points: Tensor | None,
) -> Capture:
    if len(names) < 2:
        raise ValueError(f"a host matches views with each other: at least two are needed; the capture has {len(names)}")
    matrices, sizes = zip(*inner, strict=True)
    for name, size in zip(names, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"mixed sizes: {names[0]} is {sizes[0][1]} x {sizes[0][0]} and {name} {size[1]} x {size[0]}. "
                f"Keep the pictures of one camera, or resize them."
            )
    intrinsics = torch.stack(matrices)
    check_cameras(poses, intrinsics, list(names))
    centres = poses[:, :3, 3]
    away, apart = float(centres.norm(dim=-1).max()), float((centres - centres.mean(0)).norm(dim=-1).max())
    if apart and away > MOST_AWAY * apart:
        middle = [round(value, 3) for value in centres.mean(0).tolist()]
        raise ValueError(
            f"the cameras stand {away:.6g} units from the origin and {apart:.3g} around their middle, which hosts and "
            f"files of splats cannot tell apart in 32 bits. Take {middle} "
            "from all positions, of points too, or write the model again without geographic coordinates"
        )
    height, width = sizes[0]
    for name in names:
        # Intrinsics are normalised, so that a smaller copy of the picture will do, if nothing was cut off.
        w, h = _image_size(folder / name)
        if abs(w * height - h * width) > max(width, height):
            raise ValueError(f"{name} is {w} x {h}, and its camera {width} x {height}: that is another shape")
    return Capture(tuple(folder / name for name in names), poses, intrinsics, (height, width), points)


def fit_picture(
    image: Image.Image, intrinsics_norm: Tensor, size: tuple[int, int]
) -> tuple[Float[Tensor, "3 height width"], Float[Tensor, "3 3"]]:
    """Scale a picture by Lanczos so that it covers ``size``, cut the centre out, and move its intrinsics along."""
    height, width = size
    factor = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    image = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    inner = intrinsics_norm * intrinsics_norm.new_tensor([[scaled[0] / width], [scaled[1] / height], [1.0]])
    inner[0, 2] -= left / width
    inner[1, 2] -= top / height
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255, inner


def check_bits(image: Image.Image, name: str) -> None:
    """Refuse what would be cut off at 8 bits.

    Raises:
        ValueError: The picture has more.
    """
    if image.mode[:1] in ("I", "F"):
        raise ValueError(f"{name} has more than 8 bits a value, which would be cut off; save it with 8")


def check_pictures(capture: Capture) -> None:
    """Look at what pictures hold without decoding them.

    Raises:
        ValueError: One has more than 8 bits a value.
    """
    for path in capture.images:
        with Image.open(path) as image:  # who read the cameras has seen that it can be
            check_bits(image, f"the picture {path}")


def load_views(capture: Capture, size: tuple[int, int], scene: SceneRange) -> Views:
    """Open the pictures, scale them by Lanczos so that they cover ``size``, and cut the centre out.

    Args:
        capture: All of its views are opened.
        size: Height and width of the result.
        scene: Scale, near and far.

    Returns:
        One scene, float32, in the host's units. The principal point is recomputed for the cut.

    Raises:
        ValueError: A picture is damaged, or has more than 8 bits a value.
    """
    pictures, matrices = [], []
    for path, inner in zip(capture.images, capture.intrinsics_norm, strict=True):
        try:
            with Image.open(path) as image:
                check_bits(image, f"the picture {path}")
                picture, cut = fit_picture(image.convert("RGB"), inner, size)
        except OSError as error:
            raise ValueError(f"the picture {path} cannot be read, copy it again: {error}") from error
        pictures.append(picture)
        matrices.append(cut)
    poses = capture.cam_to_world.clone()
    poses[:, :3, 3] *= scene.scale
    bounds = torch.ones(1, len(capture))
    return Views(
        torch.stack(pictures)[None],
        poses.float()[None],
        torch.stack(matrices).float()[None],
        scene.near * bounds,
        scene.far * bounds,
    )


def fit_range(
    capture: Capture,
    near: float,
    far: float,
    *,
    bounds: tuple[float, float] | None = None,
) -> SceneRange:
    """Scale a capture so that its depths fall into the range that a host knows: the 5th percentile at 1.5 ``near``.

    Args:
        capture: The scene.
        near: Least depth that the host was trained with, in its units.
        far: Largest.
        bounds: Least and largest depth of the scene in the capture's units, where the caller knows them. Otherwise they
            are those of the sparse points that each view sees; without points, a quarter and four times the median
            distance to the place that the cameras look at.

    Raises:
        ValueError: ``bounds`` are not 0 < near < far; or there are no points, and the cameras look at no common place.
    """
    if bounds is not None:
        if not 0 < bounds[0] < bounds[1]:
            raise ValueError(f"expected 0 < near < far; got {bounds[0]} and {bounds[1]}")
        depths, source = (bounds[0], (bounds[0] * bounds[1]) ** 0.5, bounds[1]), "given"
    elif capture.points is not None and len(seen := _seen_depths(capture, capture.points)):
        low, middle, high = torch.quantile(seen, torch.tensor([0.05, 0.5, 0.95], dtype=seen.dtype)).tolist()
        depths, source = (low, middle, high), f"{len(capture.points)} sparse points"
    else:
        middle = _common_depth(capture)
        depths, source = (middle / 4, middle, 4 * middle), "where the cameras look: a guess, give near and far instead"
    scale = 1.5 * near / depths[0]
    return SceneRange(scale, near, min(far, 1.5 * scale * depths[2]), depths, source)


def _seen_depths(capture: Capture, points: Tensor) -> Tensor:
    """Depths of the points that fall into each picture, of all of them; every n-th point where there are many."""
    points = points[:: 1 + len(points) * len(capture) // 4_000_000]
    local = (points - capture.cam_to_world[:, None, :3, 3]) @ capture.cam_to_world[:, :3, :3]
    depth = local[..., 2]
    place = local @ capture.intrinsics_norm.mT
    place = place[..., :2] / depth[..., None]
    inside = (depth > 0) & (place > 0).all(-1) & (place < 1).all(-1)
    seen = depth[inside]
    return seen[:: 1 + len(seen) // 1_000_000]


def _common_depth(capture: Capture) -> float:
    """Median depth of the point that lies closest to all optical axes."""
    axis, centre = capture.cam_to_world[:, :3, 2], capture.cam_to_world[:, :3, 3]
    across = torch.eye(3, dtype=axis.dtype) - axis[:, :, None] * axis[:, None, :]
    point = torch.linalg.lstsq(across.sum(0), (across @ centre[..., None]).sum(0)).solution[:, 0]
    depth = ((point - centre) * axis).sum(-1)
    spread = (centre - centre.mean(0)).norm(dim=-1).max()
    if float((depth > 0).double().mean()) < 0.9 or not float(depth.median()) < 1000 * float(spread):
        raise ValueError(
            "the capture has no sparse points, and its cameras look at no common place, so that its depth is unknown. "
            "Give near and far in the capture's units."
        )
    return float(depth.median())


def overlap(
    cam_to_world: Tensor, intrinsics_norm: Tensor, near: float, far: float, *, grid: int = 8, planes: int = 8
) -> Tensor:
    """Share of each view's frustum that each other view sees: ``[V, V]``, row ``i`` of view ``i``'s, 1 on the diagonal.

    Args:
        cam_to_world: ``[V, 4, 4]``.
        intrinsics_norm: ``[V, 3, 3]``.
        near: Least depth, in the units of the poses.
        far: Largest; between them, depths are spaced evenly in their inverse.
        grid: Samples per side of a picture.
        planes: Samples in depth.
    """
    steps = (torch.arange(grid, dtype=cam_to_world.dtype, device=cam_to_world.device) + 0.5) / grid
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    image = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)
    share = (torch.arange(planes, dtype=steps.dtype, device=steps.device) + 0.5) / planes
    depth = 1 / (1 / far + share * (1 / near - 1 / far))
    local = (image @ torch.linalg.inv(intrinsics_norm).mT)[:, None] * depth[:, None, None]  # [V, planes, points, 3]
    world = local.flatten(1, 2) @ cam_to_world[:, :3, :3].mT + cam_to_world[:, None, :3, 3]
    rows = []
    for points in world:
        theirs = (points - cam_to_world[:, None, :3, 3]) @ cam_to_world[:, :3, :3]
        z = theirs[..., 2]
        place = (theirs @ intrinsics_norm.mT)[..., :2] / z[..., None]
        rows.append(((z > 0) & (place > 0).all(-1) & (place < 1).all(-1)).to(cam_to_world.dtype).mean(-1))
    return torch.stack(rows)
