"""ZipR1: multimodal models whose layers attend to few tokens, and reinforcement learning that should make them fewer.

Each layer keeps the smallest set of tokens that holds a share p of its attention; the others take no part in it and
leave its cache. Paper: arXiv 2504.18579 (later "Sparsity Forcing").
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["PRESETS", "SparseConfig"],
        "host": ["load_host"],
        "method": ["column_mass", "select", "topp_budget", "uniform_ratio"],
        "models": ["SparseHandle", "Stats", "attach", "sparse"],
        "objectives": ["advantages", "grpo_loss", "rewards"],
    },
)
__version__ = "0.2.0"
