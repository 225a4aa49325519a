"""The public op: checks, choice of backend and ``torch.library`` registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hone_kernels.backends import Backend, Support, choose
from hone_kernels.checks import check_tensor

from .reference import draw_codes_reference

__all__ = ["SUPPORT", "Backend", "draw_codes"]

SUPPORT: dict[str, Support] = {
    "reference": Support(dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    "triton": Support(dtypes=(torch.float32, torch.float16, torch.bfloat16), language="triton", min_sm=80),
}
"""``dtypes`` are those of the logits."""

HEADS = 3
VOCABULARY = 65_536
"""Most entries that one program holds."""


def draw_codes(
    logits: Sequence[Tensor],
    weight: Tensor,
    uniform: Tensor,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Draw a code for each of n tokens of B images; no call waits for the device.

    The heads' logits are averaged with the weights, guided (``u + g (c - u)``), divided by the temperature and cut to
    the likeliest; the code is the first whose running sum of probabilities passes the token's uniform. Sums are in
    float32 and rounded in another order by each backend, so that a uniform within rounding of a border may fall on
    either side.

    Args:
        logits: Of one to three heads, each ``[R, n, V]`` of one dtype, finite. R is B, or with guidance 2 B,
            conditional rows first.
        weight: float32 ``[n, heads]``; a head of weight 0 is not read by the kernel.
        uniform: float32 ``[B, n]`` in [0, 1).
        guidance: Strength; 1 is none.
        temperature: Positive.
        top_k: Likeliest codes that are kept, with those that tie with the last; 0 keeps all.
        backend: ``"triton"`` for a GPU (or Triton's interpreter), ``"reference"`` for any device, ``"auto"`` to choose.

    Returns:
        int64 ``[B, n]``.

    Raises:
        ValueError: A shape, dtype, device, value or backend does not fit.
    """
    if not 1 <= len(logits) <= HEADS:
        raise ValueError(f"expected the logits of 1 to {HEADS} heads; got {len(logits)}")
    first = logits[0]
    if first.dim() != 3 or not first.numel() or first.shape[2] > VOCABULARY:
        raise ValueError(f"logits must be [R, n, V], not empty, V at most {VOCABULARY}; got {list(first.shape)}")
    for at, each in enumerate(logits):
        if (each.shape, each.dtype, each.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"all heads must have one shape, dtype and device; got {list(first.shape)} {first.dtype} on "
                f"{first.device}, and of head {at} {list(each.shape)} {each.dtype} on {each.device}"
            )
    rows, tokens, _ = first.shape
    guided = guidance != 1
    if guided and rows % 2:
        raise ValueError(f"with guidance, rows are conditional and unconditional ones, as many each; got {rows}")
    images = rows // (1 + guided)
    for name, x, shape in (("weight", weight, (tokens, len(logits))), ("uniform", uniform, (images, tokens))):
        check_tensor(name, x, shape, first.device, torch.float32, torch.float64)
    if not temperature > 0 or top_k < 0:
        raise ValueError(f"temperature must be positive and top_k not negative; got {temperature} and {top_k}")
    backend = choose("draw_codes", backend, SUPPORT, first.device, first.dtype)
    heads = [each.detach() for each in logits]
    return torch.ops.hone_kernels.draw_codes(
        heads, weight, uniform, float(guidance), float(temperature), int(top_k), backend
    )


@torch.library.custom_op("hone_kernels::draw_codes", mutates_args=())
def _draw_codes(
    logits: Sequence[Tensor],
    weight: Tensor,
    uniform: Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return draw_codes_reference(logits, weight, uniform, guidance, temperature, top_k)
    from .triton import draw_codes_triton  # needs Triton

    with torch.cuda.device_of(uniform):
        return draw_codes_triton(logits, weight, uniform, guidance, temperature, top_k)


@_draw_codes.register_fake
def _(
    logits: Sequence[Tensor],
    weight: Tensor,
    uniform: Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    backend: str,
) -> Tensor:
    return uniform.new_empty(uniform.shape, dtype=torch.int64)
