"""The nearest point of a cloud to each of many points in space, exact."""

from .api import SUPPORT, nearest_points
from .reference import nearest_points_reference

__all__ = ["SUPPORT", "nearest_points", "nearest_points_reference"]
