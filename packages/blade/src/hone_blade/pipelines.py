"""Distil a pipeline's transformer from prompts alone: ``encode-prompts`` and ``distill-pipeline``.

Student and fake score are LoRA adapters of the one frozen transformer, which without them is the teacher. Several
processes do what one does: samples, times and noise depend on the number of a sample alone. Of Wan2.2 both transformers
are trained at once, each at the times that it draws at, and each gets a file of its own. Image-to-video needs
images too, with which the videos begin.

Differs from the release: the unguided teacher reads the empty prompt (release: a long negative prompt for Wan, a space
for CogVideoX), and the fake score's rate rises over the first steps too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.devices import resolve_device, resolve_dtype
from hone_core.environment import code_version
from hone_core.errors import CheckpointError
from hone_core.io import atomic_path, read_prompts
from hone_core.runs import Report, Run
from hone_video.caching import Cache, fill_cache, fingerprint
from hone_video.denoising import Denoiser
from hone_video.images import read_image
from hone_video.listings import Clip, read_clips
from hone_video.lora import LORA_FILE, save_lora
from hone_video.pipeline_index import PIPELINES, find_pipeline, pipeline_parts
from hone_video.pipelines import check_size, load_pipeline, pipeline_on_meta
from hone_video.training import Group, Loop, seeded
from torch import Tensor, nn

from .config import (
    PRESETS,
    TDM_PRESETS,
    BladeConfig,
    EncodeConfig,
    PipelineDistillConfig,
    Rollout,
    TDMConfig,
)
from .lora import lora_header, save_student
from .lora_files import Transformer
from .models import attach
from .objective import Objective
from .scheduler import TDMScheduler
from .trio import Experts, Trio, WholeTrio

__all__ = ["EncodeReport", "PipelineDistillation", "PipelineReport", "Plan", "distill_pipeline", "encode_prompts"]
__all__ += ["beginning_with", "clips_of", "plan_of"]

PROMPTS = "prompts"
"""Where a run's artifacts hold encoded prompts."""
SECOND_FILE = LORA_FILE.replace(".", "_2.")
"""The LoRA of the second transformer."""
TRANSFORMER = "transformer"
"""Where a run's artifacts hold a student that was trained whole."""
SHOWN = 4
"""Frames of each video on a sample sheet."""

_GIVEN: ContextVar[dict[str, Tensor] | None] = ContextVar("given", default=None)
"""What image-to-video transformers read of the image of the video at hand, ``[1, ...]``."""

_FAMILY = {
    "wan": ("wan2.1-1.3b", (81, 480, 832)),
    "cogvideox": ("cogvideox-5b", (49, 480, 720)),
}
"""Presets of attention and objective by name, and the size that was published."""


@dataclass(frozen=True, kw_only=True)
class EncodeReport(Report):
    """Encoded prompts.

    Attributes:
        prompts: The folder to pass to ``distill-pipeline --cache``.
    """

    prompts: Path

    @classmethod
    def of(cls, run: Run) -> EncodeReport:
        """Return the report of a run whose prompts are encoded."""
        return cls(path=run.path, rows=tuple(run.rows), prompts=run.artifacts / PROMPTS)

    def __str__(self) -> str:
        return f"{self.rows[0].value:.0f} prompts  {self.prompts}"


def encode_prompts(cfg: EncodeConfig, run: Run) -> EncodeReport:
    """Encode the prompts of a text file with the pipeline's own text encoder; a run that was stopped goes on.

    Args:
        cfg: Pipeline and prompts, or images.
        run: The run, entered.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``clips_of``; or the run's folder holds other prompts.
    """
    device, (clips, size) = resolve_device(run.device), clips_of(cfg)
    cache = fill_cache(
        run.artifacts / PROMPTS, clips, cfg.model, device=device, dtype=resolve_dtype(cfg.dtype, device), size=size,
        images=size is not None, processes=run.processes, local_files_only=cfg.local_files_only, quiet=run.quiet,
    )  # fmt: skip
    run.row("prompts", len(cache), better="none")
    return EncodeReport.of(run)


def clips_of(cfg: EncodeConfig) -> tuple[list[Clip], tuple[int, int, int] | None]:
    """What is to be encoded, and the size of videos that begin with images; loads no weights.

    Raises:
        CheckpointError: There is no such pipeline, it is not whole, or of a class that takes no such prompts.
        FileNotFoundError: There is no such file, or an image is missing.
        ValueError: The file holds no prompt, or is not text; an image cannot be read, or goes into the first latent
            frame; the model cannot make the size.
    """
    local: dict[str, Any] = {"local_files_only": cfg.local_files_only}
    if cfg.prompt_file is not None:
        prompts = read_prompts(cfg.prompt_file)[: cfg.limit]
        find_pipeline(cfg.model, **local)
        return [Clip(prompt) for prompt in prompts], None
    assert cfg.image_folder is not None
    clips = read_clips(cfg.image_folder)[: cfg.limit]
    name = find_pipeline(cfg.model, images=True, **local)
    if not PIPELINES[name].image:
        raise CheckpointError(f"{cfg.model} is a {name}, which takes no images; pass --prompt-file")
    for clip in clips:
        assert clip.file is not None
        read_image(clip.file)
    usual = _FAMILY[PIPELINES[name].family][1]
    asked = (cfg.frames, cfg.height, cfg.width)
    frames, height, width = (own if given is None else given for given, own in zip(asked, usual, strict=True))
    bare = pipeline_on_meta(cfg.model, name, **local)
    if bare.config.get("expand_timesteps"):
        raise ValueError(
            f"{cfg.model} has the image in the first latent frame; expected a pipeline that reads it in channels "
            "beside the latents, as Wan2.1's and Wan2.2's larger one"
        )
    check_size(bare, frames=frames, height=height, width=width)
    return clips, (frames, height, width)


@dataclass(frozen=True)
class Plan:
    """What a training will be, found before anything is loaded.

    Attributes:
        pipeline: Class name.
        attention: Of the student.
        tdm: Of the objective.
        size: Frames, height and width.
        shape: Of a video's latents, as the transformer takes them.
        boundary: Time from which on the first of two transformers draws; None for one transformer.
    """

    pipeline: str
    attention: BladeConfig
    tdm: TDMConfig
    size: tuple[int, int, int]
    shape: tuple[int, ...]
    boundary: float | None = None


def plan_of(cfg: PipelineDistillConfig) -> Plan:
    """Look at pipeline, prompts, size and settings; loads no weights.

    Raises:
        CheckpointError: There is no such pipeline, or the encoded prompts are none, not whole, another encoder's, or
            without the images that the pipeline begins with.
        FileNotFoundError: There is no prompt file.
        ValueError: It holds no prompt; the model cannot make the size; the attention leaves steps dense; two
            transformers are to be trained whole, or shared out.
    """
    if cfg.prompt_file is not None:
        read_prompts(cfg.prompt_file)
    local: dict[str, Any] = {"local_files_only": cfg.local_files_only}
    name = find_pipeline(cfg.model, images=True, **local)
    two = "transformer_2" in pipeline_parts(cfg.model, **local)
    if two and (cfg.shard or not cfg.lora_rank):
        raise ValueError(
            f"{cfg.model} has two transformers, as Wan2.2: expected a LoRA, and no shard, since at a time processes "
            f"call different ones; got lora_rank {cfg.lora_rank}, shard {cfg.shard}"
        )
    preset, usual = _FAMILY[PIPELINES[name].family]
    if cfg.cache is not None:
        header = Cache.open(cfg.cache, encoder=fingerprint(cfg.model, "text_encoder", **local)).header
        if PIPELINES[name].image:
            usual = _size_of_images(cfg, name, header)
    elif PIPELINES[name].image:
        raise ValueError(
            f"{cfg.model} is a {name}: expected prompts with images, --cache FOLDER of encode-prompts --image-folder; "
            "got a prompt_file"
        )
    attention = cfg.attention or PRESETS[cfg.preset or preset].config
    if attention.dense_steps:
        raise ValueError(
            "distillation visits the steps of a video at random, so the attention must be the same in all: expected "
            f"dense_steps 0, got {attention.dense_steps}. Take a preset that is not '-free' or '-psa'"
        )
    tdm = cfg.tdm or TDM_PRESETS[cfg.objective or preset].config
    asked = (cfg.frames, cfg.height, cfg.width)
    frames, height, width = (own if given is None else given for given, own in zip(asked, usual, strict=True))
    bare = pipeline_on_meta(cfg.model, name, **local)
    boundary = bare.config.boundary_ratio * bare.scheduler.config.num_train_timesteps if two else None
    check_size(bare, frames=frames, height=height, width=width)
    time, space = bare.vae_scale_factor_temporal, bare.vae_scale_factor_spatial
    channels, sizes = bare.transformer.config.out_channels, ((frames - 1) // time + 1, height // space, width // space)
    denoiser = Denoiser(bare)
    shape = (channels, *sizes) if denoiser.flow else (sizes[0], channels, *sizes[1:])
    denoiser.grid(torch.empty(shape, device="meta"))
    return Plan(name, attention, tdm, (frames, height, width), shape, boundary)


def _size_of_images(cfg: PipelineDistillConfig, name: str, header: dict[str, Any]) -> tuple[int, int, int]:
    """The size that images were encoded at, once it is known to be that of the training."""
    local: dict[str, Any] = {"local_files_only": cfg.local_files_only}
    if header["pipeline"] != name or header["vae"] != fingerprint(cfg.model, "vae", **local):
        raise CheckpointError(
            f"{cfg.cache} holds no images that a {name} with this VAE begins with; fill a folder with encode-prompts "
            "--image-folder"
        )
    frames, height, width = header["size"]
    for what, asked, own in (
        ("frames", cfg.frames, frames),
        ("height", cfg.height, height),
        ("width", cfg.width, width),
    ):
        if asked not in (None, own):
            raise ValueError(f"{what} must be {own}, at which {cfg.cache} was encoded; got {asked}. Leave it out")
    return frames, height, width


@dataclass(frozen=True, kw_only=True)
class PipelineReport(Report):
    """A distilled pipeline.

    Attributes:
        student: For ``generate``: a file for ``--lora``, which ``pipe.load_lora_weights`` reads too; or, if it was
            trained whole, a folder for ``--transformer``.
        second: For ``--lora-2``; None where the pipeline has one transformer.
    """

    student: Path
    second: Path | None

    @classmethod
    def of(cls, run: Run) -> PipelineReport:
        """Return the report of a run whose student is exported."""
        file, second, folder = (run.artifacts / name for name in (LORA_FILE, SECOND_FILE, TRANSFORMER))
        return cls(
            path=run.path, rows=tuple(run.rows), student=folder if folder.is_dir() else file,
            second=second if second.is_file() else None,
        )  # fmt: skip

    def __str__(self) -> str:
        values = {row.metric: row.value for row in self.rows}
        second = "" if self.second is None else f"\nsecond   {self.second}, for --lora-2"
        return (
            f"student  {self.student}, after {values['steps']:.0f} updates{second}\ngap      {values['gap']:.4g}, mean "
            f"distance of teacher and fake score over the last tenth\nresults  {self.path / 'results.json'}"
        )


def distill_pipeline(cfg: PipelineDistillConfig, run: Run) -> PipelineReport:
    """Train the student, and write it with its attention and sampling: as a LoRA, or as a transformer.

    A run that was stopped goes on from its checkpoint when it is started again with the same folder.

    Args:
        cfg: The training.
        run: The run, entered.

    Raises:
        CheckpointError, FileNotFoundError: As ``plan_of``.
        ValueError: Likewise; or the batch cannot be shared out over the processes, or accelerate was asked for FSDP.
        OSError: A checkpoint cannot be written; the one before is intact.
        RuntimeError: A loss became infinite.
    """
    plan = plan_of(cfg)
    loop = Loop(cfg.loop, run, bf16={"auto": None, "bfloat16": True, "float32": False}[cfg.dtype])
    if loop.accelerator.is_fsdp2:
        raise ValueError(
            "distill-pipeline shares the transformer out over the processes by itself: pass --shard, and launch "
            "without --use_fsdp"
        )
    dtype = resolve_dtype(cfg.dtype, loop.device)
    if cfg.cache is None:
        assert cfg.prompt_file is not None
        clips = [Clip(prompt) for prompt in read_prompts(cfg.prompt_file)]
        cache = fill_cache(
            run.path / "cache", clips, cfg.model, device=loop.device, dtype=dtype, processes=run.processes,
            local_files_only=cfg.local_files_only, quiet=run.quiet,
        )  # fmt: skip
    else:
        cache = Cache.open(cfg.cache)
    away = ("text_encoder", "tokenizer", "image_encoder", "image_processor", *(() if cfg.sample_every else ("vae",)))
    pipe = load_pipeline(
        cfg.model, plan.pipeline, device=torch.device("cpu"), dtype=dtype, local_files_only=cfg.local_files_only,
        leave_out=away,
    )  # fmt: skip
    made = PipelineDistillation(cfg, plan, pipe, cache, loop)
    loop.resume()
    loop.follow(made.update, show=("loss", "fake_loss", "gap"))
    if cfg.sample_every:
        made.draw_samples()
    weights = loop.weights("student")
    if run.processes.main:
        rollout = Rollout(steps=plan.tdm.student_steps, eta=plan.tdm.eta)
        header = lora_header(plan.attention, rollout)
        header["hone_blade_made"] = f"{run.command or 'hone-blade distill-pipeline'}, commit {code_version()[0]}"
        if plan.boundary is not None:
            parts: tuple[tuple[Transformer, str], ...] = (("transformer", LORA_FILE), ("transformer_2", SECOND_FILE))
            for part, name in parts:
                own = {
                    key.removeprefix(f"{part}."): value.to(dtype)
                    for key, value in weights.items()
                    if key.startswith(f"{part}.")
                }
                stated = header | lora_header(None, None, part)
                save_lora(own, run.artifacts / name, header=stated, adapter_name="student")
        elif cfg.lora_rank:
            tensors = {name: value.to(dtype) for name, value in weights.items()}
            save_lora(tensors, run.artifacts / LORA_FILE, header=header, adapter_name="student")
        else:
            tensors = {name.removeprefix("student."): value for name, value in weights.items()}
            save_student(pipe.transformer, tensors, run.artifacts / TRANSFORMER, header)
        run.row_of_end("gap")
        run.row("steps", loop.step, better="none")
    return PipelineReport.of(run)


def _shard(model: nn.Module, loop: Loop) -> None:
    """Share a transformer's parameters out over the processes, block by block (FSDP2)."""
    if loop.accelerator.num_processes == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(loop.device.type, (loop.accelerator.num_processes,))
    # Adapters are float32 beside weights of 16 bits; the forward casts them itself.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    model.to(loop.device)
    for block in next(getattr(model, name) for name in ("blocks", "transformer_blocks") if hasattr(model, name)):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def beginning_with(given: dict[str, Tensor]) -> Iterator[None]:
    """Calls inside read an image; of a text-to-video pipeline, with nothing given, they do not."""
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


class PipelineDistillation:
    """A student and its fake score in training.

    Args:
        cfg: The training.
        plan: Of ``cfg``.
        pipe: Holds the transformer, on the CPU.
        cache: The prompts.
        loop: Prepared here.
    """

    def __init__(self, cfg: PipelineDistillConfig, plan: Plan, pipe: Any, cache: Cache, loop: Loop) -> None:
        self.cfg, self.plan, self.pipe, self.cache, self.loop = cfg, plan, pipe, cache, loop
        denoiser, model = Denoiser(pipe), pipe.transformer

        def call(network: nn.Module, state: Tensor, time: Tensor, text: Tensor) -> Tensor:
            given = {name: value.expand(len(state), *value.shape[1:]) for name, value in (_GIVEN.get() or {}).items()}
            return denoiser(network, state, time, text, **given)

        sparse = plan.tdm.fake_attention == "sparse"
        self.trio: Trio
        if cfg.lora_rank:
            handle = attach(model if plan.boundary is None else (model, pipe.transformer_2), plan.attention)
            if plan.boundary is not None:
                model = Experts(model, pipe.transformer_2, plan.boundary)
            self.trio = Trio(model, call, handle, rank=cfg.lora_rank, seed=cfg.loop.seed, fake_sparse=sparse)
        else:
            self.trio = whole = WholeTrio(model, call, plan.attention, fake_sparse=sparse)
            model.to(loop.device).train()
            model = whole.pair
        process = TDMScheduler.from_config(pipe.scheduler.config, eta=plan.tdm.eta)
        self.objective = Objective(self.trio, process, plan.tdm)
        model.train()
        if cfg.shard:
            for part in (model,) if cfg.lora_rank else (pipe.transformer, model.student, model.fake):
                _shard(part, loop)
        options: dict[str, Any] = {"weight_decay": cfg.loop.weight_decay, "betas": (0.0, cfg.beta2), "eps": 1e-8}
        groups = {
            "student": Group(
                lr=cfg.loop.lr, select=lambda name: ".student." in f".{name}", ema=cfg.loop.ema, **options
            ),
            "fake": Group(lr=cfg.fake_lr, select=lambda name: ".fake." in f".{name}", **options),
        }
        loop.prepare(model, groups, wrap=False)
        self.null = cache.null()[None].to(loop.device)

    def item(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Text of a prompt and what there is to read of its image, ``[1, ...]`` each."""
        found = {name: value[None].to(self.loop.device) for name, value in self.cache.item(index).items()}
        return found.pop("text"), {name: found[name] for name in ("condition", "image") if name in found}

    def update(self) -> dict[str, float]:
        """One update of the fake score and one of the student."""
        cfg, loop, objective = self.cfg, self.loop, self.objective
        if cfg.sample_every and loop.step and loop.step % cfg.sample_every == 0:
            self.draw_samples()
        fake_loss = loss = gap = 0.0
        parts = []
        for part in loop.parts():
            (index,), (generator,) = part.items(len(self.cache)), part.generators("objective")
            text, image = self.item(index)
            noise = part.randn(self.plan.shape, "noise").to(loop.device)
            with loop.accelerator.autocast(), beginning_with(image):
                states = objective.states(text, noise, generator)
                drawn = objective.draw(len(text), generator, loop.device)
                found = objective.fake_loss(text, states, drawn, generator)
            fake_loss += loop.backward(found.mean(), part)
            parts.append((part, text, image, generator, states))
        seen = {"fake_loss": fake_loss}
        limit = self.plan.tdm.skip_above
        if limit is not None and loop.mean(seen)["fake_loss"] > limit:
            for parameter in loop.groups["fake"].parameters.values():
                parameter.grad = None
        else:
            seen["fake_gradient_norm"] = loop.apply("fake")
        for part, text, image, generator, states in parts:
            with loop.accelerator.autocast(), beginning_with(image):
                drawn = objective.draw(len(text), generator, loop.device)
                found, distance = objective.student_loss(text, self.null, states, drawn, generator)
            loss += loop.backward(found.mean(), part)
            gap += float(distance.mean()) * part.share
        loop.groups["student"].lr = cfg.loop.lr * 0.5 * (1 + math.cos(math.pi * loop.step / cfg.loop.steps))
        seen |= {"loss": loss, "gap": gap, "lr": loop.groups["student"].lr}
        return seen | {"gradient_norm": loop.apply("student")}

    @torch.no_grad()
    def draw_samples(self) -> Path | None:
        """Draw the first prompts with the student as it is: a row each, frames across. Returns the PNG.

        The first process does it, with the others' shares of a sharded model; else they go on.
        """
        loop, main = self.loop, self.loop.accelerator.is_main_process
        if not main and not self.cfg.shard:
            return None
        rows = []
        for index in range(min(self.cfg.samples, len(self.cache))):
            (text, image), generator = self.item(index), seeded(self.cfg.loop.seed, "sample", index)
            noise = torch.randn(1, *self.plan.shape, generator=generator).to(loop.device)
            with loop.accelerator.autocast(), beginning_with(image):
                latents = self.objective.samples(text, noise, generator)
            if not main:
                continue
            frames = self._decode(latents)  # [F, H, W, 3]
            shown = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)
            rows.append(np.concatenate([frames[i] for i in shown], axis=1))
        if not main:
            return None
        import imageio.v3 as imageio

        path = loop.run.figures / f"samples-{loop.step:06d}.png"
        with atomic_path(path) as partial:
            imageio.imwrite(partial, np.concatenate(rows), extension=".png")
        return path

    def _decode(self, latents: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        vae = self.pipe.vae.to(self.loop.device)
        config, latents = vae.config, latents.to(next(vae.parameters()).dtype)
        if PIPELINES[self.plan.pipeline].family == "wan":
            mean, std = (
                torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        else:
            latents = latents.transpose(1, 2) / config.scaling_factor
        video = vae.decode(latents, return_dict=False)[0][0].float()  # [3, F, H, W]
        self.pipe.vae.to("cpu")
        pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(1, 2, 3, 0).cpu().numpy()
