"""Attention in which every pair of blocks is read as it is, at means of its keys, or not at all, in one softmax."""

from .api import SUPPORT, pyramid_attention
from .reference import FACTORS

__all__ = ["FACTORS", "SUPPORT", "pyramid_attention"]
