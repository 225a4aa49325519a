import itertools

import pytest
import torch
import torch.nn.functional as F
from hone_core.testing import assert_close, gradcheck
from hone_nar.method import diagonal_order, guide, mask_of, mix, plan_of, raster_order, separate_loss

GRIDS = [(3, 3), (2, 5), (5, 2), (1, 4), (2, 3, 4), (3, 1, 2)]


def test_diagonals_of_two_by_three_by_hand():
    order = diagonal_order((2, 3))
    # 0 1 2
    # 3 4 5
    assert order.steps == ((0,), (1, 3), (2, 4), (5,))
    assert order.ids == (0, 1, 3, 2, 4, 5)
    assert order.starts == (0, 1, 3, 5, 6)
    assert raster_order((2, 3)).steps == ((0,), (1,), (2,), (3,), (4,), (5,))


@pytest.mark.parametrize(("grid", "steps"), [((16, 16), 31), ((32, 32), 63), ((4, 16, 16), 34), ((8, 8), 15)])
def test_published_numbers_of_passes(grid, steps):
    order = diagonal_order(grid)
    assert len(order.steps) == steps
    assert sorted(order.ids) == list(range(order.tokens))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_plan_is_the_mean_over_neighbours_that_exist(grid):
    order, heads = diagonal_order(grid), len(grid)
    plan = plan_of(order, 5, heads)
    places = list(itertools.product(*map(range, grid)))
    for at, number in enumerate(order.ids):
        place, wanted = places[number], {}
        for axis in range(heads):
            if place[axis]:
                before = tuple(value - (axis == other) for other, value in enumerate(place))
                wanted[heads - 1 - axis] = 5 + order.ids.index(places.index(before))
        if not wanted:
            wanted = dict.fromkeys(range(heads), 4)
        for head in range(heads):
            assert float(plan.weight[at, head]) == pytest.approx(1 / len(wanted) if head in wanted else 0.0)
            if head in wanted:
                assert int(plan.source[at, head]) == wanted[head]


def test_one_head_alone_is_used_wherever_it_reaches():
    order = diagonal_order((2, 2))
    # Slots: 0, 1, 2, 3; 1 is right of 0, 2 below it, 3 right of 2 and below 1.
    right, below = (plan_of(order, 1, 2, kind) for kind in ("right", "below"))
    assert right.weight.tolist() == [[1, 0], [1, 0], [0, 1], [1, 0]]
    assert below.weight.tolist() == [[0, 1], [1, 0], [0, 1], [0, 1]]
    assert right.source[:, 0].tolist() == [0, 1, 0, 3]
    assert below.source[:, 1].tolist() == [0, 0, 1, 2]


def test_a_single_head_looks_up_then_left_and_raster_looks_back():
    order = diagonal_order((2, 2))
    assert plan_of(order, 1, 1).source[:, 0].tolist() == [0, 1, 1, 2]
    assert plan_of(raster_order((2, 2)), 1, 1).source[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("order", "heads", "kind", "message"),
    [
        (diagonal_order((2, 2)), 3, "average", "needs 2 heads or 1; got 3"),
        (raster_order((2, 2)), 2, "average", "in raster order needs 1; got 2"),
        (diagonal_order((2, 2)), 2, "back", "mix must be average or one of right, below; got 'back'"),
    ],
)
def test_plans_that_do_not_exist(order, heads, kind, message):
    with pytest.raises(ValueError, match=message):
        plan_of(order, 1, heads, kind)


@pytest.mark.parametrize("grid", [(), (0, 3), (1, 2, 3, 4)])
def test_grids_that_do_not_exist(grid):
    with pytest.raises(ValueError, match="positive sides"):
        diagonal_order(grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_mask_sees_condition_own_step_and_those_before(grid):
    order, condition = diagonal_order(grid), 2
    seen = mask_of(order, condition, "cpu")
    places = list(itertools.product(*map(range, grid)))
    for row, column in itertools.product(range(len(seen)), repeat=2):
        if row < condition or column < condition:
            wanted = column <= row and column < condition
        else:
            wanted = sum(places[order.ids[column - 2]]) <= sum(places[order.ids[row - 2]])
        assert bool(seen[row, column]) == wanted


def test_padding_is_seen_by_itself_alone():
    words = torch.tensor([[False, True, True], [True, True, True]])
    seen = mask_of(diagonal_order((2, 2)), 3, "cpu", words)
    assert seen.shape == (2, 7, 7)
    assert seen[0, :, 0].tolist() == [True] + 6 * [False]
    assert torch.equal(seen[1], mask_of(diagonal_order((2, 2)), 3, "cpu"))


def test_mixing_averages_logits_and_has_their_gradient():
    right, below = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = plan_of(diagonal_order((2, 2)), 1, 2).weight.double()
    found = mix([right, below], weight)
    assert_close(found[:, 0], (right[:, 0] + below[:, 0]) / 2)
    assert_close(found[:, 1], right[:, 1])
    assert_close(found[:, 2], below[:, 2])
    gradcheck(lambda a, b: mix([a, b], weight), right, below)
    # Averaged probabilities would be another model.
    assert not torch.allclose(found[:, 3].softmax(-1), (right[:, 3].softmax(-1) + below[:, 3].softmax(-1)) / 2)


def test_the_loss_of_each_head_counts_where_it_reaches():
    right, below = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    weight, target = plan_of(diagonal_order((2, 2)), 1, 2).weight, torch.tensor([[0, 1, 2, 1]])
    # The right head reaches slots 0, 1 and 3; the below head 0, 2 and 3.
    parts = [
        torch.stack([F.cross_entropy(each[0, at], target[0, at]) for at in slots]).mean()
        for each, slots in ((right, (0, 1, 3)), (below, (0, 2, 3)))
    ]
    assert_close(separate_loss([right, below], weight, target), sum(parts) / 2)


def test_guidance_of_one_and_none():
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    assert_close(guide(conditional, unconditional, 1.0), conditional)
    assert_close(guide(conditional, unconditional, 0.0), unconditional)
    assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)
