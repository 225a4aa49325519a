"""How much attention each key gets from a few rows of a causal map, without the map."""

from .api import SUPPORT, ColumnMass, column_mass
from .reference import column_mass_reference

__all__ = ["SUPPORT", "ColumnMass", "column_mass", "column_mass_reference"]
