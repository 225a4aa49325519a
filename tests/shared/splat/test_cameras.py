import math

import pytest
import torch
from hone_splat import cameras
from hone_splat.cameras import (
    check_cameras,
    fly_through,
    look_at,
    matrix_to_quat,
    opengl_to_opencv,
    quat_multiply,
    quat_to_matrix,
    unproject,
)


def rotations(count=64):
    torch.manual_seed(0)
    half_turns = torch.eye(4)[1:].double()
    return quat_to_matrix(
        torch.cat([torch.randn(count, 4).double(), half_turns, torch.tensor([[1.0, 0, 0, 0]]).double()])
    )


def test_quaternions_and_matrices():
    turns = rotations()
    quats = matrix_to_quat(turns)
    assert torch.allclose(quat_to_matrix(quats), turns, atol=1e-12)
    assert bool((quats[:, 0] >= 0).all())
    both = quat_multiply(quats[:-1], quats[1:])
    assert torch.allclose(quat_to_matrix(both), turns[:-1] @ turns[1:], atol=1e-12)
    quarter = quat_to_matrix(torch.tensor([math.cos(math.pi / 4), 0.0, 0.0, math.sin(math.pi / 4)]))
    assert torch.allclose(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)


def test_unprojection_by_hand():
    inner = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1.0]])  # 90 degrees
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    depth = torch.full((2, 2), 2.0)
    # The centre of the right lower pixel lies at 0.75, half the way to the edge: slope 0.5.
    flat = unproject(depth, pose, inner, "depth_z")[1, 1] - pose[:3, 3]
    assert flat.tolist() == pytest.approx([1.0, 1.0, 2.0])
    far = unproject(depth, pose, inner, "distance")[1, 1] - pose[:3, 3]
    assert far.tolist() == pytest.approx([2 * 0.5 / math.sqrt(1.5), 2 * 0.5 / math.sqrt(1.5), 2 / math.sqrt(1.5)])
    moved = unproject(depth, pose, inner, "depth_z", torch.full((2, 2, 2), 0.5))[1, 1] - pose[:3, 3]
    assert moved.tolist() == pytest.approx([2.0, 2.0, 2.0])
    # Half a pixel is another share of the width than of the height.
    wide = unproject(torch.ones(2, 4), torch.eye(4), inner, "depth_z", torch.full((2, 4, 2), 0.5))[0, 0]
    assert wide.tolist() == pytest.approx([-0.5, 0.0, 1.0])


def test_opengl_is_its_own_inverse_and_keeps_the_place():
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    turned = opengl_to_opencv(pose)
    assert turned[:3, 1].tolist() == [0, -1, 0]
    assert torch.equal(turned[:3, 3], pose[:3, 3])
    assert torch.equal(opengl_to_opencv(turned), pose)


def test_look_at():
    down = torch.tensor([0.0, 1.0, 0.0])
    pose = look_at(torch.tensor([[0.0, 0.0, -2.0], [3.0, -1.0, 0.0]]), torch.zeros(2, 3), down)
    assert torch.allclose(pose[0], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -2], [0, 0, 0, 1]]))
    assert torch.allclose(torch.linalg.det(pose[:, :3, :3]), torch.ones(2))
    assert bool((pose[:, 1, 1] > 0).all())


@pytest.mark.parametrize("start", [0.0, 1.5, 3.0, 4.5])
def test_a_flight_passes_its_poses_and_turns_evenly(start):
    # From one of these the quaternion passes w = 0, where its sign changes.
    down = torch.tensor([0.0, 1.0, 0.0])
    angle = start + torch.arange(4) * 0.5
    place = torch.stack([angle.cos(), torch.zeros(4), angle.sin()], -1)
    given = look_at(2 * place, torch.zeros(4, 3), down)
    path = fly_through(given, 10)
    assert torch.allclose(path[::3], given, atol=1e-6)
    steps = path[:-1, :3, :3].mT @ path[1:, :3, :3]
    cosine = (steps.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    assert torch.allclose(cosine, torch.full((9,), math.cos(0.5 / 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pose, inner: pose[1, 0].fill_(float("nan")), "view b: the pose is not finite"),
        (lambda pose, inner: pose[1, :3, 0].mul_(-1), "view b: the pose is left-handed"),
        (lambda pose, inner: pose[0, :3, :3].mul_(2), "view a: the pose holds no rotation"),
        (lambda pose, inner: pose[0, 3, 3].fill_(2), "view a: the last row"),
        (lambda pose, inner: inner[1, 0, 0].fill_(0), "view b: a focal length"),
        (lambda pose, inner: inner[1, 0, 2].fill_(float("inf")), "view b: the intrinsics are not finite"),
    ],
)
def test_impossible_cameras_are_named(change, message):
    poses, inner = torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1)
    check_cameras(poses, inner)
    change(poses, inner)
    with pytest.raises(ValueError, match=message):
        check_cameras(poses, inner, ["a", "b"])


def test_rays_agree_with_their_convention():
    inner = torch.tensor([[0.8, 0, 0.45], [0, 1.1, 0.5], [0, 0, 1.0]])
    points = torch.rand(7, 2)
    assert torch.allclose(cameras.rays(points, inner, "distance").norm(dim=-1), torch.ones(7))
    assert torch.allclose(cameras.rays(points, inner, "depth_z")[:, 2], torch.ones(7))
