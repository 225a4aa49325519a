"""Reading logits beside torch's own ways: values first, then time inside a CUDA graph, as a decoding step runs it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import Timing, measure_interleaved
from torch import Tensor

from hone_kernels.rows import timed

from .api import read_logits
from .reference import read_logits_reference

__all__ = ["SHAPES", "bench", "check_values", "parse"]

SHAPES = tuple(f"{rows}x151936" for rows in (1, 4, 16, 64, 256))
"""Rows and the vocabulary of Qwen2.5 and Qwen3."""

_CALLS, _BYTES = 16, 256 * 2**20
"""Calls in a graph at least, and bytes that they read between them: more than a cache keeps from one replay to the
next."""


def parse(text: str) -> tuple[int, int]:
    """Rows and vocabulary of ROWSxVOCABULARY.

    Raises:
        ValueError: It is none.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) < 1 or int(parts[1]) < 2:
        raise ValueError(f"a shape of logits is ROWSxVOCABULARY such as 64x151936; got {text!r}")
    return int(parts[0]), int(parts[1])


def check_values(rows: int, vocabulary: int, dtype: torch.dtype) -> float:
    """Largest error of the entropy.

    Raises:
        RuntimeError: A value is wrong.
    """
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.float32).mul(4).to(dtype)
    got = read_logits(logits, backend="triton")
    want = read_logits(logits.double(), backend="reference")
    error = float((got.entropy - want.entropy).abs().max())
    if not error < 1e-5:
        raise RuntimeError(f"read_logits: the entropy's error {error:.2e} is not under 1e-5. No time is reported")
    if not torch.equal(got.token, want.token):
        raise RuntimeError("read_logits: a likeliest token is another. No time is reported")
    return error


def bench(
    run: Run, shapes: dict[str, tuple[int, int]], dtypes: list[torch.dtype], *, rounds: int = 20, seed: int = 0
) -> None:
    """Measure, and write rows into the run: milliseconds of one call, of graphs that hold many.

    Args:
        run: The run, entered.
        shapes: Name to rows and vocabulary.
        dtypes: Of the logits.
        rounds: Timed replays of each.
        seed: Of data and order.

    Raises:
        RuntimeError: A value is wrong; no time is reported then.
    """
    torch.manual_seed(seed)
    compiled = torch.compile(read_logits_reference, dynamic=False)
    for name, (rows, vocabulary) in shapes.items():
        for dtype in dtypes:
            error = check_values(rows, vocabulary, dtype)
            size = rows * vocabulary * dtype.itemsize
            count = max(_CALLS, -(-_BYTES // size))
            buffers = torch.randn(count, rows, vocabulary, device="cuda").to(dtype).unbind()
            threshold = torch.full((rows,), 0.5, device="cuda")
            ways: dict[str, Callable[[Tensor], object]] = {
                "triton": functools.partial(read_logits, threshold=threshold, backend="triton"),
                "torch": lambda x: read_logits_reference(x, x.shape[-1], threshold, "entropy"),  # noqa: B023
                "torch compiled": lambda x: compiled(x, x.shape[-1], threshold, "entropy"),  # noqa: B023
                "torch amax alone": lambda x: x.amax(-1),
            }
            graphs = {way: _captured(call, buffers) for way, call in ways.items()}
            times = measure_interleaved({way: graph.replay for way, graph in graphs.items()}, rounds=rounds, seed=seed)
            for way, timing in times.items():
                found = error if way == "triton" else None
                one = _each(timing, count)
                labels: dict[str, Any] = dict(shape=name, dtype=str(dtype).removeprefix("torch."), calls=count)
                timed(run, way, one, split="graph", work=size, unit="GB/s", error=found, **labels)
            del graphs, buffers
            gc.collect()
            torch.cuda.empty_cache()


def _each(timing: Timing, count: int) -> Timing:
    """Time of one of ``count`` calls."""
    return Timing(ms_p20=timing.ms_p20 / count, ms_p50=timing.ms_p50 / count, ms_p80=timing.ms_p80 / count, n=timing.n)


def _captured(call: Callable[[Tensor], object], buffers: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(buffers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffer in buffers:
            call(buffer)
    return graph
