"""Attention knockouts for video language models: find out how one reads its video, then make it cheaper.

Block chosen query-key pairs (text to video, frame to frame, within a frame) in chosen decoder layers, measure what it
costs, and let visual tokens leave where nothing reads them any more. Paper: arXiv 2508.15360.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["PRESETS", "Knockout", "KnockoutConfig"],
        "host": ["load_host"],
        "method": ["blocked_pairs", "global_after", "windows"],
        "models": ["KnockoutHandle", "attach"],
    },
)
__version__ = "0.2.0"
