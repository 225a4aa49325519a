"""Which backend a call runs on: one rule for every op."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal

import torch

__all__ = ["Backend", "choose", "gluon_reason", "triton_reason", "warn_once"]

Backend = Literal["auto", "reference", "triton", "gluon"]

# Read once: a compiler that traces a call cannot look at the environment, and Triton itself reads the variable when a
# kernel is decorated.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> int:
    """Compute capability times ten."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def warn_once(op: str, message: str) -> None:
    """Log a warning that concerns every later call too."""
    if not torch.compiler.is_compiling() and (op, message) not in _warned:
        _warned.add((op, message))
        _log.warning("%s: %s", op, message)


def triton_reason(device: torch.device, min_sm: int) -> str | None:
    """Why Triton kernels that need compute capability ``min_sm / 10`` cannot run on this device, or None."""
    if not _HAS_TRITON:
        return "Triton is not installed; on Linux: pip install triton"
    if _INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device (or TRITON_INTERPRET=1 before the import); the tensors are on {device}"
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    sm = _capability(device)
    if sm < min_sm:
        return f"it needs compute capability {min_sm / 10}; {device} has {sm / 10}"
    return None


@torch.compiler.assume_constant_result
def _gluon_error() -> str | None:
    """Why Gluon cannot be imported. It is young, so not every Triton has what the kernels need of it."""
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"this Triton has no Gluon for Hopper ({error}); pip install 'triton>=3.6'"
    return None


def gluon_reason(device: torch.device, min_sm: int, max_sm: int) -> str | None:
    """Why Gluon kernels for compute capabilities ``min_sm / 10`` to ``max_sm / 10`` cannot run there, or None."""
    if not _HAS_TRITON:
        return "Triton is not installed; on Linux: pip install triton"
    if device.type != "cuda":
        return f"it needs a CUDA device; the tensors are on {device}"
    if _INTERPRETED:
        return "Gluon kernels cannot be interpreted; unset TRITON_INTERPRET"
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    sm = _capability(device)
    if not min_sm <= sm <= max_sm:
        return f"it needs compute capability {min_sm / 10} to {max_sm / 10}; {device} has {sm / 10}"
    error = _gluon_error()
    if error is not None:
        warn_once("gluon", f"{error}; until then Triton's kernels run, which are slower on this GPU")
    return error


def choose(
    op: str,
    backend: str,
    device: torch.device,
    why_not: Callable[[str], str | None],
    kernels: tuple[str, ...] = ("triton",),
) -> str:
    """The backend to run: the named one, or for ``"auto"`` the first that can on a GPU, else the reference.

    Args:
        op: Name for messages.
        backend: As the caller gave it.
        device: Of the tensors.
        why_not: Says of a backend why it cannot take the call, or None.
        kernels: Backends of the op beside the reference, the preferred one first. ``"triton"`` is among them.

    Raises:
        ValueError: The backend is unknown, or it is named and cannot run: a named backend never gives way to another.
    """
    known = ("auto", "reference", *kernels)
    if backend not in known:
        raise ValueError(f"backend must be one of {known}; got {backend!r}")
    if backend == "auto":
        backend = "reference"
        if device.type == "cuda":
            for name in kernels:
                if why_not(name) is None:
                    return name
            warn_once(op, f"uses the slow reference backend: triton cannot run, since {why_not('triton')}")
    reason = why_not(backend)
    if reason is not None:
        remedy = "" if backend == "reference" else ". backend='auto' chooses one that can"
        raise ValueError(f"backend {backend!r} cannot run this call: {reason}{remedy}")
    return backend
