"""The verbs of ``hone-blade``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-blade"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Adaptive block-sparse attention (BLADE) for diffusers' Wan and CogVideoX transformers.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, and the tiny host and its student that are packaged."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_video.host_config import PACKAGED

    from .config import PACKAGED_LORA, PRESETS

    return {
        **installed(PACKAGE, "diffusers"),
        "presets": {name: f"{preset.model}." for name, preset in PRESETS.items()},
        "tiny host": describe_host(PACKAGE, PACKAGED),
        "distilled tiny host": "packaged" if PACKAGED_LORA.is_file() else "absent",
    }


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": Verb(
        config="hone_blade.config:DemoConfig",
        prepare="hone_blade.inputs:find_student",
        run="hone_blade.demo:demo",
        help="Draw moving digits with dense, adaptive, static and random attention: a video, a sheet and a table.",
    ),
    "generate": Verb(
        config="hone_blade.config:GenerateConfig",
        prepare="hone_blade.inputs:find_video_inputs",
        run="hone_blade.sample:generate",
        help="Make videos from prompts, and images, with a Wan or CogVideoX pipeline, from a folder or the hub.",
        shared=True,
    ),
    "distill": Verb(
        config="hone_blade.config:DistillConfig",
        prepare="hone_blade.inputs:find_host",
        run="hone_blade.distill:distill",
        help="Train the tiny host to draw in few sparse steps without guidance (TDM); needs only prompts.",
    ),
    "encode-prompts": Verb(
        config="hone_blade.config:EncodeConfig",
        prepare="hone_blade.inputs:find_encoded",
        run="hone_blade.pipelines:encode_prompts",
        help="Encode prompts, or prompts with images, with a pipeline's own encoders, for distill-pipeline.",
        shared=True,
    ),
    "distill-pipeline": Verb(
        config="hone_blade.config:PipelineDistillConfig",
        prepare="hone_blade.inputs:find_distilled",
        run="hone_blade.pipelines:distill_pipeline",
        help="Train a Wan or CogVideoX pipeline to draw in few sparse steps without guidance; needs only prompts.",
        shared=True,
    ),
    "eval": Verb(
        config="hone_blade.config:EvalConfig",
        prepare="hone_blade.inputs:find_evaluated",
        run="hone_blade.evaluate:evaluate",
        help="Compare the variants of the demo on many random prompts, with intervals; or a pipeline by VBench.",
        shared=True,
    ),
    "bench": Verb(
        config="hone_blade.config:BenchConfig",
        run="hone_blade.bench:bench",
        help="Time dense and sparse attention at real sizes with random weights: one layer, one forward, whole videos.",
    ),
    "reproduce": Verb(
        config="hone_blade.config:ReproduceConfig",
        prepare="hone_blade.inputs:find_student",
        run="hone_blade.reproduce:reproduce",
        help="Whether masks that look beat static ones, or training with them beats adding them after; and ablations.",
    ),
    "inspect": Verb(
        config="hone_blade.config:InspectConfig",
        prepare="hone_blade.inputs:find_inspected",
        run="hone_blade.inspection:inspect",
        help="Density, clamped rows and recall of every layer at every step, as JSON and a plot.",
    ),
    "train-host": Verb(
        config="hone_blade.config:TrainConfig",
        prepare="hone_blade.inputs:find_init",
        run="hone_blade.train:train_host",
        help="Train the tiny host on generated clips (minutes on a GPU, a day on a CPU); needs the extra train.",
    ),
}
