import torch
from hone_core.testing import assert_close
from hone_visual_ar import ScaleSchedule, infinity_schedule
from hone_visual_ar.rope import Rope, coordinates, rope_table, rotate


def test_coordinates_of_the_release():
    assert coordinates(24, 64).tolist()[:10] == [0, 3, 5, 8, 11, 13, 16, 19, 21, 24]
    assert coordinates(6, 64).tolist() == [0, 11, 21, 32, 43, 53]


def test_rows_of_a_scale_that_is_not_square():
    schedule = ScaleSchedule(((1, 1), (3, 2)), rope_grid=(6, 8))
    table = rope_table(schedule, 8, "cpu")
    # Token (2, 1) of the second scale: row 2 * 6 / 3 = 4, column 1 * 8 / 2 = 4.
    frequency = torch.tensor([1.0, 10_000.0**-0.5])
    angles = torch.cat([4 * frequency, 4 * frequency])
    assert_close(table.cos[1 + 5], angles.cos())
    assert_close(table.sin[1 + 5], angles.sin())
    assert_close(table.sin[1 + 1], torch.cat([0 * frequency, 4 * frequency]).sin())


def test_rotation_is_of_adjacent_pairs_and_keeps_lengths():
    table = rope_table(infinity_schedule("0.06M"), 8, "cpu")
    x = torch.randn(2, 3, len(table.cos), 8)
    out = rotate(x, table)
    assert_close(out.norm(dim=-1), x.norm(dim=-1))
    pair = torch.complex(x[..., 2], x[..., 3]) * torch.complex(table.cos[:, 1], table.sin[:, 1])
    assert_close(out[..., 2], pair.real)
    assert_close(out[..., 3], pair.imag)


def test_rows_by_index_are_those_of_the_slice():
    table = rope_table(infinity_schedule("0.06M"), 8, "cpu")
    x, index = torch.randn(2, 3, 5, 8), torch.tensor([[4, 2, 9, 0, 1], [7, 7, 3, 2, 11]])
    out = rotate(x, table.rows(index))
    for row in range(2):
        assert_close(out[row], rotate(x[row : row + 1], Rope(table.cos[index[row]], table.sin[index[row]]))[0])
