"""The verbs of ``hone-blade``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-blade"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Adaptive block-sparse attention (BLADE) for diffusers' Wan and CogVideoX transformers.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, the tiny host and its student."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_video.host_config import PACKAGED

    from .config import PACKAGED_LORA, PRESETS

    return {
        **installed(PACKAGE, "diffusers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "tiny host": describe_host(PACKAGE, PACKAGED),
        "distilled tiny host": "packaged" if PACKAGED_LORA.is_file() else "absent",
    }


_verb = partial(verb, "hone_blade")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Draw moving digits with dense, adaptive, static and random attention: a video, a sheet and a table.",
        prepare="inputs:find_demo",
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Make videos from prompts, and images, with a Wan or CogVideoX pipeline, from a folder or the hub.",
        prepare="inputs:find_video_inputs",
        shared=True,
    ),
    "distill": _verb(
        "distill:distill",
        "DistillConfig",
        "Train the tiny host to draw in few sparse steps without guidance (TDM); needs only prompts.",
        prepare="inputs:find_host",
    ),
    "encode-prompts": _verb(
        "pipelines:encode_prompts",
        "EncodeConfig",
        "Encode prompts, or prompts with images, with a pipeline's own encoders, for distill-pipeline.",
        prepare="inputs:find_encoded",
        shared=True,
    ),
    "distill-pipeline": _verb(
        "pipelines:distill_pipeline",
        "PipelineDistillConfig",
        "Train a Wan or CogVideoX pipeline to draw in few sparse steps without guidance; needs only prompts.",
        prepare="inputs:find_distilled",
        shared=True,
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Compare the variants of the demo on many random prompts, with intervals; or a pipeline by VBench.",
        prepare="inputs:find_evaluated",
        shared=True,
    ),
    "bench": _verb(
        "bench:bench",
        "BenchConfig",
        "Time dense and sparse attention at real sizes with random weights: one layer, one forward, whole videos.",
    ),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Whether masks that look beat static ones, or training with them beats adding them after; and ablations.",
        prepare="inputs:find_reproduced",
    ),
    "inspect": _verb(
        "inspection:inspect",
        "InspectConfig",
        "Density, clamped rows and recall of every layer at every step, as JSON and a plot.",
        prepare="inputs:find_inspected",
    ),
    "train-host": _verb(
        "train:train_host",
        "TrainHostConfig",
        "Train the tiny host on generated clips (minutes on a GPU, a day on a CPU); needs the extra train.",
        prepare="inputs:find_init",
    ),
}
