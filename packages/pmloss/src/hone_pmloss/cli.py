"""The verbs of ``hone-pmloss``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-pmloss"


def main() -> None:
    """Entry point of the script."""
    run_cli(
        PACKAGE, VERBS, "PM-Loss: point maps that teach splats where surfaces are, and a geometry report of any splat."
    )


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, hosts that can be trained, and the tiny one."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_splat.ranges import HOSTS

    from .config import PRESETS

    return {
        **installed(PACKAGE, "transformers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "hosts": {name: str(host) for name, host in HOSTS.items()},
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_pmloss")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo", "DemoConfig", "A room's point cloud at occlusion edges, by pictures alone and with PM-Loss."
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Geometry report of a splat (.ply) against known depth.",
        prepare="inputs:find_evaluated",
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Train a host on chunks with PM-Loss, as released; in several processes under accelerate launch.",
        prepare="inputs:find_trained",
        shared=True,
    ),
    "bench": _verb(
        "bench:bench", "BenchConfig", "Time nearest neighbours by every backend, and the parts of a training step."
    ),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Put the paper's claims to the test on tiny hosts.",
        prepare="inputs:find_hosts",
    ),
    "train-host": _verb(
        "train:train_host",
        "TrainHostConfig",
        "Train the tiny host and its arms on generated rooms.",
        prepare="inputs:find_start",
    ),
}
