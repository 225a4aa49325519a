"""Which key blocks to keep, from their scores: a share of the row's total between clamps, or the best few."""

from .api import SUPPORT, SelectedBlocks, select_blocks
from .reference import select_blocks_reference

__all__ = ["SUPPORT", "SelectedBlocks", "select_blocks", "select_blocks_reference"]
