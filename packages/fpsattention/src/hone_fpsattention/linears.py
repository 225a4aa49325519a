"""Linear layers in E4M3, by torchao: a switch of their own, which the paper's end-to-end figures seem to include."""

from __future__ import annotations

import importlib

import torch
from hone_core.errors import MissingExtraError, UnsupportedHardwareError
from torch import nn

__all__ = ["check_linears", "round_linears"]


def check_linears(device: torch.device) -> None:
    """Whether linear layers can run in E4M3 here, before anything is loaded or timed.

    Raises:
        MissingExtraError: torchao is not installed.
        UnsupportedHardwareError: The device has no E4M3 units.
    """
    try:
        importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise MissingExtraError("linears", "hone-fpsattention", "Linear layers in E4M3") from error
    if device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UnsupportedHardwareError(
            "torchao's linear layers in E4M3 need a GPU of compute capability 8.9",
            found=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            use="the same command without --e4m3-linears",
        )


def round_linears(model: nn.Module) -> None:
    """Linear layers of the blocks in E4M3, weights and activations, in place."""
    torchao = importlib.import_module("torchao.quantization")
    torchao.quantize_(
        model,
        torchao.Float8DynamicActivationFloat8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "blocks." in name,
    )
