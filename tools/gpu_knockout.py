"""Exit and frame-local attention at 7B shapes: prefill, decode and memory beside the bound that the operations set.

    python tools/gpu_knockout.py --arch llava-onevision-7b qwen2.5-vl-7b --out results/knockout

writes one results file per architecture. Random weights; nothing is downloaded. Values are checked before anything is
timed. Does what `hone-knockout bench` does, without the command line's dependencies (tyro). From the repository root,
with PYTHONPATH=packages/knockout/src:shared/lm/src:shared/core/src.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

from hone_core.runs import Run, export_results
from hone_knockout.bench import WORKLOADS, BenchConfig, bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["llava-onevision-7b", "qwen2.5-vl-7b"]
    parser.add_argument("--arch", nargs="+", default=names, choices=list(WORKLOADS))
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="turns that each variant gets")
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills of a turn")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no further architecture after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_<arch>.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    begun = time.perf_counter()
    for arch in args.arch:
        if time.perf_counter() - begun > 60 * args.minutes:
            print(f"{arch}: not run, {args.minutes:g} minutes are over", flush=True)
            continue
        cfg = BenchConfig(
            arch=arch, frames=tuple(args.frames), rounds=args.rounds, repeats=args.repeats, seed=args.seed
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            with Run.start(package="hone-knockout", verb="bench", config=cfg, out=path, seed=cfg.seed) as run:
                report = bench(cfg, run, device=args.device)
            print(f"{arch}\n{report}", flush=True)
            export_results(path, args.out / f"bench_{arch}.json")


if __name__ == "__main__":
    main()
