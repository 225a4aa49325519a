"""Means of consecutive keys and of their values, with gradients."""

from .api import SUPPORT, group_means
from .reference import group_means_reference

__all__ = ["SUPPORT", "group_means", "group_means_reference"]
