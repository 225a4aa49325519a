"""Train knockout's tiny host for several seeds, then put the paper's findings to the test on them.

    python tools/gpu_knockout_hosts.py --out OUT --seeds 0 1 2

leaves host-<seed>.safetensors and host-<seed>.json per seed, reproduce.json (results) and verdict.json in --out, all in
one folder. A seed whose host is in --have is not trained again. Does what `hone-knockout train-host` and `hone-knockout
reproduce` do, without the command line's dependencies (tyro). From the repository root, with
PYTHONPATH=packages/knockout/src:shared/lm/src:shared/core/src.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import shutil
import tempfile
import time
from pathlib import Path

from hone_core.runs import Run, export_results
from hone_knockout.config import ClipConfig
from hone_knockout.host import HostConfig
from hone_knockout.reproduce import ReproduceConfig, reproduce
from hone_knockout.train import TrainConfig, train_host

SMOKE = TrainConfig(
    host=HostConfig(clip=ClipConfig(frames=4, grid=3, cell=4), layers=5, width=32, heads=2, heads_k=1, intermediate=32),
    batch=8,
    steps=4,
    warmup_steps=1,
    eval_every=2,
    eval_clips=16,
    log_every=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--work", type=Path, help="folder for run folders and resumable states; a temporary one if not")
    parser.add_argument("--have", type=Path, help="folder with host-<seed>.safetensors that need no training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--minutes", type=float, default=2.5, help="budget of each training; it stops early when it can"
    )
    parser.add_argument("--total-minutes", type=float, default=8.5, help="start nothing that would end after this long")
    parser.add_argument("--batch", type=int, default=TrainConfig().batch)
    parser.add_argument("--lr", type=float, default=TrainConfig().lr)
    parser.add_argument("--adamw-lr", type=float, default=TrainConfig().adamw_lr)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default=TrainConfig().optimizer)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--items", type=int, default=1024, help="questions per host in reproduce")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and four steps, for a CPU; skips reproduce")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    begun = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp())
    options = {"minutes": args.minutes, "batch": args.batch, "optimizer": args.optimizer}
    options |= {"lr": args.lr, "adamw_lr": args.adamw_lr, "compile": args.compile}
    ready = []
    for seed in args.seeds:
        target = args.out / f"host-{seed}.safetensors"
        made = args.have and args.have / target.name
        if made and made.is_file():
            for suffix in (".safetensors", ".json"):
                if made.with_suffix(suffix) != target.with_suffix(suffix):
                    shutil.copy(made.with_suffix(suffix), target.with_suffix(suffix))
            ready.append(target)
            continue
        if (time.perf_counter() - begun) / 60 + args.minutes > args.total_minutes:
            print(f"seed {seed}: not trained, it would end after {args.total_minutes:g} minutes", flush=True)
            continue
        cfg = dataclasses.replace(SMOKE if args.smoke else TrainConfig(**options), seed=seed)
        command = (
            f"hone-knockout train-host --device cuda --seed {seed} --minutes {args.minutes:g} --batch {args.batch}"
        )
        with Run.start(
            package="hone-knockout", verb="train-host", config=cfg, out=work / f"host-{seed}", seed=seed
        ) as run:
            report = train_host(cfg, run, device=args.device, command=command, quiet=True)
        print(f"seed {seed}: {report}", flush=True)
        for suffix in (".safetensors", ".json"):
            shutil.copy(report.checkpoint.with_suffix(suffix), target.with_suffix(suffix))
        if report.passed:
            ready.append(target)
    if args.smoke or not ready:
        return
    cfg = ReproduceConfig(items=args.items, batch=128, gate_clips=2048, hosts=tuple(map(str, ready)))
    # Pictures can be drawn later from the results; where there is no matplotlib, there are none.
    pictures = importlib.util.find_spec("matplotlib") is not None
    with Run.start(package="hone-knockout", verb="reproduce", config=cfg, out=work / "reproduce") as run:
        print(reproduce(cfg, run, device=args.device, quiet=True, pictures=pictures), flush=True)
    export_results(run.path, args.out / "reproduce.json")
    shutil.copy(run.artifacts / "verdict.json", args.out / "verdict.json")
    print(f"all done in {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
