"""What a verb needs, looked for before its run folder is made.

Files are looked for before torch is imported, and everything else that can be wrong before weights are read.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TypeVar

from hone_core.errors import CheckpointError
from hone_core.hosts import open_host, packaged_host
from hone_splat.places import (
    check_files,
    find_cloud,
    find_colmap,
    find_transforms,
    read_chunk_index,
    read_evaluation_index,
)
from hone_splat.ranges import HOSTS

from .config import (
    ConvertConfig,
    DemoConfig,
    DoctorConfig,
    EvalConfig,
    HostConfig,
    RenderConfig,
    ReproduceConfig,
    TrainConfig,
    ViewConfig,
)
from .places import PACKAGE, find_capture, find_weights

__all__ = ["find_converted", "find_evaluated", "find_host", "find_hosts", "find_photographs"]
__all__ += ["find_trained", "find_viewed"]

Photographed = TypeVar("Photographed", DoctorConfig, RenderConfig)

log = logging.getLogger(__name__)


def find_host(cfg: DemoConfig) -> DemoConfig:
    """Look for the host.

    Raises:
        CheckpointError: There is none.
    """
    open_host(HostConfig, PACKAGE, cfg.host)
    return cfg


def find_hosts(cfg: ReproduceConfig) -> ReproduceConfig:
    """Look whether every host is there and has passed its gates.

    Raises:
        CheckpointError: One is missing.
        ValueError: One has not, so that what it does says nothing; or no number of views is above its anchors.
    """
    cfg = replace(cfg, hosts=tuple(path.resolve() for path in cfg.hosts))
    for path in cfg.hosts or (packaged_host(PACKAGE),):
        stored = open_host(HostConfig, PACKAGE, path)
        if stored.facts is None or not stored.facts.passed:
            found = "it was never graded" if stored.facts is None else stored.facts.result
            raise ValueError(f"{path} misses its gates ({found}); train it longer")
        anchors = stored.config.zpressor.anchors
        if max(cfg.views) <= anchors:
            raise ValueError(f"{path} keeps {anchors} views: expected a number of views above that; got {cfg.views}")
    return cfg


def find_photographs(cfg: Photographed) -> Photographed:
    """Read the cameras before anything is made.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A host cannot use the photographs.
        CheckpointError: The weights are missing.
    """
    find_capture(cfg)
    if isinstance(cfg, RenderConfig):
        find_weights(cfg)
    from .photographs import read_capture, warn_of_guess

    _, scene = read_capture(cfg)
    if isinstance(cfg, RenderConfig):
        warn_of_guess(scene)
    return cfg


def find_viewed(cfg: ViewConfig) -> ViewConfig:
    """Look for the splat, or for photographs and weights.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There is nothing to show, or a host cannot use the photographs.
        CheckpointError: The weights are missing.
    """
    captured = cfg.colmap is not None or cfg.transforms is not None
    if cfg.splat is not None:
        find_cloud(cfg.splat)
    if cfg.splat is None or captured:
        find_capture(cfg)
    if cfg.splat is None:
        find_weights(cfg)
    from hone_splat.formats import read_cloud

    from .photographs import read_capture, warn_of_guess

    if cfg.splat is not None:
        read_cloud(cfg.splat)
    if cfg.splat is None or captured:
        _, scene = read_capture(cfg)
        if cfg.splat is None:
            warn_of_guess(scene)
    return cfg


def find_converted(cfg: ConvertConfig) -> ConvertConfig:
    """Read the cameras of every scene before anything is written, and say whose scale is guessed.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There is none, two scenes have one name, one has too few views or pictures of more than 8 bits, or a
            host cannot use it.
    """
    if not cfg.captures:
        raise ValueError("name folders of COLMAP models or transforms.json files: --captures PATH ...")
    for path in cfg.captures:
        if path.suffix == ".json":
            find_transforms(path)
        else:
            find_colmap(path)
    from hone_splat.captures import check_pictures, fit_range

    from .conversion import evaluation_views, read_captures

    names, limits = [], HOSTS[cfg.model]
    for name, capture in read_captures(cfg):
        try:
            evaluation_views(capture.cam_to_world, cfg.context, cfg.targets, cfg.frames)
            guessed = fit_range(capture, limits.near, limits.far).guessed
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        check_pictures(capture)
        names.append(name)
        if guessed:
            log.warning(
                "%s has no sparse points: its scale is guessed from where the cameras look. A COLMAP model with points "
                "would fix it",
                name,
            )
    if len({*names}) < len(names):
        raise ValueError(f"two scenes have one name; scenes are called by their folders: {', '.join(names)}")
    return cfg


def find_evaluated(cfg: EvalConfig) -> EvalConfig:
    """Look for chunks, index and weights.

    Raises:
        FileNotFoundError: Chunks or index are missing.
        ValueError: A file is no index, or no scene is in both.
        CheckpointError: Weights are missing.
    """
    if cfg.chunks is not None and cfg.index is not None:
        read_chunk_index(cfg.chunks)
        read_evaluation_index(cfg.index)
        find_weights(cfg)
        if cfg.vgg is not None and not cfg.vgg.is_file():
            raise CheckpointError(f"there are no weights of VGG-16 at {cfg.vgg}")
    from .evaluate import open_chunks

    chunks, _ = open_chunks(cfg)
    assert cfg.index is not None, "it was opened"
    asked = read_evaluation_index(cfg.index)
    if absent := [key for key in asked if key not in chunks.index]:
        log.warning(
            "%d of the %d scenes of %s are not in %s and will not be graded, such as %s",
            *(len(absent), len(asked), cfg.index, cfg.chunks, absent[0]),
        )
    return cfg


def find_trained(cfg: TrainConfig) -> TrainConfig:
    """Look for chunks and weights.

    Raises:
        FileNotFoundError: There are no chunks.
        CheckpointError: Weights to begin with, or of VGG-16, are missing.
    """
    check_files(cfg)
    return cfg
