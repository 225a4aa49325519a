"""FP8 block-sparse attention on a GPU: values first, then speed beside 16-bit attention and cuDNN.

    python tools/gpu_fp8.py bench --out results/kernels/attention_fp8_h200.json
    python tools/gpu_fp8.py tune  --out tune.json

``bench`` times what ships: the forward on operands that are there, the prologue that makes them beside a device copy of
as many bytes, and both together with the backward. ``tune`` times the candidates that the shipped settings were chosen
from. Everything is compared with the emulation before it is timed; a wrong value ends the run.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_attention import DENSITIES, check_error, dense_flops, flops, relative, say
from gpu_attention import SHAPES as ATTENTION_SHAPES
from hone_core.environment import environment
from hone_core.timing import measure_interleaved
from hone_kernels.attention import SUPPORT, BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import cudnn, random_layout
from hone_kernels.attention.triton import Tiles
from hone_kernels.attention_fp8 import SUPPORT as FP8_SUPPORT
from hone_kernels.attention_fp8 import quantize_qkv, quantized_attention, straight_through_attention
from hone_kernels.attention_fp8.reference import attention_fp8_reference, quantize_reference
from hone_kernels.attention_fp8.triton import TILES, attention_fp8_forward
from hone_kernels.attention_fp8.triton_quantize import PROLOGUE, ROTATING, Prologue, quantize_triton

# heads, tokens, head size
SHAPES = {name: ATTENTION_SHAPES[name] for name in ("wan-1.3b 480p", "cogvideox-5b")}
# The prologue too of Wan2.1-14B at 720p, whose tensors do not fit in a cache.
PROLOGUES = {**SHAPES, "wan-14b 720p": (40, 75600, 128)}

# Tiles' fields in order.
CANDIDATES = {
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
SETTINGS = {
    # The last six: V reused in smaller units, not at all, and held by other numbers of warps.
    "plain": [
        (8, 80), (8, 64), (4, 128), (8, 80, 4, 32, 4 << 20), (8, 80, 4, 32, 1 << 40), (8, 80, 4, 32, 8 << 20, (16, 64)),
        (8, 80, 4, 32, 8 << 20, (8, 64)), (8, 80, 4, 32, 8 << 20, (4, 168)), (8, 80, 4, 32, 8 << 20, (4, 128)),
    ],
    "rope, order": [(8, 128), (8, 96), (8, 80), (8, 128, 6), (16, 64, 4, 64), (8, 96, 4, 16), (4, 168)],
}  # fmt: skip


def inputs(heads: int, tokens: int, dim: int, n: int = 3) -> list[torch.Tensor]:
    """Views of ``[B, S, H, D]``, as models lay their tensors out."""
    shape = (1, tokens, heads, dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(n)]


def check_prologue(name: str, got: tuple, want: tuple) -> None:
    for field, g, w in zip(("q8", "k8", "v8", "q_scale", "k_scale", "v_scale"), got, want, strict=False):
        # A rotation that differs in its last bit may round the other way.
        check_error(f"{name} {field}", relative(g.float(), w.float()), 2e-3)


def rope_and_order(tokens: int, dim: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Tables, and a permutation of tiles of 4 x 4 in rows of 52: what a video in tile order asks for."""
    angle = torch.rand(tokens, dim // 2, device="cuda") * 6
    place = torch.arange(tokens, device="cuda")
    row, column = place // 52, place % 52
    order = ((row // 4 * 13 + column // 4) * 16 + row % 4 * 4 + column % 4).argsort().to(torch.int32)
    return (angle.cos(), angle.sin()), order


def kernel_times(call: Callable, n: int = 10) -> dict[str, float]:
    """Milliseconds of each kernel in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            call()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / n / 1e3 for e in profile.key_averages() if e.self_device_time_total}


def tune(rounds: int) -> list[dict]:
    rows = []
    for heads, tokens, dim in SHAPES.values():
        q, k, v = inputs(heads, tokens, dim)
        x = quantize_qkv(q, k, v)
        fields = (x.q8, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale)
        small = quantize_qkv(*inputs(2, 1000, dim))
        few = random_layout(2, 1000, 0.5)

        def run(operands: tuple, layout: BlockLayout, tiles: Tiles, dim: int = dim) -> tuple:
            lists = (layout.kv_num, layout.kv_idx, None)
            return attention_fp8_forward(*operands, *lists, 128, 128, 128, dim**-0.5, torch.bfloat16, tiles)

        good = []
        for numbers in CANDIDATES[dim]:
            tiles = Tiles(*numbers)
            try:
                got = run((small.q8, small.k8, small.v8, small.q_scale, small.k_scale, small.v_scale), few, tiles)
            except Exception as error:
                say("forward", dim, numbers, "fails:", str(error).splitlines()[0][:100])
                continue
            want = attention_fp8_reference(*small.dequantize(), few, dim**-0.5, tile=tiles.k)
            check_error(f"forward {numbers}", relative(got[0], want[0]), 2e-2)
            good.append(tiles)
        for density in (1.0, 0.1):
            layout = random_layout(heads, tokens, density)
            calls = {str(t): lambda t=t, layout=layout: run(fields, layout, t) for t in good}
            work = flops(layout, heads, dim)
            for name, t in measure_interleaved(calls, warmup=2, rounds=rounds).items():
                rate = work / t.ms_p50 / 1e9
                say(f"forward  d{dim:<4} {density:4} {name:80} {t.ms_p50:8.3f} ms {rate:6.0f}")
                rows.append(dict(kernel="forward", dim=dim, density=density, tiles=name, ms=t.ms_p50, tflops=rate))

        rope, order = rope_and_order(tokens, dim)
        for kind, options in (("plain", (None, None, None)), ("rope, order", (*rope, order))):
            want = quantize_reference(*(y[:, :1] for y in (q, k, v)), *options, None, 128, 1, False)
            calls = {}
            for numbers in SETTINGS[kind]:
                settings = Prologue(*numbers)

                def prologue(settings: Prologue = settings, options: tuple = options) -> tuple:
                    return quantize_triton(q, k, v, *options, None, 128, 1, False, settings)

                check_prologue(f"{kind} {settings}", tuple(y[:, :1] for y in prologue()[:6]), want[:6])
                calls[str(settings)] = prologue
            for name, t in measure_interleaved(calls, warmup=2, rounds=rounds).items():
                rate = 9 * q.numel() / t.ms_p50 / 1e6
                say(f"prologue d{dim:<4} {kind:12} {name:50} {t.ms_p50:8.3f} ms {rate:6.0f} GB/s")
                rows.append(dict(kernel="prologue", dim=dim, kind=kind, settings=name, ms=t.ms_p50, gbps=rate))
            for settings, call in calls.items():
                for name, ms in kernel_times(call).items():
                    say(f"    {settings} {name[:60]} {ms:.3f} ms")
                    rows.append(dict(kernel=name, dim=dim, kind=kind, settings=settings, ms=ms))
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def bench(rounds: int) -> list[dict]:
    rows = []

    def note(calls: dict[str, Callable], unit: str, work: float, dense: float = 0.0, **fields: object) -> None:
        """Rates of ``work``, those of dense providers of ``dense``."""
        for name, t in measure_interleaved(calls, warmup=3, rounds=rounds).items():
            done = dense if name.endswith(" dense") else work
            rate = done / t.ms_p50 / (1e9 if unit == "tflops" else 1e6)
            say(f"{fields} {name:18} {t.ms_p50:8.3f} ms {rate:6.0f} {unit}")
            times = dict(ms_p20=t.ms_p20, ms_p50=t.ms_p50, ms_p80=t.ms_p80, n=t.n)
            rows.append(dict(fields, provider=name, **times, **{unit: rate}))

    for shape, (heads, tokens, dim) in SHAPES.items():
        q, k, v, dout = inputs(heads, tokens, dim, 4)
        fp8, half = ([b for b in support if b != "reference"] for support in (FP8_SUPPORT, SUPPORT))
        part = [y[:, :2] for y in (q, k, v)]
        few = random_layout(2, tokens, 0.1)
        exact = block_sparse_attention(*(y.float() for y in part), few, backend="reference")
        small = quantize_qkv(*part)
        emulated = relative(quantized_attention(small, few, backend="reference"), exact)
        for name in fp8:
            error = relative(quantized_attention(small, few, backend=name), exact)
            say(f"{shape} {name}: relative error {error:.4f}, emulation {emulated:.4f}")
            check_error(f"{shape} {name}", error, 1.3 * emulated)
        x = quantize_qkv(q, k, v)
        leaves = [y.detach().requires_grad_() for y in (q, k, v)]
        for density in DENSITIES:
            layout = random_layout(heads, tokens, density)
            fields = dict(op="attention_fp8", shape=shape, heads=heads, tokens=tokens, dim=dim, density=density)
            calls = {f"fp8 {b}": lambda b=b, at=layout: quantized_attention(x, at, backend=b) for b in fp8}
            calls |= {f"bf16 {b}": lambda b=b, at=layout: block_sparse_attention(q, k, v, at, backend=b) for b in half}
            calls["prologue + fp8"] = lambda at=layout: quantized_attention(quantize_qkv(q, k, v), at)
            calls["cudnn dense"] = lambda: cudnn(q, k, v)
            work, dense = flops(layout, heads, dim), dense_flops(heads, tokens, dim)
            note(calls, "tflops", work, dense, **fields, mode="forward")
            if density in (0.5, 0.1):
                outs = {
                    f"fp8, delta {d}": straight_through_attention(*leaves, layout, delta=d)
                    for d in ("exact", "forward")
                }
                outs["bf16"] = block_sparse_attention(*leaves, layout)
                calls = {
                    name: lambda o=o: torch.autograd.grad(o, leaves, dout, retain_graph=True)
                    for name, o in outs.items()
                }
                note(calls, "tflops", 2.5 * work, **fields, mode="backward")
                del outs, calls
            gc.collect()
            torch.cuda.empty_cache()

    for shape, (heads, tokens, dim) in PROLOGUES.items():
        q, k, v = inputs(heads, tokens, dim)
        rope, order = rope_and_order(tokens, dim)
        part = [y[:, :1] for y in (q, k, v)]
        kinds = {
            "plain": {},
            "rope": dict(rope=rope),
            "rope, order": dict(rope=rope, order=order),
            "smooth_k": dict(smooth_k=True),
            "group 3": dict(group=3),
        }
        for kind, options in kinds.items():
            got, want = (quantize_qkv(*part, **options, backend=b) for b in ("triton", "reference"))
            names = ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale")
            check_prologue(kind, *(tuple(getattr(o, n) for n in names) for o in (got, want)))
        calls = {kind: lambda o=options: quantize_qkv(q, k, v, **o) for kind, options in kinds.items()}
        # What has to move: two bytes read and one written per element. A copy reads and writes as many of each.
        moved = 9 * q.numel()
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        calls["device copy"] = lambda: target.copy_(source)
        if shape in SHAPES:
            calls["torch, plain"] = lambda: quantize_qkv(q, k, v, backend="reference")
        note(calls, "gbps", moved, op="quantize_qkv", shape=shape, heads=heads, tokens=tokens, dim=dim, mode="prologue")
        del source, target, calls
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("bench", "tune"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of all variants in random order")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = (bench if args.mode == "bench" else tune)(args.rounds)
    tiles = {f"forward d{dim}": str(t) for dim, t in TILES.items()} | {"prologue": f"{PROLOGUE}, {ROTATING}"}
    result = dict(
        schema=1, package="hone-kernels", verb=f"attention_fp8 {args.mode}", environment=environment(), tiles=tiles
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(result, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
