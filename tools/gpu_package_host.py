"""Put a trained tiny host into the package: choose its sampler, grade it as it will be shipped, write the assets.

    python tools/gpu_package_host.py runs/hone-blade/train-host/RUN --clips 256

The sampler is that of HostConfig's defaults. host.json keeps the training run's facts and gains the grades, with the
command of each: ``command`` made the weights and ``train_config``, ``package_command`` chose ``sampler`` and made what
follows.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from hone_blade.config import HostConfig
from hone_blade.evaluate import bootstrap
from hone_blade.host import load_host, save_host
from hone_blade.train import GATE, grade_samples
from hone_core.environment import environment
from hone_core.io import atomic_write_json

ASSETS = Path(__file__).resolve().parent.parent / "packages/blade/src/hone_blade/assets"
SAMPLER = ("solver", "steps", "shift", "guidance", "guidance_interval")
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that holds host.safetensors and host.json")
    parser.add_argument("--clips", type=int, default=256, help="clips to grade")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    found = next(args.run.rglob("host.safetensors"))
    host = load_host(args.device, path=found)
    default = HostConfig()
    host.config = dataclasses.replace(host.config, **{name: getattr(default, name) for name in SAMPLER})
    cfg = host.config
    grades, _ = grade_samples(
        host, clips=args.clips, seed=SEED, solver=cfg.solver, steps=cfg.steps, guidance=cfg.guidance, chunk=32
    )
    result = {name: round(float(values.mean()), 4) for name, values in grades.items()}
    low, high = bootstrap(grades["accuracy"])
    facts = json.loads(found.with_suffix(".json").read_text(encoding="utf-8"))
    for key in ("gate", "passed", "sampler", "result"):
        facts.pop(key, None)
    machine = environment()
    facts |= {
        "package_command": f"python tools/gpu_package_host.py RUN --clips {args.clips} --device {args.device}",
        "sampler": {name: getattr(cfg, name) for name in SAMPLER},
        "evaluations": sum(host.evaluations()),
        "result": result,
        "accuracy_interval": [round(low, 4), round(high, 4)],
        "gate": GATE,
        "passed": all(result[name] >= gate for name, gate in GATE.items()),
        "graded": {"clips": args.clips, "seed": SEED, "cpu": machine["cpu"], "torch": machine["torch"]},
    }
    save_host(host, ASSETS / "host.safetensors")
    facts["bytes"] = (ASSETS / "host.safetensors").stat().st_size
    atomic_write_json(ASSETS / "host.json", facts)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
