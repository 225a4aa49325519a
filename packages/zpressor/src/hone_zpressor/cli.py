"""The verbs of ``hone-zpressor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hone_core.cli import Verb, run_cli

PACKAGE = "hone-zpressor"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "ZPressor: many posed views fused into a few, before Gaussians are made of them.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, and the tiny host that is packaged."""
    from hone_core.environment import installed
    from hone_core.hosts import describe_host

    from .config import HOSTS, PRESETS

    return {
        **installed(PACKAGE, "gsplat"),
        "presets": {
            name: f"{preset.config.anchors} anchors, {preset.config.layers} layers, {preset.model}. {preset.provenance}"
            for name, preset in PRESETS.items()
        },
        "hosts": {
            name: f"{one.size[0]} x {one.size[1]}, depths {one.near:g} to {one.far:g}. {one.provenance}"
            for name, one in HOSTS.items()
        },
        "tiny host": describe_host(PACKAGE),
    }


def _verb(run: str, config: str, help: str, *, prepare: bool = False, shared: bool = False) -> Verb:
    module = run.partition(":")[0]
    return Verb(
        run=f"hone_zpressor.{run}",
        help=help,
        config=f"hone_zpressor.config:{config}",
        prepare=f"hone_zpressor.{module}:prepare" if prepare else None,
        shared=shared,
    )


VERBS: dict[str, Callable[..., Any] | Verb] = {
    "info": info,
    "demo": _verb(
        "demo:demo",
        "DemoConfig",
        "Rooms from many views, compressed to a few; pictures, a .ply, a flight.",
        prepare=True,
    ),
    "render": _verb(
        "photographs:render_capture", "RenderConfig", "Your photographs to a splat and a flight.", prepare=True
    ),
    "view": _verb("viewing:view", "ViewConfig", "A splat in the browser, with a slider for its anchors.", prepare=True),
    "doctor": _verb("photographs:doctor", "DoctorConfig", "What a host would make of your photographs.", prepare=True),
    "convert": _verb(
        "conversion:convert", "ConvertConfig", "Your photographs as chunks with an evaluation index.", prepare=True
    ),
    "eval": _verb(
        "evaluate:evaluate", "EvalConfig", "PSNR and SSIM on chunks of RealEstate10K or DL3DV.", prepare=True
    ),
    "train": _verb(
        "finetune:train",
        "TrainConfig",
        "Train a host with ZPressor on chunks, as released; in several processes under accelerate launch.",
        prepare=True,
        shared=True,
    ),
    "bench": _verb("bench:bench", "BenchConfig", "Time and memory over the number of views."),
    "reproduce": _verb(
        "reproduce:reproduce", "ReproduceConfig", "Put the paper's claims to the test on tiny hosts.", prepare=True
    ),
    "train-host": _verb("train:train_host", "TrainHostConfig", "Train the tiny host and its arms on generated rooms."),
}
