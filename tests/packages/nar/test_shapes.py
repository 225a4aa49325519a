import math

import pytest
import torch
from hone_nar.shapes import CLASSES, DIRECTIONS, GRID, LEVELS, SHAPES, read_shapes, render, shapes
from hone_nar.tasks import TASKS


def test_clips_are_split_and_use_all_levels():
    train, test = shapes("train"), shapes("test")
    assert train.tokens.shape == (4000, 256)
    assert len(test) == 300
    assert (int(train.tokens.min()), int(train.tokens.max())) == (0, LEVELS - 1)
    assert torch.bincount(test.labels, minlength=CLASSES).min() > 5
    with pytest.raises(ValueError, match="split must be train or test"):
        shapes("all")


def test_held_out_clips_read_as_what_they_show_and_other_ones_do_not():
    test = shapes("test")
    right = read_shapes(test.tokens) == test.labels
    assert float(right.float().mean()) > 0.93
    backwards = test.tokens.unflatten(1, GRID).flip(1).flatten(1)
    turned = test.labels.clone()
    turned ^= 1  # right and left, down and up
    assert float((read_shapes(backwards) == turned).float().mean()) > 0.93
    still = test.tokens.unflatten(1, GRID)[:, :1].expand(-1, GRID[0], -1, -1).flatten(1)
    assert bool((read_shapes(still) == -1).all())
    assert bool((read_shapes(torch.zeros(2, 256, dtype=torch.long)) == -1).all())


def test_shapes_are_about_as_large_as_a_disc():
    radius, places = 2.4, 4 + torch.arange(8) / 32
    # Over parts of a pixel, since there are 4 x 4 points in each.
    centers = torch.stack([places, places.flip(0)], -1)[:, None]
    radii = torch.full((8,), radius)
    area = [float(render(torch.full((8,), at), centers, radii).sum((1, 2, 3)).mean()) for at in range(4)]
    assert area[0] == pytest.approx(math.pi * radius**2, rel=0.02)
    assert area[1] == pytest.approx((1.76 * radius) ** 2, rel=0.02)
    assert area[3] == pytest.approx((4 * 0.42 * 1.25 - 4 * 0.42**2 + 4 * 0.42 * 1.25) * radius**2, rel=0.03)
    assert all(0.6 * area[0] < each < 1.2 * area[0] for each in area)


def test_a_square_by_hand_and_its_movement():
    # A half side of 2: pixels 1 to 4 of both axes around (3, 3), then half a pixel to the right.
    centers = torch.tensor([[[3.0, 3.0], [3.5, 3.0]]])
    found = render(torch.tensor([SHAPES.index("square")]), centers, torch.tensor([2.0 / 0.88]))[0]
    wanted = torch.zeros(8, 8)
    wanted[1:5, 1:5] = 1
    assert torch.equal(found[0], wanted)
    half = torch.zeros(8, 8)
    half[1:5, 2:5] = 1
    half[1:5, 1] = half[1:5, 5] = 0.5
    assert torch.equal(found[1], half)
    tokens = (found[[0, 0, 1, 1]] * 7).round().long().flatten()[None]
    assert int(read_shapes(tokens)) == SHAPES.index("square") * len(DIRECTIONS)


def test_a_clip_is_shown_frame_beside_frame():
    task = TASKS["shapes"]
    picture = task.to_image(torch.arange(256)[None] % LEVELS)
    assert picture.shape == (1, 1, 8, 32)
    assert task.plane == (8, 32)
    tokens = torch.zeros(1, 256, dtype=torch.long)
    tokens[0, 2 * 64 + 3 * 8 + 5] = LEVELS - 1
    assert float(task.to_image(tokens)[0, 0, 3, 2 * 8 + 5]) == 1
    assert TASKS["digits"].to_image(torch.full((1, 64), 8)).shape == (1, 1, 8, 8)
