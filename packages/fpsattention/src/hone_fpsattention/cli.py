"""The verbs of ``hone-fpsattention``."""

from __future__ import annotations

import os
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-fpsattention"


def main() -> None:
    """Entry point of the script."""
    # Read when torch loads OpenMP. By default its idle threads spin, which on a busy machine takes twice the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_cli(PACKAGE, VERBS, "E4M3 attention over sliding 3-D tiles (FPSAttention) for diffusers' video transformers.")


def info() -> dict[str, Any]:
    """Versions, devices, and presets with where their numbers come from."""
    from hone_core.environment import environment

    from .config import PRESETS

    facts = environment()
    return {
        "version": facts["packages"].get(PACKAGE),
        "commit": facts["commit"],
        "python": facts["python"],
        "torch": facts["torch"],
        "diffusers": facts["packages"].get("diffusers"),
        "device": facts["gpu"] or f"{facts['cpu']}, {facts['cpu_count']} cores",
        "presets": {
            name: f"{preset.model}. Published: {preset.published or 'nothing.'} Ours: {preset.ours}"
            for name, preset in PRESETS.items()
        },
    }


VERBS = {
    "info": info,
    "bench": Verb(
        config="hone_fpsattention.config:BenchConfig",
        run="hone_fpsattention.bench:bench",
        help="Time dense, windowed and E4M3 attention at real sizes with random weights: one layer, one forward.",
    ),
}
