"""Words for the grid of video tokens and for their orders. Imports no torch, so a method's config may import it."""

from typing import Literal, get_args

__all__ = ["ORDERS", "Grid", "Order"]

Grid = tuple[int, int, int]
"""Video tokens along (frames, height, width), after patchify."""

Order = Literal["gilbert", "morton", "tile", "raster"]
"""``gilbert``: along a Hilbert curve for any box. ``morton``: Z-order. ``tile``: 3-D tile by tile. ``raster``: the
model's own, x fastest, then y, then frame."""

ORDERS: tuple[Order, ...] = get_args(Order)
