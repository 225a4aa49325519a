import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hone_core.testing import assert_close
from hone_motion_anything.features import Columns, extract, mirror, part_columns, recover, recover_by_rotations, uniform
from hone_motion_anything.rotations import axis_angle_to_quat
from hone_motion_anything.skeletons import HUMANML3D, KIT, forward_kinematics

spec = importlib.util.spec_from_file_location("loops", Path(__file__).with_name("loops.py"))
loops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loops)


def moving(skeleton, frames=24, seed=0, turn=1.5, swing=0.4):
    """A body that walks, turns and swings every joint."""
    g = torch.Generator().manual_seed(seed)
    if skeleton.lengths is None:
        offsets = torch.tensor(skeleton.directions).double() * (0.1 + 0.3 * torch.rand(skeleton.count, 1, generator=g))
    else:
        offsets = skeleton.offsets()
    t = torch.linspace(0, 1, frames).double()
    phase, speed = torch.rand(2, skeleton.count, 3, generator=g).double()
    angles = swing * torch.sin(2 * math.pi * (t[:, None, None] * (1 + 2 * speed) + phase))
    angles[:, 0] = torch.stack([0 * t, turn * t, 0 * t], -1)
    root = torch.stack([1.5 * t, 0.9 + 0.05 * torch.sin(9 * t), 0.7 * t], -1)
    return forward_kinematics(axis_angle_to_quat(angles), root, offsets, skeleton.parents)


@pytest.mark.parametrize("skeleton", [HUMANML3D, KIT], ids=lambda s: s.name)
@pytest.mark.parametrize("turn", [0.0, 2.0])
def test_features_are_those_of_the_loops(skeleton, turn):
    joints = moving(skeleton, turn=turn)
    offsets = skeleton.bone_offsets(moving(skeleton, seed=5)[0])
    found = extract(joints, skeleton, offsets=offsets)
    assert found.shape == (23, skeleton.width)
    assert_close(found, torch.from_numpy(loops.extract(joints, skeleton, offsets)), atol=1e-9)


def test_features_of_the_release(golden):
    joints = moving(HUMANML3D)
    found = extract(joints)
    for key, value in golden["features"].items():
        row, column = map(int, key.split(","))
        assert abs(float(found[row, column]) - value) < 2e-5, key


@pytest.mark.parametrize("skeleton", [HUMANML3D, KIT], ids=lambda s: s.name)
def test_recovery_is_the_inverse(skeleton):
    joints = moving(skeleton)
    offsets = skeleton.bone_offsets(joints[0])
    features = extract(joints, skeleton, offsets=offsets)
    back = recover(features, skeleton)
    assert_close(recover_by_rotations(features, skeleton, offsets=offsets), back, atol=1e-9)
    # The same motion, seen from where it starts: all distances within and between frames are kept.
    flat, seen = joints[:-1].flatten(0, 1), back.flatten(0, 1)
    assert_close(torch.cdist(seen, seen), torch.cdist(flat, flat), atol=1e-7)
    again = extract(torch.cat([back, back[-1:]]), skeleton, offsets=offsets)
    assert_close(recover(again, skeleton), back, atol=1e-7)


def test_the_release_turns_wrong_past_half_a_turn_and_the_corrected_form_does_not():
    joints = moving(HUMANML3D, frames=160, turn=20.0, swing=0.02)
    offsets = HUMANML3D.bone_offsets(joints[0])
    far = {}
    for corrected in (False, True):
        back = recover(extract(joints, offsets=offsets, corrected_heading=corrected))
        seen, true = back.flatten(0, 1), joints[:-1].flatten(0, 1)
        far[corrected] = float((torch.cdist(seen, seen) - torch.cdist(true, true)).abs().max())
    assert far[True] < 1e-6
    assert far[False] > 0.05


def test_hips_of_the_release_cancel_shoulders():
    joints = moving(HUMANML3D, frames=60)
    first, second = extract(joints), extract(joints, corrected_heading=True)
    assert (first[5:, 0] - second[5:, 0]).abs().max() > 1e-4
    # Both recover the same joints.
    one, two = recover(first)[:, 0], recover(second)[:, 0]
    assert_close(torch.cdist(one, one), torch.cdist(two, two), atol=1e-6)


def test_batches_and_turned_inputs_are_the_same():
    one, two = moving(HUMANML3D), moving(HUMANML3D, seed=3)
    both = extract(torch.stack([one, two]))
    assert_close(both[0], extract(one))
    assert_close(both[1], extract(two))
    quarter = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]).double()
    assert_close(extract(one @ quarter + torch.tensor([3.0, 2.0, 1.0])), extract(one), atol=1e-9)


def test_uniform_gives_the_bones_asked_for():
    joints = uniform(moving(HUMANML3D), HUMANML3D.offsets())
    lengths = (joints[:, 1:] - joints[:, list(HUMANML3D.parents[1:])]).norm(dim=-1)
    assert_close(lengths[7], torch.tensor(HUMANML3D.lengths[1:]).double(), atol=1e-6)


def test_mirroring_twice_is_nothing():
    joints = moving(HUMANML3D)
    mirrored = mirror(joints)
    assert torch.equal(mirror(mirrored), joints)
    assert_close(mirrored[:, 20, 1:], joints[:, 21, 1:])


def test_every_column_belongs_to_one_part():
    columns = part_columns()
    assert sorted(c for own in columns for c in own) == list(range(263))
    names = Columns(22)
    assert names.width == 263
    assert names.contacts.start in columns[1]
    assert names.places.start + 3 * 19 in columns[4]  # the left wrist's x


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        (torch.zeros(5, 21, 3), "of another skeleton"),
        (torch.zeros(1, 22, 3), "at least two frames"),
        (torch.zeros(5, 22, 3).index_fill(0, torch.tensor([3]), math.nan), "frame 3 holds a joint that is not finite"),
    ],
)
def test_bad_joints(joints, message):
    with pytest.raises(ValueError, match=message):
        extract(joints)


def test_a_bone_without_a_length_is_named_by_frame_and_joints():
    joints = moving(HUMANML3D)
    joints[3, 15] = joints[3, 12]
    with pytest.raises(ValueError, match="frame 3: neck and head are in one place"):
        extract(joints)
    with pytest.raises(ValueError, match="frame 3: neck and head are in one place"):
        extract(torch.stack([moving(HUMANML3D), joints]))
    with pytest.raises(TypeError, match=r"floating-point numbers, metres; got torch\.int64"):
        extract((1000 * moving(HUMANML3D)).long())


def test_bad_features_and_unknown_bones():
    with pytest.raises(ValueError, match="features of KIT-ML must be"):
        recover(torch.zeros(4, 263), KIT)
    with pytest.raises(ValueError, match="bone lengths of KIT-ML are not public"):
        extract(moving(KIT), KIT)
