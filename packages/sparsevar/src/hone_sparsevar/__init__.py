"""SparseVAR: next-scale image models that leave flat regions out of the large scales.

How much a token changes in one block tells whether it lies in a flat region; such tokens do not run at the next scale,
save for sampled anchors that stand in for them. Paper: arXiv 2507.20454; reimplemented from its abstract and figure.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["PRESETS", "SparseVARConfig"],
        "host": ["load_host"],
        "method": ["change_map", "select"],
        "models": ["SparsePolicy", "SparseVARHandle", "attach", "tiny"],
        "peers": ["EarlyStop", "FastVARStyle", "SkipUncond", "SkipVARStyle"],
    },
)
__version__ = "0.2.0"
