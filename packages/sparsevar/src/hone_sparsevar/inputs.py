"""What a command needs, looked for before a weight is read, and before a dry run prints.

Files are looked for before torch and diffusers are imported, which takes ten seconds.
"""

from __future__ import annotations

from pathlib import Path

from hone_core.errors import CheckpointError
from hone_core.hosts import StoredHost, open_host
from hone_core.io import read_prompts

from .config import (
    VARIANTS,
    BenchConfig,
    CalibrateConfig,
    DemoConfig,
    EvalConfig,
    GenerateConfig,
    HostConfig,
    InspectConfig,
    ReproduceConfig,
    SparseVARConfig,
)

__all__ = ["bench", "calibrate", "evaluate", "generate", "host", "reproduce"]


def _look(path: Path | None, settings: SparseVARConfig) -> StoredHost[HostConfig]:
    """A host's sidecar, which settings are held against."""
    stored = open_host(HostConfig, "hone-sparsevar", path)
    from .host import SCHEDULE
    from .models import fit

    fit(settings, stored.config.depth, SCHEDULE)
    return stored


def _look_for_pipeline(model: Path) -> None:
    if not (model / "model_index.json").is_file():
        raise CheckpointError(
            f"{model} holds no saved pipeline; make it with from_published and save_pretrained of InfinityPipeline or "
            "VARPipeline"
        )


def host(cfg: DemoConfig | InspectConfig) -> DemoConfig | InspectConfig:
    """Of ``demo`` and ``inspect``.

    Raises:
        CheckpointError: There is no host.
        ValueError: It has no such block, or its schedule no such scale.
    """
    _look(cfg.host, cfg.settings)
    return cfg


def generate(cfg: GenerateConfig) -> GenerateConfig:
    """Of ``generate``.

    Raises:
        CheckpointError: There is no such pipeline.
        ValueError: Prompts, classes, size, settings or the variant do not fit it.
    """
    _look_for_pipeline(cfg.model)
    from .sample import prepare

    return prepare(cfg)


def evaluate(cfg: EvalConfig) -> EvalConfig:
    """Of ``eval``: a host, or a benchmark's prompts, pipeline and scorer.

    Raises:
        CheckpointError, ValueError: One is not there, or they do not fit together.
    """
    if cfg.protocol == "scenes":
        _look(cfg.host, cfg.settings)
        from .models import variant_of

        for name in cfg.variants:
            variant_of(name, cfg.settings)
    else:
        own = cfg.benchmark
        assert own.model is not None
        assert own.prompts is not None
        _look_for_pipeline(own.model)
        if not own.prompts.exists():
            raise CheckpointError(f"{own.prompts} holds no prompts of {cfg.protocol}: there is no such place")
        if own.grade and own.weights is not None and not own.weights.is_dir():
            raise CheckpointError(f"there is no folder of GenEval's Mask2Former at {own.weights}")
        from .benchmarks import check_benchmark

        check_benchmark(cfg)
    return cfg


def calibrate(cfg: CalibrateConfig) -> CalibrateConfig:
    """Of ``calibrate``.

    Raises:
        CheckpointError, ValueError: As above.
        FileNotFoundError: There are no prompts.
    """
    settings = SparseVARConfig(start_scale=cfg.start)
    if cfg.model is None:
        _look(cfg.host, settings)
    else:
        assert cfg.prompt_file is not None
        _look_for_pipeline(cfg.model)
        prompts = read_prompts(cfg.prompt_file)[: cfg.limit]
        from hone_visual_ar.schedules import infinity_schedule

        from .sample import check_inputs

        check_inputs(cfg.model, prompts, cfg.image, settings)
        schedule = infinity_schedule(cfg.image.pixels, cfg.image.aspect)
        schedule.resolve(cfg.start)
    return cfg


def reproduce(cfg: ReproduceConfig) -> ReproduceConfig:
    """Of ``reproduce``.

    Raises:
        CheckpointError, ValueError: Of each host, as above; or one missed its gates, so that what it does says nothing.
    """
    for path in cfg.hosts or (None,):
        stored = _look(path, cfg.settings)
        if stored.facts is None or not stored.facts.passed:
            raise ValueError(f"{stored.path} missed its gates; train it longer")
    from .models import variant_of

    for name in VARIANTS:
        variant_of(name, cfg.settings)
    return cfg


def bench(cfg: BenchConfig) -> BenchConfig:
    """Of ``bench``: is there such a model, schedule, scale and block, and a scale before each stop.

    Raises:
        ValueError: There is not, or a prompt is longer than the model reads.
    """
    from hone_visual_ar.infinity import INFINITY_SIZES
    from hone_visual_ar.schedules import infinity_schedule

    from .models import TINY, TINY_SCHEDULE, fit

    sizes = {"tiny": TINY, **INFINITY_SIZES}
    if cfg.model not in sizes:
        raise ValueError(f"model must be tiny or one of {', '.join(INFINITY_SIZES)}; got {cfg.model!r}")
    schedule = TINY_SCHEDULE if cfg.model == "tiny" else infinity_schedule(cfg.pixels, cfg.aspect)
    fit(cfg.settings, sizes[cfg.model]["depth"], schedule)
    longest = sizes[cfg.model].get("text_maxlen", 512)
    if cfg.words > longest:
        raise ValueError(f"{cfg.model} reads at most {longest} words of a prompt; got text_tokens {cfg.words}")
    if not all(1 <= count < len(schedule) for count in cfg.stops):
        raise ValueError(f"stops leave out 1 to {len(schedule) - 1} of the {len(schedule)} scales; got {cfg.stops}")
    return cfg
