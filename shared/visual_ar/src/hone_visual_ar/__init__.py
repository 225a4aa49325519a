"""Next-scale autoregressive image models: what the methods that make them do less share.

Transformers of Infinity and VAR, their BSQ and VQ tokenizers, schedules, sampling, one generation loop with a policy
per scale, and strict loading of the published weights.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "checkpoints": ["MANIFESTS", "load_published"],
        "generation": ["Generation", "Policy", "generate"],
        "infinity": ["INFINITY_SIZES", "Infinity"],
        "pipelines": ["InfinityPipeline", "VARPipeline"],
        "sampling": ["Sampling"],
        "schedules": ["HART_1024", "VAR_256", "VAR_512", "ScaleSchedule", "infinity_schedule"],
        "tokenizers": ["BSQVAE", "VQVAE", "ScaleTokenizer"],
        "transformer": ["Condition", "NextScaleTransformer"],
        "var": ["VAR", "VAR_SIZES"],
    },
)
__version__ = "0.2.0"
