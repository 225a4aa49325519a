"""Videos from prompts, with a real Wan or CogVideoX pipeline.

What a run needs (weights, LoRA, prompts) is looked for before anything is loaded. Each prompt becomes one MP4, written
whole or not at all, so the same command with the same run folder goes on where it stopped.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hone_core.devices import resolve_device, resolve_dtype, use_device
from hone_core.io import atomic_write_json
from hone_core.progress import Progress, progress_bar
from hone_core.runs import Report, Run
from hone_core.timing import Stopwatch
from hone_video.finite import check_latents, check_weights
from hone_video.images import cover, read_image
from hone_video.pipeline_index import PIPELINES
from hone_video.pipelines import check_size, load_pipeline, load_transformer, make_scheduler
from hone_video.videos import make_videos, missing_videos, video_name

from .config import GenerateConfig
from .inputs import Inputs, attention_of, find_inputs, sparse_steps, stated_attention
from .lora import load_blade_lora
from .lora_files import Transformer, read_student
from .models import BladeHandle, attach
from .scheduler import TDMScheduler

__all__ = ["GenerateReport", "Sampler", "generate", "render"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateReport(Report):
    """What a run made.

    Attributes:
        videos: The files, in the order of the prompts.
        attention: Preset name, ``custom`` or ``dense``.
        sparse_steps: Denoising steps of a video whose attention is sparse.
        scheduler: The sampler, as in the settings.
        seconds: Mean time of a video from prompt to frames; None if nothing is known.
        notices: Lines to show, such as licences of weights.
    """

    videos: tuple[Path, ...]
    attention: str
    sparse_steps: int
    scheduler: str
    seconds: float | None
    notices: tuple[str, ...]

    @classmethod
    def of(cls, run: Run) -> GenerateReport:
        """Return the report of a run whose videos are made."""
        facts = json.loads((run.artifacts / "sampler.json").read_text(encoding="utf-8"))
        seconds = [row.value for row in run.rows if row.metric == "seconds"]
        return cls(
            path=run.path,
            rows=tuple(run.rows),
            videos=tuple(sorted(run.artifacts.glob("*.mp4"))),
            attention=facts["attention"],
            sparse_steps=facts["sparse_steps"],
            scheduler=facts["scheduler"],
            seconds=sum(seconds) / len(seconds) if seconds else None,
            notices=tuple(facts["notices"]),
        )

    def __str__(self) -> str:
        steps = f"{self.sparse_steps} sparse steps" if self.sparse_steps else "dense"
        lines = [str(video) for video in self.videos]
        lines.append(f"attention {self.attention} ({steps}), scheduler {self.scheduler}")
        if self.seconds is not None:
            lines.append(f"{self.seconds:.4g} s a video")
        return "\n".join([*lines, *self.notices])


def generate(cfg: GenerateConfig, run: Run) -> GenerateReport:
    """Make one video per prompt, into the run's ``artifacts``.

    Videos that are there already are kept. Rows of the run: ``seconds`` from prompt to frames, and on a GPU
    ``peak_memory``, per video.

    Args:
        cfg: What to generate.
        run: The run, entered.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``find_inputs``, before anything is loaded; a ValueError also
            for a size that the model cannot make.
        RuntimeError: The model produced values that are not finite.
    """
    inputs = find_inputs(cfg)
    cfg = inputs.config
    targets = [run.artifacts / video_name(i, prompt) for i, prompt in enumerate(cfg.prompts)]
    render(inputs, run, targets)
    return GenerateReport.of(run)


def render(inputs: Inputs, run: Run, targets: Sequence[Path]) -> None:
    """Make the videos of the prompts that are not there yet; with several processes, together.

    Raises: As ``generate``.
    """
    cfg, device = inputs.config, resolve_device(run.device)
    todo = missing_videos(targets)
    assert cfg.steps is not None  # found by find_inputs
    use_device(device)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(len(todo) * cfg.steps, desc="steps", quiet=run.quiet))
        sampler = Sampler.load(inputs, device) if todo else None
        if sampler is not None:
            _note(sampler, run)
            stack.enter_context(sampler.attached())

        def make(index: int) -> tuple[Any, list[dict[str, Any]]]:
            assert sampler is not None
            return _make(sampler, index, bar)

        fps = cfg.fps or PIPELINES[inputs.pipeline].fps
        make_videos(run, targets, make, fps=fps, what="prompt {}", advice=_advice(cfg))


def _advice(cfg: GenerateConfig) -> str:
    return f"try dtype float32 or bfloat16 (this run: {cfg.dtype})"


def _note(sampler: Sampler, run: Run) -> None:
    """What the report says of the sampler."""
    facts = {"attention": sampler.attention_name, "sparse_steps": sampler.sparse_steps}
    facts |= {"scheduler": sampler.config.scheduler, "notices": list(sampler.notices)}
    if run.processes.main:
        atomic_write_json(run.artifacts / "sampler.json", facts)


class Sampler:
    """A loaded pipeline with its scheduler and LoRA, ready to draw the prompts of a config.

    Attributes:
        config: The settings.
        pipe: The diffusers pipeline.
        device: Where it runs.
        attention_name: Preset name, ``custom`` or ``dense``.
        attention: The settings behind it; None for dense.
        sparse_steps: Denoising steps of a video whose attention is sparse.
        notices: Lines to show, such as licences of weights.
        fps: Frames per second of its videos.
    """

    def __init__(self, inputs: Inputs, pipe: Any, device: torch.device) -> None:
        kind = PIPELINES[inputs.pipeline]
        self.config, self.pipe, self.device = inputs.config, pipe, device
        self.fps = inputs.config.fps or kind.fps
        self.notices: tuple[str, ...] = ()
        parts: tuple[tuple[Transformer, str | None], ...]
        parts = ("transformer", inputs.lora), ("transformer_2", inputs.lora_2)
        for part, file in parts:
            if file is not None:
                report = load_blade_lora(pipe, file, transformer=part)
                self.notices = tuple(dict.fromkeys([*self.notices, report.licence]))
        check_weights(pipe)
        stated = stated_attention(inputs.lora, inputs.lora_2)
        if self.config.transformer is not None:
            stated = read_student(self.config.transformer)[0]
        if self.notices and stated is None and (self.config.scheduler, self.config.flow_shift) == ("unipc", 3.0):
            self.notices += (
                "Sampled with UniPC, flow shift 3, as the authors of the published Wan weights do, since the file "
                "states no settings; --scheduler tdm is the rollout of the paper.",
            )
        self.attention_name, self.attention = attention_of(inputs.config, kind.family, stated)
        self.sparse_steps = sparse_steps(inputs.config, self.attention_name, self.attention)

    @classmethod
    def load(cls, inputs: Inputs, device: str | torch.device = "auto") -> Sampler:
        """Load what ``find_inputs`` found.

        Raises:
            CheckpointError: The weights cannot be read, or a LoRA does not fit them.
            ValueError: The model cannot make the size that is asked for.
        """
        cfg, device = inputs.config, resolve_device(device)
        dtype, ready = resolve_dtype(cfg.dtype, device), {}
        if cfg.transformer is not None:
            ready["transformer"] = load_transformer(cfg.transformer, inputs.pipeline, dtype=dtype)
        pipe = load_pipeline(
            cfg.model,
            inputs.pipeline,
            device=device,
            dtype=dtype,
            offload=cfg.offload,
            local_files_only=cfg.local_files_only,
            ready=ready,
        )
        check_size(pipe, height=cfg.height, width=cfg.width, frames=cfg.frames)
        if cfg.scheduler != "tdm":
            pipe.scheduler = make_scheduler(cfg.scheduler, pipe, flow_shift=cfg.flow_shift)
        elif cfg.eta is not None:
            pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, eta=cfg.eta)
        elif not isinstance(pipe.scheduler, TDMScheduler):
            pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config)
        if inputs.lora is inputs.lora_2 is cfg.transformer is None and cfg.scheduler == "tdm":
            log.warning(
                "no LoRA: a model that was not distilled makes poor videos in %d steps of the TDM rollout; pass a "
                "LoRA, or scheduler 'default' with about 50 steps and guidance",
                cfg.steps,
            )
        return cls(inputs, pipe, device)

    @contextmanager
    def attached(self) -> Iterator[BladeHandle | None]:
        """Run with the settings' attention inside the block; gives the handle, None for dense."""
        if self.attention is None:
            yield None
            return
        with attach(self.pipe, self.attention) as handle:
            yield handle

    def draw(
        self, index: int, *, output_type: Literal["np", "latent"] = "np", step_done: Callable[[], None] | None = None
    ) -> Any:
        """Frames ``[F, H, W, 3]`` in [0, 1] for a prompt, or latents as the pipeline has them.

        Args:
            index: Which prompt; the noise is of ``seed + index``.
            output_type: ``"latent"`` spares the VAE.
            step_done: Called after each denoising step.
        """
        cfg = self.config
        generator = torch.Generator().manual_seed(cfg.seed + index)
        if isinstance(self.pipe.scheduler, TDMScheduler):
            self.pipe.scheduler.generator = generator

        def after(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            check_latents(values["latents"], step, what=f"prompt {index}", advice=_advice(cfg))
            if step_done is not None:
                step_done()
            return values

        sizes: dict[str, Any] = {"height": cfg.height, "width": cfg.width, "num_frames": cfg.frames}
        if cfg.images:
            sizes["image"] = cover(read_image(cfg.images[index]), *self._size())
        frames = self.pipe(
            prompt=cfg.prompts[index],
            negative_prompt=cfg.negative_prompt,
            num_inference_steps=cfg.steps,
            guidance_scale=cfg.guidance,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=after,
            **{name: value for name, value in sizes.items() if value is not None},
        ).frames
        return frames if output_type == "latent" else frames[0]

    def _size(self) -> tuple[int, int]:
        """Height and width of the videos, the pipeline's own where none is asked for."""
        if PIPELINES[type(self.pipe).__name__].family == "cogvideox":
            config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
            own = config.sample_height * scale, config.sample_width * scale
        else:
            known = inspect.signature(type(self.pipe).__call__).parameters
            own = known["height"].default, known["width"].default
        return self.config.height or own[0], self.config.width or own[1]


def _make(sampler: Sampler, index: int, bar: Progress) -> tuple[Any, list[dict[str, Any]]]:
    """Frames of one video, and rows on how they were made."""
    cfg = sampler.config
    with Stopwatch(sampler.device) as watch:
        frames = sampler.draw(index, step_done=bar.update)
    labels = {"prompt": index, "seed": cfg.seed + index, "frames": len(frames), "steps": cfg.steps}
    labels |= {"sparse_steps": sampler.sparse_steps, "height": frames.shape[1], "width": frames.shape[2]}
    of = {"better": "lower", "variant": "dense" if cfg.dense else "blade", "labels": labels}
    rows: list[dict[str, Any]] = [{"metric": "seconds", "value": watch.seconds, "unit": "s", **of}]
    if watch.peak_bytes is not None:
        rows.append({"metric": "peak_memory", "value": watch.peak_bytes / 2**30, "unit": "GiB", **of})
    return frames, rows
