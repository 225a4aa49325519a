"""Tokens drawn from guided logits: guidance, the likeliest few, the draw and its probability, in one pass over them."""

from .api import MOST, SUPPORT, draw_tokens
from .reference import draw_tokens_reference

__all__ = ["MOST", "SUPPORT", "draw_tokens", "draw_tokens_reference"]
