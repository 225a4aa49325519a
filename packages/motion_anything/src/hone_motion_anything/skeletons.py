"""Skeletons of the motion sets: joints, chains, rest offsets, parts of the body, and kinematics along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from .rotations import axis_angle_to_quat, between, conjugate, kabsch, matrix_to_axis_angle, multiply, rotate

__all__ = [
    "HUMANML3D",
    "KIT",
    "PARTS",
    "PART_JOINTS",
    "SMPL_OFFSETS",
    "Skeleton",
    "forward_kinematics",
    "local_rotations",
]

PARTS = ("root", "left leg", "right leg", "torso", "left arm", "right arm")
"""Parts of the body, in the order of token columns. Ours: the paper names no parts."""
PART_JOINTS = ((0,), (1, 4, 7, 10), (2, 5, 8, 11), (3, 6, 9, 12, 15), (13, 16, 18, 20), (14, 17, 19, 21))
"""Joints of each."""


@dataclass(frozen=True)
class Skeleton:
    """A set's skeleton.

    Attributes:
        name: Of the set.
        joints: Names, by number.
        chains: From the root outwards, as the set's features walk them.
        directions: Of each bone at rest, along one axis.
        lengths: Of each bone in metres, the root's is 0; None where the set's reference clip is not public.
        facing: Right hip, left hip, right shoulder, left shoulder.
        feet: Left ankle, left toe, right ankle, right toe.
        legs: Two joints whose bones give the scale.
        fps: Frames in a second.
        contact: Squared motion of a foot between frames, below which it stands, in the set's units.
        mirrored: Joints of the left side and of the right.
    """

    name: str
    joints: tuple[str, ...]
    chains: tuple[tuple[int, ...], ...]
    directions: tuple[tuple[int, int, int], ...]
    lengths: tuple[float, ...] | None
    facing: tuple[int, int, int, int]
    feet: tuple[int, int, int, int]
    legs: tuple[int, int]
    fps: float
    contact: float
    mirrored: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def count(self) -> int:
        """Number of joints."""
        return len(self.joints)

    @property
    def width(self) -> int:
        """Numbers in a row of features: 263 for 22 joints, 251 for 21."""
        return 12 * self.count - 1

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Joint that each hangs on; -1 for the root."""
        found = [-1] * self.count
        for chain in self.chains:
            for joint, child in pairwise(chain):
                found[child] = joint
        return tuple(found)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Joints that hang on each."""
        return tuple(tuple(j for j, parent in enumerate(self.parents) if parent == i) for i in range(self.count))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Joints depth first, each limb whole."""
        found: list[int] = []

        def walk(joint: int) -> None:
            found.append(joint)
            for child in self.children[joint]:
                walk(child)

        walk(0)
        return tuple(found)

    def offsets(self) -> Float[Tensor, "joints 3"]:
        """Bones at rest: direction times length.

        Raises:
            ValueError: The set's lengths are not public.
        """
        if self.lengths is None:
            raise ValueError(
                f"bone lengths of {self.name} are not public: measure them on its reference clip with bone_offsets()"
            )
        return torch.tensor(self.directions, dtype=torch.float64) * torch.tensor(self.lengths)[:, None].double()

    def bone_offsets(self, pose: Float[Tensor, "joints 3"]) -> Float[Tensor, "joints 3"]:
        """Bones at rest with the lengths that they have in a pose."""
        lengths = (pose[1:] - pose[list(self.parents[1:])]).norm(dim=-1)
        directions = torch.tensor(self.directions, dtype=pose.dtype, device=pose.device)
        return directions * torch.cat([lengths.new_zeros(1), lengths])[:, None]


def forward_kinematics(
    rotations: Float[Tensor, "*dims joints 4"],
    root: Float[Tensor, "*dims 3"],
    offsets: Float[Tensor, "joints 3"],
    parents: Sequence[int],
) -> Float[Tensor, "*dims joints 3"]:
    """Joints of rotations that are relative to the parent, as SMPL and BVH hold them.

    Args:
        rotations: ``quat_wxyz`` of each joint.
        root: Place of the root.
        offsets: Bones at rest.
        parents: Joint that each hangs on, with a smaller number.
    """
    places, turns = [root], [rotations[..., 0, :]]
    offsets = offsets.to(root)
    for joint in range(1, len(parents)):
        parent = parents[joint]
        places.append(places[parent] + rotate(turns[parent], offsets[joint]))
        turns.append(multiply(turns[parent], rotations[..., joint, :]))
    return torch.stack(places, -2)


def local_rotations(
    joints: Float[Tensor, "*dims joints 3"], offsets: Float[Tensor, "joints 3"], skeleton: Skeleton
) -> Float[Tensor, "*dims joints 4"]:
    """Rotations relative to the parent that put the bones where they are, without a twist.

    A joint with one child turns the shortest way; one with several is fitted to all of them; one without stays. So the
    joints come back by ``forward_kinematics`` as far as their bones have the lengths of ``offsets``.
    """
    offsets = offsets.to(joints)
    world: list[Tensor] = [joints.new_zeros(())] * skeleton.count
    local: list[Tensor] = [joints.new_zeros(())] * skeleton.count
    still = joints.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(*joints.shape[:-2], 4)
    for joint in skeleton.order:
        parent = skeleton.parents[joint]
        above = still if parent < 0 else world[parent]
        children = list(skeleton.children[joint])
        bones = rotate(conjugate(above)[..., None, :], joints[..., children, :] - joints[..., joint : joint + 1, :])
        if not children:
            local[joint] = still
        elif len(children) == 1:
            local[joint] = between(offsets[children[0]], bones[..., 0, :])
        else:
            turn = kabsch(offsets[children].expand_as(bones), bones)
            local[joint] = axis_angle_to_quat(matrix_to_axis_angle(turn))
        world[joint] = multiply(above, local[joint])
    return torch.stack(local, -2)


_X, _Y, _Z = (1, 0, 0), (0, 1, 0), (0, 0, 1)
_NX, _NY = (-1, 0, 0), (0, -1, 0)

HUMANML3D = Skeleton(
    name="HumanML3D",
    joints=(
        *("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle"),
        *("right_ankle", "spine3", "left_toe", "right_toe", "neck", "left_collar", "right_collar", "head"),
        *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    ),
    chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
    directions=(
        *((0, 0, 0), _X, _NX, _Y, _NY, _NY, _Y, _NY, _NY, _Y, _Z),
        *(_Z, _Y, _X, _NX, _Z, _NY, _NY, _NY, _NY, _NY, _NY),
    ),
    lengths=(
        *(0.0, 0.1031, 0.1099, 0.1316, 0.3936, 0.3902, 0.1432, 0.4324, 0.4256, 0.0574, 0.1434),
        *(0.1494, 0.2194, 0.1375, 0.1434, 0.1030, 0.1316, 0.1230, 0.2568, 0.2631, 0.2660, 0.2699),
    ),
    facing=(2, 1, 17, 16),
    feet=(7, 10, 8, 11),
    legs=(5, 8),
    fps=20.0,
    contact=0.002,
    mirrored=((1, 4, 7, 10, 13, 16, 18, 20), (2, 5, 8, 11, 14, 17, 19, 21)),
)
"""SMPL's first 22 joints; metres, +y up, facing +z, left is +x. Lengths of clip 000021, to a tenth of a millimetre."""

KIT = Skeleton(
    name="KIT-ML",
    joints=(
        *("root", "belly_point", "spine", "neck", "head", "left_shoulder", "left_elbow", "left_wrist"),
        *("right_shoulder", "right_elbow", "right_wrist", "left_hip", "left_knee", "left_ankle", "left_foot"),
        *("left_toe", "right_hip", "right_knee", "right_ankle", "right_foot", "right_toe"),
    ),
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    directions=(
        *((0, 0, 0), _Y, _Y, _Y, _Y, _X, _NY, _NY, _NX, _NY, _NY),
        *(_X, _NY, _NY, _Z, _Z, _NX, _NY, _NY, _Z, _Z),
    ),
    lengths=None,
    facing=(11, 16, 5, 8),
    feet=(19, 20, 14, 15),
    legs=(17, 18),
    fps=12.5,
    contact=0.05,
    mirrored=((5, 6, 7, 11, 12, 13, 14, 15), (8, 9, 10, 16, 17, 18, 19, 20)),
)
"""21 joints at 12.5 frames a second, by the names of KIT's model; HumanML3D's code takes its left for right."""

SMPL_OFFSETS = (
    *((0.0, 0.0, 0.0), (0.0586, -0.0823, -0.0177), (-0.0603, -0.0905, -0.0135), (0.0044, 0.1244, -0.0384)),
    *((0.0435, -0.3865, 0.0080), (-0.0433, -0.3837, -0.0048), (0.0045, 0.1380, 0.0268), (-0.0148, -0.4269, -0.0374)),
    *((0.0191, -0.4200, -0.0346), (-0.0023, 0.0560, 0.0029), (0.0411, -0.0603, 0.1220), (-0.0348, -0.0621, 0.1303)),
    *((-0.0134, 0.2116, -0.0335), (0.0717, 0.1140, -0.0189), (-0.0830, 0.1125, -0.0237), (0.0101, 0.0889, 0.0504)),
    *((0.1229, 0.0452, -0.0190), (-0.1132, 0.0469, -0.0085), (0.2553, -0.0156, -0.0229), (-0.2601, -0.0144, -0.0313)),
    *((0.2657, 0.0127, -0.0074), (-0.2691, 0.0068, -0.0060), (0.0867, -0.0106, -0.0156), (-0.0888, -0.0087, -0.0101)),
)
"""Bones of the neutral SMPL body at rest in metres, 24 joints: enough for kinematics without SMPL's own file."""
