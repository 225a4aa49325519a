"""One token of decoding, from whole caches and from those that kept a quarter: values first, then times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from hone_core.runs import Run
from hone_core.timing import check_values, measure_interleaved

from hone_kernels.column_mass.bench import parse
from hone_kernels.rows import timed

from .api import decode_attention

__all__ = ["SHAPES", "bench"]

SHAPES = tuple(f"{batch}x28x4x16384x128" for batch in (1, 8, 32, 64))
"""Attention of Qwen2.5-VL-7B."""

_KEPT = 0.25


def bench(run: Run, shapes: Sequence[str], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run; rates count the bytes of keys and values that are read.

    Args:
        run: The run, entered.
        shapes: BATCHxHEADSxKEY_HEADSxTOKENSxHEAD_SIZE, of the whole caches.
        rounds: Timed calls of each, with inputs that come from memory.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    torch.manual_seed(seed)
    for text in shapes:
        batch, heads, heads_k, tokens, dim = parse(text)
        q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, heads_k, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        # Samples kept from a half to the whole of what the one that kept most did.
        stored = max(2, int(_KEPT * tokens * 4 / 3))
        few_k, few_v = k[:, :, :stored].contiguous(), v[:, :, :stored].contiguous()
        counts = (
            torch.linspace(stored / 2, stored, batch, device="cuda") if batch > 1 else torch.tensor([_KEPT * tokens])
        )
        valid = torch.arange(stored, device="cuda") < counts.to("cuda")[:, None]
        every = torch.ones(batch, tokens, dtype=torch.bool, device="cuda")
        error = check_values(
            "decode attention",
            decode_attention(q, few_k, few_v, valid, backend="triton"),
            decode_attention(q.float(), few_k.float(), few_v.float(), valid, backend="reference"),
            tolerance=1e-2,
        )
        ways: dict[str, Callable[[], object]] = {
            "dense sdpa": partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True),
            "triton, all": partial(decode_attention, q, k, v, every, backend="triton"),
            "triton, 0.25": partial(decode_attention, q, few_k, few_v, valid, backend="triton"),
            "sdpa under a mask, 0.25": partial(
                F.scaled_dot_product_attention, q, few_k, few_v, attn_mask=valid[:, None, None], enable_gqa=True
            ),
        }
        token = 4.0 * heads_k * dim  # bytes of its keys and values
        for way, timing in measure_interleaved(ways, warmup=3, rounds=rounds, seed=seed, cold_l2=True).items():
            read = token * (batch * tokens if "0.25" not in way else float(valid.sum()))
            compared = error if way == "triton, 0.25" else None
            timed(
                run, way, timing, split="decode", work=read, unit="GB/s", error=compared, shape=text, dtype="bfloat16"
            )
        del q, k, v, few_k, few_v, ways
        torch.cuda.empty_cache()
