"""Attention of one new token per sample to caches that hold another number of tokens for each."""

from .api import SUPPORT, decode_attention
from .reference import decode_attention_reference

__all__ = ["SUPPORT", "decode_attention", "decode_attention_reference"]
