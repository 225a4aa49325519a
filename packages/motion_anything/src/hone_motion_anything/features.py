"""HumanML3D's features of motion (263 numbers a frame for 22 joints, 251 for KIT-ML's 21): joints to features and back.

A row holds the root's turning speed, its velocity and height; joints as seen from the root; rotations along the
chains in 6-D form; velocities; foot contacts. Everything takes batches: any dimensions may stand before frames.

Source: HumanML3D (Guo et al., CVPR 2022), as its released code computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from .rotations import between, conjugate, continuous, from_six, multiply, rotate, to_matrix, to_six
from .skeletons import HUMANML3D, PART_JOINTS, Skeleton

__all__ = ["Columns", "extract", "headings", "mirror", "part_columns", "recover", "recover_by_rotations", "uniform"]

SMOOTHING = 20.0
"""Standard deviation of the filter on the facing direction, in frames."""


@dataclass(frozen=True)
class Columns:
    """Where a row of features holds what.

    Args:
        joints: Their number.
    """

    joints: int

    @property
    def width(self) -> int:
        """Of a row."""
        return 12 * self.joints - 1

    @property
    def root(self) -> slice:
        """Half the turning speed, velocity along x and z, height."""
        return slice(0, 4)

    @property
    def places(self) -> slice:
        """Joints 1 and up as seen from the root, ``[joints - 1, 3]``."""
        return slice(4, 4 + 3 * (self.joints - 1))

    @property
    def turns(self) -> slice:
        """Rotations of joints 1 and up, ``[joints - 1, 6]``."""
        return slice(4 + 3 * (self.joints - 1), 4 + 9 * (self.joints - 1))

    @property
    def speeds(self) -> slice:
        """Velocities of all joints, ``[joints, 3]``, per frame."""
        return slice(4 + 9 * (self.joints - 1), self.width - 4)

    @property
    def contacts(self) -> slice:
        """Whether left ankle, left toe, right ankle, right toe stand."""
        return slice(self.width - 4, self.width)


def part_columns() -> tuple[tuple[int, ...], ...]:
    """Columns of the 263 that belong to each of ``skeletons.PARTS``; every column has one owner."""
    columns = Columns(22)
    found = []
    for number, group in enumerate(PART_JOINTS):
        own = list(range(4)) if number == 0 else []
        for joint in group:
            if joint:
                own += range(columns.places.start + 3 * (joint - 1), columns.places.start + 3 * joint)
                own += range(columns.turns.start + 6 * (joint - 1), columns.turns.start + 6 * joint)
            own += range(columns.speeds.start + 3 * joint, columns.speeds.start + 3 * (joint + 1))
        if number in (1, 2):
            first = columns.contacts.start + 2 * (number - 1)
            own += [first, first + 1]
        found.append(tuple(own))
    return tuple(found)


def headings(
    joints: Float[Tensor, "*dims frames joints 3"],
    skeleton: Skeleton = HUMANML3D,
    *,
    smooth: bool,
    corrected: bool = False,
) -> Float[Tensor, "*dims frames 4"]:
    """The turn about +y that makes each frame face +z; none in the first.

    Args:
        joints: In metres, +y up.
        skeleton: Of the set.
        smooth: Filter the direction over frames first.
        corrected: Take hips and shoulders with the same sign. The release takes the hips the other way round, so that
            they partly cancel the shoulders.
    """
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing
    hips = joints[..., right_hip, :] - joints[..., left_hip, :]
    across = (hips if corrected else -hips) + joints[..., right_shoulder, :] - joints[..., left_shoulder, :]
    across = across / across.norm(dim=-1, keepdim=True)
    up = across.new_tensor([0.0, 1.0, 0.0]).expand_as(across)
    forward = torch.linalg.cross(up, across)
    if smooth:
        forward = _smoothed(forward)
    forward = forward / forward.norm(dim=-1, keepdim=True)
    turn = between(forward, forward.new_tensor([0.0, 0.0, 1.0]))
    first = turn.new_tensor([1.0, 0.0, 0.0, 0.0]).expand_as(turn[..., :1, :])
    return torch.cat([first, turn[..., 1:, :]], -2)


def _smoothed(values: Tensor) -> Tensor:
    """A Gaussian filter along frames; beyond the ends stands the last value. As SciPy's: cut off at four deviations."""
    radius = int(4 * SMOOTHING + 0.5)
    at = torch.arange(-radius, radius + 1, device=values.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (at / SMOOTHING).square())
    weights = (weights / weights.sum()).to(values)
    frames = values.shape[-2]
    flat = values.reshape(-1, frames, values.shape[-1]).transpose(1, 2).reshape(-1, 1, frames)
    padded = torch.nn.functional.pad(flat, (radius, radius), mode="replicate")
    out = torch.nn.functional.conv1d(padded, weights[None, None])
    return out.reshape(-1, values.shape[-1], frames).transpose(1, 2).reshape(values.shape)


def _chain_rotations(joints: Tensor, heading: Tensor, skeleton: Skeleton) -> Tensor:
    """Rotations along the chains ``[..., frames, joints, 4]``.

    Every chain begins at the root's heading, also those that begin at the chest, as in the release.
    """
    directions = torch.tensor(skeleton.directions, dtype=joints.dtype, device=joints.device)
    found = [heading] * skeleton.count
    for chain in skeleton.chains:
        turn = heading
        for joint, child in pairwise(chain):
            bone = joints[..., child, :] - joints[..., joint, :]
            bone = bone / bone.norm(dim=-1, keepdim=True)
            found[child] = multiply(conjugate(turn), between(directions[child], bone))
            turn = multiply(turn, found[child])
    return torch.stack(found, -2)


def _along_chains(matrices: Tensor, root: Tensor, offsets: Tensor, skeleton: Skeleton) -> Tensor:
    """Joints of rotations along the chains, the reverse of ``_chain_rotations``."""
    places: list[Tensor] = [root] * skeleton.count
    offsets = offsets.to(root)
    for chain in skeleton.chains:
        turn = matrices[..., 0, :, :]
        for joint, child in pairwise(chain):
            turn = turn @ matrices[..., child, :, :]
            places[child] = places[joint] + (turn @ offsets[child][:, None])[..., 0]
    return torch.stack(places, -2)


def uniform(
    joints: Float[Tensor, "*dims frames joints 3"],
    offsets: Float[Tensor, "joints 3"],
    skeleton: Skeleton = HUMANML3D,
) -> Float[Tensor, "*dims frames joints 3"]:
    """The motion on other bones: directions stay, lengths are replaced, and the root's path is scaled by the legs."""
    offsets = offsets.to(joints)
    parents = list(skeleton.parents[1:])
    bones = joints[..., 1:, :] - joints[..., parents, :]
    first, second = skeleton.legs
    lengths = bones[..., 0, :, :].norm(dim=-1)
    scale = (offsets[first].norm() + offsets[second].norm()) / (lengths[..., first - 1] + lengths[..., second - 1])
    bones = bones / bones.norm(dim=-1, keepdim=True) * offsets[1:].norm(dim=-1, keepdim=True)
    places = [joints[..., 0, :] * scale[..., None, None]] * skeleton.count
    for chain in skeleton.chains:
        for joint, child in pairwise(chain):
            places[child] = places[joint] + bones[..., child - 1, :]
    return torch.stack(places, -2)


def extract(
    joints: Float[Tensor, "*dims frames joints 3"],
    skeleton: Skeleton = HUMANML3D,
    *,
    offsets: Float[Tensor, "joints 3"] | None = None,
    corrected_heading: bool = False,
) -> Float[Tensor, "*dims rows width"]:
    """Features of a motion, one row less than it has frames.

    Args:
        joints: In metres, +y up, at the set's frame rate.
        skeleton: Of the set.
        offsets: Bones that the motion is put on; None: those of the set's reference clip.
        corrected_heading: Hips and shoulders with the same sign, and quaternions that are continuous past half a turn.
            The release has neither, and its data need the default.

    Raises:
        TypeError: Joints are whole numbers.
        ValueError: There are fewer than two frames, another number of joints, a value that is not finite, or two
            joints of a bone in one place, which has no direction then; the message names the frame.

    Source: HumanML3D's ``process_file``.
    """
    check_joints(joints, skeleton)
    _check_bones(joints, skeleton)
    joints = uniform(joints, skeleton.offsets() if offsets is None else offsets, skeleton)
    level = joints.new_tensor([1.0, 0.0, 1.0])
    joints = joints - (1 - level) * joints[..., 1].amin((-1, -2))[..., None, None, None]
    start = joints[..., :1, :, :]
    joints = joints - start[..., :1, :] * level
    # The first pose faces +z, by hips and shoulders of the same sign.
    right_hip, left_hip, right_shoulder, left_shoulder = skeleton.facing
    across = start[..., right_hip, :] - start[..., left_hip, :]
    across = across + start[..., right_shoulder, :] - start[..., left_shoulder, :]
    forward = torch.linalg.cross(across.new_tensor([0.0, 1.0, 0.0]).expand_as(across), across)
    forward = forward / forward.norm(dim=-1, keepdim=True)
    joints = rotate(between(forward, forward.new_tensor([0.0, 0.0, 1.0]))[..., None, :], joints)

    feet = joints[..., list(skeleton.feet), :]
    contacts = (feet.diff(dim=-3).square().sum(-1) < skeleton.contact).to(joints.dtype)

    heading = headings(joints, skeleton, smooth=True, corrected=corrected_heading)
    if corrected_heading:
        heading = continuous(heading)
    turns = to_six(_chain_rotations(joints, heading, skeleton))[..., 1:, :].flatten(-2)
    steps = joints[..., 1:, 0, :] - joints[..., :-1, 0, :]
    velocity = rotate(heading[..., 1:, :], steps)
    turning = multiply(heading[..., 1:, :], conjugate(heading[..., :-1, :]))[..., 2].clamp(-1, 1).arcsin()
    seen = rotate(heading[..., None, :], joints - joints[..., :1, :] * level)
    speeds = rotate(heading[..., :-1, None, :], joints.diff(dim=-3)).flatten(-2)
    parts = [
        turning[..., None],
        velocity[..., [0, 2]],
        seen[..., :-1, 0, 1:2],
        seen[..., :-1, 1:, :].flatten(-2),
        turns[..., :-1, :],
        speeds,
        contacts,
    ]
    return torch.cat(parts, -1)


def _check_bones(joints: Tensor, skeleton: Skeleton) -> None:
    """Refuse what has a bone without a length: its row would hold numbers that are none."""
    if not joints.is_floating_point():
        raise TypeError(f"joints must be floating-point numbers, metres; got {joints.dtype}")
    bones = joints[..., 1:, :] - joints[..., list(skeleton.parents[1:]), :]
    gone = bones.norm(dim=-1) < 1e-6
    if bool(gone.any()):
        frame, bone = gone.reshape(-1, *gone.shape[-2:]).any(0).nonzero()[0].tolist()
        ends = skeleton.joints[skeleton.parents[bone + 1]], skeleton.joints[bone + 1]
        raise ValueError(
            f"frame {frame}: {ends[0]} and {ends[1]} are in one place, so that the bone between them has no direction. "
            "Move one of them a little along it"
        )


def check_joints(joints: Tensor, skeleton: Skeleton) -> None:
    """Refuse what is no motion of a skeleton; see ``extract``.

    Raises:
        ValueError: See ``extract``.
    """
    if joints.ndim < 3 or joints.shape[-1] != 3 or joints.shape[-2] != skeleton.count:
        raise ValueError(
            f"joints must be [frames, {skeleton.count}, 3] for {skeleton.name}; got {list(joints.shape)}: it is of "
            "another skeleton"
        )
    if joints.shape[-3] < 2:
        raise ValueError(f"features need at least two frames; got {joints.shape[-3]}")
    bad = ~torch.isfinite(joints).all(-1).all(-1)
    if bool(bad.any()):
        frame = int(bad.reshape(-1, bad.shape[-1]).any(0).nonzero()[0])
        raise ValueError(f"frame {frame} holds a joint that is not finite")


def check_motion(joints: Tensor, skeleton: Skeleton) -> None:
    """Refuse what is not one motion of a skeleton, such as a batch where a file holds one.

    Raises:
        ValueError: See ``extract``; or there are several.
    """
    check_joints(joints, skeleton)
    if joints.ndim > 3:
        raise ValueError(
            f"expected one motion, [frames, {skeleton.count}, 3]; got {list(joints.shape)}. Pass several one by one"
        )


def _root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Heading and place of the root in every row."""
    turning = features[..., 0]
    # The column is half the angle already, as quaternions want it.
    angle = torch.cat([torch.zeros_like(turning[..., :1]), turning[..., :-1]], -1).cumsum(-1)
    zero = torch.zeros_like(angle)
    heading = torch.stack([angle.cos(), zero, angle.sin(), zero], -1)
    step = torch.stack([features[..., 1], zero, features[..., 2]], -1)
    step = torch.cat([torch.zeros_like(step[..., :1, :]), step[..., :-1, :]], -2)
    place = rotate(conjugate(heading), step).cumsum(-2)
    return heading, torch.stack([place[..., 0], features[..., 3], place[..., 2]], -1)


def recover(
    features: Float[Tensor, "*dims rows width"], skeleton: Skeleton = HUMANML3D
) -> Float[Tensor, "*dims rows joints 3"]:
    """Joints of features, by the places that they hold.

    Raises:
        ValueError: The rows are of another width.

    Source: HumanML3D's ``recover_from_ric``.
    """
    _check_width(features, skeleton)
    heading, root = _root(features)
    seen = features[..., Columns(skeleton.count).places].unflatten(-1, (-1, 3))
    joints = rotate(conjugate(heading)[..., None, :], seen)
    level = joints.new_tensor([1.0, 0.0, 1.0])
    return torch.cat([root[..., None, :], joints + (root * level)[..., None, :]], -2)


def recover_by_rotations(
    features: Float[Tensor, "*dims rows width"],
    skeleton: Skeleton = HUMANML3D,
    *,
    offsets: Float[Tensor, "joints 3"] | None = None,
) -> Float[Tensor, "*dims rows joints 3"]:
    """Joints of features, by the rotations that they hold; bones keep the lengths of ``offsets``.

    Source: HumanML3D's ``recover_from_rot``.
    """
    _check_width(features, skeleton)
    heading, root = _root(features)
    six = features[..., Columns(skeleton.count).turns].unflatten(-1, (-1, 6))
    matrices = torch.cat([to_matrix(heading)[..., None, :, :], from_six(six)], -3)
    return _along_chains(matrices, root, skeleton.offsets() if offsets is None else offsets, skeleton)


def _check_width(features: Tensor, skeleton: Skeleton) -> None:
    if features.ndim < 2 or features.shape[-1] != skeleton.width:
        raise ValueError(
            f"features of {skeleton.name} must be [rows, {skeleton.width}]; got {list(features.shape)}. "
            "Another width is of another set"
        )


def mirror(
    joints: Float[Tensor, "*dims frames joints 3"], skeleton: Skeleton = HUMANML3D
) -> Float[Tensor, "*dims frames joints 3"]:
    """Left and right exchanged."""
    left, right = skeleton.mirrored
    order = list(range(skeleton.count))
    for one, other in zip(left, right, strict=True):
        order[one], order[other] = other, one
    return joints[..., order, :] * joints.new_tensor([-1.0, 1.0, 1.0])
