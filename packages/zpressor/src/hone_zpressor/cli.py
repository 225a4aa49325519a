"""The verbs of ``hone-zpressor``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hone_core.cli import Verb, run_cli, verb

PACKAGE = "hone-zpressor"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "ZPressor: many posed views fused into a few, before Gaussians are made of them.")


def info() -> dict[str, Any]:
    """Versions, devices, presets with where their numbers come from, hosts of published weights, and the tiny host."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host
    from hone_splat.ranges import HOSTS

    from .config import PRESETS

    return {
        **installed(PACKAGE, "gsplat"),
        "presets": {name: str(preset) for name, preset in PRESETS.items()},
        "hosts": {name: str(host) for name, host in HOSTS.items()},
        "tiny host": describe_host(PACKAGE),
    }


_verb = partial(verb, "hone_zpressor")

VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Rooms from many views, compressed to a few; pictures, a .ply, a flight.",
        prepare="inputs:find_host",
    ),
    "render": _verb(
        "photographs:render_capture",
        "RenderConfig",
        "Your photographs to a splat and a flight.",
        prepare="inputs:find_photographs",
    ),
    "view": _verb(
        "viewing:view",
        "ViewConfig",
        "A splat in the browser, with a slider for its anchors.",
        prepare="inputs:find_viewed",
    ),
    "doctor": _verb(
        "photographs:doctor",
        "DoctorConfig",
        "What a host would make of your photographs.",
        prepare="inputs:find_photographs",
    ),
    "convert": _verb(
        "conversion:convert",
        "ConvertConfig",
        "Your photographs as chunks with an evaluation index.",
        prepare="inputs:find_converted",
    ),
    "eval": _verb(
        "evaluate:evaluate",
        "EvalConfig",
        "PSNR and SSIM on chunks of RealEstate10K or DL3DV.",
        prepare="inputs:find_evaluated",
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Train a host with ZPressor on chunks, as released; in several processes under accelerate launch.",
        prepare="inputs:find_trained",
        shared=True,
    ),
    "bench": _verb("bench:bench", "BenchConfig", "Time and memory over the number of views."),
    "reproduce": _verb(
        "reproduce:reproduce",
        "ReproduceConfig",
        "Put the paper's claims to the test on tiny hosts.",
        prepare="inputs:find_hosts",
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host and its arms on generated rooms."),
}
