"""A transformer's pass over few tokens in five launches a block: products with what is around them, and attention."""

from .api import SUPPORT, TOKENS, attend_slots, linear_of_few

__all__ = ["SUPPORT", "TOKENS", "attend_slots", "linear_of_few"]
