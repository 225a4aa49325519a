import pytest
import torch
from hone_splat.cameras import unproject
from hone_splat.matching import cost_volume, neighbours
from hone_splat.rooms import Rooms


def test_neighbours():
    poses = torch.eye(4).repeat(1, 4, 1, 1)
    poses[0, :, 0, 3] = torch.tensor([0.0, 10.0, 1.0, 1.0])
    assert neighbours(poses).tolist() == [[[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]]
    assert neighbours(poses, 2).tolist() == [[[2], [2], [3], [2]]]
    with pytest.raises(ValueError, match="at least two views"):
        neighbours(poses, 1)


def test_the_exact_sweep_finds_true_depth():
    rooms = Rooms.draw([2])
    poses, inner = rooms.cam_to_world[:, [10, 18]], rooms.intrinsics_norm[:, None].expand(1, 2, 3, 3)
    size = (32, 32)
    _, distance = rooms.see(poses, size)
    inner_px = inner * torch.tensor([[32.0], [32.0], [1.0]])
    world = unproject(distance, poses, inner, "distance")
    local = (torch.linalg.inv(poses)[:, :, None, None, :3, :3] @ (world - poses[:, :, None, None, :3, 3])[..., None])[
        ..., 0
    ]
    depth = local[..., 2]
    # Features that name a point in the world: they agree where the depth is the true one.
    features = torch.cat([(2 * world).sin(), (2 * world).cos()], -1).movedim(-1, 2)
    scales = torch.linspace(0.6, 1.4, 5)
    candidates = 1 / (depth[:, :, None] * scales[:, None, None])
    found = cost_volume(features, poses, inner_px, candidates, neighbours(poses), "exact")
    best = found.argmax(2)
    # Where the other camera sees the same point, inside its picture.
    for view, other in ((0, 1), (1, 0)):
        points, origin = world[:, view].flatten(1, 2), poses[:, other, None, :3, 3]
        true = (points - origin).norm(dim=-1)
        _, reached = rooms._cast(origin.expand_as(points), (points - origin) / true[..., None])
        seen = (points - origin) @ poses[:, other, :3, :3] @ inner_px[:, other].mT
        place = seen[..., :2] / seen[..., 2:]
        shared = ((reached - true).abs() < 1e-3) & (seen[..., 2] > 0) & ((place > 1) & (place < 31)).all(-1)
        assert int(shared.sum()) > 300
        assert float((best[:, view].flatten(1)[shared] == 2).float().mean()) > 0.85


def test_a_sweep_in_pieces_is_the_same(monkeypatch):
    rooms = Rooms.draw([2])
    poses = rooms.cam_to_world[:, [0, 5, 10]]
    inner = rooms.intrinsics_norm[:, None].expand(1, 3, 3, 3) * torch.tensor([[8.0], [8.0], [1.0]])
    features = torch.randn(1, 3, 4, 8, 8)
    candidates = torch.linspace(0.1, 1.0, 7).view(1, 1, 7, 1, 1).expand(1, 3, 7, 1, 1)
    whole = cost_volume(features, poses, inner, candidates, neighbours(poses), "official")
    monkeypatch.setattr("hone_kernels.plane_sweep.reference.VALUES", 1)
    pieces = cost_volume(features, poses, inner, candidates, neighbours(poses), "official")
    assert whole.shape == (1, 3, 7, 8, 8)
    assert torch.allclose(whole, pieces, atol=1e-6)
