"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_heads, check_scale
from hone_kernels.launch import Kept, Notes, Plans, eager, geometry, on_device_of, plannable

from .reference import block_scores_reference

__all__ = ["KINDS", "SUPPORT", "Backend", "Kind", "block_scores"]

Kind = Literal["paper", "official", "mean", "lse"]
KINDS: tuple[Kind, ...] = get_args(Kind)


SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "triton": Support(
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        language="triton",
        head_dims=(32, 64, 96, 128),
        samples=128,
        min_sm=80,
    ),
}


def _check(q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    check_heads(q, k)
    for name, index in (("q_index", q_index), ("k_index", k_index)):
        if index.dim() != 4 or index.shape[0] not in (1, q.shape[0]) or index.shape[1] not in (1, q.shape[1]):
            raise ValueError(
                f"{name} must be [B or 1, H or 1, blocks, samples] with B = {q.shape[0]} and H = {q.shape[1]} query "
                f"heads; got {list(index.shape)}"
            )
        if not index.numel():
            raise ValueError(f"{name} must name at least one token of at least one block; got {list(index.shape)}")
        if index.dtype != torch.int32 or index.device != q.device:
            raise TypeError(f"{name} must be int32 on {q.device}; got {index.dtype} on {index.device}")


def block_scores(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    kind: Kind = "paper",
    scale: float | None = None,
    rounded: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Importance of each key block for each query block, from sampled tokens; rows sum to 1.

    With s the scaled logit of a sampled query r of block i and a sampled key c of block j:

    - ``"paper"``: ``max_r max_c softmax_c(s)``, the softmax over all sampled keys of all blocks;
    - ``"official"``: ``max_r exp(max_{c in j} s - max_c s)``, that is without the softmax denominator, so that every
      sampled query gives a 1 to its best block;
    - ``"lse"``: ``mean_r sum_{c in j} softmax_c(s)``, the attention mass of the block;
    - ``"mean"``: softmax over j of the logits of the mean query and the mean key of the listed tokens.

    Not differentiable. Never holds the map of all sampled queries against all sampled keys; no call waits for the
    device.

    Args:
        q: ``[B, H, TQ, D]``, any strides with D contiguous.
        k: ``[B, HK, TK, D]``, H a multiple of HK.
        q_index: int32 ``[B or 1, H or 1, NQ, R]``, the positions in q that stand for each query block; a negative entry
            is no token (short blocks). Not checked against TQ, which would wait for the device.
        k_index: int32 ``[B or 1, H or 1, NK, S]``, likewise for k, per query head.
        kind: Which score.
        scale: Factor on the logits, positive; ``D ** -0.5`` if None.
        rounded: Of ``"official"``: round to the dtype of q what the release stores in it, which are block maxima,
            scores, their sum and the quotient. In 16 bits that scatters the many ties of this score.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        float32 (float64 for float64 inputs) ``[B, H, NQ, NK]``. A query block without a token has a row of zeros, a key
        block without one a column of zeros.

    Raises:
        ValueError: If shapes, kind and backend do not fit together.
        TypeError: If dtypes or devices do not.

    Source: BLADE (arXiv 2508.10774), Algorithm 1 for ``"paper"``; the authors' release for ``"official"``.
    """
    given, options = (q, k, q_index, k_index), (kind, scale, rounded, backend)
    planned = plannable()
    again = _plans.find(options, given) if planned else None
    if again is not None:
        parts, addresses, stream = again
        return parts.scores(addresses, stream)[0]
    plain, call = eager(q, k, q_index, k_index), None
    if plain:
        facts = geometry(q, k, q_index, k_index)
        call = facts and (facts, kind, scale, rounded, backend)
    if call is not None and call in _checked:
        scale, backend = _checked[call]
    else:
        _check(q, k, q_index, k_index, kind)
        if rounded and kind != "official":
            raise ValueError(f"rounded goes with kind 'official'; got {kind!r}")
        scale = check_scale(scale, q.shape[3])
        # Of "mean" one token per block is scored, whatever their number.
        samples = None if kind == "mean" else k_index.shape[3]
        backend = choose("block_scores", backend, SUPPORT, q.device, q.dtype, head_dim=q.shape[3], samples=samples)
        if call is not None and backend != "reference":
            _checked.keep(call, (scale, backend))
    # As an operator only where something traces the call.
    if not plain:
        return torch.ops.hone_kernels.block_scores(q.detach(), k.detach(), *given[2:], kind, scale, rounded, backend)
    if not planned or backend == "reference" or q.requires_grad or k.requires_grad:
        return _run(q.detach(), k.detach(), q_index, k_index, kind, scale, rounded, backend)
    notes = Notes(*given)
    out = _run(*given, kind, scale, rounded, backend, notes)
    _plans.add(options, given, scores=notes.replay(out))
    return out


_plans = Plans()

_checked = Kept()
"""Scale and backend of calls that passed the checks, by all that the checks look at."""


def _run(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    kind: str,
    scale: float,
    rounded: bool,
    backend: str,
    notes: Notes | None = None,
) -> Tensor:
    if backend == "reference":
        rounding = q.dtype if rounded and q.dtype.itemsize == 2 else None
        return block_scores_reference(q, k, q_index, k_index, kind, scale, rounding=rounding)
    from .triton import block_scores_triton  # needs Triton

    with on_device_of(q):
        return block_scores_triton(q, k, q_index, k_index, kind, scale, rounded, notes=notes)


@torch.library.custom_op("hone_kernels::block_scores", mutates_args=())
def _block_scores(
    q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, kind: str, scale: float, rounded: bool, backend: str
) -> Tensor:
    return _run(q, k, q_index, k_index, kind, scale, rounded, backend)


@_block_scores.register_fake
def _(
    q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, kind: str, scale: float, rounded: bool, backend: str
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], q.shape[1], q_index.shape[2], k_index.shape[2]), dtype=dtype)
