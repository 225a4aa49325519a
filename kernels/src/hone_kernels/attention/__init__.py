"""Block-sparse attention on index lists, with pooled keys in the same softmax and exact gradients."""

from .api import SUPPORT, PooledKV, block_sparse_attention
from .layout import BlockLayout

__all__ = ["SUPPORT", "BlockLayout", "PooledKV", "block_sparse_attention"]
