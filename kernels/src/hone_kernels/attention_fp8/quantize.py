"""Operands of FP8 attention: q, k and v rounded to E4M3, by one op with all that goes before the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose, warn_once
from hone_kernels.checks import check_heads, unit_last
from hone_kernels.launch import Kept, Notes, Plans, eager, geometry, on_device_of, plannable

from .reference import V_PADDING, dequantize, quantize_reference

__all__ = ["BLOCKS", "SUPPORT", "FP8Operands", "Fields", "check_groups", "fake_fields", "quantize_fields",
           "quantize_qkv"]  # fmt: skip

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16), backward=True),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        language="triton",
        head_dims=(32, 64, 128),
        blocks=(64, 128),
        min_sm=80,
        backward=True,
    ),
}
"""``dtypes`` are those of q, k and v before they are rounded, ``blocks`` also those of the scales."""

_INDICES = (torch.int32, torch.int64)

BLOCKS = (64, 128)
"""Tokens that a scale may be for, before ``group``."""

Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""``FP8Operands`` without ``block``, as an operator returns it: what is absent is empty."""


@dataclass(frozen=True, eq=False)
class FP8Operands:
    """q, k and v rounded to E4M3, with the factors that scale them back.

    ``q = q8 * q_scale`` and ``k = k8 * k_scale`` per block of ``block`` tokens, ``v = v8 * v_scale`` per channel. All
    tensors are contiguous. Made by ``quantize_qkv``.

    Attributes:
        q8: ``[B, H, TQ, D]`` float8_e4m3fn.
        k8: ``[B, HK, TK, D]`` float8_e4m3fn, zero where a key does not exist.
        v8: ``[B, HK, D, TKP]`` float8_e4m3fn: transposed, as FP8 matrix units want it, and padded with zeros to ``TKP =
            ceil(TK / 128) * 128``; zero where a key does not exist. Of every 16 keys, key ``8 * j + 2 * t + e`` stands
            at ``4 * t + 2 * j + e`` (t < 4, j < 2, e < 2): a thread t that holds columns ``8 * j + 2 * t + e`` of the
            logits then holds P as the next product reads it, and no value changes threads.
        q_scale: ``[B, H, ceil(TQ / block)]`` float32, positive. Blocks that share a scale repeat it.
        k_scale: ``[B, HK, ceil(TK / block)]`` float32, positive.
        v_scale: ``[B, HK, D]`` float32, positive.
        block: Tokens per entry of ``q_scale`` and ``k_scale``: 64 or 128.
        k_mean: ``[B, HK, D]`` float32, what was subtracted from every key, or None.
        q_dot_mean: ``[B, H, TQ]`` float32, ``q . k_mean`` of q before it was rounded, or None where nothing was
            subtracted or no log-sum-exp will be asked for. That of the keys as they were is that of the smoothed ones
            plus ``scale * q_dot_mean``.
    """

    q8: Tensor
    k8: Tensor
    v8: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    block: int
    k_mean: Tensor | None = None
    q_dot_mean: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("q8", "k8", "v8"):
            x = getattr(self, name)
            if x.dtype != torch.float8_e4m3fn or x.dim() != 4:
                raise TypeError(f"{name} must be float8_e4m3fn with 4 axes; got {x.dtype} {list(x.shape)}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be 64 or 128; got {self.block}")
        (batch, heads, tokens_q, dim), (_, heads_k, tokens_k, _) = self.q8.shape, self.k8.shape
        shapes = {
            "q8": tuple(self.q8.shape),
            "k8": (batch, heads_k, tokens_k, dim),
            "v8": (batch, heads_k, dim, -(-tokens_k // V_PADDING) * V_PADDING),
            "q_scale": (batch, heads, -(-tokens_q // self.block)),
            "k_scale": (batch, heads_k, -(-tokens_k // self.block)),
            "v_scale": (batch, heads_k, dim),
        }
        if self.k_mean is not None:
            shapes["k_mean"] = (batch, heads_k, dim)
        if self.q_dot_mean is not None:
            shapes["q_dot_mean"] = (batch, heads, tokens_q)
        for name, want in shapes.items():
            x = getattr(self, name)
            if x is None or tuple(x.shape) != want:
                got = None if x is None else list(x.shape)
                raise ValueError(
                    f"{name} must be {list(want)} for q8 {list(self.q8.shape)} and k8 {list(self.k8.shape)} in blocks "
                    f"of {self.block}; got {got}"
                )
            if not x.is_contiguous():
                raise ValueError(f"{name} must be contiguous, as quantize_qkv makes it; call .contiguous()")
            if x.device != self.q8.device or x.dtype != (torch.float8_e4m3fn if name.endswith("8") else torch.float32):
                want_dtype = "float8_e4m3fn" if name.endswith("8") else "float32"
                raise TypeError(f"{name} must be {want_dtype} on {self.q8.device}; got {x.dtype} on {x.device}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """The rounded ``q [B, H, TQ, D]``, ``k`` and ``v [B, HK, TK, D]``; k without ``k_mean``."""
        tensors = (self.q8, self.k8, self.v8, self.q_scale, self.k_scale, self.v_scale)
        return dequantize(*tensors, self.block, dtype)


def check_groups(block: int, group: int | Tensor, tokens_q: int, tokens_k: int, device: torch.device) -> Tensor | None:
    """Check the tokens of a scale's block and the blocks that share one.

    Args:
        block: Tokens.
        group: As in ``quantize_qkv``.
        tokens_q: Queries, or their slots.
        tokens_k: Keys, or their slots.
        device: Where the result is wanted.

    Returns:
        ``[N]``, the number of each block's group; None where each has its own scale.

    Raises:
        ValueError: They do not fit.
        TypeError: A tensor of another dtype or device.
    """
    if block not in BLOCKS:
        raise ValueError(f"scales and k_valid count blocks of 64 or 128 tokens; got {block}")
    blocks_q, blocks_k = (-(-tokens // block) for tokens in (tokens_q, tokens_k))
    if isinstance(group, Tensor):
        if group.dtype not in _INDICES or group.device != device:
            raise TypeError(f"group must be int32 or int64 on {device}; got {group.dtype} on {group.device}")
        if group.dim() != 1 or not len(group) == blocks_q == blocks_k:
            raise ValueError(
                f"group must name a group for each block of {block} tokens: {blocks_q} of queries and {blocks_k} of "
                f"keys, which share it; got {list(group.shape)}"
            )
        return group
    if isinstance(group, bool) or not isinstance(group, int):
        raise TypeError(f"group must be a count of blocks or a tensor of numbers; got {group!r}")
    if group < 1:
        raise ValueError(f"group counts the blocks that share a scale and must be positive; got {group}")
    return None if group == 1 else torch.arange(max(blocks_q, blocks_k), device=device) // group


def _tables(rope: tuple[Tensor, Tensor], tokens: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[S, D/2]`` from one of the accepted forms."""
    if len(rope) != 2:
        raise ValueError(f"rope must be a pair of tables (cos, sin); got {len(rope)}")
    tables = []
    for name, x, first in (("cos", rope[0], 0), ("sin", rope[1], 1)):
        width = x.shape[-1] if x.dim() else 0
        if width not in (dim, dim // 2) or x.numel() != tokens * width:
            raise ValueError(
                f"rope's {name} must be [S, D/2] = {[tokens, dim // 2]}, or {[tokens, dim]} with each pair's value at "
                f"both places; got {list(x.shape)}"
            )
        if not x.is_floating_point() or x.device != device:
            raise TypeError(f"rope's {name} must be floating point on {device}; got {x.dtype} on {x.device}")
        x = x.reshape(tokens, width)
        tables.append((x[:, first::2] if width == dim else x).float().contiguous())
    return tables[0], tables[1]


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 128,
    group: int | Tensor = 1,
    longest: int | None = None,
    smooth_k: bool = False,
    for_lse: bool = True,
    rope: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
    k_valid: Tensor | None = None,
    backend: Backend = "auto",
) -> FP8Operands:
    """Rotate, permute and round q, k and v to E4M3.

    Q and K get one scale per ``group`` blocks and head, ``amax / 448``; V one per channel and head over the sequence. A
    block of zeros gets the smallest scale that divides safely. What is not finite takes no part in ``amax`` and becomes
    NaN. No gradient: see ``straight_through_attention``.

    Args:
        q: ``[B, H, S, D]``, any strides with D contiguous.
        k: ``[B, HK, S, D]``.
        v: ``[B, HK, S, D]``.
        block: Tokens of a block, 64 or 128: of the scales, and of ``k_valid``.
        group: Blocks that share a scale: how many in a row, or ``[N]`` int32 or int64, the number in ``[0, N)`` of
            each block's group (tiles of several blocks, the last of which may have fewer).
        longest: For a ``group`` tensor in which each group's blocks stand in a row: the blocks of the longest. Up to
            8, Q and K are then read from memory once instead of twice. Not checked, since that would wait for the
            device: blocks of one number that do not stand in a row get scales of their own.
        smooth_k: Whether to subtract from K its mean over the keys that exist (per head and channel; of more than 8,192
            keys that of a sample, runs of 128 at even distances). It changes nothing in softmax and removes what all
            keys share, which would else take up E4M3's range.
        for_lse: Whether attention may be asked for its log-sum-exp, which after ``smooth_k`` needs ``q_dot_mean``.
        rope: Cosines and sines of a rotary embedding on interleaved pairs for q and k, each ``[S, D/2]``, or ``[S, D]``
            as diffusers' Wan has them (further axes of length 1 are dropped). By position in q, before ``order``.
        order: ``[T]`` int32 or int64, ``order[slot]`` the position in q, k and v that a slot takes its token from;
            T need not be S. Slots take the place of tokens in what is returned.
        k_valid: ``[B or 1, ceil(TK / block)]`` int32, as in ``BlockLayout``: keys behind it do not exist. They are
            zeros and count in no scale or mean; with ``order`` so are the queries of their slots.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Raises:
        ValueError: If shapes, options and backend do not fit together.
        TypeError: If dtypes do not.

    Source: FPSAttention (arXiv 2506.04648), equations 1 and 4; SageAttention (arXiv 2410.02367) for ``smooth_k``.
    """
    tensors = (q, k, v, order, k_valid)
    known = notes = None
    # What comes with groups, tables or smoothed keys is more than allocations and launches.
    if plannable() and rope is None and not smooth_k and type(group) is int and group == 1 and longest is None:
        given = [x for x in tensors if x is not None]
        kind = (block, backend, order is None, k_valid is None)
        again = _plans.find(kind, given)
        if again is not None:
            parts, addresses, stream = again
            return _operands(parts.rounded(addresses, stream), block)
        if not any(x.requires_grad for x in given):
            notes = Notes(*given)
    # Of groups there is a tensor to make, of tables what they are to be read as.
    plain = rope is None and type(group) is int and group == 1 and longest is None and eager(*tensors)
    if plain:
        facts = geometry(*tensors)
        known = facts and (facts, block, backend)
    # One reading: another thread may drop the entry between two.
    if known is not None and (before := _checked.get(known)) is not None:
        groups, longest, chosen = None, 1, before
    else:
        groups = _check_quantize(q, k, v, rope, order, k_valid, block, group)
        if isinstance(group, int):
            if longest is not None:
                raise ValueError(f"longest is for a tensor of groups; got group={group} and longest={longest}")
            longest = group
        if longest is not None and longest < 1:
            raise ValueError(f"longest counts the blocks of the longest group and must be positive; got {longest}")
        chosen = choose("quantize_qkv", backend, SUPPORT, q.device, q.dtype, head_dim=q.shape[3], block=block)
        if known is not None and chosen != "reference":
            _checked.keep(known, chosen)
    cos, sin = (None, None) if rope is None else _tables(rope, q.shape[2], q.shape[3], q.device)
    q, k, v = (unit_last(x.detach() if x.requires_grad else x) for x in (q, k, v))
    order, k_valid = (None if x is None else unit_last(x) for x in (order, k_valid))
    args = (q, k, v, cos, sin, order, k_valid, block, groups, smooth_k)
    for_lse = for_lse and smooth_k
    if chosen == "reference":
        q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean = quantize_reference(*args, for_lse)
    elif plain or eager(q, k, v, cos, sin, order, k_valid, groups):
        fields = _fields(*args, longest or 0, for_lse, notes)
        if notes is not None:
            _plans.add(kind, given, rounded=notes.replay(*fields))
        return _operands(fields, block)
    else:
        # As an operator only where something traces the call.
        q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean = _quantize_op(*args, longest or 0, for_lse)
        k_mean = k_mean if smooth_k else None
        q_dot_mean = q_dot_mean if for_lse else None
    return FP8Operands(q8, k8, v8, q_scale, k_scale, v_scale, block, k_mean, q_dot_mean)


_plans = Plans()


def _operands(fields: Sequence[Tensor | None], block: int) -> FP8Operands:
    """Without its checks, which are of what others make."""
    operands = object.__new__(FP8Operands)
    operands.__dict__.update(zip(_NAMES, fields, strict=True), block=block)
    return operands


_NAMES = ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale", "k_mean", "q_dot_mean")


_checked = Kept()
"""Backend of calls that passed the checks, by all that the checks look at."""


def _check_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    order: Tensor | None,
    k_valid: Tensor | None,
    block: int,
    group: int | Tensor,
) -> Tensor | None:
    check_heads(q, k, v)
    if (rope is not None or order is not None) and q.shape[2] != k.shape[2]:
        raise ValueError(f"rope and order need as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
    if rope is not None and q.shape[3] % 2:
        raise ValueError(f"rope rotates pairs of channels; got an odd head_dim {q.shape[3]}")
    tokens = k.shape[2]
    if order is not None:
        if order.shape == (0,) or order.dim() != 1 or order.dtype not in _INDICES or order.device != q.device:
            raise ValueError(
                f"order must be [T] with T >= 1, int32 or int64 on {q.device}; got {order.dtype} {list(order.shape)} "
                f"on {order.device}"
            )
        tokens = order.shape[0]
    groups = check_groups(block, group, q.shape[2] if order is None else tokens, tokens, q.device)
    if k_valid is not None:
        blocks = -(-tokens // block)
        if k_valid.dim() != 2 or k_valid.shape[0] not in (1, q.shape[0]) or k_valid.shape[1] != blocks:
            raise ValueError(
                f"k_valid must be [1 or {q.shape[0]}, {blocks}], one count per block of {block} keys; got "
                f"{list(k_valid.shape)}"
            )
        if k_valid.dtype != torch.int32 or k_valid.device != q.device:
            raise TypeError(f"k_valid must be int32 on {q.device}; got {k_valid.dtype} on {k_valid.device}")
    return groups


@torch.library.custom_op("hone_kernels::quantize_qkv", mutates_args=())
def _quantize_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    k_valid: Tensor | None,
    block: int,
    groups: Tensor | None,
    smooth_k: bool,
    longest: int,
    for_lse: bool,
) -> Fields:
    return quantize_fields(q, k, v, cos, sin, order, k_valid, block, groups, smooth_k, longest, for_lse)


@_quantize_op.register_fake
def _(q, k, v, cos, sin, order, k_valid, block, groups, smooth_k, longest, for_lse):
    return fake_fields(q, k, None if order is None else order.shape[0], block, smooth_k, for_lse)


def quantize_fields(*args: Any) -> Fields:
    """The op's work, for ops that round and go on: a custom op returns tensors only, and an absent one is empty."""
    q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean = (
        args[0].new_empty(0, dtype=torch.float32) if x is None else x for x in _fields(*args)
    )
    return q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean


def _fields(
    q, k, v, cos, sin, order, k_valid, block, groups, smooth_k, longest, for_lse, notes=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    from .triton import has_e4m3
    from .triton_quantize import quantize_triton

    if has_e4m3(q):
        with on_device_of(q):
            return quantize_triton(
                q, k, v, cos, sin, order, k_valid, block, groups, smooth_k, longest=longest, for_lse=for_lse,
                notes=notes,
            )  # fmt: skip
    warn_once(
        "quantize_qkv", f"{q.device} has no E4M3 (compute capability 8.9): rounding in torch, products in bfloat16"
    )
    return quantize_reference(q, k, v, cos, sin, order, k_valid, block, groups, smooth_k, for_lse)


def fake_fields(q: Tensor, k: Tensor, slots: int | None, block: int, smooth_k: bool, for_lse: bool) -> Fields:
    """Empty tensors of the shapes that ``quantize_fields`` gives."""
    (batch, heads, tokens_q, dim), (_, heads_k, tokens_k, _) = q.shape, k.shape
    if slots is not None:
        tokens_q = tokens_k = slots
    shapes8 = (
        (batch, heads, tokens_q, dim),
        (batch, heads_k, tokens_k, dim),
        (batch, heads_k, dim, -(-tokens_k // V_PADDING) * V_PADDING),
    )
    q8, k8, v8 = (q.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in shapes8)
    scales = ((batch, heads, -(-tokens_q // block)), (batch, heads_k, -(-tokens_k // block)), (batch, heads_k, dim))
    q_scale, k_scale, v_scale = (q.new_empty(shape, dtype=torch.float32) for shape in scales)
    k_mean = q.new_empty((batch, heads_k, dim) if smooth_k else 0, dtype=torch.float32)
    q_dot_mean = q.new_empty((batch, heads, tokens_q) if for_lse else 0, dtype=torch.float32)
    return q8, k8, v8, q_scale, k_scale, v_scale, k_mean, q_dot_mean
