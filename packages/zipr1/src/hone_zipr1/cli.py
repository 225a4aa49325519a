"""The verbs of ``hone-zipr1``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

from .inspection import inspect

PACKAGE = "hone-zipr1"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Token-sparse multimodal models, and reinforcement learning for them.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, supported classes, and the tiny host that is packaged."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_lm.layouts import RULES

    from .config import PRESETS

    return {
        **installed(PACKAGE, "transformers"),
        "presets": {name: f"{p.config.label}. {p.provenance} For: {p.model}." for name, p in PRESETS.items()},
        "classes": list(RULES),
        "tiny host": describe_host(PACKAGE),
    }


def _verb(run: str, config: str, help: str, *, prepare: bool = False, shared: bool = False) -> Verb:
    module = run.partition(":")[0]
    return Verb(
        run=f"hone_zipr1.{run}",
        help=help,
        config=f"hone_zipr1.config:{config}",
        prepare=f"hone_zipr1.{module}:prepare" if prepare else None,
        shared=shared,
    )


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb("demo:demo", "DemoConfig", "A tiny model reads digits from fewer and fewer tokens.", prepare=True),
    "generate": _verb(
        "sample:generate", "GenerateConfig", "Answer a question about a picture or a video.", prepare=True
    ),
    "inspect": inspect,
    "profile": Verb(
        run="hone_zipr1.inspection:profile",
        help="Run one prompt and show what each layer kept of it.",
        config="hone_zipr1.config:ProfileConfig",
        prepare="hone_zipr1.sample:prepare",
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Train a model by reinforcement to live on fewer tokens.",
        prepare=True,
        shared=True,
    ),
    "eval": _verb(
        "grading:grade_model", "EvalConfig", "Grade a model on checkable questions, dense and sparse.", prepare=True
    ),
    "bench": _verb("bench:bench", "BenchConfig", "Time prefill and decoding, dense and with selected tokens."),
    "reproduce": _verb(
        "reproduce:reproduce", "ReproduceConfig", "Test what rewarding sparsity does, on tiny hosts.", prepare=True
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host on generated mosaics, densely."),
}
