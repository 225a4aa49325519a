"""The verbs of ``hone-knockout``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-knockout"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Attention knockouts for video language models, and the exit of their visual tokens.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, classes with a layout rule, and the tiny host."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_lm.layouts import RULES

    from .config import PRESETS

    return {
        **installed(PACKAGE, "transformers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "layouts": list(RULES),
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_knockout")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Ask a tiny trained Video-LLM about clips, knock its attention out, and find where video can leave.",
        prepare="inputs:find_host",
    ),
    "inspect": _verb(
        "inspection:inspect",
        None,
        "Print what each position of a prompt is: frames, text between and around them, separators.",
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Answer a question about a video, as the model is and with knockouts or an exit, with time and memory.",
        prepare="inputs:find_question",
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Answer questions under many knockouts: accuracy, intervals, flips, McNemar, per category, plots.",
        prepare="inputs:find_source",
        opened="evaluate:reopen",
    ),
    "recommend": _verb(
        "recommend:recommend",
        "RecommendConfig",
        "Choose exit and frame-local layers on half of an eval run's questions, and report them on the others.",
        prepare="inputs:find_run",
    ),
    "bench": _verb(
        "bench:bench",
        "BenchConfig",
        "Time exit and window at real sizes with random weights, beside what the operations allow.",
    ),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Put the paper's three findings to the test on tiny hosts, by rules fixed beforehand.",
        prepare="inputs:find_hosts",
    ),
    "plot": _verb("plots:plot", None, "Draw a sweep's results in the paper's axes."),
    "train-host": _verb(
        "train:train_host",
        "TrainHostConfig",
        "Train the tiny host on generated clips; stops early when every kind is learned.",
    ),
}
