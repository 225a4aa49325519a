import itertools
import math

import pytest
import torch
from hone_fpsattention.tiles import TEXT, Tiling, tile_counts

GRIDS = [
    ((8, 8, 16), (4, 4, 8)),
    ((5, 6, 7), (4, 4, 4)),
    ((7, 3, 9), (6, 8, 8)),
    ((13, 9, 17), (6, 8, 8)),
    ((1, 1, 1), (2, 2, 2)),
    ((1, 11, 5), (1, 4, 4)),
]


def tiles_of(grid, tile):
    """The raster indices of each tile's tokens, by loops."""
    frames, height, width = grid
    found = {}
    for f, y, x in itertools.product(range(frames), range(height), range(width)):
        found.setdefault((f // tile[0], y // tile[1], x // tile[2]), []).append(x + width * (y + height * f))
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize(("grid", "tile"), GRIDS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("text", [0, 3, 130])
def test_slots_by_loops(grid, tile, block, text):
    tiling = Tiling.of(grid, tile, block=block, text_tokens=text)
    expected = tiles_of(grid, tile)
    assert math.prod(tiling.counts) == len(expected)
    assert tiling.order.tolist() == [token for tokens in expected for token in tokens]
    assert tiling.sizes.tolist() == [len(tokens) for tokens in expected]
    video = math.prod(grid)
    owners = [(number, tokens) for number, tokens in enumerate(expected)]
    if text:
        owners.append((TEXT, list(range(video, video + text))))
    valid, owner, slots = [], [], []
    sequence = tiling.order.tolist() + list(range(video, video + text))
    for number, tokens in owners:
        for start in range(0, len(tokens), block):
            part = tokens[start : start + block]
            valid.append(len(part))
            owner.append(number)
            slots += part + [part[-1]] * (block - len(part))
    assert tiling.valid.tolist() == [valid]
    assert tiling.tile_of_block.tolist() == owner
    assert [sequence[place] for place in tiling.slots.tolist()] == slots
    # Every token has one slot, and finds itself there.
    assert tiling.slots[tiling.places].tolist() == list(range(video + text))
    assert tiling.padding == len(slots) / (video + text)
    assert tiling.full == (len(slots) == video + text)


def test_short_tiles_take_the_blocks_their_tokens_need():
    # 7 frames are tiles of 6 and 1: of 384 tokens (3 blocks of 128) and of 64 (one).
    tiling = Tiling.of((7, 8, 8), (6, 8, 8))
    assert tiling.sizes.tolist() == [384, 64]
    assert tiling.valid.tolist() == [[128, 128, 128, 64]]
    assert tiling.tile_of_block.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("grid", "factor"), [((21, 30, 52), 1.141), ((21, 45, 80), 1.050), ((18, 48, 80), 1.0)])
def test_padding_of_the_published_sizes(grid, factor):
    assert Tiling.of(grid, (6, 8, 8)).padding == pytest.approx(factor, abs=5e-4)


@pytest.mark.parity
def test_partition_as_fastvideo_has_it():
    # Read off get_tile_partition_indices and construct_variable_block_sizes of FastVideo (VSA), run on these grids.
    order = Tiling.of((5, 6, 7), (4, 4, 4), block=64).order
    assert order[:6].tolist() == [0, 1, 2, 3, 7, 8]
    assert order[-6:].tolist() == [200, 201, 202, 207, 208, 209]
    assert int((order * (torch.arange(210) + 1)).sum()) == 2872772
    for grid, expected in (
        ((21, 45, 80), {4: 20, 16: 320, 64: 1100}),
        ((21, 30, 52), {8: 13, 16: 91, 32: 65, 64: 455}),
    ):
        tiling = Tiling.of(grid, (4, 4, 4), block=64)
        for sizes in (tiling.sizes, tiling.valid):  # a tile is a block here
            values, counts = sizes.unique(return_counts=True)
            assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == expected


# ---- scale groups


def test_a_box_of_one_tile_groups_tiles():
    tiling = Tiling.of((13, 9, 17), (6, 8, 8), text_tokens=200)
    groups = tiling.scale_groups((6, 8, 8))
    video = tiling.tile_of_block != TEXT
    assert torch.equal(groups[video], tiling.tile_of_block[video])
    assert groups[~video].tolist() == [math.prod(tiling.counts)] * 2


def test_larger_boxes_by_loops():
    grid, tile, box = (13, 9, 17), (3, 4, 4), (6, 8, 12)
    tiling = Tiling.of(grid, tile, block=64)
    groups = tiling.scale_groups(box).repeat_interleave(64)
    _, height, width = grid
    number = {}
    for place, slot in enumerate(tiling.places.tolist()):
        raster = int(tiling.order[place])
        f, y, x = raster // (height * width), raster // width % height, raster % width
        number.setdefault((f // box[0], y // box[1], x // box[2]), set()).add(int(groups[slot]))
    assert len(number) == math.prod(tile_counts(grid, box))
    assert all(len(found) == 1 for found in number.values())
    assert len(set.union(*number.values())) == len(number)


def test_the_whole_video_is_one_group_and_its_text_another():
    tiling = Tiling.of((4, 4, 4), (2, 4, 4), block=64, text_tokens=5)
    assert tiling.scale_groups(None).tolist() == [0, 0, 1]
    assert Tiling.of((4, 4, 4), (2, 4, 4), block=64).scale_groups(None).tolist() == [0, 0]
    # A box larger than the grid is the whole video too.
    assert tiling.scale_groups((24, 32, 32)).tolist() == [0, 0, 1]


def test_a_box_must_be_made_of_tiles():
    with pytest.raises(ValueError, match="box must be a multiple of tile"):
        Tiling.of((4, 4, 4), (2, 4, 4), block=64).scale_groups((3, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (0, 4, 4)}, r"grid must be three positive token counts .* got \(0, 4, 4\)"),
        ({"tile": (4, 4)}, "tile must be three positive token counts"),
        ({"block": 32}, "block must be 64 or 128 tokens"),
        ({"text_tokens": -1}, "text_tokens must not be negative"),
    ],
)
def test_bad_values_are_named(change, message):
    values = {"grid": (4, 4, 4), "tile": (2, 2, 2), "block": 64, "text_tokens": 0, **change}
    with pytest.raises(ValueError, match=message):
        Tiling.of(values.pop("grid"), values.pop("tile"), **values)
