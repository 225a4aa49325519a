import itertools
import time

import pytest
import torch
from hone_video.orders import (
    gilbert_order,
    inverse_order,
    morton_order,
    raster_order,
    reorder,
    tile_order,
    token_order,
)


def coordinates(order, height, width):
    """[N, 3] (x, y, frame) of each position."""
    return torch.stack([order % width, order // width % height, order // (width * height)], dim=1)


def plain_recursion(p, a, b, c):
    """The curve as its recursive definition, point by point: slow, and written without a look at the fast one."""

    def add(*vectors):
        return tuple(map(sum, zip(*vectors, strict=True)))

    def times(n, v):
        return tuple(n * x for x in v)

    def size(v):
        return sum(map(abs, v))

    def unit(v):
        return tuple((x > 0) - (x < 0) for x in v)

    w, h, d = size(a), size(b), size(c)
    if 0 in (w, h, d):
        return
    if (w, h, d).count(1) >= 2:
        longest = max((a, b, c), key=size)
        for i in range(size(longest)):
            yield add(p, times(i, unit(longest)))
        return

    def half(v):
        cut = tuple(x // 2 for x in v)
        return add(cut, unit(v)) if size(cut) % 2 and size(v) > 2 else cut

    def minus(v):
        return times(-1, v)

    a2, b2, c2 = half(a), half(b), half(c)
    ra, rb, rc = add(a, minus(a2)), add(b, minus(b2)), add(c, minus(c2))
    far_a, near_b, near_c, far_c = (add(v, minus(unit(u))) for v, u in ((a, a), (b2, b), (c2, c), (c, c)))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        parts = [(p, a2, b, c), (add(p, a2), ra, b, c)]
    elif 3 * h > 4 * d:
        parts = [(p, b2, c, a2), (add(p, b2), a, rb, c), (add(p, far_a, near_b), minus(b2), c, minus(ra))]
    elif 3 * d > 4 * h:
        parts = [(p, c2, a2, b), (add(p, c2), a, b, rc), (add(p, far_a, near_c), minus(c2), minus(ra), b)]
    else:
        parts = [
            (p, b2, c2, a2),
            (add(p, b2), c, a2, rb),
            (add(p, near_b, far_c), a, minus(b2), minus(rc)),
            (add(p, far_a, b2, far_c), minus(c), minus(ra), rb),
            (add(p, far_a, near_b), minus(b2), c2, minus(ra)),
        ]
    for part in parts:
        yield from plain_recursion(*part)


# Read off the curve that the authors of BLADE use: how many steps are diagonal.
@pytest.mark.parity
@pytest.mark.parametrize(
    ("width", "height", "frames", "diagonal"),
    [(52, 30, 21, 76), (45, 30, 13, 151), (80, 45, 21, 360), (40, 24, 21, 56), (52, 30, 16, 0)],
)
def test_gilbert_golden(width, height, frames, diagonal):
    order = gilbert_order(frames, height, width)
    assert torch.equal(order.sort().values, torch.arange(frames * height * width))
    place = coordinates(order, height, width)
    steps = place.diff(dim=0).abs().sum(1)
    assert int((steps == 2).sum()) == diagonal
    assert int((steps == 1).sum()) == len(steps) - diagonal
    assert place[0].tolist() == [0, 0, 0]
    assert place[-1].tolist() == [width - 1, 0, 0]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("make", "box", "volume", "apart"),
    [(gilbert_order, (6.3, 6.5, 5.6), 216, 3.77), (raster_order, (52, 5.4, 1.1), 394, 17.7)],
)
def test_blocks_are_compact(make, box, volume, apart):
    runs = coordinates(make(21, 30, 52), 30, 52)[: 255 * 128].view(255, 128, 3).double()
    sides = runs.amax(1) - runs.amin(1) + 1
    torch.testing.assert_close(sides.mean(0), torch.tensor(box, dtype=torch.float64), atol=0.05, rtol=0)
    assert float(sides.prod(1).mean()) == pytest.approx(volume, rel=0.005)
    assert float(torch.cdist(runs, runs).mean()) == pytest.approx(apart, rel=0.005)


def test_gilbert_is_its_recursive_definition_on_every_small_grid():
    for frames, height, width in itertools.product(range(1, 8), repeat=3):
        edges = [(width, 0, 0), (0, height, 0), (0, 0, frames)]
        if width >= height and width >= frames:
            start = edges
        elif height >= width and height >= frames:
            start = [edges[1], edges[0], edges[2]]
        else:
            start = [edges[2], edges[0], edges[1]]
        points = plain_recursion((0, 0, 0), *start)
        want = [x + width * (y + height * z) for x, y, z in points]
        assert gilbert_order(frames, height, width).tolist() == want, (frames, height, width)


def test_gilbert_by_hand():
    # One frame, 2 x 2: up the left column, down the right one.
    assert gilbert_order(1, 2, 2).tolist() == [0, 2, 3, 1]
    assert gilbert_order(1, 1, 5).tolist() == [0, 1, 2, 3, 4]
    assert gilbert_order(4, 1, 1).tolist() == [0, 1, 2, 3]
    assert gilbert_order(1, 1, 1).tolist() == [0]


def test_gilbert_is_quick_at_720p_and_on_a_long_line():
    start = time.perf_counter()
    assert len(gilbert_order(21, 45, 80)) == 75600
    assert gilbert_order(1, 1, 100_000)[-1] == 99_999
    assert time.perf_counter() - start < 5


def test_morton_by_hand():
    # x in the lowest bit: in 2 x 2 x 2 that is raster order; 1 x 2 x 4 goes square by square.
    assert morton_order(2, 2, 2).tolist() == list(range(8))
    assert morton_order(1, 2, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(morton_order(3, 5, 6).sort().values, torch.arange(90))


def test_tile_by_hand():
    assert tile_order(1, 2, 4, (1, 2, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    # Cut short at the right: tiles of two columns, then one of one.
    assert tile_order(1, 2, 3, (1, 2, 2)).tolist() == [0, 1, 3, 4, 2, 5]
    assert tile_order(2, 1, 2, (2, 1, 1)).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("name", ["gilbert", "morton", "tile", "raster"])
def test_token_order_is_kept_and_undone(name):
    order = token_order(name, 3, 4, 5, tile=(2, 2, 2))
    assert token_order(name, 3, 4, 5, tile=(2, 2, 2)) is order
    x = torch.randn(2, 60 + 7, 3)
    y = reorder(x, order)
    assert torch.equal(y[:, :60], x[:, order])
    assert torch.equal(y[:, 60:], x[:, 60:])
    assert torch.equal(reorder(y, inverse_order(order)), x)
    assert torch.equal(reorder(x[:, :60], order), y[:, :60])
    assert torch.equal(reorder(x.movedim(1, 2), order, dim=-1), y.movedim(1, 2))
    assert torch.equal(order[inverse_order(order)], torch.arange(60))


def test_orders_kept_are_few():
    first = token_order("raster", 1, 1, 200)
    assert token_order("raster", 1, 1, 200) is first
    for width in range(1, 100):
        token_order("raster", 1, 1, width)
    assert token_order("raster", 1, 1, 200) is not first


def in_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@pytest.mark.parametrize("mode", [torch.inference_mode, in_fake_mode, lambda: torch.device("meta")])
@pytest.mark.parametrize("name", ["gilbert", "morton", "tile", "raster"])
def test_orders_serve_later_callers_whatever_mode_the_first_was_in(name, mode):
    grid = (2, 3, 10 + len(mode.__name__))  # of this case alone
    with mode():
        token_order(name, *grid, tile=(2, 2, 2))
        token_order(name, *grid, tile=(2, 2, 2), inverse=True)
    order, inverse = token_order(name, *grid, tile=(2, 2, 2)), token_order(name, *grid, tile=(2, 2, 2), inverse=True)
    x = torch.randn(len(order), 3, requires_grad=True)
    moved = x.index_select(0, order).index_select(0, inverse)
    assert torch.equal(moved, x)
    moved.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_token_order_compiles_whole(dynamic):
    def order_of(x):
        return reorder(x, token_order("gilbert", 2, 3, x.shape[1] // 6, device=x.device), dim=1)

    compiled = torch.compile(order_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for width in (4, 5):
        x = torch.randn(1, 6 * width)
        assert torch.equal(compiled(x), order_of(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"height must be at least 1 token; got 0 in the grid \(2, 0, 4\)"):
        gilbert_order(2, 0, 4)
    with pytest.raises(ValueError, match=r"order must be one of .*; got 'hilbert'"):
        token_order("hilbert", 1, 1, 1)
    with pytest.raises(ValueError, match="tile must be three positive token counts"):
        tile_order(1, 2, 2, (1, 0, 2))
    with pytest.raises(ValueError, match="at least the 8 tokens of the order along axis -2"):
        reorder(torch.zeros(1, 7, 3), raster_order(2, 2, 2))
