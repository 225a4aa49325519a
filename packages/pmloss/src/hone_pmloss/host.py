"""The tiny host: an MVSplat of the published parts, small, trained on generated rooms in two arms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from hone_core.hosts import StoredHost, open_host, packaged_host, save_host
from hone_splat.mvsplat import MVSplat

from .config import ARMS, HostConfig
from .models import tiny

__all__ = ["PACKAGE", "PACKAGED", "TinyHost", "load_host", "open_tiny", "save_untrained"]

PACKAGE = "hone-pmloss"
PACKAGED = packaged_host(PACKAGE)


@dataclass(frozen=True)
class TinyHost:
    """An arm.

    Attributes:
        host: The network.
        config: Architecture.
    """

    host: MVSplat
    config: HostConfig


def save_untrained(path: Path, cfg: HostConfig | None = None) -> Path:
    """Write a host that was not trained, to try verbs on; returns the path."""
    cfg = cfg or HostConfig()
    return save_host(path, cfg, {f"{arm}.": tiny(cfg) for arm in ARMS}, package=PACKAGE)


def open_tiny(path: Path | None = None) -> StoredHost[HostConfig]:
    """Read what a host is, without its weights.

    Raises:
        CheckpointError: There is none.
    """
    return open_host(HostConfig, PACKAGE, path)


def load_host(arm: str = "pm", *, path: Path | None = None, device: torch.device | str = "cpu") -> TinyHost:
    """Load a trained arm; its weights are float32 and take no gradient.

    Args:
        arm: One of ``ARMS``.
        path: A ``host.safetensors`` made by train-host; the packaged one if None.
        device: Where it goes.

    Raises:
        CheckpointError: There is none, or it is damaged.
        ValueError: There is no such arm.
    """
    if arm not in ARMS:
        raise ValueError(f"no arm {arm!r}; the arms are {', '.join(ARMS)}")
    stored = open_tiny(path)
    built = {name: tiny(stored.config) for name in ARMS}
    stored.load({f"{name}.": host for name, host in built.items()})
    return TinyHost(built[arm].to(device).eval().requires_grad_(False), stored.config)
