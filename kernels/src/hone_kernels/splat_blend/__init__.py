"""Projected Gaussians blended front to back, tile by tile, with gradients."""

from .api import DRAWN, SUPPORT, TILE, VALUES, blend_tiles
from .lists import tile_lists
from .reference import blend_tiles_reference

__all__ = ["DRAWN", "SUPPORT", "TILE", "VALUES", "blend_tiles", "blend_tiles_reference", "tile_lists"]
