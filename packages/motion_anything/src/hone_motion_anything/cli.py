"""The verbs of ``hone-motion-anything``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-motion-anything"


def main() -> None:
    """Entry point of the script."""
    run_cli(
        PACKAGE, VERBS, "Motion Anything: motion from text and music, by a masked model whose masks attention chooses."
    )


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, and the tiny host."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import PRESETS

    return {
        **installed(PACKAGE, "imageio-ffmpeg"),
        "tiny host": describe_host(PACKAGE),
        "presets": {name: f"{preset.model}. {preset.provenance}" for name, preset in PRESETS.items()},
    }


def _verb(run: str, config: str, help: str) -> Verb:
    return Verb(run=f"hone_motion_anything.{run}", config=f"hone_motion_anything.config:{config}", help=help)


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo", "DemoConfig", "Text to motion, text and music to dance, and an edit: videos with sound."
    ),
    "generate": Verb(
        run="hone_motion_anything.sample:generate",
        config="hone_motion_anything.config:GenerateConfig",
        prepare="hone_motion_anything.sample:prepare",
        help="Motions for texts, to music, or edits of a motion.",
    ),
    "convert": Verb(
        run="hone_motion_anything.convert:convert",
        config="hone_motion_anything.config:ConvertConfig",
        prepare="hone_motion_anything.convert:prepare",
        help="A motion into another format, or a published checkpoint into safetensors.",
    ),
    "train": Verb(
        run="hone_motion_anything.fit:fit",
        config="hone_motion_anything.config:TrainConfig",
        prepare="hone_motion_anything.fit:prepare",
        help="Train tokenizer or transformer on HumanML3D or text, music and dance, in one process or several.",
        shared=True,
    ),
    "make-set": _verb(
        "triples:make_set", "MakeSetConfig", "Write generated motions, captions and music as a set to train on."
    ),
    "eval": _verb(
        "evaluate:evaluate", "EvalConfig", "Metrics of text to motion and of dance, repeated, with intervals."
    ),
    "bench": _verb(
        "bench:bench", "BenchConfig", "Time the unmasking loop at published shapes, as released and as here."
    ),
    "reproduce": _verb(
        "reproduce:reproduce", "ReproduceConfig", "Attention masks against controls, trained and judged."
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host on the grammar."),
}
