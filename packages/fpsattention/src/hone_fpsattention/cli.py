"""The verbs of ``hone-fpsattention``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-fpsattention"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "E4M3 attention over sliding 3-D tiles (FPSAttention) for diffusers' video transformers.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, and the tiny host."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import PRESETS

    return {
        **installed(PACKAGE, "diffusers"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_fpsattention")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Draw moving digits dense, in E4M3, through a window, both, and both after training: a video and a table.",
        prepare="inputs:find_hosts",
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "Compare the variants of the demo on many random prompts, with intervals; or a pipeline by VBench.",
        prepare="inputs:find_evaluated",
        shared=True,
    ),
    "generate": _verb(
        "sample:generate",
        "GenerateConfig",
        "Make videos with a Wan or CogVideoX pipeline, from a folder or the hub.",
        prepare="inputs:find_video",
        shared=True,
    ),
    "calibrate": _verb(
        "calibrate:calibrate",
        "CalibrateConfig",
        "Measure windows and scales by step and layer, and write the best schedule under a density budget.",
        prepare="inputs:find_calibrated",
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Fine-tune a Wan or CogVideoX transformer with the attention in its forward pass, on one GPU or several.",
        prepare="inputs:find_finetuned",
        shared=True,
    ),
    "train-host": _verb(
        "train:train_host",
        "TrainHostConfig",
        "Fine-tune the tiny host with the attention in its forward pass, by distillation or on the flow loss.",
        prepare="inputs:find_host",
    ),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "What rounding, window, schedule and granularity cost on the tiny host, and what training buys; seeds.",
        prepare="inputs:find_host",
    ),
    "inspect": _verb(
        "inspection:inspect",
        "InspectConfig",
        "What the attention does by layer and step: density, and the errors of rounding, of the window, of both.",
        prepare="inputs:find_inspected",
    ),
    "bench": _verb(
        "bench:bench",
        "BenchConfig",
        "Time dense, windowed and E4M3 attention at real sizes with random weights: layer, forward, loop.",
        prepare="inputs:check_launch",
        shared=True,
    ),
}
