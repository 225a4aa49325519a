"""Codes drawn from logits of several heads: average, guidance, temperature, top-k and draw, each logit read once."""

from .api import SUPPORT, draw_codes
from .reference import draw_codes_reference

__all__ = ["SUPPORT", "draw_codes", "draw_codes_reference"]
