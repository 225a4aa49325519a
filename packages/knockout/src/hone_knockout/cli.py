"""The verbs of ``hone-knockout``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-knockout"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Attention knockouts for video language models, and the exit of their visual tokens.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, classes with a layout rule, and the tiny host that is packaged."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_lm.layouts import RULES

    from .config import PRESETS

    return {
        **installed(PACKAGE, "transformers"),
        "presets": {name: f"{preset.config.label} ({preset.model})." for name, preset in PRESETS.items()},
        "layouts": list(RULES),
        "tiny host": describe_host(PACKAGE),
    }


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": Verb(
        run="hone_knockout.demo:demo",
        help="Ask a tiny trained Video-LLM about clips, knock its attention out, and find where video can leave.",
        config="hone_knockout.config:DemoConfig",
        prepare="hone_knockout.inputs:find_host",
    ),
    "inspect": Verb(
        run="hone_knockout.inspection:inspect",
        help="Print what each position of a prompt is: frames, text between and around them, separators.",
    ),
    "generate": Verb(
        run="hone_knockout.sample:generate",
        help="Answer a question about a video, as the model is and with knockouts or an exit, with time and memory.",
        config="hone_knockout.config:GenerateConfig",
        prepare="hone_knockout.inputs:find_question",
    ),
    "eval": Verb(
        run="hone_knockout.evaluate:evaluate",
        help="Answer questions under many knockouts: accuracy, intervals, flips, McNemar, per category, plots.",
        config="hone_knockout.config:SweepConfig",
        prepare="hone_knockout.inputs:find_source",
        opened="hone_knockout.evaluate:reopen",
    ),
    "recommend": Verb(
        run="hone_knockout.recommend:recommend",
        help="Choose exit and frame-local layers on half of an eval run's questions, and report them on the others.",
        config="hone_knockout.config:RecommendConfig",
        prepare="hone_knockout.inputs:find_run",
    ),
    "bench": Verb(
        run="hone_knockout.bench:bench",
        help="Time exit and window at real sizes with random weights, beside what the operations allow.",
        config="hone_knockout.config:BenchConfig",
    ),
    "reproduce": Verb(
        run="hone_knockout.reproduce:reproduce",
        help="Put the paper's three findings to the test on tiny hosts, by rules fixed beforehand.",
        config="hone_knockout.config:ReproduceConfig",
        prepare="hone_knockout.inputs:find_hosts",
    ),
    "plot": Verb(run="hone_knockout.plots:plot", help="Draw a sweep's results in the paper's axes."),
    "train-host": Verb(
        run="hone_knockout.train:train_host",
        help="Train the tiny host on generated clips; stops early when every kind is learned.",
        config="hone_knockout.config:TrainHostConfig",
    ),
}
