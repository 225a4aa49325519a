"""The three functions beside torch's operations, as written and compiled: values first, then times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import check_values, measure_interleaved
from torch import Tensor

from hone_kernels.rows import timed

from .api import add_change, draw_bits, gather_modulate
from .reference import add_change_reference, draw_bits_reference, gather_modulate_reference

__all__ = ["SHAPES", "bench", "parse"]

SHAPES = (
    *(f"{rows}x{tokens}x{kept}x2048" for rows in (2, 16) for tokens, kept in ((1600, 700), (2304, 1008), (4096, 1792))),
    "2x4096x1792x3584",
)
"""Rows of guidance, tokens and kept tokens of the last three scales at 1024 px, and channels of Infinity-2B and 8B."""

_BITS = 32


def parse(text: str) -> tuple[int, int, int, int]:
    """Sizes of ROWSxTOKENSxKEPTxCHANNELS.

    Raises:
        ValueError: It is none.
    """
    parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(parts) != 4 or min(parts) < 1 or parts[0] % 2 or parts[2] > parts[1]:
        raise ValueError(
            f"a shape is ROWSxTOKENSxKEPTxCHANNELS, of an even number of rows, such as 2x4096x1792x2048; got {text!r}"
        )
    return parts[0], parts[1], parts[2], parts[3]


def bench(run: Run, shapes: Sequence[str], *, rounds: int = 20, seed: int = 0) -> None:
    """Measure, and write rows into the run; rates count the bytes that have to be read and written.

    Args:
        run: The run, entered.
        shapes: See ``parse``.
        rounds: Timed calls of each, with inputs that come from memory.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    torch.manual_seed(seed)
    references: dict[str, Callable[..., Any]] = {
        "gather": gather_modulate_reference,
        "change": add_change_reference,
        "draw": draw_bits_reference,
    }
    compiled = {name: torch.compile(function, dynamic=False) for name, function in references.items()}
    for text in shapes:
        rows, tokens, kept, channels = parse(text)
        images, half = rows // 2, torch.bfloat16
        x, before = (torch.randn(rows, n, channels, device="cuda") for n in (tokens, kept))
        update = torch.randn(rows, kept, channels, device="cuda", dtype=half)
        scale, shift, gamma = (torch.randn(rows, channels, device="cuda") for _ in range(3))
        idx = torch.rand(images, tokens, device="cuda").argsort(1)[:, :kept].sort(1).values.repeat(2, 1)
        logits = torch.randn(rows, kept, _BITS, 2, device="cuda")
        uniform = torch.rand(images, tokens, _BITS, device="cuda")
        slot = torch.randint(0, kept, (images, tokens), device="cuda")
        taken = before.clone()

        arguments: dict[str, tuple[Any, ...]] = {
            "gather": (x, idx, scale, shift, half, 1e-6),
            "change": (taken, update, gamma, before, images, False),
            "draw": (logits, uniform, slot, 4.0, 1.0, 0.97),
        }
        drawn: dict[str, Any] = {"slot": slot, "guidance": 4.0, "temperature": 1.0, "top_p": 0.97}
        kernels: dict[str, Callable[[], Any]] = {
            "gather": partial(gather_modulate, x, idx, scale, shift, dtype=half, backend="triton"),
            "change": partial(add_change, taken, update, gamma, before, images=images, backend="triton"),
            "draw": partial(draw_bits, logits, uniform, **drawn, backend="triton"),
        }
        bytes_of = {
            "gather": 10.0 * rows * kept * channels,
            "change": 12.0 * rows * kept * channels,
            "draw": _BITS * (12.0 * images * tokens + 8.0 * rows * kept),
        }
        for split, given in arguments.items():
            ways: dict[str, Callable[[], object]] = {
                "triton": kernels[split],
                "torch": partial(references[split], *given),
                "torch compiled": partial(compiled[split], *given),
            }
            error, work = _check(split, ways["triton"](), ways["torch"]()), bytes_of[split]
            for way, timing in measure_interleaved(ways, warmup=3, rounds=rounds, seed=seed, cold_l2=True).items():
                compared = error if way == "triton" else None
                timed(
                    run, way, timing, split=split, work=work, unit="GB/s", error=compared, shape=text, dtype="bfloat16"
                )
        torch.cuda.empty_cache()


def _check(split: str, got: Any, want: Any) -> float:
    if split == "draw":
        differ = float((got != want).float().mean())
        if differ > 1e-4:
            raise RuntimeError(f"draw: {differ:.2%} of the bits differ from the reference. No time is reported")
        return differ
    pairs: list[tuple[Tensor, Tensor]] = list(zip(got, want, strict=True))
    return max(check_values(split, one.float(), other.float(), tolerance=1e-2) for one, other in pairs)
