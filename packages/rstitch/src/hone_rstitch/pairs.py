"""Where tiny pairs lie, and what they are; nothing here loads torch."""

from __future__ import annotations

from pathlib import Path

from hone_core.errors import CheckpointError
from hone_core.hosts import StoredHost, open_host, packaged_host

from .config import PACKAGED, HostConfig, ReproduceConfig

__all__ = ["PACKAGE", "open_pair", "packaged_pair", "pairs_of"]

PACKAGE = "hone-rstitch"


def packaged_pair(seed: int) -> Path:
    """Where the pair of a seed lies, whether or not it ships."""
    first = packaged_host(PACKAGE)
    return first if seed == 0 else first.with_stem(f"{first.stem}-{seed}")


def open_pair(seed: int = 0, *, path: Path | None = None) -> StoredHost[HostConfig]:
    """Read what a pair is, without its weights.

    Args:
        seed: Of a packaged pair.
        path: A ``host.safetensors`` made by train-host, in its place.

    Raises:
        CheckpointError: There is none.
    """
    path = packaged_pair(seed) if path is None else path
    if not path.is_file():
        shipped = sorted(int(file.stem.partition("-")[2] or 0) for file in path.parent.glob("host*.safetensors"))
        known = f"; the packaged pairs are of seeds {', '.join(map(str, shipped))}" if shipped else ""
        raise CheckpointError(f"there is no tiny pair at {path}{known}. Train one with {PACKAGE} train-host.")
    return open_host(HostConfig, PACKAGE, path)


def pairs_of(cfg: ReproduceConfig) -> list[tuple[str, Path | None]]:
    """Name of each pair, and its file where it is none that ships."""
    if cfg.hosts:
        return [(f"pair {at}", file) for at, file in enumerate(cfg.hosts)]
    return [(f"pair {seed}", None) for seed in cfg.pairs or PACKAGED]
