"""Likeness of views under candidate depths, without a warped feature in memory."""

from .api import SUPPORT, sweep_planes
from .reference import sweep_planes_reference

__all__ = ["SUPPORT", "sweep_planes", "sweep_planes_reference"]
