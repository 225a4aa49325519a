"""PM-Loss: a training term that pulls the Gaussians of a feed-forward network onto the point map of a teacher.

The teacher's point map is moved onto the predicted centres by the best similarity, pixel to pixel, and each centre pays
its squared distance to the nearest teacher point. Nothing is added at inference. Paper: arXiv 2506.05327.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "cache": ["CachedTeacher"],
        "config": ["PRESETS", "PMLossConfig"],
        "host": ["load_host"],
        "method": ["PMTerm", "Similarity", "nearest", "pm_loss", "umeyama"],
        "models": ["PMLoss", "PMLossHandle", "attach", "tiny"],
        "vggt": ["VGGTTeacher"],
        "teachers": ["DepthTeacher", "OracleTeacher", "PointMap", "PrecomputedTeacher", "Shots"],
    },
)
__version__ = "0.2.0"
