"""FlashAttention 4 over lists of blocks, for those who have it (``flash_attn.cute``): forward, and its own backward.

Its kernels know blocks that are computed whole and blocks under a mask; lists are of the first kind. Its gradients are
added up in the order in which programs finish, so two runs may differ in the last bits.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .layout import BlockLayout

__all__ = ["flash_attention", "whole_lists"]


@functools.cache
def _modules() -> tuple[Any, Any]:
    interface = importlib.import_module("flash_attn.cute.interface")
    return interface.flash_attn_func, importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch


def whole_lists(layout: BlockLayout, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Counts ``[B, H, NQ]`` and indices ``[B, H, NQ, NK]``, zero where no block stands."""
    rows, cols = layout.num_q_blocks, layout.num_k_blocks
    num = layout.kv_num.expand(batch, heads, rows).contiguous()
    idx = layout.kv_idx[..., :cols]
    idx = torch.nn.functional.pad(idx, (0, cols - idx.shape[-1])).expand(batch, heads, rows, cols)
    used = torch.arange(cols, device=layout.device) < num[..., None]
    return num, torch.where(used, idx, 0).contiguous()


def _sparse(layout: BlockLayout, batch: int, heads: int) -> Any:
    num, idx = whole_lists(layout, batch, heads)
    under_a_mask = dict(mask_block_cnt=torch.zeros_like(num), mask_block_idx=torch.zeros_like(idx))
    size = (layout.block_q, layout.block_k)
    return _modules()[1](**under_a_mask, full_block_cnt=num, full_block_idx=idx, block_size=size)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, *, return_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, TQ, D]``, in memory ``[B, TQ, H, D]``, and natural log-sum-exp ``[B, H, TQ]`` float32.

    What it reads of the layout is kept with it. Arguments as the public op's, on blocks of 128.
    """
    sizes = (q.shape[0], q.shape[1])
    lists = {"block_sparse_tensors": layout.kept(("flash", *sizes), lambda: _sparse(layout, *sizes))}
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        made = layout.kept(("flash columns", *sizes), lambda: _sparse(layout.transpose(), *sizes))
        lists["block_sparse_tensors_bwd"] = made
    heads_last = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _modules()[0](*heads_last, softmax_scale=scale, return_lse=return_lse, **lists)
    return out.transpose(1, 2), lse
