"""Video diffusion transformers of diffusers: what the methods that change their attention share.

Token orders, an attachment for methods that replace self-attention, pipelines and sizes, tiny models of the real
classes, generated clips with a grader, and quality metrics.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "architectures": ["FULL_SIZE", "full_size", "tiny", "tiny_inputs", "tiny_pipeline"],
        "attachment": ["Method"],
        "caching": ["Cache", "fill_cache"],
        "clips": ["fake_batch", "load_glyphs", "render"],
        "grader": ["ClipClassifier", "estimate_motion", "grade"],
        "host": ["Host", "load_host"],
        "host_config": ["HostConfig"],
        "grids": ["ORDERS", "Grid", "Order"],
        "handle": ["SUPPORTED", "VideoHandle", "attach_method"],
        "listings": ["read_clips"],
        "orders": ["inverse_order", "reorder", "token_order"],
        "pipeline_index": ["PIPELINES", "find_pipeline"],
        "pipelines": ["load_pipeline"],
        "prompts": ["ClipConfig", "describe", "parse_prompt"],
        "quality": ["psnr", "ssim"],
        "training": ["Group", "Loop"],
        "workloads": ["WORKLOADS", "Workload"],
    },
)
__version__ = "0.2.0"
