"""Motion Anything: human motion from text and music, by a masked-token model whose masks attention chooses.

In training, the frames and parts of the body that attend most to the condition are hidden; two transformers adapt to
the condition in time and align it in space. Paper: arXiv 2503.06955, which came without code; its holes are options
here.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["PRESETS", "MotionAnythingConfig", "TransformerConfig", "UnmaskConfig"],
        "exports": ["read_bvh", "read_smpl", "write_bvh", "write_smpl"],
        "features": ["extract", "recover"],
        "host": ["load_host"],
        "method": ["Condition", "MotionTransformer", "attention_mask", "select"],
        "models": ["MotionAnythingHandle", "attach", "tiny"],
        "pipelines": ["MoGenTSPipeline", "MoMaskPipeline", "MotionAnythingPipeline"],
        "skeletons": ["HUMANML3D", "KIT"],
        "tokenizers": ["RVQVAE", "PartTokenizer"],
    },
)
__version__ = "0.2.0"
