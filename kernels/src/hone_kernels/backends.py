"""What each backend of an op can do, as data, and which one a call runs on: one rule for every op."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

__all__ = ["Backend", "Support", "choose", "flash_reason", "gluon_reason", "triton_reason", "warn_once"]

F = TypeVar("F", bound=Callable[..., Any])

Backend = Literal["auto", "reference", "triton", "gluon", "flash"]

# Read once: a compiler that traces a call cannot look at the environment, and Triton itself reads the variable when a
# kernel is decorated.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()


def _constant(fn: F) -> F:
    """Do what ``torch.compiler.assume_constant_result`` does, which imports the whole compiler: seconds."""
    fn.__dict__["_dynamo_marked_constant"] = True
    return fn


@_constant
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
    if not HAS_TRITON:
        return "Triton is not installed; on Linux: pip install triton"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device (or TRITON_INTERPRET=1 before the import); the tensors are on {device}"
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    sm = _capability(device)
    if sm < min_sm:
        return f"it needs compute capability {min_sm / 10}; {device} has {sm / 10}"
    return None


@_constant
def _gluon_error() -> str | None:
    """Why Gluon cannot be imported. It is young, so not every Triton has what the kernels need of it."""
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"this Triton has no Gluon for Hopper ({error}); pip install 'triton>=3.6'"
    return None


def gluon_reason(device: torch.device, min_sm: int, max_sm: int) -> str | None:
    """Why Gluon kernels for compute capabilities ``min_sm / 10`` to ``max_sm / 10`` cannot run there, or None."""
    if not HAS_TRITON:
        return "Triton is not installed; on Linux: pip install triton"
    if device.type != "cuda":
        return f"it needs a CUDA device; the tensors are on {device}"
    if INTERPRETED:
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


@_constant
def _flash_error() -> str | None:
    """Why FlashAttention 4 cannot be imported."""
    try:
        importlib.import_module("flash_attn.cute.interface")
    except Exception as error:  # a shared library that does not load raises what it likes
        return f"FlashAttention 4 is not there ({error}); pip install --pre flash-attn-4"
    return None


def flash_reason(device: torch.device, min_sm: int, max_sm: int) -> str | None:
    """Why FlashAttention 4 cannot run on this device, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device; the tensors are on {device}"
    sm = _capability(device)
    if torch.version.hip or not min_sm <= sm <= max_sm:
        return f"it needs compute capability {min_sm / 10} to {max_sm / 10}; {device} has {sm / 10}"
    if torch.compiler.is_compiling():
        return "it runs outside of torch.compile only"
    return _flash_error()


@dataclass(frozen=True)
class Support:
    """What one backend of an op can do; error messages, documentation and test parameters are read from here.

    Attributes:
        dtypes: Of the op's floating-point inputs.
        language: What it is written in, which says where it runs.
        head_dims: D, or None for any.
        blocks: Allowed sizes of blocks, or None for any.
        samples: Most sampled keys in a block, or None for any number.
        min_sm: Least compute capability times ten, or None where no GPU is needed.
        max_sm: Greatest compute capability times ten, or None.
        backward: Whether gradients flow.
    """

    dtypes: tuple[torch.dtype, ...]
    language: Literal["torch", "triton", "gluon", "flash"] = "torch"
    head_dims: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    samples: int | None = None
    min_sm: int | None = None
    max_sm: int | None = None
    backward: bool = False

    def reason(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        head_dim: int | None = None,
        samples: int | None = None,
        **blocks: int,
    ) -> str | None:
        """Why this backend cannot take a call, or None.

        Args:
            device: Of the tensors.
            dtype: Of the tensors; None where they are E4M3 already.
            head_dim: D, where the op has heads.
            samples: Sampled keys in a block, where that counts.
            blocks: Sizes of blocks by the name that the caller knows, such as ``block_q``.
        """
        if dtype is not None and dtype not in self.dtypes:
            return f"it takes {', '.join(str(d) for d in self.dtypes)}; got {dtype}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"it takes head_dim in {self.head_dims}; got {head_dim}"
        for name, size in blocks.items():
            if self.blocks is not None and size not in self.blocks:
                return f"it takes {name} in {self.blocks}; got {size}"
        if self.samples is not None and samples is not None and samples > self.samples:
            return f"it takes up to {self.samples} sampled keys per block; got {samples}"
        if self.language == "triton":
            assert self.min_sm is not None
            return triton_reason(device, self.min_sm)
        if self.language == "gluon":
            assert self.min_sm is not None
            assert self.max_sm is not None
            return gluon_reason(device, self.min_sm, self.max_sm)
        if self.language == "flash":
            assert self.min_sm is not None
            assert self.max_sm is not None
            return flash_reason(device, self.min_sm, self.max_sm)
        return None


def choose(
    op: str,
    backend: Backend,
    support: Mapping[str, Support],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    kernels: tuple[Backend, ...] = ("triton",),
    named: tuple[Backend, ...] = (),
    **sizes: Any,
) -> Backend:
    """The backend to run: the named one, or for ``"auto"`` the first that can on a GPU, else the reference.

    Args:
        op: Name for messages.
        backend: As the caller gave it.
        support: What each backend of the op can do.
        device: Of the tensors.
        dtype: As for ``Support.reason``.
        kernels: Backends of the op beside the reference, the preferred one first. ``"triton"`` is among them.
        named: Further ones, which run only where they are named.
        sizes: As for ``Support.reason``.

    Raises:
        ValueError: The backend is unknown, or it is named and cannot run: a named backend never gives way to another.
    """
    known = ("auto", "reference", *kernels, *named)
    if backend not in known:
        raise ValueError(f"backend must be one of {known}; got {backend!r}")
    if backend == "auto":
        backend = "reference"
        if device.type == "cuda":
            reasons = {}
            for name in kernels:
                reasons[name] = support[name].reason(device, dtype, **sizes)
                if reasons[name] is None:
                    return name
            warn_once(op, f"uses the slow reference backend: triton cannot run, since {reasons['triton']}")
    reason = support[backend].reason(device, dtype, **sizes)
    if reason is not None:
        remedy = "" if backend == "reference" else ". backend='auto' chooses one that can"
        raise ValueError(f"backend {backend!r} cannot run this call: {reason}{remedy}")
    return backend
