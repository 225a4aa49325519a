"""The GPU that a verb measures."""

from __future__ import annotations

import torch
from hone_core.devices import resolve_device
from hone_core.errors import UnsupportedHardwareError

__all__ = ["the_gpu"]


def the_gpu(name: str) -> torch.device:
    """The CUDA device that ``auto``, ``cuda`` or ``cuda:1`` means.

    Raises:
        UnsupportedHardwareError: It is not there, or another kind of device was named.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        raise UnsupportedHardwareError("kernels are measured on a CUDA device", found=f"{device} for --device {name}")
    return device
