"""GPU kernels of hone, one folder per op."""

__version__ = "0.2.0"
