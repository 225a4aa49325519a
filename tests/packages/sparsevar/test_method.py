import pytest
import torch
import torch.nn.functional as F
from hone_core.testing import assert_close
from hone_sparsevar.method import (
    anchor_of,
    by_slot,
    change_map,
    interpolate_kept,
    kept_count,
    num_anchors,
    resize_map,
    select,
    select_above,
    slots,
    update_map,
)

GRIDS = [(8, 8), (7, 6), (5, 9), (1, 1), (3, 4), (70, 56)]


def test_change_by_hand():
    before, after = torch.tensor([[[1.0, 2.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 4.0], [3.0, 1.0]]])
    assert_close(change_map(before, after), torch.tensor([[2.0, 5.0]]))
    assert_close(change_map(before, after, "rel"), torch.tensor([[2.0 / 2.5, 5.0 / 2.0]]))
    # Blocks in half precision: what is small beside a large change is not rounded away.
    half = torch.tensor([[[0.0, 0.0]], [[1.0, 2**-5]]], dtype=torch.bfloat16)[:, None]
    assert torch.equal(change_map(*half), torch.tensor([[(1 + 2**-10) / 2]]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_every_window_has_one_anchor_inside_it(grid, window):
    anchors = anchor_of(grid, window).view(grid)
    own = set()
    for y in range(grid[0]):
        for x in range(grid[1]):
            ay, ax = divmod(int(anchors[y, x]), grid[1])
            assert (ay // window, ax // window) == (y // window, x // window)
            assert anchors[ay, ax] == anchors[y, x]
            own.add((ay, ax))
    assert len(own) == num_anchors(grid, window)


def test_anchor_places_by_hand():
    # 7 x 6 in windows of 4: rows 1 and 5, columns 1 and 5; the last window of columns is 2 wide, so 4 + 1 is its end.
    assert sorted(set(anchor_of((7, 6), 4).tolist())) == [1 * 6 + 1, 1 * 6 + 5, 5 * 6 + 1, 5 * 6 + 5]


def test_counts():
    assert kept_count((64, 64), 4, 0.6) == 4096 - int(0.6 * 3840)
    assert kept_count((10, 10), None, 0.29) == 71
    assert kept_count((8, 8), 4, 0.0) == 64
    assert kept_count((7, 6), 4, 1.0) == 4


def test_selection_against_a_slow_one():
    generator = torch.Generator().manual_seed(0)
    for grid in GRIDS:
        tokens, anchors = grid[0] * grid[1], anchor_of(grid, 4)
        score = torch.randint(0, 5, (3, tokens), generator=generator).float()  # many ties
        count = kept_count(grid, 4, 0.6)
        for row, got in zip(score.tolist(), select(score, count, anchors).tolist(), strict=True):
            order = sorted(range(tokens), key=lambda p: (int(anchors[p]) != p, -row[p], p))
            assert got == sorted(order[:count])


def test_threshold_keeps_what_lies_above_and_fills_the_bucket_with_the_next():
    score = torch.tensor([[0.0, 9.0, 1.0, 0.5, 8.0, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert select_above(score[:1], 1.0, 1, None).tolist() == [[1, 4]]
    assert select_above(score[:1], 1.0, 4, None).tolist() == [[1, 2, 3, 4]]
    # A batch keeps as many as its fullest image.
    assert select_above(score, 1.0, 1, None).shape == (2, 6)
    assert select_above(score[:1], 1.0, 100, None).shape == (1, 6)
    # Anchors stay, however low they score, and count among what is kept; above every score there is a bucket still.
    anchors = torch.tensor([0, 0, 0, 5, 5, 5])
    assert select_above(score[:1], 1.0, 1, anchors).tolist() == [[0, 1, 4, 5]]
    assert select_above(score[:1], 1.0, 3, anchors).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert select_above(score[:1], 9.0, 2, None).tolist() == [[1, 4]]


def test_slots_and_stand_ins():
    anchors = anchor_of((2, 4), 2)
    idx = torch.tensor([[0, 2, 3, 5]])
    slot, runs = slots(idx, 8, anchors)
    assert runs.tolist() == [[True, False, True, True, False, True, False, False]]
    assert slot.tolist() == [[0, 0, 1, 2, 0, 3, 1, 1]]
    values = torch.tensor([[10.0, 12.0, 13.0, 15.0]])
    assert by_slot(values, slot).tolist() == [[10, 10, 12, 13, 10, 15, 12, 12]]


@pytest.mark.parametrize("grid", GRIDS)
def test_interpolation_against_a_slow_one(grid):
    generator = torch.Generator().manual_seed(0)
    window, tokens = 3, grid[0] * grid[1]
    idx = select(torch.rand(1, tokens, generator=generator), kept_count(grid, window, 0.9), anchor_of(grid, window))
    values = torch.randn(1, idx.shape[1], 2, generator=generator, dtype=torch.float64)
    got = interpolate_kept(values, idx, grid, window)
    positions = range(tokens) if tokens < 100 else range(0, tokens, 97)
    for p in positions:
        y, x = divmod(p, grid[1])
        weights = [
            max(0, 1 - abs(q // grid[1] - y) / 3) * max(0, 1 - abs(q % grid[1] - x) / 3) for q in idx[0].tolist()
        ]
        if p in idx[0].tolist():
            weights = [float(q == p) for q in idx[0].tolist()]
        w = torch.tensor(weights, dtype=torch.float64)
        assert w.sum() > 0
        assert_close(got[0, p], (w[:, None] * values[0]).sum(0) / w.sum(), dtype=torch.float32)


def test_maps_grow_bilinearly_and_keep_what_was_not_measured():
    old = torch.rand(2, 3, 2)
    assert torch.equal(resize_map(old, (3, 2)), old)
    big = resize_map(old, (6, 4))
    assert_close(big, F.interpolate(old[:, None], (6, 4), mode="bilinear")[:, 0])
    new = update_map(big, torch.tensor([[0, 5], [1, 23]]), torch.tensor([[7.0, 8.0], [9.0, 10.0]]))
    assert new[0, 0, 0] == 7
    assert new[0, 1, 1] == 8
    assert new[1, 5, 3] == 10
    assert (new != big).sum() == 4
