"""Feed-forward 3D Gaussian splatting: what methods that compress or supervise such networks share.

Cameras, Gaussians, a renderer for any device, generated rooms with exact depth, files that viewers open, and published
host networks.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "gaussians": ["Gaussians"],
        "rendering": ["Picture", "render"],
        "views": ["Views"],
    },
)
__version__ = "0.2.0"
