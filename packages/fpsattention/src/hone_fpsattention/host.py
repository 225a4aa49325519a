"""The tiny host that was trained with FPSAttention: ``hone_video``'s, fine-tuned, with the attention it is for."""

from __future__ import annotations

from pathlib import Path

import torch
from hone_core import hosts
from hone_video.host import Host

from .config import FPSAttentionConfig, TunedHostConfig

__all__ = ["PACKAGE", "load_tuned", "save_tuned"]

PACKAGE = "hone-fpsattention"


def save_tuned(host: Host, attention: FPSAttentionConfig, path: Path) -> Path:
    """Write weights, and in the sidecar the architecture and the attention; return the path.

    Args:
        host: Fine-tuned, without anything attached.
        attention: What it was tuned for.
        path: The ``host.safetensors`` to write.
    """
    config = TunedHostConfig(host=host.config, attention=attention)
    modules = {"transformer.": host.transformer, "classifier.": host.classifier}
    return hosts.save_host(path, config, modules, package=PACKAGE, others={"words": host.words})


def load_tuned(device: torch.device | str = "cpu", *, path: Path | None = None) -> tuple[Host, FPSAttentionConfig]:
    """Load the tuned host that ships with the package, or another one made by ``hone-fpsattention train``.

    Args:
        device: Where to put it.
        path: A ``host.safetensors``; the packaged one if None.

    Returns:
        The host, nothing attached, and the attention that it was tuned for.

    Raises:
        CheckpointError: The file is missing or is not a tuned host.
    """
    stored = hosts.open_host(TunedHostConfig, PACKAGE, path)
    host = Host.untrained(stored.config.host)
    rest = stored.load({"transformer.": host.transformer, "classifier.": host.classifier}, ("words",))
    host.words, host.facts = rest["words"], stored.facts
    host.transformer.eval().requires_grad_(False)
    host.classifier.eval().requires_grad_(False)
    return host.to(device), stored.config.attention
