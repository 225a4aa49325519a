"""Block-sparse attention on operands rounded to E4M3, the prologue that rounds them, and training through both."""

from .api import Delta, quantized_attention, straight_through_attention
from .quantize import SUPPORT, FP8Operands, quantize_qkv

__all__ = ["SUPPORT", "Delta", "FP8Operands", "quantize_qkv", "quantized_attention", "straight_through_attention"]
