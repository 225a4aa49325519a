"""Attention in which each row reads a prefix of the keys, such as all tokens of its own step and those before."""

from .api import SUPPORT, prefix_attention
from .reference import prefix_attention_reference

__all__ = ["SUPPORT", "prefix_attention", "prefix_attention_reference"]
