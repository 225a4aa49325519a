"""Published checkpoints into our hosts: read safely, and loaded strictly.

A tensor that is missing, too many or of another shape is an error, never a random start: a network that is half random
still draws plausible pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from torch import Tensor, nn

from .depthsplat import DEPTHSPLATS, DepthSplat
from .mvsplat import MVSplat

__all__ = ["PUBLISHED", "build_published", "load_published", "load_trained", "read_state"]
__all__ += ["state_difference"]

PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "mvsplat": MVSplat,
    **{name: partial(DepthSplat, cfg) for name, cfg in DEPTHSPLATS.items()},
}
"""Architectures that checkpoints were published for."""
COMPRESSOR = "zipmatch."
OUTSIDE = ("decoder.", "losses.", "data_shim.")
"""What a training checkpoint holds beside the host."""


def build_published(kind: str) -> Any:
    """A host of a published architecture, with random weights.

    Raises:
        ValueError: There is no such architecture.
    """
    if kind not in PUBLISHED:
        raise ValueError(f"no published host {kind!r}; there are {', '.join(PUBLISHED)}")
    return PUBLISHED[kind]().eval()


def read_state(path: str | Path, *, outside: tuple[str, ...] = OUTSIDE) -> dict[str, Tensor]:
    """Tensors of a checkpoint, keys as in our hosts; nothing in the file is executed.

    Args:
        path: ``.safetensors``, or ``.ckpt``, ``.pth``, ``.pt`` with a state dict, alone or under ``state_dict`` or
            ``model``.
        outside: Beginnings of names that are passed over.

    Raises:
        CheckpointError: The file is missing, damaged, needs code to be read, or holds no tensors of a host.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            data: Any = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file, or is cut short: {error}") from error
    else:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} cannot be read as tensors alone: {cause} A damaged file has to be copied again; one with "
                f"other Python objects is not opened: save its state_dict as .safetensors where you trust it."
            ) from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{path} holds no state dict: expected names and tensors, alone or under state_dict")
    state = {name: value for name, value in data.items() if not name.startswith(outside)}
    if any(name.startswith("encoder.") for name in state):
        others = [name for name in state if not name.startswith("encoder.")]
        if others:
            raise CheckpointError(f"{path}: beside encoder.* it holds {_some(others)}, which no host here has")
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
    return state


def load_published(path: str | Path, kind: str) -> tuple[Any, dict[str, Tensor] | None]:
    """A host with a published checkpoint's weights, in float32 on the CPU.

    Args:
        path: See ``read_state``.
        kind: One of ``PUBLISHED``.

    Returns:
        The host, and the compressor's weights where the checkpoint has some.

    Raises:
        CheckpointError: See ``read_state``; or the file is of another architecture, which is named if it is known.
        ValueError: There is no such architecture.
    """
    with torch.device("meta"):
        host = build_published(kind)
    own, compressor = _split(read_state(path))
    wrong = state_difference(host, own)
    if wrong:
        others = [name for name in PUBLISHED if name != kind and not state_difference(_on_meta(name), own)]
        advice = (
            f"It is a checkpoint of {' or '.join(others)}: name that instead." if others else "It fits no host here."
        )
        raise CheckpointError(f"{path} is no checkpoint of {kind}: {wrong}. {advice}")
    host.load_state_dict({name: value.float() for name, value in own.items()}, assign=True)
    return host.requires_grad_(True), compressor or None


def load_trained(path: str | Path, host: nn.Module) -> dict[str, Tensor] | None:
    """Fill a host with weights that ``training.fit`` wrote of one like it.

    Args:
        path: See ``read_state``.
        host: Of the same architecture, without a compressor.

    Returns:
        The compressor's weights where the file has some.

    Raises:
        CheckpointError: See ``read_state``; or the file is of another architecture.
    """
    own, compressor = _split(read_state(path))
    wrong = state_difference(host, own)
    if wrong:
        raise CheckpointError(f"{path} does not fit this {type(host).__name__}: {wrong}")
    host.load_state_dict(own)
    return compressor or None


def _on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return build_published(kind)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The host's tensors, and the compressor's without their prefix."""
    own = {name: value for name, value in state.items() if COMPRESSOR not in name}
    compressor = {name.partition(COMPRESSOR)[2]: value for name, value in state.items() if COMPRESSOR in name}
    return own, compressor


def state_difference(model: nn.Module, state: dict[str, Tensor]) -> str:
    """What of a state does not fit a model; empty where all does."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    parts = {
        "missing": [name for name in expected if name not in state],
        "too many": [name for name in state if name not in expected],
        "of another shape": [name for name in state if name in expected and state[name].shape != expected[name]],
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
