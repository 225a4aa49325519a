"""Attention of one new token per sample to caches that hold another number of tokens for each.

``decoding.paged_attention`` reads the first tokens of a row, from pages; this op reads any of them, with the holes that
an eviction leaves, from a cache of transformers as it lies.
"""

from .api import SUPPORT, decode_attention
from .reference import decode_attention_reference

__all__ = ["SUPPORT", "decode_attention", "decode_attention_reference"]
