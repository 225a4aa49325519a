"""Compare BLADE's variants on the tiny host over densities and seeds.

What `hone-blade eval` does, repeated: every density, with and without dense first steps, for three seeds of prompts and
noise. Each setting is a run of its own, exported as soon as it is measured, so a call that is cut off keeps what it
has, and the same call again goes on with the next setting. Needs no command-line dependencies (tyro). From the
repository root, with PYTHONPATH=packages/blade/src:shared/video/src:shared/core/src:kernels/src.
"""

import argparse
import dataclasses
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

from hone_blade.config import Comparison
from hone_blade.evaluate import Outcome, compare, write_mean
from hone_blade.host import Host, load_host
from hone_core.runs import Run, export_results
from hone_video.clips import random_labels

SETTINGS = {
    "0.5": Comparison(density=0.5),
    "0.25": Comparison(density=0.25),
    "0.25, a quarter of the steps dense": Comparison(density=0.25, dense_steps=3),
    "0.125": Comparison(density=0.125, pool=32),
}


def measure(
    host: Host, name: str, setting: Comparison, out: Path, *, prompts: int, seeds: int, batch: int, started: float
) -> Run:
    """The finished run of one setting in ``out``; says on stdout how far it is."""
    import torch

    config = {"setting": name, "comparison": dataclasses.asdict(setting), "prompts": prompts, "seeds": seeds}
    with Run.start(package="hone-blade", verb="eval", config=config, out=out) as run:
        if run.done:
            print(f"{time.perf_counter() - started:7.0f} s  {name}: was there", flush=True)
            return run
        found: dict[str, list[Outcome]] = {}
        for seed in range(seeds):
            labels = random_labels(prompts, torch.Generator().manual_seed(1000 + seed))
            begun = time.perf_counter()
            for variant, outcome in compare(host, labels, dataclasses.replace(setting, seed=seed), batch=batch).items():
                found.setdefault(variant, []).append(outcome)
            now = time.perf_counter()
            print(f"{now - started:7.0f} s  {name}: seed {seed + 1} of {seeds} in {now - begun:.0f} s", flush=True)
        write(run, name, found)
    return run


def write(run: Run, name: str, found: Mapping[str, list[Outcome]]) -> None:
    """Rows of one setting, over its seeds."""
    import torch

    for variant, outcomes in found.items():
        if variant == "dense" and name != next(iter(SETTINGS)):
            continue  # the same clips at every density
        label = {} if variant == "dense" else {"setting": name}
        for metric in ("psnr", "ssim"):
            values = torch.cat([getattr(outcome, metric) for outcome in outcomes])
            unit = "dB" if metric == "psnr" else ""
            write_mean(run, metric, values, unit=unit, variant=variant, labels=label)
        for task in ("accuracy", "digit", "direction", "color", "speed"):
            values = torch.cat([outcome.grades[task] for outcome in outcomes])
            metric = task if task == "accuracy" else f"{task}_accuracy"
            write_mean(run, metric, values, variant=variant, labels=label)
        for metric, better in (("recall", "higher"), ("density", "lower"), ("attention_gflop", "lower")):
            value = sum(getattr(outcome, metric) for outcome in outcomes) / len(outcomes)
            unit = "GFLOP" if metric == "attention_gflop" else ""
            run.row(metric, value, unit=unit, better=better, n=len(outcomes), variant=variant, labels=label)


def slug(name: str) -> str:
    """A setting's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one for each setting")
    parser.add_argument("--export", type=Path, help="folder for tiny_host_<setting>.json, such as results/blade")
    parser.add_argument(
        "--allow-dirty", action="store_true", help="export results of uncommitted changes, which say so"
    )
    parser.add_argument("--host", type=Path, help="a host.safetensors, in place of the packaged one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=256, help="per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    started = time.perf_counter()
    host = load_host(args.device, path=args.host)
    count = {"prompts": args.prompts, "seeds": args.seeds, "batch": args.batch}
    for name, setting in SETTINGS.items():
        run = measure(host, name, setting, args.out / slug(name), **count, started=started)
        if args.export is not None:
            target = args.export / f"tiny_host_{slug(name)}.json"
            print(export_results(run.path, target, allow_dirty=args.allow_dirty), flush=True)


if __name__ == "__main__":
    main()
