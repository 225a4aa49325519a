"""Motions in files: which format, which skeleton, how fast, which way is up. Every complaint names file and frame."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from hone_core.io import atomic_path
from hone_core.runs import Row, Run
from jaxtyping import Float
from torch import Tensor

from .config import Bones
from .dance import resampled
from .exports import export_distance, read_bvh, read_smpl, write_bvh, write_smpl
from .features import extract, recover
from .gltf import write_gltf
from .rotations import axis_angle_to_quat
from .skeletons import HUMANML3D, KIT, SMPL_OFFSETS, Skeleton, forward_kinematics
from .viewer import write_viewer

__all__ = ["READS", "SKELETONS", "STRETCHED", "WRITES", "Motion", "distance_lines", "distance_rows", "read_motion"]
__all__ += ["read_numbers", "write_motion"]

SKELETONS = {"humanml3d": HUMANML3D, "kit": KIT}
READS = (".npy", ".npz", ".bvh", ".pkl")
WRITES = (".npy", ".npz", ".bvh", ".gltf", ".mp4", ".html")
AIST_FPS = 60.0
STRETCHED = (".bvh", ".gltf")
"""Formats that can hold bones that stretch."""
_MEAN, _GREATEST = "distance of joints, mean", "distance of joints, greatest"


@dataclass(frozen=True)
class Motion:
    """A motion that was read and looked at.

    Attributes:
        joints: ``[frames, joints, 3]`` in metres, +y up.
        fps: Frames a second.
        skeleton: Of the joints.
    """

    joints: Float[Tensor, "frames joints 3"]
    fps: float
    skeleton: Skeleton


def read_motion(path: str | Path, skeleton: Skeleton = HUMANML3D, *, fps: float | None = None, up: str = "y") -> Motion:
    """Read a motion and check what can be checked.

    Args:
        path: ``.npy`` of joints ``[frames, joints, 3]`` or of features ``[rows, 263 or 251]``; ``.npz`` with SMPL's
            poses, as AMASS has them; ``.bvh``; ``.pkl`` of AIST++.
        skeleton: Whose joints it is to have.
        fps: Frames a second, for joints in ``.npy``; elsewhere the file says it, and must say the same.
        up: Axis that is up in the file, ``y`` or ``z``; z is turned to y.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another format, skeleton, frame rate, unit or up axis than said, or a joint is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    joints, said = _read(path, skeleton)
    for rate in (said, fps):
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{path}: frames a second must be positive; got {rate:g}")
    if said is None and fps is None:
        raise ValueError(f"{path} does not say how fast it is: give its frames a second with --fps, such as 20")
    if said is not None and fps is not None and abs(said - fps) > 0.01 * fps:
        raise ValueError(f"{path} has {said:g} frames a second and not {fps:g}, as was said; leave --fps out")
    if joints.shape[1:] != (skeleton.count, 3):
        raise ValueError(
            f"{path}: expected [frames, {skeleton.count}, 3] for {skeleton.name}; got {list(joints.shape)}, which is "
            "another skeleton"
        )
    bad = ~torch.isfinite(joints).all(-1).all(-1)
    if bool(bad.any()):
        raise ValueError(f"{path}, frame {int(bad.nonzero()[0])}: a joint is not finite")
    if len(joints) < 2:
        raise ValueError(f"{path} has {len(joints)} frame; expected two at least")
    if up == "z":
        joints = torch.stack([joints[..., 0], joints[..., 2], -joints[..., 1]], -1)
    _check_stance(joints, skeleton, path, up)
    speed = said if said is not None else fps
    assert speed is not None
    return Motion(joints, float(speed), skeleton)


def _read(path: Path, skeleton: Skeleton) -> tuple[Tensor, float | None]:
    if path.suffix == ".bvh":
        joints, fps, _ = read_bvh(path, skeleton)
        return joints, fps
    if path.suffix == ".npz":
        return read_smpl(path)
    if path.suffix == ".pkl":
        return read_aist(path), AIST_FPS
    if path.suffix != ".npy":
        raise ValueError(f"{path}: expected a file that ends in {', '.join(READS)}")
    values = read_numbers(path)
    if values.ndim == 2 and values.shape[1] == skeleton.width:
        bad = ~torch.isfinite(values).all(-1)
        if bool(bad.any()):
            raise ValueError(f"{path}, row {int(bad.nonzero()[0])}: a feature is not finite")
        return recover(values, skeleton), skeleton.fps
    if values.ndim != 3:
        raise ValueError(
            f"{path}: expected joints [frames, {skeleton.count}, 3] or features [rows, {skeleton.width}]; got "
            f"{list(values.shape)}"
        )
    return values, None


def read_numbers(path: Path) -> Float[Tensor, "*dims"]:
    """Real numbers of an ``.npy``, in double precision.

    Raises:
        ValueError: It is damaged or holds something else; the message names the file.
    """
    try:
        data = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers: {error}") from error
    if not isinstance(data, np.ndarray) or data.dtype.kind not in "iuf":
        raise ValueError(f"{path} is no array of numbers: it holds {getattr(data, 'dtype', 'several arrays')}")
    return torch.from_numpy(data.astype(np.float64))


def _check_stance(joints: Tensor, skeleton: Skeleton, path: Path, up: str) -> None:
    """Whether bodies are as tall as people, and stand rather than lie."""
    feet, head = list(skeleton.feet), skeleton.joints.index("head")
    body = joints[:, head] - joints[:, feet].mean(1)
    height = float(body.norm(dim=-1).median())
    if skeleton is HUMANML3D and not 0.3 < height < 3:
        raise ValueError(
            f"{path}: from feet to head are {height:.3g} m, and no person is so; give it in metres (a file in "
            "centimetres has to be divided by 100)"
        )
    share = body.abs().mean(0) / body.norm(dim=-1).mean()
    if float(share[1]) < 0.5 and float(share.max()) > 0.8:
        found = "xyz"[int(share.argmax())]
        # What was turned for z is named as in the file.
        found = found if up == "y" else {"x": "x", "z": "y"}[found]
        todo = "turn it first" if found == "x" else f"pass --up {found}"
        raise ValueError(f"{path}: bodies stand along {found} and not along {up}, as was said; {todo}")


class _Arrays(pickle.Unpickler):
    """Arrays and numbers, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")) or (
            module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar")
        ):
            import importlib

            return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_aist(path: str | Path) -> Float[Tensor, "frames 22 3"]:
    """Joints of a motion of AIST++ (``motions/*.pkl``): SMPL's poses, and its way divided by the scaling. 60 a second.

    Raises:
        ValueError: It is no such file, or holds more than arrays.
    """
    path = Path(path)
    file: IO[bytes]
    with path.open("rb") as file:
        try:
            data = _Arrays(file, encoding="latin1").load()
            poses, scaling, way = (np.asarray(data[f"smpl_{name}"]) for name in ("poses", "scaling", "trans"))
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is no motion of AIST++: {error}") from error
    if poses.ndim != 2 or poses.shape[1] != 72 or way.shape != (len(poses), 3) or scaling.size != 1:
        raise ValueError(
            f"{path}: expected poses [frames, 72] and a way [frames, 3]; got {poses.shape} and {way.shape}"
        )
    vectors = torch.from_numpy(poses[:, :66].astype(np.float64)).unflatten(1, (22, 3))
    root = torch.from_numpy(way.astype(np.float64) / float(scaling.reshape(())))
    return forward_kinematics(axis_angle_to_quat(vectors), root, torch.tensor(SMPL_OFFSETS)[:22], HUMANML3D.parents)


def distance_rows(run: Run, motions: Sequence[Motion], formats: Iterable[str], bones: Bones) -> None:
    """Add how far joints are from where they were, in the formats (without a dot) whose bones have one length."""
    kinds = [kind for kind in formats if kind == "npz" or (f".{kind}" in STRETCHED and bones == "fixed")]
    if not kinds:
        return
    found = 1000 * torch.cat([export_distance(motion.joints, motion.skeleton).flatten() for motion in motions])
    for metric, value in ((_MEAN, found.mean()), (_GREATEST, found.max())):
        run.row(metric, float(value), unit="mm", better="lower", n=len(motions), variant=", ".join(kinds))


def distance_lines(rows: Iterable[Row]) -> list[str]:
    """What ``distance_rows`` added, as text."""
    found = {row.metric: row for row in rows if row.metric in (_MEAN, _GREATEST)}
    if not found:
        return []
    mean, most = found[_MEAN], found[_GREATEST]
    line = (
        f"{mean.variant}: bones of one length, joints {mean.value:.1f} mm off on average, {most.value:.1f} mm at most"
    )
    exactly = "; in bvh and gltf --bones stretched puts them where they are"
    return [line + (exactly if most.value >= 0.05 else "")]


def write_motion(motion: Motion, path: str | Path, *, features: bool = False, bones: Bones = "fixed") -> Path:
    """Write a motion in the format of the path's suffix; returns the path.

    Args:
        motion: What was read or made.
        path: ``.npy``, ``.npz`` (SMPL's poses), ``.bvh``, ``.gltf``, ``.mp4`` or ``.html``, a page that shows it.
        features: For ``.npy``: features in place of joints, at the set's frame rate.
        bones: For ``.bvh`` and ``.gltf``: ``fixed``, of one length, or ``stretched``, joints exactly where they are.

    Raises:
        ValueError: There is no such format, or the skeleton has no such form.
    """
    path, skeleton = Path(path), motion.skeleton
    if path.suffix not in WRITES:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(WRITES)}")
    if features and path.suffix != ".npy":
        raise ValueError(f"{path}: features are written as .npy")
    if bones != "fixed" and path.suffix not in STRETCHED:
        raise ValueError(f"{path}: bones are {bones} in {', '.join(STRETCHED)}")
    if path.suffix == ".bvh":
        return write_bvh(motion.joints, path, skeleton, fps=motion.fps, bones=bones)
    if path.suffix == ".gltf":
        return write_gltf(motion.joints, path, skeleton, fps=motion.fps, bones=bones)
    if path.suffix == ".npz":
        return write_smpl(motion.joints, path, fps=motion.fps)
    if path.suffix == ".html":
        return write_viewer({path.stem: motion.joints}, path, skeleton, fps=motion.fps)
    if path.suffix == ".mp4":
        from .drawing import draw_frames, write_video

        return write_video(draw_frames({path.stem: motion.joints}, skeleton=skeleton), path, fps=motion.fps)
    joints = motion.joints
    if features:
        if motion.fps != skeleton.fps:
            joints = torch.from_numpy(resampled(joints.numpy(), motion.fps, skeleton.fps))
        offsets = skeleton.bone_offsets(joints[0]) if skeleton.lengths is None else None
        joints = extract(joints, skeleton, offsets=offsets)
    with atomic_path(path) as scratch:
        np.save(scratch, joints.numpy().astype(np.float32))
    return path
