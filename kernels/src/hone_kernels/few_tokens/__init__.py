"""A transformer's pass over few tokens: attention over slots, the gated layer, and all blocks in one launch."""

from .api import SUPPORT, TOKENS, Block, BlocksOfFew, attend_slots, gated_of_few

__all__ = ["SUPPORT", "TOKENS", "Block", "BlocksOfFew", "attend_slots", "gated_of_few"]
