"""The Hopper attention kernel on a GPU: does it finish, is it right, and which configuration is fastest.

    timeout 180 python tools/gpu_hopper.py smoke
    python tools/gpu_hopper.py tune --out tune.json

``smoke`` runs tiny shapes of every variant and feature, the least risky first, and says each before it starts; one that
does not finish within 30 seconds ends the run. ``tune`` times every candidate beside cuDNN's dense attention, the
Triton kernel and (with ``--flex``) FlexAttention, all in random order, and checks each before.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gpu_attention import DENSITIES, SHAPES, check, dense_flops, flops, inputs, relative, say
from hone_core.environment import environment
from hone_core.timing import measure_interleaved
from hone_kernels.attention import BlockLayout, PooledKV, block_sparse_attention
from hone_kernels.attention.bench import cudnn, flex, random_layout
from hone_kernels.attention.gluon_sm90 import CONFIGS, Config, attention_forward
from hone_kernels.attention.reference import attention_reference

BLOCKS = ["128x128", "128x64", "64x64"]

# (head size, queries in a block) -> what a tuning run compares with the shipped configuration.
CANDIDATES = {
    (128, 128): [
        Config(keys=128, stages=2, q_registers=True),
        Config(keys=128, stages=2, turns=True),
        Config(keys=128, stages=2, q_registers=True, turns=True),
    ],
    (64, 128): [
        Config(keys=128, stages=4),
        Config(keys=128, stages=4, q_registers=True),
        Config(keys=128, stages=3, q_registers=True, turns=True),
    ],
    (128, 64): [
        Config(keys=64, stages=2),
        Config(keys=128, stages=1),
    ],
    (64, 64): [
        Config(keys=128, stages=3, q_registers=True),
        Config(keys=64, stages=4, q_registers=True),
        Config(keys=128, stages=2),
    ],
}


def uneven_layout(heads: int, tokens: int, density: float, block_q: int = 128, block_k: int = 128) -> BlockLayout:
    """Lists of a quarter to seven quarters of the mean, but two whole rows last in each head, an empty one first."""
    rows, cols = -(-tokens // block_q), -(-tokens // block_k)
    chance = density * (0.25 + 1.5 * torch.rand(1, heads, rows, 1, device="cuda"))
    chance[:, :, -2:] = 1.0
    chance[:, :, 0] = 0.0
    mask = torch.rand(1, heads, rows, cols, device="cuda") < chance
    return BlockLayout.from_mask(mask, tokens, tokens, block_q=block_q, block_k=block_k)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    config: Config | None = None,
    pooled: PooledKV | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel without the op around it, so that a configuration can be named."""
    extra = (None, None, None)
    if pooled is not None:
        bias = None if pooled.bias is None else pooled.bias.float().expand(pooled.k.shape[:3])
        extra = (pooled.k, pooled.v, bias)
    return attention_forward(
        q, k, v, layout.kv_num, layout.kv_idx, layout.k_valid, *extra, layout.block_q, layout.block_k,
        q.shape[3] ** -0.5, config,
    )  # fmt: skip


def smoke(brief: bool) -> None:
    started = time.perf_counter()

    def case(name: str, dim: int, queries: int, keys: int, density: float = 0.5, *, heads: int = 2, kv_heads: int = 2,
             batch: int = 1, block_q: int = 128, block_k: int = 128, padded: bool = False, pooled: int = 0,
             bias: bool = True, config: Config | None = None, dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
        print(f"{time.perf_counter() - started:6.1f} s  d{dim:<4} {name} ...", end=" ", flush=True)
        faulthandler.dump_traceback_later(30, exit=True)
        q, *kv = (
            torch.randn(batch, n, s, dim, device="cuda", dtype=dtype)
            for n, s in ((heads, queries), (kv_heads, keys), (kv_heads, keys), *[(kv_heads, pooled)] * 2 * bool(pooled))
        )
        rows, cols = -(-queries // block_q), -(-keys // block_k)
        mask = torch.rand(batch, heads, rows, cols, device="cuda") < density
        valid = None
        if padded:
            valid = torch.randint(0, block_k + 1, (batch, cols), device="cuda", dtype=torch.int32)
        layout = BlockLayout.from_mask(mask, queries, keys, block_q=block_q, block_k=block_k, k_valid=valid)
        further = None
        if pooled:
            further = PooledKV(*kv[2:], torch.randn(kv_heads, pooled, device="cuda") if bias else None)
        out, lse = forward(q, *kv[:2], layout, config, further)
        torch.cuda.synchronize()
        faulthandler.cancel_dump_traceback_later()
        full = None if further is None or further.bias is None else further.bias.expand(further.k.shape[:3])
        extra = () if further is None else (further.k, further.v, full)
        want, want_lse = attention_reference(q, *kv[:2], layout, dim**-0.5, *extra)
        torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-4)
        error = relative(out, want) if want.any() else out.abs().max().item()
        if not error < 1e-2:
            sys.exit(f"relative error {error:.2e}")
        print(f"ok, error {error:.1e}", flush=True)

    for dim in (128,) if brief else (128, 64):
        case("one block", dim, 128, 128, 1.0, heads=1, kv_heads=1)
        case("one query, one key", dim, 1, 1, 1.0, heads=1, kv_heads=1)
        case("two blocks", dim, 128, 256, 1.0, heads=1, kv_heads=1)
        case("whole blocks", dim, 512, 512, 1.0)
        case("ragged ends", dim, 300, 523, 1.0)
        case("some empty rows", dim, 1000, 1000, 0.3)
        case("all rows empty", dim, 300, 300, 0.0)
        case("more programs than rows, then fewer", dim, 2500, 2500, 0.3, heads=12, kv_heads=12)
        case("grouped heads, batch", dim, 700, 900, batch=2, heads=4)
        case("float16", dim, 300, 523, dtype=torch.float16)
        case("pooled keys alone", dim, 300, 300, 0.0, pooled=5)
        case("pooled keys", dim, 300, 523, pooled=301)
        case("pooled keys without bias", dim, 300, 523, pooled=128, bias=False)
        case("padded blocks", dim, 300, 523, padded=True, batch=2)
        case("padded blocks, pooled keys", dim, 300, 523, padded=True, pooled=70, batch=2)
        for block_q, block_k in ((64, 64),) if brief else ((128, 64), (64, 128), (64, 64)):
            sizes = dict(block_q=block_q, block_k=block_k)
            name = f"blocks of {block_q} x {block_k}"
            case(name, dim, 128, 128, 1.0, **sizes)
            case(f"{name}, ragged, uneven", dim, 500, 700, **sizes)
            case(f"{name}, many rows", dim, 2500, 2500, 0.3, heads=12, kv_heads=12, **sizes)
            case(f"{name}, pooled", dim, 500, 700, pooled=100, **sizes)
            case(f"{name}, padded, pooled", dim, 500, 700, pooled=100, padded=True, **sizes)
    for (dim, block_q), configs in () if brief else CANDIDATES.items():
        for config in (*configs, replace(CONFIGS[dim, block_q], claim=False)):
            case(str(config), dim, 1500, 1500, 0.4, heads=12, kv_heads=12, block_q=block_q, config=config)
    say(f"all right in {time.perf_counter() - started:.0f} s")


def tune(rounds: int, shapes: list[str], blocks: list[str], with_flex: bool) -> list[dict]:
    rows = []
    for shape in shapes:
        heads, tokens, dim = SHAPES[shape]
        q, k, v = inputs(heads, tokens, dim)
        part = [x[:, :2] for x in (q, k, v)]
        wants: dict[tuple[int, int], tuple] = {}

        def checked(config: Config, block_q: int, block_k: int) -> bool:
            """Whether it runs; the sample's values must then be right. Two heads, whole length."""
            if (block_q, block_k) not in wants:
                few = uneven_layout(2, tokens, 0.1, block_q, block_k)
                wants[block_q, block_k] = few, attention_reference(*part, few, dim**-0.5)
            few, want = wants[block_q, block_k]
            faulthandler.dump_traceback_later(60, exit=True)
            try:
                got = forward(*part, few, config)
                torch.cuda.synchronize()
            except (RuntimeError, ValueError) as error:
                say(config, "fails:", str(error).splitlines()[0][:100])
                return False
            finally:
                faulthandler.cancel_dump_traceback_later()
            rows_with_keys = want[1].isfinite()
            mine, theirs = [(o[rows_with_keys], l[rows_with_keys]) for o, l in (got, want)]
            check(f"{shape} {config}", mine, theirs, 1e-2)
            return True

        def note(calls: dict[str, Callable], layout: BlockLayout, **fields: object) -> None:
            work = flops(layout, heads, dim)
            calls["cudnn dense"] = lambda: cudnn(q, k, v)
            times = measure_interleaved(calls, warmup=2, rounds=rounds)
            dense = dense_flops(heads, tokens, dim) / times["cudnn dense"].ms_p50 / 1e9
            for name, t in times.items():
                rate = dense if name == "cudnn dense" else work / t.ms_p50 / 1e9
                say(f"{shape:22} {fields} {name:64} {t.ms_p50:8.3f} ms {rate:5.0f} {rate / dense:5.2f}x")
                rows.append(
                    dict(fields, shape=shape, provider=name, ms_p20=t.ms_p20, ms_p50=t.ms_p50, ms_p80=t.ms_p80, n=t.n,
                         tflops=rate, over_dense=rate / dense)
                )  # fmt: skip

        for block_q, block_k in (map(int, sizes.split("x")) for sizes in blocks):
            shipped = CONFIGS[dim, block_q]
            configs = [shipped, *CANDIDATES[dim, block_q], replace(shipped, claim=False)]
            configs = [c for c in configs if checked(c, block_q, block_k)]
            layouts = {}
            for density in DENSITIES if block_k == 128 else (0.5, 0.1):
                scores = torch.rand(1, heads, -(-tokens // block_q), -(-tokens // block_k), device="cuda")
                keep = max(1, round(scores.shape[3] * density))
                layouts[density] = BlockLayout.from_topk(
                    scores, keep, tokens, tokens, block_q=block_q, block_k=block_k
                )  # fmt: skip
                del scores
            layouts["0.2 uneven"] = uneven_layout(heads, tokens, 0.2, block_q, block_k)
            for density, layout in layouts.items():
                calls: dict[str, Callable] = {
                    ("shipped: " if c is shipped else "") + str(c): lambda c=c: forward(q, k, v, layout, c)
                    for c in configs
                }
                calls["triton"] = lambda: block_sparse_attention(q, k, v, layout, backend="triton")
                if with_flex and block_q == block_k == 128 and tokens % 128 == 0:
                    other = flex(layout)
                    calls["flex"] = lambda: other(q, k, v)
                note(calls, layout, block_q=block_q, block_k=block_k, density=density)
                gc.collect()
                torch.cuda.empty_cache()
        groups = tokens // 30
        pooled = PooledKV(*inputs(heads, groups, dim, 2), torch.full((groups,), 3.4, device="cuda"))
        layout = random_layout(heads, tokens, 0.1)
        work = flops(layout, heads, dim) + 4.0 * dim * heads * tokens * groups
        calls = {
            name: lambda name=name: block_sparse_attention(q, k, v, layout, pooled=pooled, backend=name)
            for name in ("gluon", "triton")
        }
        for name, t in measure_interleaved(calls, warmup=2, rounds=rounds).items():
            say(f"{shape:22} pooled, 0.1 {name:64} {t.ms_p50:8.3f} ms {work / t.ms_p50 / 1e9:5.0f}")
            rows.append(dict(shape=shape, density="0.1 pooled", provider=name, ms_p50=t.ms_p50, n=t.n))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("smoke", "tune"))
    parser.add_argument("--out", type=Path, help="JSON file that tune writes")
    parser.add_argument("--brief", action="store_true", help="smoke: one head size, shipped configurations")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of all variants in random order")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--blocks", nargs="+", default=BLOCKS, choices=BLOCKS, help="of queries and keys")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too, which compiles for each density")
    args = parser.parse_args()
    if (args.mode == "tune") != (args.out is not None):
        parser.error("tune needs --out, smoke takes none")
    torch.manual_seed(0)
    if args.mode == "smoke":
        smoke(args.brief)
        return
    rows = tune(args.rounds, args.shapes, args.blocks, args.flex)
    result = dict(schema=1, package="hone-kernels", verb="hopper tune", environment=environment(), rows=rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
