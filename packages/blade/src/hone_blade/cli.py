"""The verbs of ``hone-blade``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from hone_core.cli import run_cli

PACKAGE = "hone-blade"


def main() -> None:
    """Entry point of the script."""
    # Read when torch loads OpenMP. By default its idle threads spin, which on a busy two-core machine takes twice the
    # time (two steps of the tiny host: 8.8 s against 4.9 s). What the caller has set holds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        density: Share of query-key pairs that each sparse variant computes (default: 0.25).
        steps: Denoising steps (default: the host's own number).
        limit: Use only so many of the prompts.
        host: A host.safetensors made by train-host, in place of the packaged one.
        config: A run's config.json to start from; other flags change it.
        seed: Of the starting noise (default: 0).
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
    prompts = (tuple(prompt) if prompt is not None else cfg.prompts)[: _positive("limit", limit)]
    cfg = dataclasses.replace(cfg, prompts=prompts, comparison=comparison)
    if dry_run:
        return _plan(cfg, out)
    with _start("demo", cfg, out, comparison.seed, _named(cfg)) as run:
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
        limit: Number of prompts (default: 64).
        density: Share of query-key pairs that each sparse variant computes (default: 0.25).
        steps: Denoising steps (default: the host's own number).
        dense_steps: First steps that every variant runs dense (default: 0).
        batch: Clips sampled at once (default: 16).
        host: A host.safetensors made by train-host, in place of the packaged one.
        config: A run's config.json to start from; other flags change it.
        seed: Of prompts and noise (default: 0).
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
    with _start("eval", cfg, out, comparison.seed, _named(cfg)) as run:
        if not run.done:
            measure(cfg, run, _host(host, device), quiet=quiet)
    chart = run.figures / "accuracy.png"
    if not chart.exists():
        plots.accuracy_chart(run.results(), chart)
    return EvalReport.of(run)


def generate(
    *,
    model: str | None = None,
    prompt: tuple[str, ...] | None = None,
    prompt_file: str | None = None,
    negative_prompt: str | None = None,
    preset: str | None = None,
    dense: bool = False,
    lora: str | None = None,
    scheduler: Literal["tdm", "unipc", "dpm", "default"] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    limit: int | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    offload: bool = False,
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Make videos with a Wan or CogVideoX pipeline, from a folder or the hub.

    Args:
        model: Folder of a diffusers pipeline, or its hub address, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
        prompt: What to make, one video each.
        prompt_file: Text file with a prompt a line, instead.
        negative_prompt: What guidance leads away from.
        preset: Attention settings by name (hone-blade info lists them); those of the LoRA or the model unless given.
        dense: Leave attention as it is.
        lora: LoRA weights: a safetensors file, its folder, or a hub address.
        scheduler: tdm is what BLADE's distillation trains, unipc and dpm what its release samples with (default: tdm).
        steps: Denoising steps (default: 8).
        guidance: Classifier-free guidance weight; 1 is none (default: 1).
        height: Pixels; the model's own unless given, like width and frames.
        width: Pixels.
        frames: Frames.
        limit: Use only so many of the prompts.
        config: A run's config.json to start from; other flags change it.
        seed: Of the first prompt; the following ones count up (default: 0).
        device: auto, cpu, cuda or cuda:1.
        dtype: Of transformer and text encoder; auto is bfloat16 on a GPU, float32 on a CPU (default: auto).
        offload: Keep on the GPU only the part that is running.
        out: Run folder; the same folder resumes.
        dry_run: Look for the inputs, print the settings and do nothing.
        quiet: Show no progress.
    """
    cfg = _generate_config(
        config,
        model=model,
        prompts=prompt,
        prompt_file=prompt_file,
        negative_prompt=negative_prompt,
        preset=preset,
        dense=dense or None,
        lora=lora,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        frames=frames,
        seed=seed,
        dtype=dtype,
        offload=offload or None,
    )
    from .sample import generate as make

    cfg = _found(cfg, limit)
    if dry_run:
        return _plan(cfg, out)
    with _start("generate", cfg, out, cfg.seed, cfg.preset) as run:
        return make(cfg, run, device=device, quiet=quiet)


def inspect(
    *,
    model: str | None = None,
    prompt: str = "a red 7 moving left, slow",
    preset: str | None = None,
    lora: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    recall: bool = True,
    host: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
) -> Any:
    """Density, clamped rows and recall of every layer at every step, as JSON and a plot.

    Args:
        model: A diffusers pipeline as for generate; the tiny host unless given.
        prompt: What to draw while looking.
        preset: Attention settings by name; tiny for the tiny host, the model's own otherwise.
        lora: LoRA weights for a pipeline.
        steps: Denoising steps (default: the host's own number, or 8).
        guidance: Classifier-free guidance weight; 1 is none (default: 1).
        recall: Also measure the share of dense attention's mass that is kept, which costs a dense attention per call.
        host: A host.safetensors made by train-host, in place of the packaged one.
        seed: Of the starting noise.
        device: auto, cpu, cuda or cuda:1.
        out: Run folder.
        dry_run: Print the settings and do nothing.
    """
    if model is None:
        if lora is not None:
            raise ValueError("lora is for a pipeline; pass --model too")
        settings = {"prompt": prompt, "preset": preset or "tiny", "steps": steps, "guidance": guidance}
        settings |= {"recall": recall, "seed": seed, "host": None if host is None else str(host)}
        return _inspect_host(settings, device, out, dry_run=dry_run)
    if host is not None:
        raise ValueError("give model, a pipeline, or host, a tiny host; not both")
    options = {"preset": preset, "lora": lora, "steps": steps, "guidance": guidance, "seed": seed}
    cfg = _generate_config(None, model=model, prompts=(prompt,), **options)
    from .inspection import inspect_pipeline

    cfg = _found(cfg, None)
    if dry_run:
        return _plan(cfg, out)
    with _start("inspect", cfg, out, seed, preset) as run:
        return run.results() if run.done else inspect_pipeline(cfg, run, device=device, recall=recall)


def bench(
    *,
    model: str | None = None,
    parts: tuple[Literal["attention", "forward", "e2e"], ...] | None = None,
    preset: str | None = None,
    rounds: int | None = None,
    steps: int | None = None,
    few_steps: int | None = None,
    max_steps: int | None = None,
    compile_blocks: bool = False,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Time dense and sparse attention at real sizes with random weights: one layer, one forward, whole videos.

    Args:
        model: wan2.1-1.3b, wan2.1-14b or cogvideox-5b, or on a CPU tiny-wan or tiny-cogvideox (default: wan2.1-1.3b).
        parts: attention, forward, e2e, or several of them (default: all).
        preset: Attention settings by name; the model's own unless given.
        rounds: Timed calls of each variant of one attention (default: 20).
        steps: Denoising steps of the undistilled model (default: 50).
        few_steps: Denoising steps of the distilled one (default: 8).
        max_steps: Run at most so many steps of a loop and scale the time up; the rows say so.
        compile_blocks: Also time the forward with compiled transformer blocks.
        config: A run's config.json to start from; other flags change it.
        seed: Of weights, inputs and noise (default: 0).
        device: auto, cpu, cuda or cuda:1.
        dtype: Of weights and inputs (default: auto).
        out: Run folder.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    from .bench import BenchConfig
    from .bench import bench as measure

    cfg = _change(
        _load(BenchConfig, config),
        model=model,
        parts=parts,
        preset=preset,
        rounds=rounds,
        steps=steps,
        few_steps=few_steps,
        max_steps=max_steps,
        compile_blocks=compile_blocks or None,
        dtype=dtype,
        seed=seed,
    )
    if dry_run:
        return _plan(cfg, out)
    with _start("bench", cfg, out, cfg.seed, cfg.preset or _named(cfg)) as run:
        return measure(cfg, run, device=device, quiet=quiet)


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
        minutes: Budget of the training itself (default: 7).
        steps: Number of optimiser steps, instead of a time budget.
        batch: Clips per step (default: 256).
        lr: Peak learning rate of the matrices (default: 0.005).
        init: A host.safetensors whose weights to start from.
        compile: Compile the transformer's blocks on a GPU.
        config: A run's config.json to start from; other flags change it.
        seed: Of weights and data (default: 0).
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
    with _start("train-host", cfg, out, cfg.seed, _named(cfg)) as run:
        if run.done:
            return TrainReport.of(run)
        return train(cfg, run, device=target, init=init, command=shlex.join([PACKAGE, *sys.argv[1:]]), quiet=quiet)


VERBS = {
    "info": info,
    "demo": demo,
    "generate": generate,
    "eval": evaluate,
    "bench": bench,
    "inspect": inspect,
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


def _start(verb: str, cfg: Any, out: Path | None, seed: int, preset: str | None = None) -> Any:
    from hone_core.runs import Run

    return Run.start(package=PACKAGE, verb=verb, config=cfg, out=out, seed=seed, preset=preset)


def _named(cfg: Any) -> str | None:
    """``default`` for settings that are nobody's own, whatever their seed: the name of such a run's folder."""
    import dataclasses

    plain = type(cfg)()
    if hasattr(cfg, "comparison"):
        plain = dataclasses.replace(plain, comparison=dataclasses.replace(plain.comparison, seed=cfg.comparison.seed))
    else:
        plain = dataclasses.replace(plain, seed=cfg.seed)
    return "default" if cfg == plain else None


def _host(path: Path | None, device: str) -> Any:
    from hone_core.devices import resolve_device

    from .host import load_host

    return load_host(resolve_device(device), path=path)


def _generate_config(path: Path | None, **changes: Any) -> Any:
    """Settings of a real pipeline from a file, flags, or both."""
    import json

    given = {name: value for name, value in changes.items() if value is not None}
    stored = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    if "prompt_file" in given:
        stored.pop("prompts", None)
    if "prompts" in given:
        stored.pop("prompt_file", None)
        given["prompts"] = list(given["prompts"])
    settings = {**stored, **given}
    # Before torch and diffusers are imported, which takes seconds.
    if "model" not in settings:
        raise ValueError("no model; pass --model FOLDER, or a hub address such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    file = settings.get("prompt_file")
    if not settings.get("prompts") and file is None:
        raise ValueError("no prompt; pass --prompt TEXT, or --prompt-file FILE with one a line")
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"prompt_file {file} does not exist; expected a text file with one prompt a line")
    _known_preset(settings.get("preset"))

    from hone_core.config import from_dict

    from .sample import GenerateConfig

    return from_dict(GenerateConfig, {**stored, **given})


def _found(cfg: Any, limit: int | None) -> Any:
    """The settings with their prompts read, once everything that they name is known to be there."""
    import dataclasses

    from .sample import find_inputs

    cfg = find_inputs(cfg).config
    return dataclasses.replace(cfg, prompts=cfg.prompts[: _positive("limit", limit)])


def _known_preset(name: str | None) -> None:
    from .config import PRESETS

    if name is not None and name not in PRESETS:
        raise ValueError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return value


def _leaves_a_sparse_step(preset: str, steps: int) -> None:
    from .config import PRESETS

    dense = PRESETS[preset].config.dense_steps
    if dense >= steps:
        raise ValueError(
            f"steps must be above the {dense} first steps that preset {preset} leaves dense, or there is nothing to "
            f"inspect; got {steps}. Take more steps, or another preset"
        )


def _inspect_host(settings: dict[str, Any], device: str, out: Path | None, *, dry_run: bool) -> Any:
    """Look at the tiny host while it draws one clip."""
    preset, prompt, seed = settings["preset"], settings["prompt"], settings["seed"]
    _positive("steps", settings["steps"])
    _known_preset(preset)
    from hone_video.prompts import parse_prompt

    parse_prompt(prompt)
    if dry_run:
        return {"config": settings, "out": str(out or f"runs/{PACKAGE}/...")}
    from .inspection import inspect_model
    from .models import attach

    with _start("inspect", settings, out, seed, preset) as run:
        if run.done:
            return run.results()
        host = _host(settings["host"] and Path(settings["host"]), device)
        text, noise = host.encode_prompt(prompt), host.noise(1, seed)
        _leaves_a_sparse_step(preset, host.config.steps if settings["steps"] is None else settings["steps"])
        sampler = {"steps": settings["steps"], "guidance": settings["guidance"]}
        with attach(host.transformer, preset) as handle:

            def draw() -> None:
                host.sample(text, noise, **sampler, on_step=lambda step, _: handle.begin_step(step))

            title = f"tiny host, {preset}: {prompt}"
            return inspect_model(handle, draw, run, recall=settings["recall"], title=title)
