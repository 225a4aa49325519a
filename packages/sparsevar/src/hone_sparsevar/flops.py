"""Work of a generation, counted from what ran: products of the blocks and the head, two operations each."""

from __future__ import annotations

from collections.abc import Iterable

from hone_visual_ar.generation import ScaleRecord
from hone_visual_ar.infinity import Infinity
from hone_visual_ar.transformer import NextScaleTransformer

__all__ = ["gflops", "scale_gflops"]


def scale_gflops(record: ScaleRecord, model: NextScaleTransformer, text_tokens: int = 0) -> float:
    """10^9 operations of one scale and image, all its rows.

    Args:
        record: What ran.
        model: Its width, blocks and head.
        text_tokens: Words that cross-attention reads.
    """
    width, block = model.width, model.layers[0]
    text = isinstance(model, Infinity)
    hidden = block.ffn.fc1.out_features
    linear = 2 * (4 * width**2 + 2 * width * hidden + (2 * width**2 if text else 0))
    attention = 4 * width * (record.keys + (text_tokens if text else 0))
    head = 2 * width * model.groups * model.choices
    return 1e-9 * record.rows * record.kept * (len(model.layers) * (linear + attention) + head)


def gflops(records: Iterable[ScaleRecord], model: NextScaleTransformer, text_tokens: int = 0) -> float:
    """Of all scales."""
    return sum(scale_gflops(record, model, text_tokens) for record in records)
