"""Videos from prompts with a real pipeline: each becomes one MP4, and the same command goes on where it stopped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch
from hone_video.grids import Grid
from hone_video.pipelines import PIPELINES, check_size, find_pipeline, load_pipeline
from hone_video.videos import save_video, video_name

from .config import PRESETS, FPSAttentionConfig, GenerateConfig, VideoConfig
from .models import attach
from .schedule import Schedule, step_regimes
from .windows import covers, density

__all__ = ["GenerateReport", "check_windows", "default_preset", "draw", "generate", "open_pipeline", "video_grid"]


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """What a run made.

    Attributes:
        videos: The files, in the order of the prompts.
    """

    videos: tuple[Path, ...]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a run whose videos are made."""
        return cls(path=run.path, rows=tuple(run.rows), videos=tuple(sorted(run.artifacts.glob("*.mp4"))))

    def __str__(self) -> str:
        seconds = [row.value for row in self.rows if row.metric == "seconds"]
        read = [f"{row.value:.1%} of the tiles are read" for row in self.rows if row.metric == "density"][:1]
        return "\n".join([*map(str, self.videos), *read, f"{sum(seconds) / len(seconds):.4g} s a video"])


def default_preset(pipeline: str) -> str:
    """The preset of a pipeline's kind."""
    return {"wan": "wan2.1-1.3b", "cogvideox": "cogvideox-5b"}[PIPELINES[pipeline].family]


def open_pipeline(cfg: VideoConfig, device: torch.device) -> Any:
    """Load a pipeline, with its own scheduler.

    Raises:
        CheckpointError: It is not there, not whole, or of an unsupported class.
        ValueError: The model cannot make the size that is asked for.
    """
    assert cfg.model is not None
    name = find_pipeline(cfg.model, local_files_only=cfg.local_files_only)
    dtype = resolve_dtype(cfg.dtype, device)
    pipe = load_pipeline(
        cfg.model, name, device=device, dtype=dtype, offload=cfg.offload, local_files_only=cfg.local_files_only
    )
    check_size(pipe, height=cfg.height, width=cfg.width, frames=cfg.frames)
    return pipe


def video_grid(pipe: Any, cfg: VideoConfig) -> Grid:
    """Video tokens along (frames, height, width) of what the pipeline will make."""
    config = pipe.transformer.config
    own = inspect.signature(type(pipe).__call__).parameters
    frames = cfg.frames or own["num_frames"].default or config.sample_frames
    height = cfg.height or own["height"].default or config.sample_height * pipe.vae_scale_factor_spatial
    width = cfg.width or own["width"].default or config.sample_width * pipe.vae_scale_factor_spatial
    patch = config.patch_size
    _, high, wide = (1, patch, patch) if isinstance(patch, int) else patch
    space = pipe.vae_scale_factor_spatial
    return (frames - 1) // pipe.vae_scale_factor_temporal + 1, height // space // high, width // space // wide


def check_windows(config: FPSAttentionConfig, grid: Grid) -> None:
    """Refuse windows that leave nothing out, which would be slower than dense attention and nothing else.

    Raises:
        ValueError: Every regime with a window reads every tile of this grid.
    """
    windows = [regime.window for regime in config.regimes if regime.window is not None]
    if windows and all(covers(grid, config.tile, window, config.border) for window in windows):
        raise ValueError(
            f"the windows {windows} are larger than the grid of {grid} tokens in tiles of {config.tile}: they read "
            "every tile. Make a larger video, or take smaller windows, or smaller tiles"
        )


def draw(
    pipe: Any,
    cfg: VideoConfig,
    index: int,
    *,
    output_type: Literal["np", "latent"] = "np",
    step_done: Callable[[], object] = lambda: None,
) -> Any:
    """Frames ``[F, H, W, 3]`` in [0, 1] for a prompt, or latents as the pipeline has them.

    Args:
        pipe: The pipeline.
        cfg: Prompts, steps and sizes.
        index: Which prompt; the noise is of ``seed + index``.
        output_type: ``"latent"`` spares the VAE.
        step_done: Called after each denoising step.
    """

    def after(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        step_done()
        return values

    sizes = {"height": cfg.height, "width": cfg.width, "num_frames": cfg.frames}
    frames = pipe(
        prompt=cfg.prompts[index],
        negative_prompt=cfg.negative_prompt,
        num_inference_steps=cfg.steps,
        guidance_scale=cfg.guidance,
        generator=torch.Generator().manual_seed(cfg.seed + index),
        output_type=output_type,
        callback_on_step_end=after,
        **{name: value for name, value in sizes.items() if value is not None},
    ).frames
    return frames if output_type == "latent" else frames[0]


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Make one video per prompt, into the run's ``artifacts``; those that are there already are kept.

    Args:
        cfg: What to generate.
        run: The run, entered.

    Raises:
        CheckpointError: The pipeline is not there, not whole, or of an unsupported class.
        ValueError: The schedule is of another model or sampler, the windows leave nothing out, or the model cannot make
            this size; before the sampling starts.
        RuntimeError: The model produced values that are not finite.
    """
    video, device = cfg.video, resolve_device(run.device)
    targets = [run.artifacts / video_name(i, prompt) for i, prompt in enumerate(video.prompts)]
    todo = [i for i, target in enumerate(targets) if not target.is_file()]
    if not todo:
        return GenerateReport.of(run)
    pipe = open_pipeline(video, device)
    grid = video_grid(pipe, video)
    settings: FPSAttentionConfig | Schedule | None = None
    if not cfg.dense:
        name = cfg.preset or default_preset(type(pipe).__name__)
        settings = Schedule.load(cfg.schedule) if cfg.schedule else cfg.attention or PRESETS[name].config
    config = settings.config if isinstance(settings, Schedule) else settings
    labels: dict[str, str | int | float] = {"steps": video.steps, "grid": "x".join(map(str, grid))}
    if config is not None:
        check_windows(config, grid)
        shares = [density(grid, config.tile, regime.window, border=config.border).tiles for regime in config.regimes]
        regimes = step_regimes(config, video.steps)
        run.row("density", sum(shares[i] for i in regimes) / len(regimes), better="lower", labels=labels)
    variant = "dense" if config is None else "fpsattention"
    progress = progress_bar(len(todo) * video.steps, desc="steps", quiet=run.quiet)
    with nullcontext() if settings is None else attach(pipe, settings), progress as bar:
        for i in todo:
            with Stopwatch(device) as watch:
                frames = draw(pipe, video, i, step_done=bar.update)
            fps = cfg.fps or PIPELINES[type(pipe).__name__].fps
            advice = f"try dtype float32 or bfloat16 (this run: {video.dtype})"
            save_video(frames, targets[i], fps=fps, what=f"prompt {i}", advice=advice)
            of: dict[str, str | int | float] = {"prompt": i, "seed": video.seed + i, **labels}
            run.row("seconds", watch.seconds, unit="s", better="lower", variant=variant, labels=of)
            if watch.peak_bytes is not None:
                peak = watch.peak_bytes / 2**30
                run.row("peak_memory", peak, unit="GiB", better="lower", variant=variant, labels=of)
    return GenerateReport.of(run)
