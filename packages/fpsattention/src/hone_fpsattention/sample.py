"""Videos from prompts with a real pipeline: each becomes one MP4, and the same command goes on where it stopped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hone_core.devices import resolve_device, resolve_dtype, use_device
from hone_core.progress import progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch
from hone_video.finite import check_latents, check_weights
from hone_video.grids import Grid
from hone_video.pipeline_index import PIPELINES, find_pipeline
from hone_video.pipelines import check_size, load_pipeline, pipeline_on_meta, with_flow_shift
from hone_video.videos import make_videos, missing_videos, video_name

from .config import FPSAttentionConfig, GenerateConfig, VideoConfig
from .linears import check_linears, round_linears
from .models import attach, preset_for, scheduler_shift
from .schedule import Schedule, step_regimes
from .tuned import Tuned, load_tuned, need_peft, put_lora, read_tuned
from .windows import covers, density

__all__ = [
    "GenerateReport",
    "check_video",
    "check_windows",
    "choose_attention",
    "default_preset",
    "draw",
    "generate",
    "open_pipeline",
    "outline",
    "render",
    "set_shift",
    "video_grid",
]


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


def open_pipeline(cfg: VideoConfig, device: torch.device, tuned: Tuned | None = None) -> Any:
    """Load a pipeline, with its own scheduler and, where given, trained weights.

    Raises:
        CheckpointError: It is not there, not whole, or of an unsupported class.
        ValueError: The model cannot make the size that is asked for, or its sampler has no timestep shift to set.
    """
    assert cfg.model is not None
    name = find_pipeline(cfg.model, local_files_only=cfg.local_files_only)
    dtype = resolve_dtype(cfg.dtype, device)
    ready = {} if tuned is None else load_tuned(tuned, name, dtype=dtype)
    pipe = load_pipeline(
        cfg.model, name, device=device, dtype=dtype, offload=cfg.offload, local_files_only=cfg.local_files_only,
        ready=ready,
    )  # fmt: skip
    _set_up(pipe, cfg)
    if tuned is not None:
        put_lora(pipe, tuned)
    return pipe


def _set_up(pipe: Any, cfg: VideoConfig) -> None:
    """The sampler's shift, and a look at the size."""
    set_shift(pipe, cfg.flow_shift)
    check_size(pipe, height=cfg.height, width=cfg.width, frames=cfg.frames)


def set_shift(pipe: Any, shift: float | None) -> None:
    """Give the pipeline its sampler at another timestep shift; None keeps it.

    Raises:
        ValueError: Its sampler has none to set.
    """
    if shift is None:
        return
    if PIPELINES[type(pipe).__name__].family != "wan":
        raise ValueError(f"flow_shift is of Wan's samplers; {type(pipe).__name__} has none. Leave it out")
    pipe.scheduler = with_flow_shift(pipe.scheduler, shift)


def outline(cfg: VideoConfig) -> Any:
    """What ``open_pipeline`` will return, without weights and text encoder.

    Raises: As ``open_pipeline``.
    """
    assert cfg.model is not None
    name = find_pipeline(cfg.model, local_files_only=cfg.local_files_only)
    pipe = pipeline_on_meta(cfg.model, name, local_files_only=cfg.local_files_only)
    _set_up(pipe, cfg)
    return pipe


def check_video(cfg: GenerateConfig) -> None:
    """Refuse what would be refused once the weights are loaded, by the configs alone.

    Raises:
        CheckpointError: The pipeline is not there, not whole, or of an unsupported class.
        MissingExtraError: A LoRA is given, and peft is not installed.
        ValueError: As ``generate``.
    """
    tuned = None if cfg.tuned is None else read_tuned(cfg.tuned)
    if tuned is not None and tuned.lora is not None:
        need_peft("A LoRA")
    pipe = outline(cfg.video)
    settings = choose_attention(cfg, pipe, tuned)
    if settings is not None:
        check_windows(settings.config if isinstance(settings, Schedule) else settings, video_grid(pipe, cfg.video))
        attach(pipe, settings).detach()


def choose_attention(cfg: GenerateConfig, pipe: Any, tuned: Tuned | None) -> FPSAttentionConfig | Schedule | None:
    """What is to be attached; None is the model's own attention."""
    if cfg.dense:
        return None
    settings = Schedule.load(cfg.schedule) if cfg.schedule else cfg.attention
    if settings is None and cfg.preset is None and tuned is not None:
        return tuned.schedule
    preset = cfg.preset or default_preset(type(pipe).__name__)
    return settings or preset_for(preset, scheduler_shift(pipe.scheduler))


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
        check_latents(values["latents"], step, what=f"prompt {index}", advice=_advice(cfg))
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
    video = cfg.video
    targets = [run.artifacts / video_name(i, prompt) for i, prompt in enumerate(video.prompts)]
    render(cfg, run, targets)
    return GenerateReport.of(run)


def render(cfg: GenerateConfig, run: Run, targets: Sequence[Path]) -> None:
    """Make the videos of the prompts that are not there yet; with several processes, together.

    Args and Raises: As for ``generate``.
    """
    video, device = cfg.video, resolve_device(run.device)
    if cfg.e4m3_linears:
        check_linears(device)
    todo = missing_videos(targets)
    use_device(device)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(len(todo) * video.steps, desc="steps", quiet=run.quiet))
        sampler = Sampler(cfg, device, stack, run) if todo else None

        def make(index: int) -> tuple[Any, list[dict[str, Any]]]:
            assert sampler is not None
            return sampler.make(index, bar.update)

        kind = PIPELINES[find_pipeline(str(video.model), local_files_only=video.local_files_only)]
        make_videos(run, targets, make, fps=cfg.fps or kind.fps, what="prompt {}", advice=_advice(video))


def _advice(cfg: VideoConfig) -> str:
    return f"try dtype float32 or bfloat16 (this run: {cfg.dtype})"


class Sampler:
    """A pipeline with its trained weights and its attention.

    Args:
        cfg: What to generate, and how.
        device: Where.
        stack: Closes what is attached.
        run: Gets the density.

    Raises: As ``generate``.
    """

    def __init__(self, cfg: GenerateConfig, device: torch.device, stack: ExitStack, run: Run) -> None:
        self.cfg, self.device = cfg, device
        video = cfg.video
        tuned = None if cfg.tuned is None else read_tuned(cfg.tuned)
        self.pipe = open_pipeline(video, device, tuned)
        check_weights(self.pipe)
        grid = video_grid(self.pipe, video)
        settings = choose_attention(cfg, self.pipe, tuned)
        config = settings.config if isinstance(settings, Schedule) else settings
        self.labels: dict[str, str | int | float] = {"steps": video.steps, "grid": "x".join(map(str, grid))}
        if config is not None:
            check_windows(config, grid)
            shares = [density(grid, config.tile, r.window, border=config.border).tiles for r in config.regimes]
            regimes = step_regimes(config, video.steps)
            run.row("density", sum(shares[i] for i in regimes) / len(regimes), better="lower", labels=self.labels)
        self.variant = "dense" if config is None else "fpsattention"
        if cfg.e4m3_linears:
            for part in ("transformer", "transformer_2"):
                if getattr(self.pipe, part, None) is not None:
                    round_linears(getattr(self.pipe, part))
            self.variant += ", linear layers in E4M3"
        if settings is not None:
            stack.enter_context(attach(self.pipe, settings))

    def make(self, index: int, step_done: Callable[[], object]) -> tuple[Any, list[dict[str, Any]]]:
        """Frames of a prompt, and rows on how they were made."""
        with Stopwatch(self.device) as watch:
            frames = draw(self.pipe, self.cfg.video, index, step_done=step_done)
        labels = {"prompt": index, "seed": self.cfg.video.seed + index, **self.labels}
        of = {"better": "lower", "variant": self.variant, "labels": labels}
        rows: list[dict[str, Any]] = [{"metric": "seconds", "value": watch.seconds, "unit": "s", **of}]
        if watch.peak_bytes is not None:
            rows.append({"metric": "peak_memory", "value": watch.peak_bytes / 2**30, "unit": "GiB", **of})
        return frames, rows
