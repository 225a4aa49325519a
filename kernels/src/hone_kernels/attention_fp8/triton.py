"""FP8 block-sparse attention in Triton: the forward on E4M3 operands. triton_quantize.py makes them.

The forward is the one of ``attention/triton.py`` with E4M3 matrix products. The factor 448 of P is folded into the
running maximum: with ``top = max - log2(448)`` the exponential is ``448 * p`` itself, and ``448 * l`` and ``top +
log2(448 * l)`` are what the output and the log-sum-exp need.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hone_kernels.attention.triton import (
    LN2,
    LOG2E,
    Tiles,
    _bhs,
    _describe,
    _listed,
    _sm,
    _strides,
    _tile,
    attention_forward,
)
from hone_kernels.launch import Notes, geometry, launch

from .reference import dequantize, put_rows

__all__ = ["TILES", "attention_fp8_forward", "has_e4m3", "tiles_for"]

LOG2_MAX = tl.constexpr(8.807354922057604)  # log2(448)
SCALE_MIN = tl.constexpr(torch.finfo(torch.float32).tiny)

# Head size -> configuration on compute capability 9.0 and later. The caps let three (128) and four programs share a
# multiprocessor, as in attention/triton.py (LOG.md).
TILES: dict[int, Tiles] = {
    32: Tiles(64, 128, 4, 2, True, registers=128),
    64: Tiles(64, 128, 4, 2, True, registers=128),
    128: Tiles(64, 128, 4, 2, True, registers=168),
}


def has_e4m3(x: Tensor) -> bool:
    """Whether x's device converts and multiplies E4M3: the interpreter, and GPUs from compute capability 8.9."""
    return x.device.type != "cuda" or _sm(x) >= 89


def tiles_for(dim: int, block_q: int, block_k: int, block: int, sm: int) -> Tiles:
    """The forward's configuration: a tile never spans two blocks, neither of the layout nor of the scales."""
    best = TILES[dim]
    return replace(
        best,
        q=min(best.q, block_q, block),
        k=min(best.k, block_k, block),
        descriptors=best.descriptors and sm >= 90,
        registers=best.registers if sm >= 90 else None,
    )


@triton.jit
def _values(source, batch, head, start, heads, keys, ROWS: tl.constexpr, DIM: tl.constexpr, DESC: tl.constexpr):
    """Values ``start`` to ``start + ROWS`` of one head from transposed storage, ``[ROWS, DIM]``."""
    if DESC:
        v = source.load([batch, head, 0, start]).reshape([DIM, ROWS])
    else:
        row = (batch.to(tl.int64) * heads + head) * DIM + tl.arange(0, DIM)
        v = tl.load(source + row[:, None] * keys + (start + tl.arange(0, ROWS))[None, :])
    return tl.trans(v)


@triton.jit
def _softmax_step(acc, total, top, q, k, v, scale, valid, MASKED: tl.constexpr):
    """One tile of keys into the running softmax. ``valid`` is how many of them exist (read only if MASKED)."""
    logits = tl.dot(q, tl.trans(k))  # [BM, BN]
    if MASKED:
        # Most blocks are full, and to mask one costs a quarter of a step's instructions: a branch, but not at smaller
        # head sizes, where registers are capped so low that it makes some spill.
        if k.shape[1] < 128 or valid < k.shape[0]:
            logits = tl.where((tl.arange(0, k.shape[0]) < valid)[None, :], logits, -float("inf"))
        # Of two blocks of zeros, as those without a token are, the scales' product is 0, and 0 * inf is NaN.
        scale = tl.maximum(scale, SCALE_MIN)
    new = tl.maximum(top, tl.max(logits, 1) * scale - LOG2_MAX)
    shift = new
    if MASKED:
        # A row that has met no key yet would compute inf - inf.
        shift = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(logits * scale - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    # Into the order of v8's keys, in which the products leave P where its threads hold it: no shuffles.
    BM: tl.constexpr = p.shape[0]
    BN: tl.constexpr = p.shape[1]
    p8 = p.to(v.dtype).reshape([BM, BN // 16, 2, 4, 2]).trans(0, 1, 3, 2, 4).reshape([BM, BN])
    # The matrix unit adds FP8 products with about 14 bits. A product of its own for each tile, added here in float32,
    # keeps that error from growing with the length of the list.
    acc = acc * fade[:, None] + tl.dot(p8, v)
    return acc, total, new


@triton.jit
def _forward_kernel(
    q_src, k_src, v_src, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, num_ptr, idx_ptr, valid_ptr,
    order_ptr, sqb, sqh, sqs, skb, skh, sks, sob, soh, sos, snb, snh, sib, sih, siq, sval,
    tokens_q, tokens_k, padded_k, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, VALID: tl.constexpr, DESC: tl.constexpr,
    ORDER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    heads = tl.num_programs(1)
    head_k = head // GROUP
    heads_k = heads // GROUP
    start_q = tile * BM
    row = start_q // BLOCK_Q
    num = tl.load(num_ptr + batch * snb + head * snh + row)
    idx_ptr += batch.to(tl.int64) * sib + head.to(tl.int64) * sih + row.to(tl.int64) * siq
    SUB: tl.constexpr = BLOCK_K // BN
    q_scale_ptr += (batch * heads + head) * tl.cdiv(tokens_q, SCALED)
    k_scale_ptr += (batch * heads_k + head_k) * tl.cdiv(tokens_k, SCALED)

    q = _tile(q_src, batch, head, start_q, sqb, sqh, sqs, tokens_q, BM, DIM, DIM, True, DESC)
    scale *= tl.load(q_scale_ptr + start_q // SCALED)
    acc = tl.zeros([BM, DIM], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)

    # Only the last listed block can be the ragged one: lists ascend.
    full = num * SUB
    if VALID:
        full = 0
    elif TAIL:
        last = tl.load(idx_ptr + tl.maximum(num - 1, 0))
        full = tl.where((num > 0) & ((last + 1) * BLOCK_K > tokens_k), num - 1, num) * SUB
    if not VALID:
        start = _listed(idx_ptr, 0, full, BLOCK_K, SUB, BN)
        k_scale = tl.load(k_scale_ptr + start // SCALED)
        for t in tl.range(0, full, num_stages=STAGES):
            k = _tile(k_src, batch, head_k, start, skb, skh, sks, tokens_k, BN, DIM, DIM, False, DESC)
            v = _values(v_src, batch, head_k, start, heads_k, padded_k, BN, DIM, DESC)
            acc, total, top = _softmax_step(acc, total, top, q, k, v, scale * k_scale, 0, False)
            start = _listed(idx_ptr, t + 1, full, BLOCK_K, SUB, BN)
            k_scale = tl.load(k_scale_ptr + start // SCALED)
    if TAIL or VALID:
        for t in tl.range(full, num * SUB, num_stages=STAGES if VALID else 1):
            block = tl.load(idx_ptr + t // SUB)
            start = block * BLOCK_K + (t % SUB) * BN
            valid = tokens_k - start
            if VALID:
                valid = tl.minimum(valid, tl.load(valid_ptr + batch * sval + block) - (t % SUB) * BN)
            k = _tile(k_src, batch, head_k, start, skb, skh, sks, tokens_k, BN, DIM, DIM, True, DESC)
            v = _values(v_src, batch, head_k, start, heads_k, padded_k, BN, DIM, DESC)
            k_scale = tl.load(k_scale_ptr + start // SCALED)
            acc, total, top = _softmax_step(acc, total, top, q, k, v, scale * k_scale, valid, True)

    at = start_q + tl.arange(0, BM)
    dim = tl.arange(0, DIM)
    some = total != 0  # so that NaN stays NaN
    total = tl.where(some, total, 1.0)
    v_scale = tl.load(v_scale_ptr + (batch * heads_k + head_k) * DIM + dim)
    acc = acc / total[:, None] * v_scale[None, :]
    lse = tl.where(some, top * LN2 + tl.log(total), -float("inf"))
    keep = at < tokens_q
    tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * tokens_q + at, lse, mask=keep)
    out_ptr += batch.to(tl.int64) * sob + head.to(tl.int64) * soh
    if ORDER:
        if VALID:
            exist = tl.load(valid_ptr + batch * sval + at // BLOCK_K, mask=keep, other=0)
            keep = keep & (at % BLOCK_K < exist)
        row = tl.load(order_ptr + at, mask=keep, other=0).to(tl.int64)
        ptrs = out_ptr + (row * sos)[:, None] + dim[None, :]
    else:
        ptrs = out_ptr + start_q.to(tl.int64) * sos + tl.arange(0, BM)[:, None] * sos + dim[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=keep[:, None])


def attention_fp8_forward(
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    k_valid: Tensor | None,
    block: int,
    block_q: int,
    block_k: int,
    scale: float,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
    *,
    out: Tensor | None = None,
    order: Tensor | None = None,
    notes: Notes | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp ``[B, H, TQ]`` float32 of the keys as given.

    Without ``out`` a new one, in memory ``[B, TQ, H, D]``. With ``order`` rows go to their places in ``out``, see
    ``quantized_attention``. ``notes`` is for ``launch``.
    """
    if not has_e4m3(q8):
        q, k, v = dequantize(q8, k8, v8, q_scale, k_scale, v_scale, block, torch.bfloat16)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)  # its strides become the output's
        rows, lse = attention_forward(q, k, v, kv_num, kv_idx, k_valid, None, None, None, block_q, block_k, scale)
        if out is None:
            return rows.to(out_dtype), lse
        put_rows(out, rows, order, k_valid, block_k)
        return out, lse
    batch, heads, tokens_q, dim = q8.shape
    given = out
    if out is None:
        out = torch.empty((batch, tokens_q, heads, dim), dtype=out_dtype, device=q8.device).transpose(1, 2)
    lse = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=q8.device)
    if notes is not None:
        notes.made(lse)
        if given is None:
            notes.made(out)
    tensors = (q8, k8, v8, q_scale, k_scale, v_scale, out, kv_num, kv_idx, k_valid, order)
    facts = geometry(*tensors)

    def build(q8, k8, v8, q_scale, k_scale, v_scale, out, kv_num, kv_idx, k_valid, order, lse):
        tokens_k = k8.shape[2]
        t = tiles or tiles_for(dim, block_q, block_k, block, _sm(q8))
        sources: list[Any] = [q8, k8, v8]
        if t.descriptors:
            values = TensorDescriptor(v8, list(v8.shape), list(v8.stride()), [1, 1, dim, t.k])
            sources = [_describe(q8, t.q), _describe(k8, t.k), values]
        args = (
            *sources, q_scale, k_scale, v_scale, out, lse, kv_num, kv_idx, k_valid, order,
            *_bhs(q8), *_bhs(k8), *_bhs(out),
            *_strides(kv_num, (0, 1)), *_strides(kv_idx, (0, 1)), kv_idx.stride(2), *_strides(k_valid, (0,)),
            tokens_q, tokens_k, v8.shape[3], scale * LOG2E.value,
        )  # fmt: skip
        named = dict(
            GROUP=heads // k8.shape[1], DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, SCALED=block, BM=t.q, BN=t.k,
            TAIL=tokens_k % block_k != 0, VALID=k_valid is not None, DESC=t.descriptors, ORDER=order is not None,
            STAGES=t.stages, num_warps=t.warps, num_stages=t.stages, maxnreg=t.registers,
        )  # fmt: skip
        return (triton.cdiv(tokens_q, t.q), heads, batch), args, named

    key = facts and (facts, block, block_q, block_k, scale, tiles)
    launch(_forward_kernel, key, (*tensors, lse), build, notes)
    return out, lse
