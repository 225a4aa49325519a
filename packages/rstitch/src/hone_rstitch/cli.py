"""The verbs of ``hone-rstitch``."""

from __future__ import annotations

import os
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-rstitch"


def main() -> None:
    """Entry point of the script."""
    # Read when torch loads OpenMP: idle threads that spin cost more than such small models do. What is set holds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_cli(PACKAGE, VERBS, "R-Stitch: a small and a large language model write one chain of thought.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, and the tiny pairs that are packaged."""
    from importlib.resources import files
    from pathlib import Path

    from hone_core.environment import environment
    from hone_core.hosts import describe_host

    from .config import PRESETS

    facts = environment()
    pairs = sorted(Path(str(files("hone_rstitch") / "assets")).glob("pair-*.safetensors"))
    return {
        "version": facts["packages"].get(PACKAGE),
        "commit": facts["commit"],
        "python": facts["python"],
        "torch": facts["torch"],
        "transformers": facts["packages"].get("transformers"),
        "device": facts["gpu"] or f"{facts['cpu']}, {facts['cpu_count']} cores",
        "presets": {
            name: f"{preset.config.label}. {preset.provenance} {preset.models}." for name, preset in PRESETS.items()
        },
        "tiny pairs": {path.stem: describe_host(PACKAGE, path) for path in pairs} or "absent",
    }


def _verb(name: str, help: str, module: str, config: str, *, prepare: bool = False) -> Verb:
    return Verb(
        run=f"hone_rstitch.{module}:{name}",
        help=help,
        config=f"hone_rstitch.config:{config}",
        prepare=f"hone_rstitch.{module}:prepare" if prepare else None,
    )


VERBS = {
    "info": info,
    "train-host": _verb("train_host", "Train a tiny pair on generated products.", "train", "TrainHostConfig"),
}
