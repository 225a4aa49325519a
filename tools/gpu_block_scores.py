"""BLADE's prober and block selection on a GPU: values first, then speed beside the sparse attention they prepare.

    python tools/gpu_block_scores.py bench --out results/kernels/block_scores_h200.json
    python tools/gpu_block_scores.py tune  --out tune.json

``bench`` times what ships: every score, the selection, both together, the attention on the selected blocks with pooled
keys, and cuDNN's dense attention. ``tune`` times candidate tiles of the prober's pass. Values are compared with the
float64 reference before anything is timed; a wrong one ends the run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from pathlib import Path

import torch
from gpu_attention import check_error, say
from hone_blade.config import BladeConfig
from hone_blade.method import adaptive_sparse_attention, pool_tokens, select_blocks
from hone_blade.prober import probe, sample_index
from hone_core.environment import environment
from hone_core.timing import measure_interleaved
from hone_kernels.attention import BlockLayout, block_sparse_attention
from hone_kernels.attention.bench import cudnn
from hone_kernels.block_scores import KINDS, block_scores
from hone_kernels.block_scores.triton import TILES, Tile, block_scores_triton
from hone_kernels.block_select import select_blocks as select

# batch, heads, video tokens, text tokens, head size; most blocks kept, pooling
SHAPES = {
    "wan-1.3b 480p": (1, 12, 32760, 0, 128, 0.17, 30),
    "wan-14b 480p": (1, 40, 32760, 0, 128, 0.17, 30),
    "wan-14b 720p": (1, 40, 75600, 0, 128, 0.17, 30),
    "cogvideox-5b": (1, 48, 17550, 226, 64, 0.10, 15),
    "ragged": (2, 12, 20160, 77, 128, 0.17, 30),
}

CANDIDATES = [
    Tile(rows, cols, warps, stages)
    for (rows, warps), cols, stages in itertools.product([(64, 4), (128, 4), (128, 8)], [32, 64, 128], [2, 3, 4])
]


def inputs(shape: str, n: int = 3) -> list[torch.Tensor]:
    """Tensors of the shape that models hand over: heads inside tokens."""
    batch, heads, video, text, dim = SHAPES[shape][:5]
    make = (batch, video + text, heads, dim)
    return [torch.randn(make, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(n)]


def check_values() -> None:
    for (dtype, dim), kind in itertools.product(
        [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 96), (torch.float32, 128), (torch.float32, 32)],
        KINDS,
    ):
        q = torch.randn(2, 4, 3000, dim, device="cuda", dtype=dtype)
        k = torch.randn(2, 2, 3000, dim, device="cuda", dtype=dtype)
        index = [sample_index(3000, 128, 128 if kind == "mean" else 16, "strided", device="cuda")] * 2
        got = block_scores(q, k, *index, kind=kind, backend="triton")
        want = block_scores(q.double(), k.double(), *index, kind=kind, backend="reference")
        check_error(f"block_scores {kind} {dtype} {dim}", float((got - want).abs().max() / want.max()), 1e-4)
        for mass, forced in itertools.product((None, 0.9), (0, 2)):
            rule = {"min_keep": 2, "max_keep": 6, "mass": mass, "keep_diagonal": True, "forced": forced}
            mine, theirs = (select(got, backend=name, **rule).kv_num for name in ("triton", "reference"))
            check_error(
                f"select_blocks {mass} {forced}: rows cut elsewhere", float((mine != theirs).float().mean()), 0.01
            )
    say("values: ok")


def tune(rounds: int, shapes: list[str]) -> list[dict]:
    rows = []
    for shape, samples, kind in (
        ("wan-1.3b 480p", 16, "paper"),
        ("wan-1.3b 480p", 32, "official"),
        ("wan-1.3b 480p", 16, "lse"),
        ("cogvideox-5b", 16, "paper"),
    ):
        if shape not in shapes:
            continue
        q, k = inputs(shape, 2)
        index = [sample_index(q.shape[2], 128, samples, "seeded", side=side, device="cuda") for side in "qk"]
        scale = q.shape[3] ** -0.5
        want = block_scores_triton(q, k, *index, kind, scale)
        calls = {}
        for tile in CANDIDATES:
            try:
                got = block_scores_triton(q, k, *index, kind, scale, tile)
            except Exception as error:
                say(shape, tile, "fails:", str(error).splitlines()[0][:100])
                continue
            check_error(f"{shape} {tile}", float((got - want).abs().max() / want.max()), 1e-4)
            calls[str(tile)] = lambda tile=tile: block_scores_triton(q, k, *index, kind, scale, tile)
        for name, t in sorted(measure_interleaved(calls, rounds=rounds).items(), key=lambda item: item[1].ms_p50):
            say(f"{shape:16} {kind:9} {samples:3} {name:50} {t.ms_p50:8.4f} ms")
            rows.append(dict(op="block_scores", shape=shape, kind=kind, samples=samples, tile=name, ms_p50=t.ms_p50))
    return rows


def bench(rounds: int, shapes: list[str]) -> list[dict]:
    rows = []
    for shape in shapes:
        batch, heads, video, text, dim, most, pool = SHAPES[shape]
        q, k, v = inputs(shape)
        base = BladeConfig(max_density=most, pool=pool)
        text_blocks = -(-(video + text) // 128) - video // 128 if text else 0
        calls = {}
        for score, samples in (("paper", 16), ("paper", 32), ("official", 32), ("lse", 16), ("mean", 16)):
            cfg = BladeConfig(max_density=most, pool=pool, score=score, samples=samples)
            calls[f"probe {score} {samples}"] = lambda cfg=cfg: probe(q, k, cfg)
        scores = probe(q, k, base)
        keep = base.keep_bounds(scores.shape[-1])[1]
        topk = BladeConfig(max_density=most, selection="topk")
        kept = select_blocks(scores, base, text_blocks=text_blocks)
        layout = BlockLayout(kept.kv_num, kept.kv_idx, video + text, video + text, 128, 128)
        pooled = pool_tokens(k, v, pool, text_tokens=text)
        calls |= {
            "select threshold": lambda: select_blocks(scores, base, text_blocks=text_blocks),
            "select topk": lambda: select_blocks(scores, topk, text_blocks=text_blocks),
            "select topk (torch)": lambda: BlockLayout.from_topk(scores, keep, video + text, video + text),
            "probe + select": lambda: select_blocks(probe(q, k, base), base, text_blocks=text_blocks),
            "pool": lambda: pool_tokens(k, v, pool, text_tokens=text),
            "attention ASA": lambda: block_sparse_attention(q, k, v, layout),
            "attention ASA_G": lambda: block_sparse_attention(q, k, v, layout, pooled=pooled),
            "whole ASA_G": lambda: adaptive_sparse_attention(q, k, v, cfg=base, text_tokens=text),
        }
        calls["dense cudnn"] = lambda: cudnn(q, k, v)
        times = measure_interleaved(calls, rounds=rounds)
        density = float(layout.density())
        for name, t in times.items():
            share = t.ms_p50 / times["attention ASA_G"].ms_p50
            say(f"{shape:16} {name:20} {t.ms_p50:9.4f} ms  {100 * share:6.1f} % of ASA_G")
            rows.append(
                dict(
                    op="block_scores", shape=shape, batch=batch, heads=heads, tokens=video + text, dim=dim, call=name,
                    density=density, pooled=pooled.k.shape[2], ms_p20=t.ms_p20, ms_p50=t.ms_p50, ms_p80=t.ms_p80, n=t.n,
                    peak_bytes=t.peak_bytes,
                )
            )  # fmt: skip
        del calls, times
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("bench", "tune"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of all variants in random order")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    torch.manual_seed(0)
    check_values()
    rows = (bench if args.mode == "bench" else tune)(args.rounds, args.shapes)
    tiles = {f"{size} bytes d{dim}": str(tile) for (size, dim), tile in TILES.items()}
    result = dict(
        schema=1, package="hone-kernels", verb=f"block_scores {args.mode}", environment=environment(), tiles=tiles
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(result, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
