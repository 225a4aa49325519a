"""What surrounds blocks that run only some tokens: gather with the first norm, the change of a block, and draws."""

from .api import SUPPORT, add_change, draw_bits, gather_modulate
from .reference import add_change_reference, draw_bits_reference, gather_modulate_reference

__all__ = [
    "SUPPORT",
    "add_change",
    "add_change_reference",
    "draw_bits",
    "draw_bits_reference",
    "gather_modulate",
    "gather_modulate_reference",
]
