"""R-Stitch: a small and a large language model write one chain of thought, token by token.

The small model writes; where the entropy of its next token is high, the large model writes until it is certain, and
hands back. Paper: arXiv 2507.17307.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["PRESETS", "StitchConfig"],
        "generation": ["StitchOutput", "StitchToken", "stitch_decoding", "stitch_generate"],
        "host": ["load_host"],
        "method": ["Gate", "entropy_nats", "stitch"],
        "models": ["Pair", "StitchHandle", "attach", "tiny"],
        "vocabulary": ["Vocabulary"],
    },
)
__version__ = "0.2.0"
