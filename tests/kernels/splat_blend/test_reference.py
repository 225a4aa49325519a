import math

import pytest
import torch
from hone_core.testing import assert_close
from hone_kernels.splat_blend import blend_tiles

LISTS = torch.tensor([0, 1]), torch.tensor([2])


def one(x, y, opacity, colour, depth, width=2.0):
    return [x, y, 1 / width**2, 0.0, 1 / width**2, opacity, *colour, depth]


def test_two_gaussians_by_hand():
    pair = [one(2.5, 1.5, 0.6, (1, 0, 0), 2.0), one(2.5, 2.5, 0.5, (0, 1, 0), 3.0)]
    values = torch.tensor(pair, dtype=torch.float64)
    drawn = blend_tiles(values, *LISTS, 1, 1)[0].view(4, 4, 5)
    front, back = 0.6, 0.5 * math.exp(-0.5 / 4)
    want = [front, (1 - front) * back, 0.0, front + (1 - front) * back, 2 * front + 3 * (1 - front) * back]
    assert_close(drawn[1, 2], torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


def test_nothing_behind_a_wall():
    # The second would leave less than 1e-4 of the light: it is not drawn, nor is what follows, though fainter.
    values = torch.tensor([one(2, 2, 1.0, (1, 0, 0), 1.0, 1e4), one(2, 2, 0.95, (0, 1, 0), 2.0, 1e4)]).double()
    drawn = blend_tiles(values, *LISTS, 1, 1)[0]
    assert_close(drawn[:, 0], torch.full((16,), 0.999, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(drawn[:, 1], torch.zeros(16, dtype=torch.float64))


def test_second_picture_begins_anew():
    values = torch.tensor([one(6.5, 1.5, 0.6, (1, 0, 0), 2.0)])
    counts = torch.tensor([0, 1, 0, 1])  # two pictures of one row of two tiles
    drawn = blend_tiles(values, torch.tensor([0, 0]), counts, 1, 2)
    assert torch.equal(drawn[1], drawn[3])
    assert float(drawn[1, 6, 0]) == pytest.approx(0.6)
    assert not drawn[[0, 2]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 9)}, r"values must be \[M, 10\]; got \[2, 9\]"),
        ({"order": torch.zeros(2)}, "must be int64"),
        ({"rows": 2}, "whole pictures of 2 x 1 tiles; got 1 tiles"),
        ({"backend": "gluon"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"values": torch.zeros(2, 10), "order": LISTS[0], "counts": LISTS[1], "rows": 1, "columns": 1}
    with pytest.raises(ValueError, match=message):
        blend_tiles(**arguments | change)
