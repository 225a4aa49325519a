"""What a decoding step does between its matrix products: norms, rotation and paged caches, attention over pages."""

from .api import SUPPORT, add_rms_norm, paged_attention, rotate_append, silu_mul

__all__ = ["SUPPORT", "add_rms_norm", "paged_attention", "rotate_append", "silu_mul"]
