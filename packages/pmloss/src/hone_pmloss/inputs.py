"""What a verb needs, looked for before its run folder is made.

Files are looked for before torch is imported, and everything else that can be wrong before weights are read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hone_core.errors import CheckpointError
from hone_core.hosts import HostFacts, open_host, packaged_host
from hone_splat.places import check_files, find_cloud, find_colmap, find_transforms

from .config import EvalConfig, HostConfig, ReproduceConfig, TrainConfig, TrainHostConfig

__all__ = ["find_evaluated", "find_hosts", "find_start", "find_trained"]

PACKAGE = "hone-pmloss"
TRAINED_ALIKE = ("seed", "start", "graded", "graded_targets", "log_every", "checkpoint_seconds")
"""Settings in which hosts that are put beside each other may differ."""


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """Read the head of the splat, and what it is measured against.

    Raises:
        ValueError: The splat is no 3DGS file, the truth holds impossible cameras, or no Gaussian is opaque enough.
        FileNotFoundError: A file is missing.
        CheckpointError: The truth is no such file.
    """
    _find_truth(cfg)
    find_cloud(cfg.ply)
    from hone_splat.formats import read_cloud

    from .truths import find_truth

    find_truth(cfg)
    splat = read_cloud(cfg.ply)
    if not splat.finite():
        raise ValueError(f"{cfg.ply} holds values that are not finite")
    if not len(splat.pruned(opacity=cfg.opacity)):
        raise ValueError(
            f"{cfg.ply}: none of {len(splat)} Gaussians has an opacity of {cfg.opacity:g}; lower --opacity"
        )
    return cfg


def find_trained(cfg: TrainConfig) -> TrainConfig:
    """Look for chunks and weights.

    Raises:
        FileNotFoundError: There are no chunks.
        CheckpointError: Weights to begin with, of VGG-16 or of a teacher are missing.
    """
    reads = cfg.pm.weight and cfg.teacher != "depth"
    check_files(cfg, *([Path(cfg.points)] if reads else []))
    return cfg


def find_start(cfg: TrainHostConfig) -> TrainHostConfig:
    """Look whether the run to begin with is there, and of the same settings.

    Raises:
        CheckpointError: It is not.
    """
    if cfg.start is None:
        return cfg
    start = cfg.start.resolve()
    if not start.is_file():
        raise CheckpointError(f"start: there is no file {start}; expected a run's artifacts/checkpoint.pt")
    cfg = replace(cfg, start=start)
    from .train import begun

    begun(cfg)
    return cfg


def find_hosts(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look whether every host is there, of its kind, has passed its gates, and can be put beside the others.

    Raises:
        CheckpointError: One is missing.
        ValueError: One has not passed: what it does says nothing. Or its offsets are not what its flag says, two are of
            one seed, or it was trained in another way.
    """
    hosts, free, sweep = (tuple(path.resolve() for path in paths) for paths in (cfg.hosts, cfg.free, cfg.sweep))
    cfg = replace(cfg, hosts=hosts, free=free, sweep=sweep)
    for path in (*(hosts or (packaged_host(PACKAGE),)), *free, *sweep):
        stored = open_host(HostConfig, PACKAGE, path)
        if stored.facts is None or not stored.facts.passed:
            raise ValueError(f"{path} misses its gates ({stored.facts and stored.facts.result}); train it longer")
        offset = "unconstrained" if path in free else "bounded"
        if path not in sweep and stored.config.offset != offset:
            raise ValueError(
                f"{path} has {stored.config.offset} offsets; expected {offset} ones, see --hosts and --free"
            )
    first = None
    for path in _seeds(hosts, "hosts"):
        first = first or path
        _alike(path, first)
    for (path, seed), bounded in zip(_seeds(free, "free").items(), hosts or (packaged_host(PACKAGE),), strict=False):
        _alike(path, bounded)
        if seed != (expected := _facts(bounded).seed):
            raise ValueError(f"free: {path} is of seed {seed}; expected {expected}, that of {bounded}")
    return cfg


def _find_truth(cfg: EvalConfig) -> None:
    if cfg.truth is not None:
        if not cfg.truth.is_file():
            raise CheckpointError(f"there is no file {cfg.truth}")
    elif cfg.cloud is not None:
        if not cfg.cloud.is_file():
            raise FileNotFoundError(f"there is no file {cfg.cloud}; expected a .ply of points")
        for path, names in ((cfg.observed, ("ObsMask", "BB", "Res")), (cfg.plane, ("P",))):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"there is no file {path}; expected a .mat of DTU with {', '.join(names)}")
    elif cfg.colmap is not None:
        find_colmap(cfg.colmap, cfg.images)
    elif cfg.transforms is not None:
        find_transforms(cfg.transforms)
    if cfg.depths is not None and not cfg.depths.is_dir():
        raise FileNotFoundError(f"there is no folder {cfg.depths}; expected one of the pictures' depths")


def _facts(path: Path) -> HostFacts:
    facts = open_host(HostConfig, PACKAGE, path).facts
    assert facts is not None
    return facts


def _seeds(paths: tuple[Path, ...], name: str) -> dict[Path, int]:
    seeds = {path: _facts(path).seed for path in paths}
    if len(set(seeds.values())) < len(seeds):
        raise ValueError(f"{name}: expected hosts of different seeds; got {list(seeds.values())}")
    return seeds


def _alike(path: Path, other: Path) -> None:
    """Raise unless two hosts were trained in the same way, but for seed and offsets."""

    def settings(path: Path) -> dict[str, Any]:
        found = dict(_facts(path).train_config)
        found["host"] = {key: value for key, value in found.get("host", {}).items() if key != "offset"}
        return {key: value for key, value in found.items() if key not in TRAINED_ALIKE}

    one, two = settings(path), settings(other)
    if differ := sorted(key for key in {*one, *two} if one.get(key) != two.get(key)):
        raise ValueError(f"{path} and {other} were trained with another {', '.join(differ)}: see --sweep")
