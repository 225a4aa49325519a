"""Launch settings that the FP8 kernels' shipped ones were chosen from."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hone_core.runs import Run
from hone_core.timing import Timing, measure_interleaved
from torch import Tensor

from hone_kernels.attention.bench import SHAPES as BENCH_SHAPES
from hone_kernels.attention.bench import Shape, random_layout
from hone_kernels.attention.layout import BlockLayout
from hone_kernels.attention.tune import check
from hone_kernels.rows import timed

from .bench import check_prologue, inputs, rope_and_order
from .quantize import FP8Operands, quantize_qkv
from .reference import attention_fp8_reference, quantize_reference

__all__ = ["SHAPES", "triton"]

SHAPES = {name: BENCH_SHAPES[name] for name in ("wan-1.3b 480p", "cogvideox-5b")}
SHAPES["small"] = Shape("small", 2, 2080, 64, 2)
"""The last one only shows that everything runs."""

# Head size -> Tiles' fields in order.
TILES: dict[int, list[Any]] = {
    128: [
        (64, 128, 4, 2, True, 168), (64, 128, 4, 2, True), (64, 128, 4, 3, True, 168), (64, 64, 4, 2, True, 168),
        (128, 128, 8, 2, True, 168), (128, 128, 8, 3, True),
    ],
    64: [
        (64, 128, 4, 2, True, 128), (64, 128, 4, 2, True, 168), (64, 128, 4, 3, True, 128), (64, 64, 4, 2, True, 96),
        (128, 128, 8, 2, True, 128), (128, 64, 8, 2, True),
    ],
}  # fmt: skip
# Prologue's fields in order.
PROLOGUES: dict[str, list[tuple[Any, ...]]] = {
    # The last six: V reused in smaller units, not at all, and held by other numbers of warps.
    "plain": [
        (8, 80), (8, 64), (4, 128), (8, 80, 4, 32, 4 << 20), (8, 80, 4, 32, 1 << 40), (8, 80, 4, 32, 8 << 20, (16, 64)),
        (8, 80, 4, 32, 8 << 20, (8, 64)), (8, 80, 4, 32, 8 << 20, (4, 168)), (8, 80, 4, 32, 8 << 20, (4, 128)),
    ],
    "rope, order": [(8, 128), (8, 96), (8, 80), (8, 128, 6), (16, 64, 4, 64), (8, 96, 4, 16), (4, 168)],
}  # fmt: skip
_WARMUP = 2
_log = logging.getLogger(__name__)


def triton(run: Run, shapes: Mapping[str, Shape], *, candidates: int | None, rounds: int, seed: int) -> None:
    """Tiles of the forward and settings of the prologue, the latter also kernel by kernel.

    Args:
        run: Gets the rows; ``split`` is ``forward`` or the prologue's work.
        shapes: Name to shape.
        candidates: Only so many of each, or None.
        rounds: Timed calls of each.
        seed: Of the order.
    """
    for shape in shapes.values():
        q, k, v = inputs(shape)
        _forward(run, shape, (q, k, v), candidates, rounds, seed)
        rope, order = rope_and_order(shape.tokens, shape.dim)
        for kind, options in (("plain", (None, None, None)), ("rope, order", (*rope, order))):
            _prologue(run, shape, (q, k, v), kind, options, candidates, rounds, seed)
        gc.collect()
        torch.cuda.empty_cache()


def _forward(run: Run, shape: Shape, qkv: tuple[Tensor, ...], candidates: int | None, rounds: int, seed: int) -> None:
    from hone_kernels.attention.triton import Tiles

    from .triton import attention_fp8_forward

    scale = shape.dim**-0.5

    def call(x: FP8Operands, layout: BlockLayout, tiles: Tiles) -> tuple[Tensor, Tensor]:
        fields = (x.q8, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale, layout.kv_num, layout.kv_idx, None)
        return attention_fp8_forward(*fields, 128, 128, 128, scale, torch.bfloat16, tiles)

    small, few = quantize_qkv(*inputs(Shape("", 2, 1000, shape.dim, 2))), random_layout(2, 1000, 0.5)
    errors: dict[str, float] = {}
    good = []
    for tiles in [Tiles(*x) for x in TILES[shape.dim][:candidates]]:
        try:
            got = call(small, few, tiles)
        except Exception as error:
            _log.info("forward d%d %s fails: %s", shape.dim, tiles, str(error).splitlines()[0][:100])
            continue
        want = attention_fp8_reference(*small.dequantize(), few, scale, tile=tiles.k)
        errors[str(tiles)] = check(f"forward {tiles}", got[:1], want[:1], 2e-2)
        good.append(tiles)
    operands = quantize_qkv(*qkv)
    for density in (1.0, 0.1):
        layout = random_layout(shape.heads, shape.tokens, density)
        calls = {str(t): lambda t=t, layout=layout: call(operands, layout, t) for t in good}
        work = 4.0 * shape.dim * shape.heads * shape.tokens**2 * layout.density().item()
        for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
            fields: dict[str, Any] = dict(
                work=work, error=errors[name], shape=shape.name, dim=shape.dim, density=density
            )
            timed(run, name, timing, split="forward", **fields)


def _prologue(
    run: Run, shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], kind: str, options: tuple[Any, Any, Any],
    candidates: int | None, rounds: int, seed: int,
) -> None:  # fmt: skip
    from .triton_quantize import Prologue, quantize_triton

    q, k, v = qkv
    want = quantize_reference(q[:, :1], k[:, :1], v[:, :1], *options, None, 128, None, False)[:6]
    calls, errors = {}, {}
    for settings in [Prologue(*x) for x in PROLOGUES[kind][:candidates]]:

        def prologue(settings: Prologue = settings) -> tuple[Tensor, ...]:
            return quantize_triton(q, k, v, *options, None, 128, None, False, settings)[:6]

        few = [x[:, :1] for x in prologue()]
        errors[str(settings)] = check_prologue(f"{kind} {settings}", few, want)
        calls[str(settings)] = prologue
    labels: dict[str, Any] = dict(shape=shape.name, dim=shape.dim)
    for name, timing in measure_interleaved(calls, warmup=_WARMUP, rounds=rounds, seed=seed).items():
        fields: dict[str, Any] = dict(work=9.0 * q.numel(), unit="GB/s", error=errors[name], **labels)
        timed(run, name, timing, split=kind, **fields)
    for name, call in calls.items():
        for kernel, ms in _kernel_times(call).items():
            timing = Timing(ms_p20=ms, ms_p50=ms, ms_p80=ms, n=_PROFILED)
            timed(run, name, timing, split=f"{kind}: {kernel[:60]}", **labels)


_PROFILED = 10


def _kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Mean milliseconds of each kernel in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED):
            call()
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / _PROFILED / 1e3 for e in profile.key_averages()}
    return {name: ms for name, ms in times.items() if ms}
