"""FPSAttention: E4M3 attention over sliding 3-D tiles, by denoising step, for video diffusion transformers.

Queries and keys are rounded to 8 bits tile by tile, each tile reads the tiles in a window around it, and rounding and
window change along the denoising trajectory; the model is fine-tuned with both. Paper: arXiv 2506.04648.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "config": ["FPSAttentionConfig", "PRESETS", "Regime"],
        "host": ["load_host"],
        "method": ["fps_attention"],
        "models": ["FPSAttentionHandle", "attach"],
        "schedule": ["Schedule"],
        "tiles": ["Tiling"],
        "windows": ["density"],
    },
)
__version__ = "0.2.0"
