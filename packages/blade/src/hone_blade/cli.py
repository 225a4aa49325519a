"""The verbs of ``hone-blade``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone_core.cli import run_cli

PACKAGE = "hone-blade"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Adaptive block-sparse attention (BLADE) for diffusers' Wan and CogVideoX transformers.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, and the tiny host that is packaged."""
    import json
    from importlib.resources import files

    from hone_core.environment import environment

    from .config import PRESETS

    facts = environment()
    sidecar = files("hone_blade") / "assets" / "host.json"
    host = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
    return {
        "version": facts["packages"].get(PACKAGE),
        "commit": facts["commit"],
        "python": facts["python"],
        "torch": facts["torch"],
        "diffusers": facts["packages"].get("diffusers"),
        "device": facts["gpu"] or f"{facts['cpu']}, {facts['cpu_count']} cores",
        "presets": {name: f"{preset.model}." for name, preset in PRESETS.items()},
        "tiny host": {key: host[key] for key in ("command", "steps", "seconds", "result") if key in host} or "absent",
    }


def demo(
    *,
    prompt: tuple[str, ...] | None = None,
    density: float | None = None,
    steps: int | None = None,
    limit: int | None = None,
    host: Path | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Draw moving digits with dense, adaptive, static and random attention; leaves a video, a sheet and a table.

    Args:
        prompt: What to draw, such as "a red 7 moving left, slow"; six prompts unless given.
        density: Share of query-key pairs that each sparse variant computes (0.25).
        steps: Denoising steps (the host's own number).
        limit: Use only so many of the prompts.
        host: A host.safetensors made by train-host, in place of the packaged one.
        config: A run's config.json to start from; other flags change it.
        seed: Of the starting noise (0).
        device: auto, cpu, cuda or cuda:1.
        out: Run folder.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    import dataclasses

    from .demo import DemoConfig, DemoReport
    from .demo import demo as draw

    cfg = _load(DemoConfig, config)
    comparison = _change(cfg.comparison, density=density, steps=steps, seed=seed)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    prompts = (tuple(prompt) if prompt is not None else cfg.prompts)[:limit]
    cfg = dataclasses.replace(cfg, prompts=prompts, comparison=comparison)
    if dry_run:
        return _plan(cfg, out)
    with _start("demo", cfg, out, comparison.seed) as run:
        return DemoReport.of(run) if run.done else draw(cfg, run, _host(host, device), quiet=quiet)


def evaluate(
    *,
    limit: int | None = None,
    density: float | None = None,
    steps: int | None = None,
    dense_steps: int | None = None,
    batch: int | None = None,
    host: Path | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Compare the variants of the demo on many random prompts, with bootstrap intervals.

    Args:
        limit: Number of prompts (64).
        density: Share of query-key pairs that each sparse variant computes (0.25).
        steps: Denoising steps (the host's own number).
        dense_steps: First steps that every variant runs dense (0).
        batch: Clips sampled at once (16).
        host: A host.safetensors made by train-host, in place of the packaged one.
        config: A run's config.json to start from; other flags change it.
        seed: Of prompts and noise (0).
        device: auto, cpu, cuda or cuda:1.
        out: Run folder.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    import dataclasses

    from . import plots
    from .evaluate import EvalConfig, EvalReport
    from .evaluate import evaluate as measure

    cfg = _change(_load(EvalConfig, config), prompts=limit, batch=batch)
    comparison = _change(cfg.comparison, density=density, steps=steps, dense_steps=dense_steps, seed=seed)
    cfg = dataclasses.replace(cfg, comparison=comparison)
    if dry_run:
        return _plan(cfg, out)
    with _start("eval", cfg, out, comparison.seed) as run:
        if not run.done:
            measure(cfg, run, _host(host, device), quiet=quiet)
    chart = run.figures / "accuracy.png"
    if not chart.exists():
        plots.accuracy_chart(run.results(), chart)
    return EvalReport.of(run)


def train_host(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    init: Path | None = None,
    compile: bool = True,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Train the tiny host on generated clips (minutes on a GPU, a day on a CPU); needs the extra train.

    Args:
        minutes: Budget of the training itself (7).
        steps: Number of optimiser steps, instead of a time budget.
        batch: Clips per step (256).
        lr: Peak learning rate of the matrices (0.005).
        init: A host.safetensors whose weights to start from.
        compile: Compile the transformer's blocks on a GPU.
        config: A run's config.json to start from; other flags change it.
        seed: Of weights and data (0).
        device: auto, cpu, cuda or cuda:1.
        out: Run folder; the same folder resumes.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    import shlex
    import sys

    from hone_core.devices import resolve_device

    from .train import TrainConfig, TrainReport
    from .train import train_host as train

    cfg = _change(_load(TrainConfig, config), minutes=minutes, steps=steps, batch=batch, lr=lr, seed=seed)
    cfg = _change(cfg, compile=None if compile else False)
    if dry_run:
        return _plan(cfg, out)
    target = resolve_device(device)
    with _start("train-host", cfg, out, cfg.seed) as run:
        if run.done:
            return TrainReport.of(run)
        return train(cfg, run, device=target, init=init, command=shlex.join([PACKAGE, *sys.argv[1:]]), quiet=quiet)


VERBS = {
    "info": info,
    "demo": demo,
    "eval": evaluate,
    "train-host": train_host,
}


def _load(kind: type, path: Path | None) -> Any:
    from hone_core.config import load_config

    return kind() if path is None else load_config(kind, path)


def _change(cfg: Any, **changes: Any) -> Any:
    """Replace the fields that a flag was given for."""
    import dataclasses

    return dataclasses.replace(cfg, **{name: value for name, value in changes.items() if value is not None})


def _plan(cfg: Any, out: Path | None) -> dict[str, Any]:
    from hone_core.config import to_dict

    return {"config": to_dict(cfg), "out": str(out or f"runs/{PACKAGE}/...")}


def _start(verb: str, cfg: Any, out: Path | None, seed: int) -> Any:
    from hone_core.runs import Run

    return Run.start(package=PACKAGE, verb=verb, config=cfg, out=out, seed=seed)


def _host(path: Path | None, device: str) -> Any:
    from hone_core.devices import resolve_device

    from .host import load_host

    return load_host(resolve_device(device), path=path)
