"""The verbs of ``hone-nar``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-nar"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "NAR: image models that draw whole diagonals of tokens at a time.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, published sizes, and the tiny hosts."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .checkpoints import MANIFESTS
    from .config import PRESETS
    from .places import host_of

    return {
        **installed(PACKAGE, "diffusers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "sizes": {name: f"{manifest.parameters:,} parameters" for name, manifest in MANIFESTS.items()},
        "tiny host": describe_host(PACKAGE),
        "tiny host of clips": describe_host(PACKAGE, host_of("shapes")),
    }


_verb = partial(verb, "hone_nar")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Draw digits by NAR and by a raster model: a GIF and a sheet.",
        prepare="inputs:find_host",
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Draw images of classes or prompts, or clips of classes, with a saved pipeline.",
        prepare="inputs:find_drawn",
    ),
    "extract": _verb(
        "extract:extract",
        "ExtractConfig",
        "Write codes of images in folders, to train on.",
        prepare="inputs:find_extracted",
    ),
    "train": _verb(
        "finetune:train", "TrainConfig", "Train NAR, LlamaGen or FlashAR on codes.", prepare="inputs:find_trained"
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Exact likelihoods, and quality of drawn digits.",
        prepare="inputs:find_graded",
    ),
    "reproduce": _verb("reproduce:reproduce", "ReproduceConfig", "Put the central claim to the test on digits."),
    "bench": _verb("bench:bench", "BenchConfig", "Time drawing at real sizes: the release's loop, ours, and raster."),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host: NAR and a raster model."),
}
