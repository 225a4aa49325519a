"""The verbs of ``hone-motion-anything``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

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
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_motion_anything")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Text to motion, text and music to dance, and an edit: videos with sound.",
        prepare="inputs:find_host",
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Motions for texts, to music, or edits of a motion.",
        prepare="inputs:find_asked",
    ),
    "convert": _verb(
        "convert:convert",
        "ConvertConfig",
        "A motion into another format, or a published checkpoint into safetensors.",
        prepare="inputs:find_converted",
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Train tokenizer or transformer on HumanML3D or text, music and dance, in one process or several.",
        prepare="inputs:find_trained",
        shared=True,
    ),
    "make-set": _verb(
        "triples:make_set", "MakeSetConfig", "Write generated motions, captions and music as a set to train on."
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Metrics of text to motion and of dance, repeated, with intervals.",
        prepare="inputs:find_host",
    ),
    "bench": _verb(
        "bench:bench", "BenchConfig", "Time the unmasking loop at published shapes, as released and as here."
    ),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Attention masks against controls, trained and judged.",
        prepare="inputs:find_host",
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host on the grammar."),
}
