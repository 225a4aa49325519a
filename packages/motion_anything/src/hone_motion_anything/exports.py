"""Motion as files: BVH for animation tools, NPZ with SMPL's parameters, and both read back.

Joints alone do not say how a bone is twisted: rotations turn each bone the shortest way from the rest pose, and a
joint with several children to fit them all. Bones at rest are the mean of the motion's own, so that a rigid motion
comes back exactly. One whose bones stretch comes back exactly with ``bones="stretched"``, a place for each joint in
each frame.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from hone_core.io import atomic_path, atomic_write_text
from jaxtyping import Float
from torch import Tensor

from .config import Bones
from .features import check_motion
from .rotations import axis_angle_to_quat, conjugate, matrix_to_axis_angle, multiply, rotate, to_matrix
from .skeletons import HUMANML3D, SMPL_OFFSETS, Skeleton, forward_kinematics, local_rotations

__all__ = ["Rig", "export_distance", "fit_rig", "read_bvh", "read_smpl", "write_bvh", "write_smpl"]


class Rig(NamedTuple):
    """A motion as a skeleton at rest that moves.

    Attributes:
        offsets: Bones at rest in metres; the root's is 0.
        rotations: ``quat_wxyz`` relative to the parent.
        places: Of each joint in its parent's frame, in metres; the root's in the world.
    """

    offsets: Float[Tensor, "joints 3"]
    rotations: Float[Tensor, "frames joints 4"]
    places: Float[Tensor, "frames joints 3"]


def fit_rig(joints: Float[Tensor, "frames joints 3"], skeleton: Skeleton = HUMANML3D, bones: Bones = "fixed") -> Rig:
    """The skeleton at rest and its motion, in double precision on the CPU.

    Args:
        joints: In metres, +y up.
        skeleton: Of the joints; at rest its bones point as SMPL's or as the set's, in the mean of the motion's lengths
            and of its angles between the bones of one joint.
        bones: ``fixed`` leaves each joint at its bone's end; ``stretched`` puts it where it is, in each frame.

    Raises:
        ValueError: The joints are of another skeleton, of several motions, or not finite; ``bones`` is neither.
    """
    if bones not in get_args(Bones):
        raise ValueError(f"bones must be one of {', '.join(get_args(Bones))}; got {bones!r}")
    joints = joints.detach().double().cpu()
    check_motion(joints, skeleton)
    directions = SMPL_OFFSETS[:22] if skeleton is HUMANML3D else skeleton.directions
    rest = torch.tensor(directions, dtype=torch.float64)
    spans = torch.cat([torch.zeros_like(joints[:, :1]), joints[:, 1:] - joints[:, list(skeleton.parents[1:])]], 1)
    offsets = _in_parents(spans, local_rotations(joints, rest, skeleton), skeleton).mean(0)
    rotations = local_rotations(joints, offsets, skeleton)
    places = offsets.expand_as(joints) if bones == "fixed" else _in_parents(spans, rotations, skeleton)
    return Rig(offsets, rotations, torch.cat([joints[:, :1], places[:, 1:]], 1))


def _in_parents(spans: Tensor, rotations: Tensor, skeleton: Skeleton) -> Tensor:
    """Bones of the world, ``[frames, joints, 3]``, as each one's parent sees them."""
    turns, found = [rotations[:, 0]], [spans[:, 0]]
    for joint in range(1, skeleton.count):
        parent = skeleton.parents[joint]
        found.append(rotate(conjugate(turns[parent]), spans[:, joint]))
        turns.append(multiply(turns[parent], rotations[:, joint]))
    return torch.stack(found, 1)


def export_distance(
    joints: Float[Tensor, "frames joints 3"], skeleton: Skeleton = HUMANML3D
) -> Float[Tensor, "frames joints"]:
    """How far, in metres, each joint of an export with fixed bones is from where it was.

    Raises:
        ValueError: The joints are of another skeleton, of several motions, or not finite.
    """
    rig = fit_rig(joints, skeleton)
    back = forward_kinematics(rig.rotations, rig.places[:, 0], rig.offsets, skeleton.parents)
    return (back - joints.detach().double().cpu()).norm(dim=-1)


def write_bvh(
    joints: Float[Tensor, "frames joints 3"],
    path: str | Path,
    skeleton: Skeleton = HUMANML3D,
    *,
    fps: float | None = None,
    bones: Bones = "fixed",
) -> Path:
    """Write a BVH in centimetres, rotations as Euler angles z, y, x in degrees; returns the path.

    Args:
        joints: In metres, +y up.
        path: File to write.
        skeleton: Of the joints.
        fps: Frames a second; the set's if None.
        bones: ``fixed``, three channels a joint and six for the root; ``stretched``, six for each, whose places stand
            in for the offsets.

    Raises:
        ValueError: The joints are of another skeleton, of several motions, or not finite; ``bones`` is neither.
    """
    rig = fit_rig(joints, skeleton, bones)
    angles = _euler(to_matrix(rig.rotations))
    # Joints that have a place in each frame.
    placed = (0,) if bones == "fixed" else range(skeleton.count)
    lines = ["HIERARCHY"]

    def add(joint: int, depth: int) -> None:
        pad = "\t" * depth
        x, y, z = (100 * rig.offsets[joint]).tolist()
        channels = "3 Zrotation Yrotation Xrotation"
        if joint in placed:
            channels = f"6 Xposition Yposition Zposition {channels[2:]}"
        lines.append(f"{pad}{'JOINT' if depth else 'ROOT'} {skeleton.joints[joint]}")
        lines.append(f"{pad}{{")
        lines.append(f"{pad}\tOFFSET {x:.6f} {y:.6f} {z:.6f}")
        lines.append(f"{pad}\tCHANNELS {channels}")
        for child in skeleton.children[joint]:
            add(child, depth + 1)
        if not skeleton.children[joint]:
            lines.extend([f"{pad}\tEnd Site", f"{pad}\t{{", f"{pad}\t\tOFFSET 0 0 0", f"{pad}\t}}"])
        lines.append(f"{pad}}}")

    add(0, 0)
    rate = fps or skeleton.fps
    lines += ["MOTION", f"Frames: {len(joints)}", f"Frame Time: {1 / rate:.8f}"]
    columns: list[Tensor] = []
    for joint in skeleton.order:
        columns += [100 * rig.places[:, joint]] if joint in placed else []
        columns.append(angles[:, joint])
    lines += [" ".join(f"{value:.6f}" for value in row) for row in torch.cat(columns, 1).tolist()]
    return atomic_write_text(path, "\n".join(lines) + "\n")


def _euler(matrix: Tensor) -> Tensor:
    """Angles z, y, x in degrees, of R = Rz Ry Rx."""
    y = torch.asin((-matrix[..., 2, 0]).clamp(-1, 1))
    z = torch.atan2(matrix[..., 1, 0], matrix[..., 0, 0])
    x = torch.atan2(matrix[..., 2, 1], matrix[..., 2, 2])
    # Where y is a right angle, z and x are one angle: x is taken as 0.
    locked = matrix[..., 0, 0].hypot(matrix[..., 1, 0]) < 1e-9
    z = torch.where(locked, torch.atan2(-matrix[..., 0, 1], matrix[..., 1, 1]), z)
    x = torch.where(locked, torch.zeros_like(x), x)
    return torch.rad2deg(torch.stack([z, y, x], -1))


class _Words:
    """Words of a BVH with their lines, for messages that say where."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no BVH: it is no text") from error
        self.words = [(word, number) for number, line in enumerate(text.splitlines(), 1) for word in line.split()]
        self.at = 0

    def fail(self, expected: str, frame: int | None = None) -> ValueError:
        found, line = self.words[self.at] if self.at < len(self.words) else ("its end", self.last)
        where = f"{self.path}, line {line}" + ("" if frame is None else f", frame {frame}")
        return ValueError(f"{where}: expected {expected}; got {found}. The file is damaged, or no BVH")

    @property
    def last(self) -> int:
        return self.words[-1][1] if self.words else 1

    def peek(self) -> str:
        return self.words[self.at][0] if self.at < len(self.words) else ""

    def take(self, expected: str | None = None) -> str:
        if self.at >= len(self.words) or (expected is not None and self.peek() != expected):
            raise self.fail(expected or "a word")
        self.at += 1
        return self.words[self.at - 1][0]

    def numbers(self, count: int, width: int | None = None) -> list[float]:
        """The next ones; ``width`` are a frame."""
        found: list[float] = []
        for _ in range(count):
            try:
                value = float(self.peek())
            except ValueError:
                raise self.fail("a number", width and len(found) // width) from None
            if not math.isfinite(value):
                raise self.fail("a finite number", width and len(found) // width)
            found.append(value)
            self.at += 1
        return found


def read_bvh(
    path: str | Path, skeleton: Skeleton | None = HUMANML3D
) -> tuple[Float[Tensor, "frames joints 3"], float, tuple[str, ...]]:
    """Joints in metres, frames a second, and names, in the order of ``skeleton``.

    Args:
        path: A BVH in centimetres, +y up, with any order of channels.
        skeleton: Whose joints the file is to have, by name; None takes all in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another skeleton; the message names the line or the frame.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    words = _Words(path)
    names: list[str] = []
    parents: list[int] = []
    offsets: list[list[float]] = []
    channels: list[list[str]] = []

    def joint(parent: int) -> None:
        number = len(names)
        names.append(words.take())
        parents.append(parent)
        words.take("{")
        words.take("OFFSET")
        offsets.append(words.numbers(3))
        words.take("CHANNELS")
        count = int(words.numbers(1)[0])
        channels.append([words.take() for _ in range(count)])
        if bad := [c for c in channels[-1] if c[1:] not in ("position", "rotation") or c[:1] not in "XYZ"]:
            raise ValueError(f"{path}: joint {names[-1]} has the unknown channel {bad[0]}")
        while words.peek() == "JOINT":
            words.take()
            joint(number)
        if words.peek() == "End":
            words.take()
            words.take("Site")
            words.take("{")
            words.take("OFFSET")
            words.numbers(3)
            words.take("}")
        words.take("}")

    words.take("HIERARCHY")
    words.take("ROOT")
    try:
        joint(-1)
    except RecursionError:
        raise ValueError(f"{path}: its joints stand in one another too deep. The file is damaged, or no BVH") from None
    words.take("MOTION")
    words.take("Frames:")
    frames = int(words.numbers(1)[0])
    words.take("Frame")
    words.take("Time:")
    seconds = words.numbers(1)[0]
    if frames < 1 or seconds <= 0:
        raise ValueError(f"{path} says {frames} frames of {seconds} s; expected at least one of a positive time")
    width = sum(map(len, channels))
    if not width:
        raise ValueError(f"{path}: no joint has a channel")
    found = (len(words.words) - words.at) / width
    if found != frames:
        rows = [len(list(row)) for _, row in groupby(words.words[words.at :], key=lambda word: word[1])]
        odd = next((frame for frame, row in enumerate(rows) if row != width), min(len(rows), frames))
        short = odd == len(rows) or rows[odd] < width
        raise ValueError(
            f"{path} says {frames} frames of {width} numbers and holds {found:g}: frame {odd} is "
            f"{'cut short' if short else 'too much'}"
        )
    data = torch.tensor(words.numbers(frames * width, width), dtype=torch.float64).view(frames, width)
    places: list[Tensor] = []
    turns: list[Tensor] = []
    at = 0
    for number, own in enumerate(channels):
        move = torch.tensor(offsets[number], dtype=torch.float64).expand(frames, 3).clone()
        turn = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(frames, 4)
        for channel in own:
            axis = "XYZ".index(channel[0])
            if channel.endswith("position"):
                move[:, axis] = data[:, at]
            else:
                vector = torch.zeros(frames, 3, dtype=torch.float64)
                vector[:, axis] = torch.deg2rad(data[:, at])
                turn = multiply(turn, axis_angle_to_quat(vector))
            at += 1
        parent = parents[number]
        if parent < 0:
            places.append(move)
            turns.append(to_matrix(turn))
        else:
            places.append(places[parent] + (turns[parent] @ move[..., None])[..., 0])
            turns.append(turns[parent] @ to_matrix(turn))
    joints = torch.stack(places, 1) / 100
    if skeleton is not None:
        if missing := [name for name in skeleton.joints if name not in names]:
            raise ValueError(
                f"{path} is of another skeleton than {skeleton.name}: it has {len(names)} joints and no "
                f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}. Rename its joints"
            )
        joints, names = joints[:, [names.index(name) for name in skeleton.joints]], list(skeleton.joints)
    return joints, 1 / seconds, tuple(names)


def write_smpl(joints: Float[Tensor, "frames 22 3"], path: str | Path, *, fps: float = 20.0) -> Path:
    """Write an NPZ with SMPL's parameters, as AMASS names them; returns the path.

    ``poses`` ``[frames, 72]`` in radians with hands at rest, ``trans``, ``betas`` 0, ``mocap_framerate``, ``gender``;
    beside them ``offsets`` ``[22, 3]``, the mean of the motion's bones, which SMPL's mean body has about.

    Args:
        joints: In metres, +y up.
        path: File to write, ``.npz``.
        fps: Frames a second.

    Raises:
        ValueError: The joints are of another skeleton, of several motions, or not finite.
    """
    rig = fit_rig(joints)
    vectors = matrix_to_axis_angle(to_matrix(rig.rotations))
    poses = torch.cat([vectors.flatten(1), vectors.new_zeros(len(vectors), 6)], 1)
    with atomic_path(path) as scratch:
        np.savez(
            scratch,
            poses=poses.numpy(),
            # SMPL turns about its pelvis, which lies off the model's origin by a constant that only its file holds.
            trans=rig.places[:, 0].numpy(),
            betas=np.zeros(10),
            mocap_framerate=np.float64(fps),
            gender=np.str_("neutral"),
            offsets=rig.offsets.numpy(),
        )
    return Path(path)


def read_smpl(path: str | Path) -> tuple[Float[Tensor, "frames 22 3"], float]:
    """Joints in metres, and frames a second, of such an NPZ: AMASS's and AIST++'s poses too, on the mean body's bones.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none, or a pose is not finite; the message names the file and the frame.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no NPZ, or is cut short")
    try:
        with np.load(path, allow_pickle=False) as data:
            held = {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged NPZ: {error}") from error
    if missing := [name for name in ("poses", "trans", "mocap_framerate") if name not in held]:
        raise ValueError(f"{path} has no {', '.join(missing)}; it holds {', '.join(held) or 'nothing'}")
    poses, trans, rate = held["poses"], held["trans"], held["mocap_framerate"]
    rest = held.get("offsets", np.asarray(SMPL_OFFSETS)[:22])
    if other := [value.dtype for value in (poses, trans, rate, rest) if value.dtype.kind not in "iuf"]:
        raise ValueError(f"{path}: expected numbers; got {other[0]}")
    if poses.ndim != 2 or poses.shape[1] < 66 or trans.shape != (len(poses), 3):
        raise ValueError(
            f"{path}: expected poses [frames, 66 or more] and trans [frames, 3]; got {poses.shape}, {trans.shape}"
        )
    if rest.shape != (22, 3) or rate.size != 1:
        raise ValueError(f"{path}: expected offsets [22, 3] and one mocap_framerate; got {rest.shape}, {rate.shape}")
    bad = ~(np.isfinite(poses).all(1) & np.isfinite(trans).all(1))
    if bad.any():
        raise ValueError(f"{path}, frame {int(bad.nonzero()[0][0])}: a pose is not finite")
    vectors = torch.from_numpy(poses[:, :66]).double().unflatten(1, (22, 3))
    joints = forward_kinematics(
        axis_angle_to_quat(vectors), torch.from_numpy(trans).double(), torch.from_numpy(rest), HUMANML3D.parents
    )
    return joints, float(rate.item())
