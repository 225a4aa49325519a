"""The verbs of ``hone-sparsevar``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-sparsevar"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "SparseVAR: next-scale image models leave flat regions out of the large scales.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, and the tiny host."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import PRESETS

    return {
        **installed(PACKAGE, "diffusers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_sparsevar")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Draw scenes dense, sparse, stopped early, and by other masks: pictures.",
        prepare="inputs:host",
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Draw images of prompts or classes with a saved pipeline.",
        prepare="inputs:generate",
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Quality against work of every variant, on many scenes.",
        prepare="inputs:evaluate",
    ),
    "calibrate": _verb(
        "calibrate:calibrate",
        "CalibrateConfig",
        "Which block's change tells textured from flat.",
        prepare="inputs:calibrate",
    ),
    "inspect": _verb(
        "inspection:inspect", "InspectConfig", "What ran in one image, scale by scale.", prepare="inputs:host"
    ),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Put the claims to the test on tiny hosts.",
        prepare="inputs:reproduce",
    ),
    "bench": _verb(
        "bench:bench",
        "BenchConfig",
        "Time the transformer at real sizes, dense, sparse and stopped early.",
        prepare="inputs:bench",
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host: tokenizer, grader, transformer."),
}
