"""The verbs of ``hone-knockout``."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Literal

from hone_core.cli import run_cli

PACKAGE = "hone-knockout"


def main() -> None:
    """Entry point of the script."""
    run_cli(PACKAGE, VERBS, "Attention knockouts for video language models, and the exit of their visual tokens.")


def info() -> dict[str, Any]:
    """Versions, devices, presets, classes with a layout rule, and the tiny host that is packaged."""
    import json
    from importlib.resources import files

    from hone_core.environment import environment

    from .config import PRESETS

    facts = environment()
    sidecar = files("hone_knockout") / "assets" / "host.json"
    host = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
    from hone_lm.layouts import RULES

    return {
        "version": facts["packages"].get(PACKAGE),
        "commit": facts["commit"],
        "python": facts["python"],
        "torch": facts["torch"],
        "transformers": facts["packages"].get("transformers"),
        "device": facts["gpu"] or f"{facts['cpu']}, {facts['cpu_count']} cores",
        "presets": {name: f"{preset.config.label} ({preset.model})." for name, preset in PRESETS.items()},
        "layouts": list(RULES),
        "tiny host": {key: host[key] for key in ("command", "steps", "seconds", "result") if key in host} or "absent",
    }


def demo(
    *,
    limit: int | None = None,
    max_drop: float | None = None,
    host: Path | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Ask a tiny trained Video-LLM about generated clips, knock its attention out, and find where video can leave.

    Args:
        limit: Number of questions, four kinds in turn (128).
        max_drop: Points of accuracy that exit and window may cost (2).
        host: A host.safetensors made by train-host, in place of the packaged one.
        config: A run's config.json to start from; other flags change it.
        seed: Of clips and questions (0).
        device: auto, cpu, cuda or cuda:1.
        out: Run folder.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    from .demo import DemoConfig, DemoReport
    from .demo import demo as show

    cfg = _change(_load(DemoConfig, config), items=limit, max_drop=max_drop, seed=seed)
    if dry_run:
        return _plan(cfg, out)
    model = _host(host, device)
    with _start("demo", cfg, out, cfg.seed) as run:
        return DemoReport.of(run) if run.done else show(cfg, run, model, quiet=quiet)


def inspect(
    *,
    model: str | None = None,
    video: Path | None = None,
    ask: str | None = None,
    frames: int | None = None,
    tokens_per_frame: int | None = None,
    save: Path | None = None,
    host: Path | None = None,
) -> Any:
    """Print what each position of a prompt is: frames, text between and around them, separators.

    Args:
        model: Folder or hub address of a Video-LLM; the tiny host and a generated clip unless given.
        video: File, folder of pictures or .npy array.
        ask: Question.
        frames: Frames to sample, before a model fuses any: at 32, Qwen's layout has 16 (32).
        tokens_per_frame: Cut the video into frames of so many tokens, in place of the rule of the model's class; needed
            for a class without one whose frames follow each other without text.
        save: JSON file to write the layout to.
        host: A host.safetensors made by train-host.
    """
    if model is not None and host is not None:
        raise ValueError("give model, a Video-LLM, or host, a tiny host; not both")
    if model is not None:
        _check_asked(video, ask)
    from .data import generated_items
    from .sample import AskConfig, look

    if model is None:
        if (video, ask, frames, tokens_per_frame) != (None, None, None, None):
            raise ValueError(
                "video, ask, frames and tokens-per-frame belong to --model; "
                "the tiny host is asked about a generated clip"
            )
        loaded = _host(host, "cpu")
        item = generated_items(1, loaded.config.clip)[0]
        cfg = AskConfig(model="host", video="generated", ask=item.question, options=item.options, style="text")
        layout = look(loaded.model, loaded.processor, cfg, item.clip)
    else:
        from transformers import AutoConfig, AutoProcessor

        from .models import check_model

        cfg = _ask_config(model, video, ask, frames=32 if frames is None else frames, tokens_per_frame=tokens_per_frame)
        check_model(model)
        layout = look(AutoConfig.from_pretrained(model), AutoProcessor.from_pretrained(model), cfg)
    if save is not None:
        layout.save(save)
    return layout


def generate(
    *,
    model: str | None = None,
    video: Path | None = None,
    ask: str | None = None,
    option: tuple[str, ...] = (),
    knock: tuple[Literal["LV", "VT", "VS", "VV", "VT-strict"], ...] = (),
    layers: str | None = None,
    exit: int | None = None,
    local: str | None = None,
    preset: str | None = None,
    frames: int = 32,
    tokens_per_frame: int | None = None,
    max_new_tokens: int | None = None,
    start: float | None = None,
    end: float | None = None,
    rounds: int = 3,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    dry_run: bool = False,
) -> Any:
    """Answer a question about a video, as the model is and with knockouts or an exit, with time and memory.

    Args:
        model: Folder or hub address of a Video-LLM.
        video: File, folder of pictures or .npy array.
        ask: Question.
        option: Options to score instead of writing an answer, as in --option up down.
        knock: Knockouts in --layers.
        layers: Layers of --knock, counted from 0, such as 0-7,12 or 8- (all).
        exit: Layer at which visual tokens leave, counted from 0: 18 keeps them in the first 18 layers.
        local: Layers in which frames read only themselves, such as 0-7.
        preset: Recipe by name, in place of the four flags above.
        frames: Frames to sample, before a model fuses any: at 32, Qwen's layout has 16.
        tokens_per_frame: Cut the video into frames of so many tokens, in place of the rule of the model's class.
        max_new_tokens: Length of a written answer (64).
        start: Seconds from which.
        end: Seconds up to which.
        rounds: Turns that each variant gets after one that warms up; times are medians.
        device: auto, cpu, cuda or cuda:1.
        dtype: Of the weights; auto is bfloat16 on a GPU, float32 on a CPU.
        dry_run: Check the settings against the model's config, print them and do nothing.
    """
    from .config import PRESETS, Knockout, KnockoutConfig, parse_layers

    if model is None:
        raise ValueError("which model? Give --model, such as llava-hf/llava-onevision-qwen2-7b-ov-hf")
    if preset is not None and (knock or (layers, exit, local) != (None, None, None)):
        raise ValueError("preset stands for knock, layers, exit and local; give one or the other")
    if layers is not None and not knock:
        raise ValueError("layers are those of --knock, which was not given")
    if len(set(knock)) != len(knock):
        raise ValueError(f"a knockout is named twice in --knock {' '.join(knock)}")
    if max_new_tokens is not None and option:
        raise ValueError("max-new-tokens is of a written answer; with --option none is written")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    # Everything that can be wrong is looked at before the weights are read, and files before anything is imported.
    _check_asked(video, ask)
    from hone_core.config import to_dict
    from hone_core.devices import resolve_device, resolve_dtype
    from hone_lm.checkpoints import load_model
    from hone_lm.video import read_video
    from transformers import AutoConfig, AutoProcessor

    from .models import check_model
    from .sample import ask as answer
    from .sample import check_question

    cfg = _ask_config(
        model, video, ask, frames=frames, tokens_per_frame=tokens_per_frame, start=start, end=end, options=option
    )
    cfg = _change(cfg, max_new_tokens=max_new_tokens)
    num_layers = check_model(model)
    if preset is not None:
        config = PRESETS[preset].config
    else:
        chosen = parse_layers("all" if layers is None else layers, num_layers)
        items = [Knockout(kind=kind, layers=chosen) for kind in knock]
        if local is not None:
            items.append(Knockout(kind="VT", layers=parse_layers(local, num_layers)))
        config = KnockoutConfig(knockouts=tuple(items), exit=exit)
    check_model(model, config)
    cfg = _change(cfg, config=config, rounds=rounds)
    if dry_run:
        return {"config": to_dict(cfg)}
    clip = read_video(video, num_frames=frames, start=start, end=end)
    check_question(AutoConfig.from_pretrained(model), AutoProcessor.from_pretrained(model), cfg, clip)
    target = resolve_device(device)
    loaded, processor = load_model(model, device=target, dtype=resolve_dtype(dtype, target))
    return answer(loaded, processor, cfg, clip)


def evaluate(
    *,
    data: Path | None = None,
    format: Literal["jsonl", "videomme", "mvbench", "egoschema", "tvbench"] | None = None,
    videos: Path | None = None,
    model: str | None = None,
    setting: tuple[Literal["global1", "global2", "window", "local"], ...] | None = None,
    knock: tuple[Literal["LV", "VT", "VS", "VV", "VT-strict"], ...] | None = None,
    window: int | None = None,
    stride: int | None = None,
    step: int | None = None,
    random_control: bool = False,
    frames: int | None = None,
    tokens_per_frame: int | None = None,
    batch: int | None = None,
    limit: int | None = None,
    host: Path | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    out: Path | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Answer a set of questions under many knockouts: accuracy, intervals, flips, McNemar, per category, plots.

    Args:
        data: Question file, or the folder of MVBench or TVBench; generated clips for the tiny host unless given.
        format: Of the file (jsonl: a line {"video", "question", "options", "answer", "category"} each).
        videos: Folder of the videos; the file's own unless given. Those of Video-MME, MVBench and TVBench are found in
            its subfolders.
        model: Folder or hub address of a Video-LLM; the tiny host unless given.
        setting: global1 (LV-K after layer i), global2 (all layers), window, local (VT-K in the first layers).
        knock: Kinds of global2 and window (LV VT VS).
        window: Layers of a window (4).
        stride: Between windows: 1 slides, 4 tiles (4).
        step: Between the layers of global1 and local (2).
        random_control: Add a control of as many random pairs to global2.
        frames: Frames to sample, before a model fuses any: at 32, Qwen's decoder sees 16 (32).
        tokens_per_frame: Cut the video into frames of so many tokens, in place of the rule of the model's class.
        batch: Questions run together (1).
        limit: Ask only so many questions.
        host: A host.safetensors made by train-host.
        config: A run's config.json to start from; other flags change it.
        seed: Of option order, controls and bootstrap (0).
        device: auto, cpu, cuda or cuda:1.
        dtype: Of the model's weights; auto is bfloat16 on a GPU, float32 on a CPU (auto).
        out: Run folder; the same folder resumes.
        retry_failed: Ask the questions that failed in a finished run again. An unfinished one does so anyway.
        dry_run: Look for questions, videos and the model's config, print the settings and do nothing.
        quiet: Show no progress.
    """
    if retry_failed and out is None:
        raise ValueError("which run? --retry-failed goes with --out, the folder of the run whose questions failed")
    flags = {"data": data, "format": format, "videos": videos, "model": model, "limit": limit, "host": host}
    flags["dtype"] = dtype
    if config is None:
        # Files are looked for before anything is imported.
        _check_files(_source({}, **flags))
    from .evaluate import SweepConfig, SweepReport, configurations, read_answers, sweep

    cfg = _load(SweepConfig, config)
    source = _source(cfg.source, **flags)
    _check_files(source)
    cfg = _change(
        cfg,
        settings=setting,
        kinds=knock,
        width=window,
        stride=stride,
        step=step,
        controls=("none", "random") if random_control else None,
        frames=frames,
        tokens_per_frame=tokens_per_frame,
        batch=batch,
        seed=seed,
        source=source,
    )
    if "model" not in source:
        cfg = _change(cfg, style="text", shuffle=False if config is None else None)
    items = _questions(source, cfg.seed)
    # What does not fit the model is seen before a folder is made and the weights are read.
    configurations(cfg, _num_layers(source))
    if dry_run:
        return _plan(cfg, out) | {"questions": len(items)}
    from . import plots

    run = _start("eval", cfg, out, cfg.seed)
    if run.done and retry_failed and read_answers(run.path)[1]:
        run.reopen()
    with run:
        chart = run.figures / "sweep.png"
        if not run.done:
            loaded, processor, _ = _loaded(source, device)
            sweep(loaded, processor, items, cfg, run, quiet=quiet)
            # That of a run taken up again is of fewer answers.
            chart.unlink(missing_ok=True)
    if not chart.exists():
        plots.sweep_chart(run.results(), chart)
    report = SweepReport.of(run)
    if report.failed:
        logging.getLogger(__name__).warning(
            "%d of %d questions failed; the same command with --out %s --retry-failed asks them again",
            len(report.failed),
            report.items + len(report.failed),
            run.path,
        )
    return report


def recommend(
    *,
    run: Path | None = None,
    max_drop: float = 1.0,
    verify: bool = True,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Choose exit and frame-local layers on one half of an eval run's questions, and report them on the other.

    Args:
        run: Folder of an eval run with the settings global1 and, for the window, local.
        max_drop: Points of accuracy that each may cost on the choosing half.
        verify: Run both together on the reporting half, which loads the model.
        seed: Of the halves.
        device: auto, cpu, cuda or cuda:1.
        out: Run folder of the verification.
        dry_run: Only read the run; load nothing.
        quiet: Show no progress.
    """
    from hone_core.config import load_config

    from .evaluate import BASELINE, Configuration, SweepConfig, configurations, read_answers, sweep
    from .recommend import RecommendConfig, RecommendReport, choose, halves
    from .sample import exit_gap

    if run is None:
        raise ValueError("which run? Give --run, the folder of a finished eval run")
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is no run folder; expected one that hone-knockout eval wrote")
    cfg = load_config(SweepConfig, run / "config.json")
    # Another directory is no other run.
    run = Path(os.path.abspath(run))
    cfg = dataclasses.replace(cfg, source=_found(cfg.source, run, ("model",)))
    answers, _ = read_answers(run)
    if not answers:
        raise ValueError(f"{run} holds no answers; let the eval run finish first")
    num_layers = _layers_of(run)
    found = configurations(cfg, num_layers)
    deepstack = 0
    if "model" in cfg.source:
        from transformers import AutoConfig

        vision = getattr(AutoConfig.from_pretrained(cfg.source["model"]), "vision_config", None)
        deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    recipe = choose(answers, found, num_layers=num_layers, max_drop=max_drop, deepstack_layers=deepstack, seed=seed)
    if dry_run or not verify or not (recipe.exit is not None or recipe.window):
        return RecommendReport(recipe)
    cfg = dataclasses.replace(cfg, source=_found(cfg.source, run))
    _, second = halves(list(answers), seed=seed)
    items = [item for item in _questions(cfg.source, cfg.seed) if item.id in set(second)]
    entry = Configuration(recipe.config, "recipe", "recipe", recipe.exit or 0, num_layers - 1)
    chosen = {BASELINE: found[BASELINE], recipe.config.label: entry}
    # What is verified is the recipe: another run, budget or recipe is another command, and its folder is refused.
    plan = RecommendConfig(
        run=str(run), max_drop=max_drop, recipe=recipe.config, reported_on=len(second), sweep=cfg, seed=seed
    )
    with _start("recommend", plan, out, seed) as inner:
        if not inner.done:
            loaded, processor, _ = _loaded(cfg.source, device)
            sweep(loaded, processor, items, cfg, inner, chosen=chosen, quiet=quiet)
            # A sweep runs LV-K as the exit that it equals; here each runs as itself.
            done, _ = read_answers(inner.path)
            inputs = _inputs(loaded, processor, next(item for item in items if item.id in done), cfg)
            gap = exit_gap(loaded, inputs, recipe.config, tokens_per_frame=cfg.tokens_per_frame)
            if gap is not None:
                inner.row("exit_gap", gap, better="lower", variant=recipe.config.label)
    return RecommendReport.of(recipe, inner)


def bench(
    *,
    arch: Literal["llava-onevision-7b", "qwen2.5-vl-7b", "tiny"] | None = None,
    frames: tuple[int, ...] | None = None,
    rounds: int | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Time exit and window at real sizes with random weights, beside what the operations allow.

    Args:
        arch: Shape of the model; tiny for a CPU (llava-onevision-7b).
        frames: Frames sampled, before the architecture fuses any (8 16 32 64).
        rounds: Turns that each variant gets (3).
        config: A run's config.json to start from; other flags change it.
        seed: Of weights and inputs (0).
        device: auto, cpu, cuda or cuda:1.
        dtype: Of weights and inputs (auto).
        out: Run folder.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    from .bench import BenchConfig, BenchReport
    from .bench import bench as measure

    cfg = _change(_load(BenchConfig, config), arch=arch, frames=frames, rounds=rounds, dtype=dtype, seed=seed)
    if dry_run:
        return _plan(cfg, out)
    with _start("bench", cfg, out, cfg.seed) as run:
        return BenchReport.of(run) if run.done else measure(cfg, run, device=device, quiet=quiet)


def reproduce(
    *,
    host: tuple[Path, ...] | None = None,
    limit: int | None = None,
    max_drop: float | None = None,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Put the paper's three findings to the test on tiny hosts, by rules fixed beforehand.

    Args:
        host: Checkpoints made by train-host with different seeds; the packaged one, a single seed, unless given.
        limit: Questions per host (400).
        max_drop: Points that the recipe's exit and window may cost on the choosing half (1).
        config: A run's config.json to start from; other flags change it.
        seed: Of the questions (0).
        device: auto, cpu, cuda or cuda:1.
        out: Run folder; the same folder resumes.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    from .config import ReproduceConfig

    hosts = None if host is None else tuple(_absolute("host", str(path)) for path in host)
    cfg = _change(_load(ReproduceConfig, config), hosts=hosts, items=limit, max_drop=max_drop, seed=seed)
    if dry_run:
        return _plan(cfg, out)
    _check_hosts(cfg.hosts)
    from hone_core.devices import resolve_device

    from .reproduce import ReproduceReport
    from .reproduce import reproduce as test

    target = resolve_device(device)
    with _start("reproduce", cfg, out, cfg.seed) as run:
        return ReproduceReport.of(run) if run.done else test(cfg, run, device=target, quiet=quiet)


def plot(*, run: Path | None = None, save: Path | None = None, title: str = "") -> Any:
    """Draw a sweep's results in the paper's axes.

    Args:
        run: Folder of an eval or demo run, or its results.json.
        save: PNG or SVG to write; figures/sweep.png in the folder unless given.
        title: Above the picture.
    """
    from hone_core.runs import load_results

    if run is None:
        raise ValueError("which run? Give --run, the folder of an eval or demo run")
    folder = run if run.is_dir() else run.parent
    results = load_results(run)
    if results.get("status", "done") != "done":
        raise ValueError(f"{run} is not finished; resume it with the command that started it, then plot")
    from .plots import sweep_chart

    return str(sweep_chart(results, save or folder / "figures" / "sweep.png", title=title))


def train_host(
    *,
    size: Literal["full", "small"] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    compile: bool = False,
    config: Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Any:
    """Train the tiny host on generated clips; stops early when every kind is learned.

    Args:
        size: full (minutes on a GPU) or small (smaller clips, ten minutes on two CPU cores) (full).
        minutes: Budget of the training itself (4.5).
        steps: Number of optimiser steps, instead of a time budget.
        batch: Clips per step, six questions on each (256).
        compile: Compile the decoder's layers on a GPU.
        config: A run's config.json to start from; other flags change it.
        seed: Of weights and data (0).
        device: auto, cpu, cuda or cuda:1.
        out: Run folder; the same folder resumes.
        dry_run: Print the settings and do nothing.
        quiet: Show no progress.
    """
    import shlex
    import sys

    from .train import SIZES, TrainConfig, TrainReport
    from .train import train_host as train

    if size is not None and config is not None:
        raise ValueError("--config holds the size already; give one of --size and --config")
    cfg = _change(
        _load(TrainConfig, config) if size is None else SIZES[size],
        minutes=minutes,
        steps=steps,
        batch=batch,
        seed=seed,
    )
    cfg = _change(cfg, compile=compile or None)
    if dry_run:
        return _plan(cfg, out)
    from hone_core.devices import resolve_device

    target = resolve_device(device)
    with _start("train-host", cfg, out, cfg.seed) as run:
        if run.done:
            return TrainReport.of(run)
        return train(cfg, run, device=target, command=shlex.join([PACKAGE, *sys.argv[1:]]), quiet=quiet)


VERBS = {
    "info": info,
    "demo": demo,
    "inspect": inspect,
    "generate": generate,
    "eval": evaluate,
    "recommend": recommend,
    "bench": bench,
    "reproduce": reproduce,
    "plot": plot,
    "train-host": train_host,
}


def _load(kind: type, path: Path | None) -> Any:
    from hone_core.config import load_config

    return kind() if path is None else load_config(kind, path)


def _change(cfg: Any, **changes: Any) -> Any:
    """Replace the fields that a flag was given for."""
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


def _check_asked(video: Path | None, ask: str | None) -> None:
    """What can be said of a video and a question without importing torch."""
    if video is None or ask is None:
        raise ValueError("a model needs a video and a question; give --video and --ask")
    if not video.exists():
        raise FileNotFoundError(f"there is no video {video}")


def _check_files(source: dict[str, str]) -> None:
    """Likewise of a source's files."""
    for name, what in (("data", "question file"), ("videos", "folder of videos")):
        if name in source and not Path(source[name]).exists():
            raise FileNotFoundError(f"there is no {what} {source[name]}")
    if "host" in source:
        _check_hosts((source["host"],))


def _check_hosts(paths: tuple[str, ...]) -> None:
    """Likewise of hosts."""
    from hone_core.errors import CheckpointError

    for path in paths:
        if not Path(path).is_file():
            raise CheckpointError(
                f"there is no trained host at {path}; train one with {PACKAGE} train-host, and name its "
                "host.safetensors with --host"
            )


def _ask_config(
    model: str,
    video: Path | None,
    ask: str | None,
    *,
    frames: int,
    tokens_per_frame: int | None = None,
    start: float | None = None,
    end: float | None = None,
    options: tuple[str, ...] = (),
) -> Any:
    _check_asked(video, ask)
    from hone_lm.video import check_video

    from .sample import AskConfig

    check_video(video)
    return AskConfig(
        model=model,
        video=str(video),
        ask=ask,
        options=options,
        frames=frames,
        tokens_per_frame=tokens_per_frame,
        start=start,
        end=end,
    )


def _source(before: dict[str, str], **flags: Any) -> dict[str, str]:
    """Where model and questions come from, as strings: what flags give, and of a config's source what they leave.

    Paths are absolute, so that a run can be repeated from any directory.
    """
    given = {name: _absolute(name, str(value)) for name, value in flags.items() if value is not None}
    if "model" in given and "host" in given:
        raise ValueError("give model, a Video-LLM, or host, a tiny host; not both")
    gone: set[str] = set()
    if "host" in given:
        gone |= {"model", "data", "format", "videos", "dtype"}
    if "model" in given or "data" in given:
        gone |= {"host"}
    if "data" in given:
        # Format and folder are of the other question file.
        gone |= {"format", "videos"}
    source = {name: _absolute(name, value) for name, value in before.items() if name not in gone} | given
    if ("data" in source) != ("model" in source):
        raise ValueError("data and model belong together: give both, or neither for the tiny host's generated clips")
    lost = sorted({"format", "videos", "dtype"} & given.keys())
    if lost and "model" not in source:
        raise ValueError(f"{', '.join(lost)} belong to --model and --data; the tiny host has its own")
    if int(source.get("limit", 1)) < 1:
        raise ValueError(f"limit must be positive; got {source['limit']}")
    return {"dtype": "auto"} | source


_PATHS = ("data", "videos", "host", "model")
"""What is a path in a source; a model that is no folder here is an address on the hub."""


def _absolute(name: str, value: str) -> str:
    return os.path.abspath(value) if name in _PATHS and (name != "model" or Path(value).exists()) else value


def _found(source: dict[str, str], run: Path, names: tuple[str, ...] = _PATHS) -> dict[str, str]:
    """The source of a run, with what is named by a path looked for: where it says, else from the run's folder.

    Raises:
        FileNotFoundError: It is not there.
    """
    found = dict(source)
    for name in source.keys() & set(names):
        value = source[name]
        there = next((place for place in (Path(value), run / value) if place.exists()), None)
        if there is not None:
            found[name] = _absolute(name, str(there))
        elif name != "model" or Path(value).is_absolute():
            raise FileNotFoundError(
                f"{name} of the run {run} was expected at {value} and is not there. If it was moved, put it back, or "
                f"write its place into source.{name} of {run / 'config.json'}"
            )
    return found


def _questions(source: dict[str, str], seed: int) -> list[Any]:
    """Questions of a source, before any model is loaded.

    Raises:
        ValueError: No video of them is there.
    """
    from hone_lm.question_sets import check_items, load_items

    from .data import generated_items

    limit = int(source["limit"]) if "limit" in source else None
    if "data" not in source:
        from .host import host_config

        path = Path(source["host"]) if "host" in source else None
        return generated_items(limit or 256, host_config(path).clip, seed=2000 + seed)
    items = load_items(source["data"], format=source.get("format", "jsonl"), videos=source.get("videos"))[:limit]
    problems = check_items(items)
    for problem in problems[:5]:
        logging.getLogger(__name__).warning("%s", problem)
    if len(problems) == len(items):
        raise ValueError(f"none of the {len(items)} videos can be read: {problems[0]} (--videos names their folder)")
    return items


def _inputs(model: Any, processor: Any, item: Any, cfg: Any) -> dict[str, Any]:
    """Inputs of a question."""
    from hone_lm.choices import choice_inputs, choice_prompt, to_model
    from hone_lm.question_sets import read_clip

    prompt = choice_prompt(processor, item.question, item.options, style=cfg.style)
    return to_model(choice_inputs(processor, [prompt], [read_clip(item, num_frames=cfg.frames)]), model)


def _num_layers(source: dict[str, str]) -> int:
    """Decoder layers of a source's model, without its weights.

    Raises:
        ValueError: The model cannot be taken.
    """
    if "model" in source:
        from .models import check_model

        return check_model(source["model"])
    from .host import host_config

    return host_config(Path(source["host"]) if "host" in source else None).layers


def _loaded(source: dict[str, str], device: str) -> tuple[Any, Any, int]:
    """Model, processor, number of layers."""
    if "model" not in source:
        host = _host(Path(source["host"]) if "host" in source else None, device)
        return host.model, host.processor, host.config.layers
    from hone_core.devices import resolve_device, resolve_dtype
    from hone_lm.checkpoints import load_model

    from .models import check_model

    target = resolve_device(device)
    layers = check_model(source["model"])
    model, processor = load_model(
        source["model"], device=target, dtype=resolve_dtype(source.get("dtype", "auto"), target)
    )
    return model, processor, layers


def _layers_of(run: Path) -> int:
    """Decoder layers of the model that a run was made with, from its baseline row."""
    from hone_core.runs import load_results

    for row in load_results(run)["rows"]:
        if row.get("labels", {}).get("setting") == "baseline":
            return int(row["labels"]["last"]) + 1
    raise ValueError(f"{run} holds no finished sweep; repeat the eval command to finish it")
