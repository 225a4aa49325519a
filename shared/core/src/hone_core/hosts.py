"""Tiny hosts: a small trained checkpoint and the facts of how it was made, in two files that belong together.

``host.safetensors`` holds the weights in 16 bits. ``host.json`` beside it holds the architecture, the digest of the
weights, and how they came about: command, seed, time, result. Each is written whole, the weights first, and a pair that
does not belong together is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from hone_core.config import from_dict, to_dict
from hone_core.errors import CheckpointError
from hone_core.io import atomic_write_json, save_safetensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["HostFacts", "ModuleHost", "StoredHost", "describe_host", "open_host", "packaged_host", "read_facts"]
__all__ += ["save_host", "write_facts"]

FORMAT = "hone host 1"
"""First entry of a sidecar."""

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """How a host was made and what it can do."""

    command: str
    """What the user typed to train it."""
    seed: int
    steps: int
    """Optimiser steps done."""
    seconds: float
    """Training time, over all resumed parts."""
    result: dict[str, float]
    """Grades of the weights as they are stored."""
    gates: dict[str, float]
    """Grades that it must reach before a method on it says anything."""
    passed: bool
    train_config: dict[str, Any]
    environment: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    """What only this package's hosts have."""


@dataclass(frozen=True)
class StoredHost(Generic[C]):
    """A host on disk, read without its weights.

    Attributes:
        path: The ``host.safetensors``.
        package: Distribution whose host it is.
        config: Its architecture.
        facts: How it was made; None for one that was saved without.
        sha256: Digest of the weights' file.
    """

    path: Path
    package: str
    config: C
    facts: HostFacts | None
    sha256: str

    def load(self, modules: "Mapping[str, nn.Module]", others: Sequence[str] = ()) -> "dict[str, Tensor]":
        """Fill modules with the weights.

        Args:
            modules: Prefix of its tensors' names to module, as they were saved.
            others: Tensors that belong to no module.

        Returns:
            Those, by name, in float32 on the CPU.

        Raises:
            CheckpointError: The file is damaged, is not the one that the sidecar describes, or holds other tensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise CheckpointError(
                f"{self.path} is not the file that {_sidecar(self.path).name} beside it describes: one of them was "
                f"replaced or cut short. Copy both again. {_advice(self.package)}"
            )
        try:
            tensors = {
                name: value.float() if value.is_floating_point() else value for name, value in load(data).items()
            }
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is no safetensors file: {error}. {_advice(self.package)}") from error
        absent = [name for name in others if name not in tensors]
        rest = {name: tensors.pop(name) for name in others if name in tensors}
        for prefix, module in modules.items():
            own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            try:
                module.load_state_dict({name.removeprefix(prefix): value for name, value in own.items()})
            except RuntimeError as error:
                cause = " ".join(str(error).split()).rstrip(".")
                raise CheckpointError(
                    f"{self.path} does not fit its own config: {cause}. {_advice(self.package)}"
                ) from error
        if absent or tensors:
            raise CheckpointError(
                f"{self.path} holds other tensors than expected: {', '.join(absent) or 'none'} missing, "
                f"{', '.join(tensors) or 'none'} too many. {_advice(self.package)}"
            )
        return rest


class ModuleHost:
    """A host of several modules: how it is moved, stored and loaded. A subclass is a dataclass and says what it is.

    Attributes:
        package: Distribution name.
        architecture: Dataclass of ``config``.
        tensors: Attributes that are stored and belong to no module.
        config: Architecture.
        facts: How it was made; None for one without.
    """

    package: ClassVar[str]
    architecture: ClassVar[type[Any]]
    tensors: ClassVar[tuple[str, ...]] = ()
    config: Any
    facts: HostFacts | None

    @classmethod
    def untrained(cls, config: Any = None, seed: int = 0) -> Self:
        """Random weights; the global generator stays."""
        raise NotImplementedError

    @property
    def modules(self) -> "dict[str, nn.Module]":
        """Prefix in the stored file to module."""
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by module."""
        return {name.rstrip("."): sum(p.numel() for p in m.parameters()) for name, m in self.modules.items()}

    def to(self, device: "torch.device | str") -> Self:
        """Move it; returns itself."""
        for module in self.modules.values():
            module.to(device)
        for name in self.tensors:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def save(self, path: Path, facts: HostFacts | None = None) -> Path:
        """Write weights and architecture; return the path."""
        others = {name: getattr(self, name) for name in self.tensors}
        return save_host(path, self.config, self.modules, package=self.package, others=others, facts=facts)

    @classmethod
    def load(cls, device: "torch.device | str" = "cpu", *, path: Path | None = None) -> Self:
        """Load the packaged host, or another one made by ``train-host``; its weights take no gradient.

        Args:
            device: Where to put it.
            path: A ``host.safetensors``.

        Raises:
            CheckpointError: The file is missing or no such host.
        """
        stored = open_host(cls.architecture, cls.package, path)
        host = cls.untrained(stored.config)
        for name, value in stored.load(host.modules, cls.tensors).items():
            setattr(host, name, value)
        host.facts = stored.facts
        for module in host.modules.values():
            module.eval().requires_grad_(False)
        return host.to(device)


def packaged_host(package: str) -> Path:
    """Where the host that ships with a package lies, whether or not one does.

    Args:
        package: Distribution name, such as "hone-blade".
    """
    return Path(str(files(package.replace("-", "_")) / "assets" / "host.safetensors"))


def save_host(
    path: Path,
    config: Any,
    modules: "Mapping[str, nn.Module]",
    *,
    package: str,
    others: "Mapping[str, Tensor] | None" = None,
    facts: HostFacts | None = None,
) -> Path:
    """Write a host: weights in 16 bits, and the sidecar.

    Args:
        path: The ``host.safetensors`` to write; the sidecar stands beside it as ``.json``.
        config: Dataclass of the architecture.
        modules: Prefix to module; a tensor is stored as prefix and name.
        package: Distribution name.
        others: Tensors that belong to no module, by name.
        facts: How it was made; ``write_facts`` adds them later, when the stored weights are graded.

    Returns:
        The path.

    Raises:
        ValueError: A weight is not finite, or too large for 16 bits; nothing is written.
    """
    import torch

    tensors = {f"{prefix}{name}": value for prefix, m in modules.items() for name, value in m.state_dict().items()}
    tensors |= others or {}
    stored = {
        name: value.to("cpu", torch.float16 if value.is_floating_point() else None) for name, value in tensors.items()
    }
    lost = [name for name, value in stored.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if lost:
        raise ValueError(
            f"{lost[0]} of the host holds values that are not finite or beyond 65,504, which 16 bits do not hold; "
            "train it again at a lower learning rate"
        )
    save_safetensors(stored, path)
    data = path.read_bytes()
    head = {"format": FORMAT, "package": package, "config": to_dict(config), "bytes": len(data)}
    head["sha256"] = hashlib.sha256(data).hexdigest()
    atomic_write_json(_sidecar(path), head | ({} if facts is None else to_dict(facts)))
    return path


def write_facts(path: Path, facts: HostFacts, *, package: str) -> None:
    """Add the facts to the sidecar of a stored host, in place of earlier ones.

    Raises:
        CheckpointError: There is no host at ``path``.
    """
    data = _read(path, package)
    atomic_write_json(_sidecar(path), {key: data[key] for key in _HEAD} | to_dict(facts))


def read_facts(path: Path, package: str) -> HostFacts:
    """How the host at ``path`` was made.

    Raises:
        CheckpointError: There is none, or its sidecar is of another format or holds no facts.
    """
    data = _read(path, package)
    try:
        return from_dict(HostFacts, {key: value for key, value in data.items() if key not in _HEAD})
    except ValueError as error:
        raise CheckpointError(f"{_sidecar(path)} does not say how the host was made: {error}") from error


def open_host(config: type[C], package: str, path: Path | None = None) -> StoredHost[C]:
    """Read what a host is, without its weights.

    Args:
        config: Dataclass of the architecture.
        package: Distribution name.
        path: A ``host.safetensors``; None: the packaged one.

    Raises:
        CheckpointError: There is none, its sidecar is missing or of another format, or it is a host of another package
            or version.
    """
    path = packaged_host(package) if path is None else Path(path)
    data = _read(path, package)
    if data["package"] != package:
        raise CheckpointError(f"{path} is a host of {data['package']}. {_advice(package)}")
    try:
        own = from_dict(config, data["config"])
        facts = {key: value for key, value in data.items() if key not in _HEAD}
        found = from_dict(HostFacts, facts) if facts else None
    except ValueError as error:
        raise CheckpointError(
            f"{_sidecar(path)} is of another version of {package}: {error}. {_advice(package)}"
        ) from error
    return StoredHost(path, package, own, found, data["sha256"])


def describe_host(package: str, path: Path | None = None) -> dict[str, Any] | str:
    """What ``info`` says of a host: its command, steps, seconds and result, or "absent".

    Args:
        package: Distribution name.
        path: A ``host.safetensors``; None: the packaged one.

    Raises:
        CheckpointError: There is a host, and its sidecar is missing or of another format.
    """
    path = packaged_host(package) if path is None else path
    if not path.is_file():
        return "absent"
    data = _read(path, package)
    return {key: data[key] for key in ("command", "steps", "seconds", "result") if key in data}


_HEAD = ("format", "package", "config", "bytes", "sha256")


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _advice(package: str) -> str:
    return f"Train one with {package} train-host, and pass its host.safetensors."


def _read(path: Path, package: str) -> dict[str, Any]:
    """The sidecar of the host at ``path``, its head checked."""
    if not path.is_file():
        raise CheckpointError(f"there is no tiny host at {path}. {_advice(package)}")
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        raise CheckpointError(f"{path} lacks its sidecar {sidecar.name}, which says what it is: copy both files")
    try:
        data = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{sidecar} is not JSON ({error}). {_advice(package)}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{sidecar} must be of format {FORMAT!r}; got {found!r}. {_advice(package)}")
    if missing := [key for key in _HEAD if key not in data]:
        raise CheckpointError(f"{sidecar} has no {', '.join(missing)}. {_advice(package)}")
    return data
