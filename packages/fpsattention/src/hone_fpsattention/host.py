"""The tiny host that was trained with FPSAttention: ``hone_video``'s, fine-tuned, with the attention it is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from hone_core import hosts
from hone_video.host import Host

from .config import FPSAttentionConfig, HostConfig

__all__ = ["PACKAGE", "PACKAGED", "TunedHost", "load_host", "save_host"]

PACKAGE = "hone-fpsattention"

PACKAGED = hosts.packaged_host(PACKAGE)
"""The tuned host that ships; the dense one that it comes from is ``hone_video``'s."""


@dataclass
class TunedHost(Host):
    """A fine-tuned host.

    Attributes:
        attention: What it was tuned for; nothing is attached yet.
    """

    attention: FPSAttentionConfig = field(default_factory=FPSAttentionConfig)


def save_host(host: Host, attention: FPSAttentionConfig, path: Path) -> Path:
    """Write weights, and in the sidecar the architecture and the attention; return the path.

    Args:
        host: Fine-tuned, without anything attached.
        attention: What it was tuned for.
        path: The ``host.safetensors`` to write.
    """
    config = HostConfig(host=host.config, attention=attention)
    modules = {"transformer.": host.transformer, "classifier.": host.classifier}
    return hosts.save_host(path, config, modules, package=PACKAGE, others={"words": host.words})


def load_host(device: torch.device | str = "cpu", *, path: Path | None = None) -> TunedHost:
    """Load the tuned host that ships with the package, or another one made by ``hone-fpsattention train-host``.

    Args:
        device: Where to put it.
        path: A ``host.safetensors``; the packaged one if None.

    Raises:
        CheckpointError: The file is missing or is not a tuned host.
    """
    stored = hosts.open_host(HostConfig, PACKAGE, path)
    plain = Host.untrained(stored.config.host)
    rest = stored.load({"transformer.": plain.transformer, "classifier.": plain.classifier}, ("words",))
    host = TunedHost(
        plain.config, plain.transformer, rest["words"], plain.classifier, attention=stored.config.attention
    )
    host.facts = stored.facts
    host.transformer.eval().requires_grad_(False)
    host.classifier.eval().requires_grad_(False)
    host.to(device)
    return host
