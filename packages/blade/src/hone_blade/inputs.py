"""What a verb needs, looked for before its run folder is made and before torch is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hone_core.errors import CheckpointError
from hone_core.hosts import open_host
from hone_core.io import read_prompts
from hone_video.host_config import PACKAGE, PACKAGED, HostConfig
from hone_video.images import read_image
from hone_video.listings import read_cache, read_clips
from hone_video.pipeline_index import PIPELINES, find_pipeline, pipeline_parts

from .config import (
    PRESETS,
    BladeConfig,
    Comparison,
    DemoConfig,
    DistillConfig,
    EncodeConfig,
    EvalConfig,
    GenerateConfig,
    InspectConfig,
    PipelineDistillConfig,
    ReproduceConfig,
    Rollout,
    TrainHostConfig,
)
from .lora_files import Transformer, check_part, find_lora, read_config, read_header, read_rollout, read_student

__all__ = ["Inputs", "attention_of", "check_inspected", "find_demo", "find_distilled", "find_encoded"]
__all__ += ["find_evaluated", "find_host", "find_init", "find_inputs", "find_inspected", "find_reproduced"]
__all__ += ["find_student", "find_video_inputs", "sparse_steps", "stated_attention"]

Hosted = TypeVar("Hosted", DemoConfig, DistillConfig, EvalConfig, InspectConfig, ReproduceConfig)


def find_host(cfg: Hosted) -> Hosted:
    """The settings with their tiny host by its absolute path.

    Raises:
        CheckpointError: It is not there, or is none of this package.
    """
    return cfg if cfg.host is None else replace(cfg, host=_checkpoint(cfg.host))


Shown = TypeVar("Shown", DemoConfig, ReproduceConfig)


def find_student(cfg: Shown) -> Shown:
    """Likewise, and with its student.

    Raises:
        CheckpointError: One of them is not there.
    """
    cfg = find_host(cfg)
    if cfg.lora is None:
        return cfg
    if not cfg.lora.is_file():
        raise CheckpointError(f"{cfg.lora} does not exist; expected a lora.safetensors made by hone-blade distill")
    return replace(cfg, lora=Path(os.path.abspath(cfg.lora)))


def find_demo(cfg: DemoConfig) -> DemoConfig:
    """Likewise, once the comparison is known to fit the host.

    Raises:
        CheckpointError: As ``find_student``.
        ValueError: No step is sparse, or ASA_G cannot keep to its density.
    """
    cfg = find_student(cfg)
    _check_comparison(cfg.comparison, _host(cfg.host))
    return cfg


def find_reproduced(cfg: ReproduceConfig) -> ReproduceConfig:
    """Likewise of every comparison of the claim.

    Raises:
        CheckpointError, ValueError: As ``find_demo``.
    """
    cfg = find_student(cfg)
    host = _host(cfg.host)
    if cfg.claim == "masks":
        for setting in cfg.settings.values():
            _check_comparison(setting, host)
    else:
        cfg.students.comparison.configs(host.tokens)
    return cfg


def find_init(cfg: TrainHostConfig) -> TrainHostConfig:
    """The settings with the host that training starts from by its absolute path.

    Raises:
        CheckpointError: It is not there, is none of this package, or is of another architecture.
    """
    if cfg.start is None:
        return cfg
    start, earlier = _checkpoint(cfg.start), _host(cfg.start)
    if _architecture(earlier) != _architecture(cfg.host):
        raise CheckpointError(f"{start} has another architecture: {earlier}; this run trains {cfg.host}")
    return replace(cfg, start=start)


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """The settings, once the host, or pipeline and prompts, are known to be there.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``find_host`` and ``find_video_inputs``; or the videos cannot
            be graded here.
    """
    if cfg.protocol == "clips":
        cfg = find_host(cfg)
        _check_comparison(cfg.comparison, _host(cfg.host))
        return cfg
    from hone_video.vbench import find_suite

    find_video_inputs(cfg.videos(find_suite(cfg.vbench, limit=cfg.prompts).expanded))
    info = cfg.vbench.vbench_info
    info = None if info is None else Path(os.path.abspath(info))
    return replace(cfg, vbench=replace(cfg.vbench, vbench_info=info))


def find_video_inputs(cfg: GenerateConfig) -> GenerateConfig:
    """The settings with their prompts read, once everything that they name is known to be there.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``find_inputs``.
    """
    return find_inputs(cfg).config


def find_inspected(cfg: InspectConfig) -> InspectConfig:
    """The settings, once host or pipeline is known to be there.

    Raises:
        CheckpointError, ValueError: As ``find_host``, ``check_inspected`` and ``find_video_inputs``.
    """
    if cfg.model is None:
        cfg = find_host(cfg)
        check_inspected(cfg, _host(cfg.host))
        return cfg
    find_video_inputs(cfg.pipeline)
    return cfg


def find_encoded(cfg: EncodeConfig) -> EncodeConfig:
    """The settings, once pipeline and prompts are known to be there.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``hone_blade.pipelines.clips_of``.
    """
    # What needs no look at the model comes before torch is imported.
    if cfg.prompt_file is not None:
        read_prompts(cfg.prompt_file)
    if cfg.image_folder is not None:
        read_clips(cfg.image_folder)
    find_pipeline(cfg.model, images=cfg.image_folder is not None, local_files_only=cfg.local_files_only)
    from .pipelines import clips_of

    clips_of(cfg)
    prompt_file, images = (None if x is None else Path(os.path.abspath(x)) for x in (cfg.prompt_file, cfg.image_folder))
    return replace(cfg, prompt_file=prompt_file, image_folder=images)


def find_distilled(cfg: PipelineDistillConfig) -> PipelineDistillConfig:
    """The settings, once everything that they name is known to be there and to fit together.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: As ``hone_blade.pipelines.plan_of``.
    """
    if cfg.prompt_file is not None:
        read_prompts(cfg.prompt_file)
    if cfg.cache is not None:
        read_cache(cfg.cache)
    find_pipeline(cfg.model, images=True, local_files_only=cfg.local_files_only)
    from .pipelines import plan_of

    plan_of(cfg)
    prompt_file, cache = (None if x is None else Path(os.path.abspath(x)) for x in (cfg.prompt_file, cfg.cache))
    return replace(cfg, prompt_file=prompt_file, cache=cache)


def check_inspected(cfg: InspectConfig, host: HostConfig) -> None:
    """Refuse to inspect steps of the tiny host of which none is sparse.

    Raises:
        ValueError: None is.
    """
    preset = cfg.preset or "tiny"
    steps, dense = cfg.steps or host.steps, PRESETS[preset].config.dense_steps
    if dense >= steps:
        raise ValueError(
            f"steps must be above the {dense} first steps that preset {preset} leaves dense, or there is nothing to "
            f"inspect; got {steps}. Take more steps, or another preset"
        )


def _check_comparison(comparison: Comparison, host: HostConfig) -> None:
    """Refuse what ``hone_blade.evaluate.compare`` would refuse once the host is loaded."""
    comparison.check_steps(host.steps if comparison.steps is None else comparison.steps)
    comparison.configs(host.tokens)


def _host(path: Path | None) -> HostConfig:
    return open_host(HostConfig, PACKAGE, PACKAGED if path is None else path).config


def _architecture(host: HostConfig) -> tuple[int, ...]:
    """What the shapes of the transformer's weights follow from."""
    return host.patch, host.layers, host.heads * host.head_dim, host.ffn_dim, host.text_dim, host.freq_dim


def _checkpoint(path: Path) -> Path:
    open_host(HostConfig, PACKAGE, path)
    return Path(os.path.abspath(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was found before anything is loaded.

    Attributes:
        config: The settings with the prompts themselves in place of their file, and only so many as asked for: what a
            run should keep, so that an edited prompt file is another run. Each prompt has its image, if there are any.
        pipeline: Class name of the pipeline.
        lora: The LoRA file, or None.
        lora_2: Likewise of the second transformer.
    """

    config: GenerateConfig
    pipeline: str
    lora: str | None
    lora_2: str | None = None


_DEFAULT_PRESET = {"wan": "wan2.1-1.3b", "cogvideox": "cogvideox-5b"}
"""By family of the pipeline."""


def find_inputs(cfg: GenerateConfig) -> Inputs:
    """Look for everything that the run needs, and load nothing.

    Raises:
        CheckpointError: The pipeline or LoRA weights are not there, not whole, or of an unsupported class.
        FileNotFoundError: There is no prompt file, or no such image.
        ValueError: The prompt file holds no prompt; scheduler, preset or images are not for this pipeline; an image is
            missing or cannot be read; the attention settings leave every step dense; the model cannot make the size.
    """
    # What needs no look at the weights or the hub comes first.
    prompts = cfg.read_prompts()
    if (cfg.preset is not None or cfg.attention is not None) and cfg.steps is not None:
        sparse_steps(cfg, *attention_of(cfg, None, None))
    name = find_pipeline(cfg.model, images=True, local_files_only=cfg.local_files_only)
    images = _find_images(cfg, name, len(prompts))
    schedulers, family = ("tdm", *PIPELINES[name].schedulers), PIPELINES[name].family
    if cfg.scheduler not in ("auto", *schedulers):
        raise ValueError(f"scheduler must be one of {', '.join(schedulers)} for a {name}; got {cfg.scheduler!r}")
    families = {kind.family for kind in PIPELINES.values()}
    own = {other for other in families if cfg.preset is not None and cfg.preset.startswith(other)}
    if own and family not in own:
        fitting = [preset for preset in PRESETS if not preset.startswith(tuple(families - {family}))]
        raise ValueError(f"preset must be one of {', '.join(fitting)} for a {name}; got {cfg.preset!r}")
    two = (cfg.lora is not None or cfg.lora_2 is not None) and "transformer_2" in pipeline_parts(
        cfg.model, local_files_only=cfg.local_files_only
    )
    if cfg.lora_2 is not None and not two:
        raise ValueError(f"lora_2 is for a second transformer, as Wan2.2 has; {cfg.model} has one. Pass lora")
    lora, lora_2 = (
        None if file is None else find_lora(file, local_files_only=cfg.local_files_only)
        for file in (cfg.lora, cfg.lora_2)
    )
    parts: tuple[tuple[Path | None, Transformer], ...] = ((lora, "transformer"), (lora_2, "transformer_2"))
    for file, part in parts:
        if two and file is not None:
            check_part(file, part)
    stated, rollout = stated_attention(lora, lora_2), _stated_rollout(lora, lora_2)
    if cfg.transformer is not None:
        stated, rollout = read_student(cfg.transformer)
    if cfg.scheduler == "auto":
        published = family == "wan" and cfg.eta is stated is None and not lora is lora_2 is None
        chosen: dict[str, Any] = {"scheduler": "unipc", "flow_shift": 3.0} if published else {"scheduler": "tdm"}
        cfg = replace(cfg, **chosen)
    if cfg.steps is None:
        cfg = replace(cfg, steps=(rollout or Rollout()).steps)
    if cfg.scheduler == "tdm" and cfg.eta is None and rollout is not None:
        cfg = replace(cfg, eta=rollout.eta)
    sparse_steps(cfg, *attention_of(cfg, family, stated))
    sizes = {"height": cfg.height, "width": cfg.width, "frames": cfg.frames}
    if lora is not None or lora_2 is not None or any(value is not None for value in sizes.values()):
        # These need the model's config, by its class: torch and diffusers are imported now.
        from hone_video.pipelines import check_size, pipeline_on_meta

        from .lora import check_lora

        bare = pipeline_on_meta(cfg.model, name, local_files_only=cfg.local_files_only)
        for file, part in parts:
            if file is not None:
                check_lora(file, getattr(bare, part))
        check_size(bare, **sizes)
    return Inputs(
        config=replace(cfg, prompts=prompts[: cfg.limit], images=images[: cfg.limit], prompt_file=None, limit=None),
        pipeline=name,
        lora=None if lora is None else str(lora),
        lora_2=None if lora_2 is None else str(lora_2),
    )


def _find_images(cfg: GenerateConfig, pipeline: str, prompts: int) -> tuple[str, ...]:
    """An image of each prompt, each of them readable; none for a pipeline that takes none."""
    if not PIPELINES[pipeline].image:
        if cfg.images:
            raise ValueError(f"images are for an image-to-video pipeline; {cfg.model} is a {pipeline}. Leave them out")
        return ()
    if len(cfg.images) not in (1, prompts):
        raise ValueError(
            f"the videos of a {pipeline} begin with an image: expected one for all prompts or one for each of the "
            f"{prompts} (--image FILE); got {len(cfg.images) or 'none'}"
        )
    for file in dict.fromkeys(cfg.images):
        read_image(file)
    found = tuple(os.path.abspath(file) for file in cfg.images)
    return found * prompts if len(found) == 1 else found


def stated_attention(*loras: str | Path | None) -> BladeConfig | None:
    """The attention settings in the headers of LoRA files; their weights are not read."""
    files = [Path(lora) for lora in loras if lora is not None]
    found = [read_config(file, read_header(file)[2]) for file in files]
    if len(set(found)) > 1:
        raise ValueError("lora and lora_2 must state the same attention settings; theirs differ")
    return found[0] if found else None


def _stated_rollout(*loras: str | Path | None) -> Rollout | None:
    """The sampling in the headers of LoRA files."""
    files = [Path(lora) for lora in loras if lora is not None]
    found = {read_rollout(file, read_header(file)[2]) for file in files}
    if len(found) > 1:
        raise ValueError("lora and lora_2 must state the same sampling; theirs differ. Pass steps and eta")
    return next(iter(found), None)


def sparse_steps(cfg: GenerateConfig, name: str, settings: BladeConfig | None) -> int:
    """Steps with sparse attention; raises if there are none though the settings are for sparse attention."""
    if settings is None:
        return 0
    assert cfg.steps is not None
    if settings.dense_steps >= cfg.steps or settings.mask == "dense":
        what = "the attention settings" if name == "custom" else f"preset {name}"
        if settings.mask == "dense":
            raise ValueError(f"{what} must be sparse; got mask 'dense'. Pass dense to leave attention as it is")
        raise ValueError(
            f"steps must be above the {settings.dense_steps} first steps that {what} leave{'s' * (name != 'custom')} "
            f"dense, or none is sparse; got {cfg.steps}. Take more steps, or another preset, or dense"
        )
    return cfg.steps - settings.dense_steps


def attention_of(cfg: GenerateConfig, family: str | None, stated: BladeConfig | None) -> tuple[str, BladeConfig | None]:
    """Name and settings of the attention; ``stated`` is what a LoRA file says, ``family`` gives the default."""
    if cfg.dense:
        return "dense", None
    if cfg.attention is not None:
        return "custom", cfg.attention
    if cfg.preset is None and stated is not None:
        return "custom", stated
    if (name := cfg.preset) is None:
        assert family is not None
        name = _DEFAULT_PRESET[family]
    return name, PRESETS[name].config
