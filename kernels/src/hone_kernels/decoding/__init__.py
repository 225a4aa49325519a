"""What a decoding step does between its matrix products: norms, rotation and paged caches, attention over pages."""

from .api import (
    SUPPORT,
    add_rms_norm,
    linear_of_one,
    paged_attention,
    rotate_append,
    rotate_attend,
    silu_mul,
)

__all__ = ["SUPPORT", "add_rms_norm", "linear_of_one", "paged_attention", "rotate_append", "rotate_attend", "silu_mul"]
