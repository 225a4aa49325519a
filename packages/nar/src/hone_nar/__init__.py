"""NAR: image models that draw all tokens of one distance to the corner at once.

A head for each axis of the grid predicts a token's neighbours; where two reach the same token, their logits are
averaged. A grid of n x n takes 2 n - 1 passes in place of n x n. Paper: arXiv 2503.10696.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "checkpoints": ["MANIFESTS", "build", "load_published"],
        "config": ["PRESETS", "NARConfig"],
        "flashar": ["FlashARForImageGeneration", "post_train_start"],
        "generation": ["Decoding", "GraphedDecoding", "generate"],
        "host": ["load_host"],
        "larp": ["LARPTokenizer"],
        "method": ["diagonal_order", "plan_of", "raster_order"],
        "models": ["NARHandle", "attach", "tiny", "warm_start"],
        "pipelines": ["NARPipeline", "NARVideoPipeline"],
        "tokenizer": ["LlamaGenVQModel"],
        "transformer": ["LlamaGenForImageGeneration", "NARForImageGeneration", "NARForVideoGeneration"],
    },
)
__version__ = "0.2.0"
