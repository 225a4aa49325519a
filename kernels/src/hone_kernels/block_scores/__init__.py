"""How much each block of queries attends to each block of keys, estimated from a few sampled tokens of every block."""

from .api import KINDS, SUPPORT, Kind, block_scores
from .reference import block_scores_reference

__all__ = ["KINDS", "SUPPORT", "Kind", "block_scores", "block_scores_reference"]
