import torch
from hone_zpressor.anchors import farthest_points
from hone_zpressor.data import graded_rooms, training_batch


def same_pose(first, second):
    return (first[:, :, None] - second[:, None]).abs().flatten(3).amax(-1) < 1e-6


def test_graded_contexts_are_the_farthest_and_targets_are_others():
    scene = graded_rooms([0, 5], 12, 8, 16)
    assert scene.context.image_01.shape == (2, 12, 3, 16, 16)
    assert scene.targets.image_01.shape == (2, 8, 3, 16, 16)
    assert not same_pose(scene.context.cam_to_world, scene.targets.cam_to_world).any()
    # Farthest of the path: no target is farther from all of them than they are from each other.
    centres, others = (views.cam_to_world[..., :3, 3] for views in (scene.context, scene.targets))
    apart = torch.cdist(centres, centres) + 1e9 * torch.eye(12)
    assert bool((torch.cdist(others, centres).amin(-1) <= apart.amin((1, 2))[:, None] + 1e-5).all())


def test_training_views_lie_in_a_part_of_the_path():
    scene = training_batch([7, 8], 6, 3, (12, 12), 16)
    again = training_batch([7, 8], 6, 3, (12, 12), 16)
    assert torch.equal(scene.context.image_01, again.context.image_01)
    assert not same_pose(scene.context.cam_to_world, scene.targets.cam_to_world).any()
    wide = training_batch([7, 8], 6, 3, (50, 50), 16)
    spread = [s.context.cam_to_world[..., :3, 3].std(1).sum(-1) for s in (scene, wide)]
    assert bool((spread[0] < spread[1]).all())


def test_more_context_views_begin_with_the_same_ones():
    centres = graded_rooms([2], 12, 1, 16).context.cam_to_world[..., :3, 3]
    assert farthest_points(centres, 6).tolist()[0] == farthest_points(centres, 12).tolist()[0][:6]
