"""Block-sparse attention on index lists, with pooled keys in the same softmax and exact gradients; in FP8 too."""

from .api import SUPPORT, PooledKV, block_sparse_attention
from .fp8 import FP8_SUPPORT, FP8Operands, block_sparse_attention_fp8, fp8_block_sparse_attention, quantize_qkv
from .layout import BlockLayout

__all__ = [
    "FP8_SUPPORT",
    "SUPPORT",
    "BlockLayout",
    "FP8Operands",
    "PooledKV",
    "block_sparse_attention",
    "block_sparse_attention_fp8",
    "fp8_block_sparse_attention",
    "quantize_qkv",
]
