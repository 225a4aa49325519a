"""What a transformer's pass over few tokens does beside its products: attention over slots, and the gated layer."""

from .api import SUPPORT, TOKENS, attend_slots, gated_of_few

__all__ = ["SUPPORT", "TOKENS", "attend_slots", "gated_of_few"]
