"""Video language models of transformers: what their token sequence holds, and how to reach into them.

Token layouts (which position shows which frame), attention interception through transformers' registry, tiny models of
the real classes, published checkpoints, question sets, multiple-choice scoring and video decoding.
"""

from hone_core.lazy import lazy_names as _lazy_names

__getattr__, __dir__, __all__ = _lazy_names(
    __name__,
    {
        "addresses": ["find_checkpoint"],
        "attention": ["AttentionTap", "tap_attention"],
        "checkpoints": ["load_model"],
        "choices": ["Choices", "option_token_ids", "read_choices"],
        "decoders": ["Decoder", "find_decoder"],
        "layouts": ["TokenLayout", "find_layouts", "locate_spans"],
        "question_sets": ["Item", "load_items"],
        "tiny": ["tiny", "tiny_inputs"],
        "video": ["Clip", "read_video"],
    },
)
__version__ = "0.2.0"
