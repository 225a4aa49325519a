"""What a verb needs, looked for before its run folder is made.

Files are looked for before torch is imported, and everything else that can be wrong before weights are read.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from hone_lm.addresses import find_checkpoint

from .config import (
    CalibrateConfig,
    EvalConfig,
    GenerateConfig,
    ModelsConfig,
    ProfileConfig,
    ReproduceConfig,
    ServeConfig,
    TrainRouterConfig,
)
from .data import SETS, check_answers, grade, read_problems
from .latency import read_latency
from .pairs import PACKAGE, open_pair, pairs_of

__all__ = [
    "find_asked",
    "find_calibrated",
    "find_evaluated",
    "find_pairs",
    "find_profiled",
    "find_served",
    "find_trained",
]


def find_asked(cfg: GenerateConfig) -> GenerateConfig:
    """Look whether the models can write one text, and read the question.

    Raises:
        ValueError: They cannot, cannot read the question, or the router is for another small model.
        OSError: There is no such checkpoint, or no such router.
    """
    _find_models(cfg.models)
    _find_router(cfg.router)
    from .host import check_pair

    check_pair(cfg.models, cfg.router, ask=cfg.ask)
    return cfg


def find_served(cfg: ServeConfig) -> ServeConfig:
    """Look whether the models can write one text, and whether there is what a server needs.

    Raises:
        ValueError: They cannot, or the router is for another small model.
        OSError: There is no such checkpoint, or no such router.
        MissingExtraError: The server's extra is not installed.
    """
    _find_models(cfg.models)
    _find_router(cfg.router)
    import_module("hone_rstitch.serve")  # whether its extra is there
    from .host import check_pair

    check_pair(cfg.models, cfg.router)
    return cfg


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """Look for the data, and make its path absolute: a run names it.

    Raises:
        ValueError: It holds no problems, or a tiny pair would be asked what it cannot read.
        FileNotFoundError: It is not there.
        MissingExtraError: The grader's extra is not installed.
        OSError: There is no such checkpoint.
    """
    if cfg.format == "math":
        grade("1", "1", "math")  # whether its extra is there
    cfg = replace(cfg, data=_data(cfg.data, tiny=cfg.models.small is None, format=cfg.format))
    _check_models(cfg.models)
    return cfg


def find_calibrated(cfg: CalibrateConfig) -> CalibrateConfig:
    """Look for the data, and make its path absolute.

    Raises:
        ValueError: It holds no problems, or a tiny pair would be asked what it cannot read.
        FileNotFoundError: It is not there.
        OSError: There is no such checkpoint.
    """
    cfg = replace(cfg, data=_data(cfg.data, tiny=cfg.models.small is None))
    _check_models(cfg.models)
    return cfg


def find_profiled(cfg: ProfileConfig) -> ProfileConfig:
    """Look whether the models can write one text.

    Raises:
        ValueError: They are not of one family.
        OSError: There is no such checkpoint.
    """
    _check_models(cfg.models)
    return cfg


def find_trained(cfg: TrainRouterConfig) -> TrainRouterConfig:
    """Look for the data and the latencies, and make their paths absolute.

    Raises:
        ValueError: They hold nothing of use, or a tiny pair would be asked what it cannot read.
        FileNotFoundError: A file is not there.
        OSError: There is no such checkpoint.
    """
    if cfg.latency is not None:
        read_latency(cfg.latency)
        cfg = replace(cfg, latency=cfg.latency.resolve())
    if cfg.format == "math":
        grade("1", "1", "math")
    tiny = cfg.models.small is None
    data, held_out = (_data(x, tiny=tiny, format=cfg.format) for x in (cfg.data, cfg.held_out_data))
    cfg = replace(cfg, data=data, held_out_data=held_out)
    _check_models(cfg.models)
    return cfg


def find_pairs(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look whether every pair is there and has passed its gates.

    Raises:
        CheckpointError: One is missing.
        ValueError: One has not: what it does says nothing. Or a router is of another pair.
        FileNotFoundError: There is no such router.
    """
    cfg = replace(
        cfg,
        hosts=tuple(file.resolve() for file in cfg.hosts),
        routers=tuple(file.resolve() for file in cfg.routers),
    )
    widths = []
    for name, path in pairs_of(cfg):
        stored = open_pair(path=path) if path else open_pair(int(name.split()[-1]))
        facts = stored.facts
        if facts is None or not facts.passed:
            raise ValueError(f"{name} misses its gates ({facts and facts.result}); train it longer")
        widths.append(stored.config.small.width)
    for router in cfg.routers:
        _find_router(router)
    if cfg.routers:
        from .router import load_router

        for router, width in zip(cfg.routers, widths, strict=True):
            load_router(router, hidden=width)
    return cfg


def _data(data: str | None, *, tiny: bool, format: Literal["number", "math"] | None = None) -> str | None:
    """What names a set of problems, read once; a file's path is absolute then. ``format`` is of the grader, if any.

    Raises:
        ValueError: It holds no problems, or answers that cannot be graded so, or is missing or given where it must not
            be.
        FileNotFoundError: There is no such file.
        ConnectionError: It is on the hub, which cannot be reached.
    """
    if tiny != (data is None):
        raise ValueError(
            "the packaged pair only multiplies: leave data out, or give small and large"
            if tiny
            else f"which problems? Give data: JSON lines with question and answer, or {', '.join(SETS)}"
        )
    if data is None:
        return None
    problems = read_problems(data)
    if format is not None:
        check_answers(problems, format)
    return data if data in SETS or data.startswith("hf:") else str(Path(data).resolve())


def _find_models(cfg: ModelsConfig) -> None:
    for name, path in (("--small", cfg.small), ("--large", cfg.large)):
        if path is not None:
            find_checkpoint(path, name)


def _check_models(cfg: ModelsConfig) -> None:
    _find_models(cfg)
    from .models import check_models

    check_models(cfg)


def _find_router(path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"there is no router {path}; make one with {PACKAGE} train-router")
