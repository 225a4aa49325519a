"""Choosing tokens beside the attention that it is to shorten: values first, then times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.runs import Run
from hone_core.timing import check_values, measure_interleaved

from hone_kernels.rows import timed
from hone_kernels.token_select import select_tokens

from .api import column_mass

__all__ = ["SHAPES", "bench", "parse"]

SHAPES = tuple(f"{batch}x28x4x{tokens}x128" for tokens in (4096, 16384, 32768) for batch in (1, 8))
"""Attention of Qwen2.5-VL-7B."""

_ROWS = 64
"""Probe rows at the end, and as many drawn among the others."""


def parse(text: str) -> tuple[int, int, int, int, int]:
    """Sizes of BATCHxHEADSxKEY_HEADSxTOKENSxHEAD_SIZE.

    Raises:
        ValueError: It is none.
    """
    parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(parts) != 5 or min(parts) < 1 or parts[1] % parts[2]:
        raise ValueError(f"a shape is BATCHxHEADSxKEY_HEADSxTOKENSxHEAD_SIZE such as 1x28x4x16384x128; got {text!r}")
    return parts[0], parts[1], parts[2], parts[3], parts[4]


def bench(run: Run, shapes: Sequence[str], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run.

    Args:
        run: The run, entered.
        shapes: See ``parse``.
        rounds: Timed calls of each.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    torch.manual_seed(seed)
    for text in shapes:
        batch, heads, heads_k, tokens, dim = parse(text)
        q, k, v = (
            torch.randn(batch, h, tokens, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, heads_k, heads_k)
        )
        last = min(_ROWS, tokens)
        drawn = torch.randperm(tokens - last, device="cuda")[:_ROWS].sort().values
        rows = torch.cat([drawn, torch.arange(tokens - last, tokens, device="cuda")]).int().repeat(batch, 1)
        real = torch.ones(batch, tokens, dtype=torch.bool, device="cuda")
        protected = torch.zeros_like(real)
        protected[:, -1] = True
        p = torch.full((batch,), 0.975, device="cuda")

        def mass(backend="triton", q=q, k=k, rows=rows):
            return column_mass(q, k, rows, backend=backend)

        def select(found, backend="triton", real=real, protected=protected, p=p):
            return select_tokens(found.rank, real=real, protected=protected, mass=found.mass, p=p, backend=backend)

        found, want = mass(), mass("reference")
        error = check_values("column mass", found.mass, want.mass, tolerance=1e-3)
        apart = (select(found).num - select(found, "reference").num).abs()
        if int(apart.max()) > 1:
            raise RuntimeError(f"selection: budgets are {apart.tolist()} tokens apart. No time is reported")
        ways: dict[str, Callable[[], object]] = {
            "column mass": mass,
            "selection": partial(select, found),
            "both": partial(_both, mass, select, "triton"),
            "torch": partial(_both, mass, select, "reference"),
            "causal dense": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
        }
        for way, timing in measure_interleaved(ways, warmup=3, rounds=rounds, seed=seed).items():
            work = 2.0 * batch * heads * tokens**2 * dim if way == "causal dense" else 0.0
            compared = error if way == "column mass" else None
            timed(run, way, timing, split="selection", work=work, error=compared, shape=text, dtype="bfloat16")
        del q, k, v, found, want, ways
        torch.cuda.empty_cache()


def _both(mass: Callable[[str], Any], select: Callable[[Any, str], object], backend: str) -> None:
    select(mass(backend), backend)
