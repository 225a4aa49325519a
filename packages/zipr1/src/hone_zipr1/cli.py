"""The verbs of ``hone-zipr1``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-zipr1"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Token-sparse multimodal models, and reinforcement learning for them.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, supported classes, and the tiny host."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_lm.layouts import RULES

    from .config import PRESETS, TESTED

    return {
        **installed(PACKAGE, "transformers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "classes": {
            "tested with all that the README lists": ", ".join(TESTED),
            "tested in prefill and decoding": ", ".join(name for name in RULES if name not in TESTED),
        },
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_zipr1")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo", "DemoConfig", "A tiny model reads digits from fewer and fewer tokens.", prepare="inputs:find_host"
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Answer a question about a picture or a video.",
        prepare="inputs:find_asked",
    ),
    "inspect": _verb(
        "inspection:inspect", None, "Print what a prompt is and what selection could save of it; weights are not read."
    ),
    "profile": _verb(
        "inspection:profile",
        "ProfileConfig",
        "Run one prompt and show what each layer kept of it.",
        prepare="inputs:find_asked",
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Train a model by reinforcement to live on fewer tokens.",
        prepare="inputs:find_trained",
        shared=True,
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Grade a model on checkable questions, dense and sparse.",
        prepare="inputs:find_evaluated",
    ),
    "bench": _verb("bench:bench", "BenchConfig", "Time prefill and decoding, dense and with selected tokens."),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Test what rewarding sparsity does, on tiny hosts.",
        prepare="inputs:find_hosts",
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host on generated mosaics, densely."),
}
