"""The verbs of ``hone-rstitch``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-rstitch"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "R-Stitch: a small and a large language model write one chain of thought.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, and the tiny pairs."""
    from importlib.resources import files
    from pathlib import Path

    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import PRESETS

    # By length first: host, host-1, host-2.
    pairs = sorted(
        Path(str(files("hone_rstitch") / "assets")).glob("host*.safetensors"), key=lambda path: (len(path.stem), path)
    )
    return {
        **installed(PACKAGE, "transformers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "tiny pairs": {path.stem: describe_host(PACKAGE, path) for path in pairs} or "absent",
    }


_verb = partial(verb, "hone_rstitch")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb("demo:demo", "DemoConfig", "Two tiny models multiply; see who wrote what, and the curve."),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Answer a question with two models, token by token.",
        prepare="inputs:find_asked",
    ),
    "serve": _verb(
        "serve:serve", "ServeConfig", "OpenAI's routes and a page, on one pair.", prepare="inputs:find_served"
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Accuracy and cost over thresholds, beside the baselines.",
        prepare="inputs:find_evaluated",
    ),
    "bench": _verb("bench:bench", "BenchConfig", "Step times, gaps and rates of the loop or of the engine."),
    "calibrate": _verb(
        "calibrate:calibrate",
        "CalibrateConfig",
        "Choose tau for a wanted share or time.",
        prepare="inputs:find_calibrated",
    ),
    "simulate": _verb("simulate:simulate", "SimulateConfig", "When should the large model start? Throughput of both."),
    "profile": _verb(
        "profile:profile",
        "ProfileConfig",
        "Time both models' calls here, for train-router.",
        prepare="inputs:find_profiled",
    ),
    "train-router": _verb(
        "reinforce:train_router",
        "TrainRouterConfig",
        "Train the router of R-Stitch+ by DAPO.",
        prepare="inputs:find_trained",
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train a tiny pair on generated products."),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Put the paper's claims to the test on tiny pairs.",
        prepare="inputs:find_pairs",
    ),
}
