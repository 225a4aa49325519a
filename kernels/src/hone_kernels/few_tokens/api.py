"""The public functions: checks and choice of backend. They are called inside captured graphs, and none waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose

from .reference import Block, attend_slots_reference, blocks_of_few_reference, gated_of_few_reference

__all__ = ["SUPPORT", "TOKENS", "Backend", "Block", "BlocksOfFew", "attend_slots", "gated_of_few"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(dtypes=(torch.float32, torch.bfloat16, torch.float16), language="triton", min_sm=80),
}
"""``dtypes`` are those of activations, weights and caches."""

WHOLE: dict[str, Support] = {
    "reference": SUPPORT["reference"],
    "triton": Support(dtypes=(torch.bfloat16, torch.float16), language="triton", min_sm=80),
}
"""Of all blocks in one launch, whose programs hold weights in registers."""

TOKENS = 64
"""Most tokens of a product, and most of a row in attention: programs hold all of them."""


def gated_of_few(x: Tensor, gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate(x)) * up(x) of few tokens in one launch.

    Args:
        x: ``[T, C]``, contiguous.
        gate: ``[N, C]``, contiguous.
        up: Likewise.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[T, N]``.

    Raises:
        ValueError: Shapes do not fit together, or there are more tokens than ``TOKENS``.
    """
    if x.dim() != 2 or gate.dim() != 2 or x.shape[1] != gate.shape[1] or up.shape != gate.shape:
        raise ValueError(
            f"expected x [T, C], gate and up [N, C]; got {list(x.shape)}, {list(gate.shape)} and {list(up.shape)}"
        )
    if not 1 <= len(x) <= TOKENS:
        raise ValueError(f"expected 1 to {TOKENS} tokens; got {len(x)}")
    if choose("gated_of_few", backend, SUPPORT, x.device, x.dtype) == "reference":
        return gated_of_few_reference(x, gate, up)
    from .triton import gated_of_few_triton  # needs Triton

    return gated_of_few_triton(x, gate, up)


def attend_slots(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    begin: int,
    *,
    scale: float,
    words: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate new tokens, write their keys and values to their slots, and attend to all slots up to the last of them.

    New tokens see each other in both directions. What is cached for earlier slots is read before the launches just
    before have ended: no kernel that overlaps the next one may write it.

    Args:
        qkv: ``[R, n, (H + 2 HK) * D]``, contiguous: queries, keys and values of each token.
        rope: Cosines and sines, float32 ``[slots, D / 2]``, contiguous, of adjacent pairs of channels; None: positions
            are in the tokens.
        keys: ``[R, HK, slots, D]``, contiguous; slots from ``begin`` on are written.
        values: Likewise.
        begin: Slot of the first new token.
        scale: Of the logits.
        words: bool ``[R, T]``, contiguous: which of the first T slots may be read; T at most ``begin``.
        backend: Which; see ``SUPPORT``.

    Returns:
        ``[R, n, H * D]``.

    Raises:
        ValueError: Shapes do not fit together, or there are more new tokens than ``TOKENS``.
    """
    if keys.dim() != 4 or keys.shape != values.shape or qkv.dim() != 3 or len(qkv) != len(keys):
        raise ValueError(
            f"expected qkv [R, n, (H + 2 HK) * D], keys and values [R, HK, slots, D]; got {list(qkv.shape)}, "
            f"{list(keys.shape)} and {list(values.shape)}"
        )
    _, heads_k, slots, dim = keys.shape
    tokens, (heads, rest) = qkv.shape[1], divmod(qkv.shape[2], dim)
    if rest or heads <= 2 * heads_k or heads % heads_k:
        raise ValueError(f"qkv must have (H + 2 * {heads_k}) * {dim} channels, H a multiple of {heads_k}; got {heads}")
    if not 1 <= tokens <= TOKENS or begin < 0 or begin + tokens > slots:
        raise ValueError(f"expected 1 to {TOKENS} tokens in {slots} slots; got {tokens} from {begin} on")
    if rope is not None and any(table.shape != (slots, dim // 2) for table in rope):
        raise ValueError(f"rope must be two tables [{slots}, {dim // 2}]; got {[list(table.shape) for table in rope]}")
    if words is not None and (words.dim() != 2 or len(words) != len(qkv) or words.shape[1] > begin):
        raise ValueError(f"words must be [{len(qkv)}, T], T at most {begin}; got {list(words.shape)}")
    if choose("attend_slots", backend, SUPPORT, qkv.device, qkv.dtype) == "reference":
        return attend_slots_reference(qkv, rope, keys, values, begin, scale, words)
    from .triton import attend_slots_triton  # needs Triton

    return attend_slots_triton(qkv, rope, keys, values, begin, scale, words)


class BlocksOfFew:
    """All blocks of a pass over few tokens, in one launch on a GPU.

    There is one program a multiprocessor, and they wait for each other at each product. Addresses of weights and caches
    are kept, so that an object is of no use once one of those is moved or replaced, and its programs count in memory of
    their own, so that its calls must not run at the same time.

    Args:
        blocks: Weights of each.
        keys: Caches ``[R, H, slots, D]`` of each block, contiguous; a call reads a prefix and writes what follows it.
        values: Likewise.
        rope: As of ``attend_slots``.
        eps: Of the norms.
        scale: Of the logits.
        backend: Which; see ``SUPPORT``. Triton's is of half precision.

    Raises:
        ValueError: Shapes do not fit together, or are none that a program can hold: heads of 16, 32, 64 or 128
            channels, widths a multiple of 8.
    """

    TOKENS = 32
    """Most of a call, all rows counted."""

    def __init__(
        self,
        blocks: Sequence[Block],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        rope: tuple[Tensor, Tensor] | None,
        eps: float,
        scale: float,
        backend: Backend = "auto",
    ) -> None:
        self.blocks, self.keys, self.values, self.rope = list(blocks), list(keys), list(values), rope
        self.eps, self.scale = eps, scale
        _, self.heads, self.slots, dim = keys[0].shape
        width, self.hidden = self.heads * dim, len(blocks[0].gate)
        if dim not in (16, 32, 64, 128) or self.hidden % 8:
            raise ValueError(
                f"expected heads of 16, 32, 64 or 128 channels and a hidden width that is a multiple of 8; got {dim} "
                f"and {self.hidden}"
            )
        wanted = [(width,), (3 * width, width), (width, width), (width,), (self.hidden, width), (self.hidden, width)]
        wanted.append((width, self.hidden))
        for block, *caches in zip(blocks, keys, values, strict=True):
            if [tuple(weight.shape) for weight in block] != wanted:
                raise ValueError(f"expected weights {wanted}; got {[tuple(weight.shape) for weight in block]}")
            if any(cache.shape != keys[0].shape for cache in caches):
                raise ValueError(f"expected caches {list(keys[0].shape)}; got {[list(x.shape) for x in caches]}")
            if not all(x.is_contiguous() for x in (*block, *caches)):
                raise ValueError("weights and caches must be contiguous")
        device, dtype = keys[0].device, keys[0].dtype
        self.backend = choose("blocks_of_few", backend, WHOLE, device, dtype)
        if self.backend == "triton":
            at = [[x.data_ptr() for x in (*block, k, v)] for block, k, v in zip(blocks, keys, values, strict=True)]
            self._table = torch.tensor(at, dtype=torch.int64).to(device)
            self._count = torch.zeros(1, dtype=torch.int32, device=device)
            self._programs = torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(self, x: Tensor, begin: int, words: Tensor | None = None) -> Tensor:
        """Run all blocks.

        Args:
            x: ``[R, n, C]``, contiguous; R n at most ``BlocksOfFew.TOKENS``.
            begin: Slot of the first token.
            words: As of ``attend_slots``.

        Returns:
            ``[blocks, R, n, C]``, what each block puts out.

        Raises:
            ValueError: Shapes do not fit together.
        """
        rows, tokens, width = x.shape
        if rows != len(self.keys[0]) or width != len(self.blocks[0].norm) or not x.is_contiguous():
            raise ValueError(
                f"expected contiguous x [{len(self.keys[0])}, n, {len(self.blocks[0].norm)}]; got {list(x.shape)}"
            )
        if not 1 <= rows * tokens <= self.TOKENS or begin < 0 or begin + tokens > self.slots:
            raise ValueError(
                f"expected 1 to {self.TOKENS} tokens in all, in {self.slots} slots; got {rows} x {tokens} from "
                f"{begin} on"
            )
        if words is not None and (words.dim() != 2 or len(words) != rows or words.shape[1] > begin):
            raise ValueError(f"words must be [{rows}, T], T at most {begin}; got {list(words.shape)}")
        if self.backend == "reference":
            return blocks_of_few_reference(
                x, self.blocks, self.keys, self.values, self.rope, begin, self.eps, self.scale, words
            )
        from .triton_blocks import blocks_of_few_triton  # needs Triton

        return blocks_of_few_triton(
            x, self._table, self._count, self.rope, words, begin, heads=self.heads, hidden=self.hidden,
            slots=self.slots, eps=self.eps, scale=self.scale, programs=self._programs,
        )  # fmt: skip
