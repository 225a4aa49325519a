"""The tiny host: an MVSplat of the published parts, small, trained on generated rooms in three arms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hone_core.hosts import StoredHost, open_host, packaged_host, save_host
from hone_splat.mvsplat import MVSplat
from torch import nn

from .config import ARMS, HostConfig, ZPressorConfig
from .models import ZPressorHandle, attach, tiny

__all__ = [
    "PACKAGE",
    "PACKAGED",
    "TinyHost",
    "arm_config",
    "build_arm",
    "load_host",
    "open_tiny",
    "save_untrained",
]

PACKAGE = "hone-zpressor"
PACKAGED = packaged_host(PACKAGE)


@dataclass(frozen=True)
class TinyHost:
    """A trained arm.

    Attributes:
        host: The network, with the compressor on it where the arm has one.
        handle: Of the compressor; None for the arm ``host``.
        config: Architecture.
    """

    host: MVSplat
    handle: ZPressorHandle | None
    config: HostConfig


def arm_config(cfg: HostConfig, arm: str) -> ZPressorConfig | None:
    """Settings of an arm's compressor.

    Raises:
        ValueError: There is no such arm.
    """
    if arm not in ARMS:
        raise ValueError(f"no arm {arm!r}; the arms are {', '.join(ARMS)}")
    return {"host": None, "zpressor": cfg.zpressor, "anchors": replace(cfg.zpressor, fuse=False)}[arm]


def build_arm(cfg: HostConfig, arm: str, *, seed: int = 0) -> TinyHost:
    """An untrained arm; all arms of a seed begin with the same host."""
    host, config = tiny(cfg, seed=seed), arm_config(cfg, arm)
    if config is None:
        return TinyHost(host, None, cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return TinyHost(host, attach(host, config), cfg)


def save_untrained(path: Path, cfg: HostConfig | None = None) -> Path:
    """Write a host that was not trained, to try verbs on; returns the path."""
    cfg = cfg or HostConfig()
    return save_host(path, cfg, {f"{arm}.": build_arm(cfg, arm).host for arm in ARMS}, package=PACKAGE)


def open_tiny(path: Path | None = None) -> StoredHost[HostConfig]:
    """Read what a host is, without its weights.

    Raises:
        CheckpointError: There is none.
    """
    return open_host(HostConfig, PACKAGE, path)


def load_host(arm: str = "host", *, path: Path | None = None, device: torch.device | str = "cpu") -> TinyHost:
    """Load a trained arm; its weights are float32 and take no gradient.

    Args:
        arm: One of ``ARMS``.
        path: A ``host.safetensors`` made by train-host; the packaged one if None.
        device: Where it goes.

    Raises:
        CheckpointError: There is none, or it is damaged.
        ValueError: There is no such arm.
    """
    stored = open_tiny(path)
    built = {name: build_arm(stored.config, name) for name in ARMS}
    if arm not in built:
        raise ValueError(f"no arm {arm!r}; the arms are {', '.join(ARMS)}")
    modules: dict[str, nn.Module] = {f"{name}.": one.host for name, one in built.items()}
    stored.load(modules)
    built[arm].host.to(device).eval().requires_grad_(False)
    return built[arm]
