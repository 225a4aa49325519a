"""What surrounds blocks that run only some tokens: gather with the first norm, the change of a block, draws; moves."""

from .api import (
    SUPPORT,
    Packed,
    add_change,
    draw_bits,
    gather_modulate,
    pack_tokens,
    spread_tokens,
    take_tokens,
    unpack_tokens,
)
from .reference import (
    add_change_reference,
    draw_bits_reference,
    gather_modulate_reference,
    pack_tokens_reference,
    spread_tokens_reference,
    take_tokens_reference,
    unpack_tokens_reference,
)

__all__ = [
    "SUPPORT",
    "Packed",
    "add_change",
    "add_change_reference",
    "draw_bits",
    "draw_bits_reference",
    "gather_modulate",
    "gather_modulate_reference",
    "pack_tokens",
    "pack_tokens_reference",
    "spread_tokens",
    "spread_tokens_reference",
    "take_tokens",
    "take_tokens_reference",
    "unpack_tokens",
    "unpack_tokens_reference",
]
