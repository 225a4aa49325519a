"""The verbs of ``hone-fpsattention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-fpsattention"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "E4M3 attention over sliding 3-D tiles (FPSAttention) for diffusers' video transformers.")


def info() -> dict[str, Any]:
    """Versions, devices, and presets with where their numbers come from."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import PRESETS

    return {
        **installed(PACKAGE, "diffusers"),
        "tiny host": describe_host(PACKAGE),
        "presets": {name: f"{preset.model}. {preset.provenance}" for name, preset in PRESETS.items()},
    }


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": Verb(
        config="hone_fpsattention.config:DemoConfig",
        prepare="hone_fpsattention.inputs:find_hosts",
        run="hone_fpsattention.demo:demo",
        help="Draw moving digits dense, in E4M3, through a window, both, and both after training: a video and a table.",
    ),
    "eval": Verb(
        config="hone_fpsattention.config:EvalConfig",
        prepare="hone_fpsattention.inputs:find_evaluated",
        run="hone_fpsattention.evaluate:evaluate",
        help="Compare the variants of the demo on many random prompts, with intervals; or a pipeline by VBench.",
        shared=True,
    ),
    "generate": Verb(
        config="hone_fpsattention.config:GenerateConfig",
        prepare="hone_fpsattention.inputs:find_video",
        run="hone_fpsattention.sample:generate",
        help="Make videos with a Wan or CogVideoX pipeline, from a folder or the hub.",
        shared=True,
    ),
    "calibrate": Verb(
        config="hone_fpsattention.config:CalibrateConfig",
        prepare="hone_fpsattention.inputs:find_calibrated",
        run="hone_fpsattention.calibrate:calibrate",
        help="Measure windows and scales by step and layer, and write the best schedule under a density budget.",
    ),
    "train": Verb(
        config="hone_fpsattention.config:FinetuneConfig",
        prepare="hone_fpsattention.inputs:find_finetuned",
        run="hone_fpsattention.finetune:finetune",
        help="Fine-tune a Wan or CogVideoX transformer with the attention in its forward pass, on one GPU or several.",
        shared=True,
    ),
    "train-host": Verb(
        config="hone_fpsattention.config:TrainConfig",
        prepare="hone_fpsattention.inputs:find_host",
        run="hone_fpsattention.train:train_host",
        help="Fine-tune the tiny host with the attention in its forward pass, by distillation or on the flow loss.",
    ),
    "reproduce": Verb(
        config="hone_fpsattention.config:ReproduceConfig",
        prepare="hone_fpsattention.inputs:find_host",
        run="hone_fpsattention.reproduce:reproduce",
        help="What rounding, window, schedule and granularity cost on the tiny host, and what training buys; seeds.",
    ),
    "inspect": Verb(
        config="hone_fpsattention.config:InspectConfig",
        prepare="hone_fpsattention.inputs:find_inspected",
        run="hone_fpsattention.inspection:inspect",
        help="What the attention does by layer and step: density, and the errors of rounding, of the window, of both.",
    ),
    "bench": Verb(
        config="hone_fpsattention.config:BenchConfig",
        run="hone_fpsattention.bench:bench",
        shared=True,
        help="Time dense, windowed and E4M3 attention at real sizes with random weights: layer, forward, loop.",
    ),
}
