"""The verbs of ``hone-pmloss``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-pmloss"


def main() -> None:
    """Entry point of the script."""
    run_cli(
        PACKAGE, VERBS, "PM-Loss: point maps that teach splats where surfaces are, and a geometry report of any splat."
    )


def info() -> dict[str, Any]:
    """Versions, devices, presets, and the tiny host that is packaged."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import PRESETS

    return {
        **installed(PACKAGE, "transformers"),
        "presets": {
            name: f"weight {preset.config.weight:g}, {preset.config.align}, {preset.config.direction}; {preset.model}. "
            f"{preset.provenance}"
            for name, preset in PRESETS.items()
        },
        "tiny host": describe_host(PACKAGE),
    }


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": Verb(
        run="hone_pmloss.demo:demo",
        config="hone_pmloss.config:DemoConfig",
        help="A room's point cloud at occlusion edges, by pictures alone and with PM-Loss.",
    ),
    "eval": Verb(
        run="hone_pmloss.evaluate:evaluate",
        config="hone_pmloss.config:EvalConfig",
        prepare="hone_pmloss.evaluate:prepare",
        help="Geometry report of a splat (.ply) against known depth.",
    ),
    "train": Verb(
        run="hone_pmloss.finetune:train",
        config="hone_pmloss.config:TrainConfig",
        prepare="hone_pmloss.finetune:prepare",
        help="Train a host on chunks with PM-Loss, as released; in several processes under accelerate launch.",
        shared=True,
    ),
    "bench": Verb(
        run="hone_pmloss.bench:bench",
        config="hone_pmloss.config:BenchConfig",
        help="Time nearest neighbours by every backend, and the parts of a training step.",
    ),
    "reproduce": Verb(
        run="hone_pmloss.reproduce:reproduce",
        config="hone_pmloss.config:ReproduceConfig",
        prepare="hone_pmloss.reproduce:prepare",
        help="Put the paper's claims to the test on tiny hosts.",
    ),
    "train-host": Verb(
        run="hone_pmloss.train:train_host",
        config="hone_pmloss.config:TrainHostConfig",
        prepare="hone_pmloss.train:prepare",
        help="Train the tiny host and its arms on generated rooms.",
    ),
}
