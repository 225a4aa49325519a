"""Orders of the video tokens of a (frames, height, width) grid that make a block a compact piece of video.

Every function returns ``order``, int64 ``[N]``: ``order[position]`` is the raster index, ``x + width * (y + height *
frame)``, of the token at that position. ``reorder`` applies an order, and undoes it with ``inverse_order``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from hone_core.tensors import plain_tensors
from torch import Tensor

from .grids import ORDERS, Grid, Order

__all__ = [
    "gilbert_order",
    "inverse_order",
    "morton_order",
    "raster_order",
    "reorder",
    "tile_order",
    "token_order",
]


def _check_grid(frames: int, height: int, width: int) -> None:
    for name, size in (("frames", frames), ("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1 token; got {size} in the grid {(frames, height, width)}")


def gilbert_order(frames: int, height: int, width: int) -> Tensor:
    """Generalised Hilbert curve through a box of any size: neighbours on the curve are neighbours in the video.

    The box is cut into parts, each with a start corner and three signed edge vectors (the first one is the direction in
    which the curve crosses the part), until every part is a straight line. All parts of one depth are cut together.

    Args:
        frames: Grid size along time, in tokens.
        height: Grid size along y.
        width: Grid size along x.

    Returns:
        int64 ``[frames * height * width]``, the raster index visited at each position of the curve.

    Source: the paper's "Gilbert" curve, that is J. Cerveny's generalised Hilbert curve. Odd edges make a few steps
        diagonal, or on small grids up to four cells long; everything else moves one cell.
    """
    _check_grid(frames, height, width)
    # Coordinates are (x, y, frame). The longest edge comes first, width before height before frames where equal.
    edges = [(width, 0, 0), (0, height, 0), (0, 0, frames)]
    if width >= height and width >= frames:
        axes = (0, 1, 2)
    elif height >= width and height >= frames:
        axes = (1, 0, 2)
    else:
        axes = (2, 0, 1)
    corner = torch.zeros((1, 3), dtype=torch.int64)
    edge = torch.tensor([[edges[axis] for axis in axes]])  # [parts, 3 edges, 3 coordinates]
    while True:
        straight = (edge.abs().sum(-1) == 1).sum(-1) >= 2
        if bool(straight.all()):
            break
        corner, edge = _cut(corner, edge, straight)
    length, along = edge.abs().sum(-1).max(-1)
    direction = edge[torch.arange(len(edge)), along].sign()
    part = torch.repeat_interleave(length)  # of each point of the curve
    step = torch.arange(len(part)) - (length.cumsum(0) - length)[part]
    x, y, frame = (corner[part] + step[:, None] * direction[part]).T
    return x + width * (y + height * frame)


def _cut(corner: Tensor, edge: Tensor, straight: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the recursion: each part that is not straight becomes 2, 3 or 5 parts, in the order of the curve."""
    p, (a, b, c) = corner, edge.unbind(1)
    w, h, d = edge.abs().sum(-1).T
    da, db, dc = edge.sign().unbind(1)

    def half(e: Tensor, unit: Tensor, size: Tensor) -> Tensor:
        cut = e // 2  # floors the signed vector
        odd = (cut.abs().sum(-1) % 2 == 1) & (size > 2)
        return cut + unit * odd[:, None]

    a2, b2, c2 = half(a, da, w), half(b, db, h), half(c, dc, d)
    end = p + (a - da)  # where the curve crosses to on the far side of the first edge
    long = (2 * w > 3 * h) & (2 * w > 3 * d)
    high = ~long & (3 * h > 4 * d)
    deep = ~long & ~high & (3 * d > 4 * h)
    cases = [
        (straight, [(p, a, b, c)]),
        (~straight & long, [(p, a2, b, c), (p + a2, a - a2, b, c)]),
        (~straight & high, [(p, b2, c, a2), (p + b2, a, b - b2, c), (end + (b2 - db), -b2, c, a2 - a)]),
        (~straight & deep, [(p, c2, a2, b), (p + c2, a, b, c - c2), (end + (c2 - dc), -c2, a2 - a, b)]),
        (
            ~straight & ~long & ~high & ~deep,
            [
                (p, b2, c2, a2),
                (p + b2, c, a2, b - b2),
                (p + (b2 - db) + (c - dc), a, -b2, c2 - c),
                (end + b2 + (c - dc), -c, a2 - a, b - b2),
                (end + (b2 - db), -b2, c2, a2 - a),
            ],
        ),
    ]
    corners = p.new_zeros((len(p), 5, 3))
    parts = p.new_zeros((len(p), 5, 3, 3))
    for rows, children in cases:
        for slot, (start, *vectors) in enumerate(children):
            corners[rows, slot] = start[rows]
            parts[rows, slot] = torch.stack(vectors, 1)[rows]
    real = parts.abs().sum(-1).prod(-1) > 0
    return corners[real], parts[real]


def _coordinates(frames: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, y and x of each raster index."""
    _check_grid(frames, height, width)
    index = torch.arange(frames * height * width)
    return index // (height * width), index // width % height, index % width


def morton_order(frames: int, height: int, width: int) -> Tensor:
    """Z-order: raster indices sorted by the interleaved bits of frame, y and x, x in the lowest bit.

    Args and Returns: As for ``gilbert_order``.
    """
    code = torch.zeros(frames * height * width, dtype=torch.int64)
    for place, axis in enumerate(reversed(_coordinates(frames, height, width))):
        for bit in range(max(frames, height, width).bit_length()):
            code |= (axis >> bit & 1) << (3 * bit + place)
    return code.argsort()


def tile_order(frames: int, height: int, width: int, tile: tuple[int, int, int]) -> Tensor:
    """Tile by tile in raster order, raster order inside a tile; tiles at the far border may be cut short.

    Args:
        frames: Grid size along time, in tokens.
        height: Grid size along y.
        width: Grid size along x.
        tile: Tokens of a tile along (frames, height, width). Tiles and blocks coincide where it divides the grid.

    Returns:
        As for ``gilbert_order``.

    Raises:
        ValueError: ``tile`` is not three positive counts.
    """
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"tile must be three positive token counts (frames, height, width); got {tile}")
    t, y, x = _coordinates(frames, height, width)
    tiles_y, tiles_x = -(-height // tile[1]), -(-width // tile[2])
    number = (t // tile[0] * tiles_y + y // tile[1]) * tiles_x + x // tile[2]
    return number.argsort(stable=True)


def raster_order(frames: int, height: int, width: int) -> Tensor:
    """The order the model itself uses: x fastest, then y, then frame.

    Args and Returns: As for ``gilbert_order``.
    """
    _check_grid(frames, height, width)
    return torch.arange(frames * height * width)


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``: ``order[inverse_order(order)]`` counts 0, 1, 2, ...

    Args:
        order: int64 ``[N]``, a permutation.
    """
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def reorder(x: Tensor, order: Tensor, *, dim: int = -2) -> Tensor:
    """Tokens in ``order``; tokens behind it (text at the tail of the sequence) stay where they are.

    ``reorder(reorder(x, order), inverse_order(order))`` is x.

    Args:
        x: Tokens along ``dim``, at least as many as ``order`` has.
        order: int64 ``[N]``, a permutation.
        dim: Which axis.

    Raises:
        ValueError: If x has fewer tokens than the order.
    """
    tokens, video = x.shape[dim], len(order)
    if tokens < video:
        raise ValueError(f"x must have at least the {video} tokens of the order along axis {dim}; got {list(x.shape)}")
    if tokens > video:
        order = torch.cat([order, torch.arange(video, tokens, device=order.device)])
    return x.index_select(dim, order)


def token_order(
    name: Order,
    frames: int,
    height: int,
    width: int,
    *,
    device: torch.device | str = "cpu",
    tile: Grid = (4, 4, 8),
    inverse: bool = False,
) -> Tensor:
    """The order called ``name`` on ``device``, computed once per grid and kept.

    Args:
        name: ``"gilbert"``, ``"morton"``, ``"tile"`` or ``"raster"``.
        frames: Grid size along time, in tokens.
        height: Grid size along y.
        width: Grid size along x.
        device: Where the result is wanted.
        tile: Tile of ``"tile"``, see ``tile_order``.
        inverse: The permutation that undoes the order, in its place.

    Returns:
        As for ``gilbert_order``. Kept for 64 grids and shared: do not write into it.

    Raises:
        ValueError: If the name is unknown or a grid size is below one.
    """
    if name not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}; got {name!r}")
    if torch.compiler.is_compiling():
        return _token_order_op(name, frames, height, width, list(tile), torch.device(device), inverse)
    return _kept(name, (frames, height, width), tile, torch.device(device), inverse)


@lru_cache(maxsize=64)
def _kept(name: str, grid: Grid, tile: Grid, device: torch.device, inverse: bool) -> Tensor:
    with plain_tensors():
        if name == "gilbert":
            order = gilbert_order(*grid)
        elif name == "morton":
            order = morton_order(*grid)
        elif name == "tile":
            order = tile_order(grid[0], grid[1], grid[2], tile)
        else:
            order = raster_order(*grid)
        return (inverse_order(order) if inverse else order).to(device)


@torch.library.custom_op("hone_video::token_order", mutates_args=())
def _token_order_op(
    name: str, frames: int, height: int, width: int, tile: list[int], device: torch.device, inverse: bool
) -> Tensor:
    """For ``torch.compile``, which cannot trace through the curve and may overwrite what an op returns."""
    return _kept(name, (frames, height, width), (tile[0], tile[1], tile[2]), device, inverse).clone()


@_token_order_op.register_fake
def _(name: str, frames: int, height: int, width: int, tile: list[int], device: torch.device, inverse: bool) -> Tensor:
    return torch.empty(frames * height * width, dtype=torch.int64, device=device)
