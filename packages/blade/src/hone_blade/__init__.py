"""BLADE: adaptive block-sparse attention for video diffusion transformers.

A cheap probe of queries and keys decides, per head and block of queries, which blocks of keys to attend to; the rest is
skipped, or seen through mean-pooled tokens. Paper: arXiv 2508.10774.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["BladeConfig", "PRESETS"],
        "host": ["load_host"],
        "method": ["adaptive_sparse_attention", "sparse_layout"],
        "models": ["BladeHandle", "attach"],
    },
)
__version__ = "0.2.0"
