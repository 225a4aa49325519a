"""Train BLADE's tiny host on a GPU machine that lacks the command line's dependencies (tyro).

Does what `hone-blade train-host` does; --out becomes the run folder. From the repository root, with
PYTHONPATH=packages/blade/src:shared/video/src:shared/core/src:kernels/src.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

from hone_blade.config import HostConfig, TrainConfig
from hone_blade.train import train_host
from hone_core.runs import Run

SMOKE = TrainConfig(
    host=HostConfig(frames=4, height=16, width=16, layers=1, heads=1, head_dim=32, ffn_dim=32),
    batch=8,
    steps=4,
    warmup_steps=1,
    classifier_steps=4,
    classifier_batch=16,
    eval_clips=8,
    eval_samplers=(("unipc", 2, 1.0), ("euler", 2, 2.0)),
    log_every=2,
)


def main() -> None:
    """Parse the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--checkpoint", type=Path, help="where the large resumable state goes, if not into the run folder"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=TrainConfig().minutes)
    parser.add_argument("--seed", type=int, default=TrainConfig().seed)
    parser.add_argument("--batch", type=int, default=TrainConfig().batch)
    parser.add_argument("--lr", type=float, default=TrainConfig().lr)
    parser.add_argument("--init", type=Path, help="start from the weights of this host.safetensors")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and four steps, for a CPU")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    options = {"minutes": args.minutes, "seed": args.seed, "batch": args.batch, "lr": args.lr}
    cfg = SMOKE if args.smoke else dataclasses.replace(TrainConfig(), compile=not args.no_compile, **options)
    cfg = dataclasses.replace(cfg, init=args.init)
    command = "hone-blade train-host --device cuda " + " ".join(
        f"--{name} {value:g}" for name, value in options.items()
    )
    if args.init is not None:
        command += f" --init {args.init.name}"
    where = {"package": "hone-blade", "verb": "train-host", "out": args.out, "device": args.device, "command": command}
    with Run.start(config=cfg, seed=args.seed, **where) as run:
        print(train_host(cfg, run, checkpoint=args.checkpoint))


if __name__ == "__main__":
    main()
