"""Which tokens to keep: as many as hold a share of a mass, or a given number; the best-ranked ones, without sorting."""

from .api import SUPPORT, SelectedTokens, select_tokens
from .reference import select_tokens_reference

__all__ = ["SUPPORT", "SelectedTokens", "select_tokens", "select_tokens_reference"]
