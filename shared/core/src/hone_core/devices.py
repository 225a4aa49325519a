"""Device and dtype from the words that a command line uses."""

from typing import TYPE_CHECKING

from hone_core.errors import UnsupportedHardwareError
from hone_core.processes import Processes

if TYPE_CHECKING:
    import torch

__all__ = ["check_device", "resolve_device", "resolve_dtype", "use_device"]

_DTYPES = ("float32", "bfloat16", "float16")


def check_device(name: "str | torch.device") -> None:
    """Refuse a word that names no kind of device, whatever this machine has; loads no torch.

    Raises:
        ValueError: It is not ``auto``, ``cpu``, ``cuda`` or one of these with an index.
    """
    kind, colon, index = str(name).partition(":")
    if str(name) != "auto" and (kind not in ("cpu", "cuda") or (colon and not index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>; got {str(name)!r}")


def resolve_device(name: "str | torch.device" = "auto") -> "torch.device":
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that exists.

    ``auto`` is the first CUDA device if there is one, else the CPU. Of several processes (``hone_core.processes``) each
    has its own: ``auto`` and ``cuda`` name the one of its number on this machine.

    Raises:
        ValueError: The name is not one of these.
        UnsupportedHardwareError: A CUDA device was named and is not there.
    """
    import torch

    check_device(name)
    text = str(name)
    if text == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    processes = Processes.of_launcher()
    if text in ("auto", "cuda") and processes.count > 1:
        text = f"cuda:{processes.local_rank}"
    if text == "auto":
        return torch.device("cuda")
    kind, _, index = text.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            raise UnsupportedHardwareError(f"device {text!r} was asked for", found=found, use="--device cpu or auto")
    return torch.device(text)


def use_device(device: "torch.device") -> None:
    """Make it the current one of this thread, which is where what names no device goes.

    A CUDA device without an index is the current one already, and ``torch.cuda.set_device`` refuses it; so is a CPU.
    """
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def resolve_dtype(name: "str | torch.dtype" = "auto", device: "str | torch.device" = "cpu") -> "torch.dtype":
    """Turn ``auto``, ``float32``, ``bfloat16`` or ``float16`` into a dtype.

    ``auto`` is bfloat16 on CUDA (float16 before sm_80, which has no bfloat16 units) and float32 on the CPU.

    Raises:
        ValueError: The name is not one of these.
    """
    import torch

    text = str(name).removeprefix("torch.")
    if text == "auto":
        if torch.device(device).type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if text not in _DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}; got {text!r}")
    return getattr(torch, text)
