from dataclasses import replace

import pytest
import torch
from hone_splat.cameras import unproject
from hone_splat.rooms import FAR, NEAR, Rooms


def test_a_seed_is_a_room():
    one, again = Rooms.draw([3, 4]), Rooms.draw([4])
    assert torch.equal(one.cam_to_world[1], again.cam_to_world[0])
    assert not torch.equal(one.centres[0], one.centres[1])


def test_a_point_is_where_another_camera_sees_it():
    rooms = Rooms.draw([5])
    poses = rooms.cam_to_world[:, [0, 12]]
    inner = rooms.intrinsics_norm[:, None].expand(1, 2, 3, 3)
    image, distance = rooms.see(poses, (48, 48))
    assert image.shape == (1, 2, 3, 48, 48)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    world = unproject(distance[:, 0], poses[:, 0], inner[:, 0], "distance").flatten(1, 2)
    # The ray from the second camera to each point ends there or before it.
    origin = poses[:, 1, :3, 3].expand_as(world)
    true = (world - origin).norm(dim=-1)
    _, found = rooms._cast(origin, (world - origin) / true[..., None])
    assert bool((found <= true + 1e-3).all())
    reached = (found - true).abs() < 1e-3
    assert float(reached.float().mean()) > 0.5


def test_depths_stay_in_range():
    rooms = Rooms.draw(range(12), frames=6)
    _, distance = rooms.see(rooms.cam_to_world, (24, 24), samples=1)
    assert float(distance.min()) > NEAR
    assert float(distance.max()) < FAR


def test_a_depth_range_that_is_none_is_named():
    views, _ = Rooms.draw([0]).views(torch.tensor([[0, 1]]), 8)
    views.check()
    with pytest.raises(ValueError, match="expected 0 < near < far; got near 20 and far 12"):
        replace(views, near=torch.tensor([[0.4, 20.0]])).check()
