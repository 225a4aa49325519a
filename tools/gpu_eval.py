"""Compare BLADE's variants on the tiny host over densities and seeds, and write one results file.

What `hone-blade eval` does, repeated: every density, with and without dense first steps, for three seeds of prompts and
noise. Needs no command-line dependencies (tyro). From the repository root, with
PYTHONPATH=packages/blade/src:shared/core/src:kernels/src.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

from hone_blade.data import random_labels
from hone_blade.evaluate import Comparison, compare, write_mean
from hone_blade.host import load_host
from hone_core.runs import Run, export_results

SETTINGS = {
    "0.5": Comparison(density=0.5),
    "0.25": Comparison(density=0.25),
    "0.25, a quarter of the steps dense": Comparison(density=0.25, dense_steps=3),
    "0.125": Comparison(density=0.125, pool=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--export", type=Path, help="results file to write, such as results/blade/tiny_host.json")
    parser.add_argument("--host", type=Path, help="a host.safetensors, in place of the packaged one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=256, help="per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    import torch

    host = load_host(args.device, path=args.host)
    config = {name: dataclasses.asdict(setting) for name, setting in SETTINGS.items()}
    config |= {"prompts": args.prompts, "seeds": args.seeds}
    with Run.start(package="hone-blade", verb="eval", config=config, out=args.out) as run:
        for name, setting in SETTINGS.items():
            found: dict[str, list] = {}
            for seed in range(args.seeds):
                labels = random_labels(args.prompts, torch.Generator().manual_seed(1000 + seed))
                seeded = dataclasses.replace(setting, seed=seed)
                for variant, outcome in compare(host, labels, seeded, batch=args.batch).items():
                    found.setdefault(variant, []).append(outcome)
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
                    run.row(metric, value, better=better, n=len(outcomes), variant=variant, labels=label)
    if args.export is not None:
        print(export_results(run.path, args.export))


if __name__ == "__main__":
    main()
