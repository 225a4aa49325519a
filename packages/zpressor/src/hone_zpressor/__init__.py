"""ZPressor: many posed views of a scene, fused into a few, before a feed-forward network makes Gaussians of them.

Anchors are the farthest cameras; every other view's features flow into the nearest anchor's by cross-attention. Paper:
arXiv 2505.23734.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "anchors": ["assign", "cluster_views", "farthest_points"],
        "config": ["PRESETS", "ZPressorConfig"],
        "host": ["load_host"],
        "method": ["ZPressor"],
        "models": ["ZPressorHandle", "attach", "tiny"],
        "streaming": ["SceneStream"],
    },
)
__version__ = "0.2.0"
