import itertools
import math

import pytest
import torch
from hone_fpsattention.tiles import TEXT, Tiling, tile_counts
from hone_fpsattention.windows import axis_window, covers, density, tile_mask, window_layout

BORDERS = ("shift", "cut")


def reads(at, key, count, window, border):
    """Whether a tile reads another along one axis, by the rule's words."""
    reach = window // 2
    if border == "shift":
        if 2 * reach + 1 > count:
            return True
        at = max(reach, min(at, count - 1 - reach))
    return abs(at - key) <= reach


def mask_by_loops(counts, window, border):
    tiles = list(itertools.product(*(range(n) for n in counts)))
    return torch.tensor(
        [
            [all(reads(a, b, n, w, border) for a, b, n, w in zip(q, k, counts, window, strict=True)) for k in tiles]
            for q in tiles
        ]
    )


def test_an_axis_by_hand():
    rows = axis_window(5, 3, "shift").int().tolist()
    assert rows == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    rows = axis_window(5, 3, "cut").int().tolist()
    assert rows == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_an_even_window_is_the_next_odd_one():
    for border in BORDERS:
        assert torch.equal(axis_window(9, 4, border), axis_window(9, 5, border))
        assert not torch.equal(axis_window(9, 4, border), axis_window(9, 3, border))


def test_an_axis_too_short_for_the_shifted_window_is_read_whole():
    for count, window in ((4, 6), (4, 5), (2, 3), (1, 3), (3, 100)):
        assert bool(axis_window(count, window, "shift").all())
    assert not bool(axis_window(4, 3, "shift").all())
    assert not bool(axis_window(4, 5, "cut").all())
    assert bool(axis_window(4, 6, "cut").all())


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("counts", [(3, 4, 5), (1, 6, 2), (4, 1, 7)])
@pytest.mark.parametrize("window", [(1, 1, 1), (3, 3, 1), (2, 5, 4), (9, 3, 3)])
def test_masks_by_loops(counts, window, border):
    assert torch.equal(tile_mask(counts, window, border), mask_by_loops(counts, window, border))


def test_a_tile_reads_itself_and_equally_many_others():
    mask = tile_mask((4, 6, 10), (3, 5, 3), "shift")
    assert bool(mask.diagonal().all())
    assert set(mask.sum(-1).tolist()) == {45}
    assert bool(tile_mask((4, 6, 10), (3, 5, 3), "cut").diagonal().all())


def test_no_window_is_all_tiles():
    assert bool(tile_mask((2, 3, 4), None).all())


@pytest.mark.parity
def test_windows_as_sliding_tile_attention_has_them():
    # Read off generate_sta_mask of FastVideo, run on 36x48x48 tokens in tiles of 6x8x8 with the window 3x5x4.
    mask = tile_mask((6, 6, 6), (3, 5, 4))
    assert int(mask.sum()) == 16200
    assert mask[0].nonzero().flatten()[:12].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13]
    assert mask[157].nonzero().flatten()[:6].tolist() == [108, 109, 110, 111, 112, 114]
    assert mask[157].nonzero().flatten()[-6:].tolist() == [202, 204, 205, 206, 207, 208]
    number = torch.arange(216) + 1
    assert int((mask.long() * number[:, None] * number).sum()) == 234900000
    # And on 18x48x80 tokens with the window 3x3x3.
    first = [f * 60 + y * 10 + x for f in range(3) for y in range(3) for x in range(3)]
    assert tile_mask((3, 6, 10), (3, 3, 3))[0].nonzero().flatten().tolist() == first


# ---- density

TABLE = [
    ((21, 45, 80), (6, 6, 1), 0.100, 0.083),
    ((21, 45, 80), (3, 3, 1), 0.038, 0.028),
    ((21, 45, 80), (6, 6, 6), 0.700, 0.483),
    ((21, 45, 80), (5, 6, 10), 1.000, 0.583),
    ((21, 45, 80), (3, 3, 3), 0.112, 0.078),
    ((21, 30, 52), (6, 6, 1), 0.143, 0.143),
    ((21, 30, 52), (3, 3, 3), 0.241, 0.151),
]


@pytest.mark.parametrize(("grid", "window", "shift", "cut"), TABLE)
def test_densities_of_the_published_windows(grid, window, shift, cut):
    # Three digits, cut or rounded.
    assert density(grid, (6, 8, 8), window).tiles == pytest.approx(shift, abs=6e-4)
    assert density(grid, (6, 8, 8), window, border="cut").tiles == pytest.approx(cut, abs=6e-4)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("text", [0, 70])
@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [
        ((7, 9, 11), (4, 4, 4), (1, 3, 1)),
        ((8, 8, 16), (4, 4, 8), (1, 1, 1)),
        ((13, 9, 17), (6, 8, 8), (3, 1, 1)),
        ((5, 6, 7), (2, 3, 8), (3, 1, 3)),
        ((5, 6, 7), (2, 3, 8), None),
    ],
)
def test_density_counts_pairs(grid, tile, window, text, block, border):
    got = density(grid, tile, window, border=border, text_tokens=text, block=block)
    counts = tile_counts(grid, tile)
    mask = torch.ones(math.prod(counts), math.prod(counts)) if window is None else mask_by_loops(counts, window, border)
    assert got.tiles == float(mask.double().mean())
    tiling = Tiling.of(grid, tile, block=block, text_tokens=text)
    layout = window_layout(tiling, window, border)
    assert got.tokens == pytest.approx(float(layout_pairs(tiling, layout).sum()) / tiling.tokens**2, rel=1e-12)
    assert got.slots == int(layout.kv_num.sum()) * block**2 / tiling.tokens**2


def layout_pairs(tiling, layout):
    """Token pairs of each block pair that is listed."""
    sizes = tiling.valid[0].double()
    return layout.to_mask()[0, 0] * sizes[:, None] * sizes


def test_everything_kept_has_density_one():
    for window in (None, (9, 9, 9)):
        got = density((8, 8, 8), (4, 4, 4), window, block=64, text_tokens=64)
        assert got == (1, 1, 1)


def test_covers():
    assert covers((21, 45, 80), (6, 8, 8), None)
    assert covers((21, 45, 80), (6, 8, 8), (5, 6, 10))
    assert not covers((21, 45, 80), (6, 8, 8), (5, 6, 10), "cut")
    assert not covers((21, 45, 80), (6, 8, 8), (5, 6, 9))


# ---- layouts


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("text", [0, 70])
def test_layout_of_ragged_tiles(border, text):
    grid, tile, window = (13, 9, 17), (6, 8, 8), (1, 3, 1)
    tiling = Tiling.of(grid, tile, block=64, text_tokens=text)
    layout = window_layout(tiling, window, border)
    mask, tiles = layout.to_mask()[0, 0], mask_by_loops(tiling.counts, window, border)
    owner = tiling.tile_of_block.tolist()
    for i, j in itertools.product(range(len(owner)), repeat=2):
        expected = TEXT in (owner[i], owner[j]) or bool(tiles[owner[i], owner[j]])
        assert bool(mask[i, j]) == expected
    assert torch.equal(layout.key_counts(), tiling.valid)
    assert layout.kv_idx.shape[-1] == int(layout.kv_num.max())


def test_layout_without_padding_marks_none():
    assert window_layout(Tiling.of((8, 8, 16), (4, 4, 8)), (1, 1, 1)).k_valid is None


def test_a_layout_of_half_blocks_says_so_where_all_are_full():
    # Kernels that round take a block to be 128 tokens otherwise.
    tiling = Tiling.of((4, 8, 8), (4, 4, 4), block=64)
    assert tiling.full
    layout = window_layout(tiling, (1, 1, 1))
    assert (layout.k_valid == 64).all()
