"""BLADE on a GPU: one attention, one forward and whole denoising loops beside dense cuDNN attention.

    python tools/gpu_blade.py --models wan2.1-1.3b cogvideox-5b --out results/blade

writes one results file per model and part, each as soon as it is measured. Random weights of the published
architectures; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from hone_blade.bench import bench
from hone_blade.config import BenchConfig
from hone_core.runs import Run, export_results
from hone_video.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wan2.1-1.3b", "cogvideox-5b"], choices=list(WORKLOADS))
    parser.add_argument("--parts", nargs="+", default=["attention", "forward", "e2e"])
    parser.add_argument("--preset", help="attention settings; default: those of each model")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of one attention")
    parser.add_argument("--max-steps", type=int, help="run at most so many steps of a loop and scale the time up")
    parser.add_argument("--compile-blocks", action="store_true", help="also time a forward with compiled blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--allow-dirty", action="store_true", help="write results of uncommitted changes, which say so")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_<model>_<part>.json")
    args = parser.parse_args()
    for model, part in itertools.product(args.models, args.parts):
        cfg = BenchConfig(
            model=model,
            parts=(part,),
            preset=args.preset,
            rounds=args.rounds,
            max_steps=args.max_steps,
            compile_blocks=args.compile_blocks,
            seed=args.seed,
        )
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            where = {"package": "hone-blade", "verb": "bench", "out": path, "device": args.device}
            with Run.start(config=cfg, preset=args.preset, seed=cfg.seed, **where) as run:
                report = bench(cfg, run)
            export_results(path, args.out / f"bench_{model}_{part}.json", allow_dirty=args.allow_dirty)
        print(f"{model} {part}, {time.perf_counter() - start:.0f} s\n{report}", flush=True)


if __name__ == "__main__":
    main()
