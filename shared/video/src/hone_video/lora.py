"""LoRA on a video transformer: put on by peft, written as diffusers reads it, with the method's settings in the header.

``alpha`` equals the rank, so the update is exactly ``B @ A`` and no file has to state it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone_core.errors import CheckpointError, MissingExtraError
from hone_core.io import save_safetensors

from .training_config import LoraTargets

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LORA_FILE", "PROJECTIONS", "add_lora", "lora_tensors", "read_lora_header", "save_lora"]

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file that ``pipe.load_lora_weights(folder)`` looks for."""

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("net.0.proj", "net.2")


def add_lora(
    model: Any, rank: int, *, targets: LoraTargets = "attention", adapter_name: str = "default", seed: int = 0
) -> None:
    """Freeze a transformer and give it a LoRA to train, in float32, which changes nothing yet (B is zero).

    Args:
        model: A transformer of diffusers.
        rank: Of every update.
        targets: ``attention`` for the four projections of every attention, ``all`` for the feed-forward layers too.
        adapter_name: ``model.set_adapter(name)``, ``disable_adapters()`` and ``enable_adapters()`` switch.
        seed: Of A; the global generator is left as it was.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        import torch
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("train", "hone-video", "LoRA training") from error
    names = PROJECTIONS + (_FEED_FORWARD if targets == "all" else ())
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(names)),
            adapter_name=adapter_name,
        )
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            parameter.data = parameter.data.float()


def lora_tensors(weights: Mapping[str, Tensor], adapter_name: str = "default") -> dict[str, Tensor]:
    """A LoRA's tensors as diffusers names them in a file, of a model's named parameters; others are left out."""
    mark = f".{adapter_name}."
    return {
        f"transformer.{name.replace(mark, '.')}": value
        for name, value in weights.items()
        if mark in name and (".lora_A." in name or ".lora_B." in name)
    }


def save_lora(
    weights: Mapping[str, Tensor], path: str | Path, *, header: Mapping[str, str], adapter_name: str = "default"
) -> Path:
    """Write a LoRA that ``pipe.load_lora_weights`` accepts; returns the file.

    Args:
        weights: Named parameters of the model, as ``hone_video.training.Loop.weights`` gives them.
        path: The file.
        header: Kept in the file's header; names of a package start with its name.
        adapter_name: Which adapter.

    Raises:
        ValueError: There is no such adapter.
    """
    tensors = lora_tensors(weights, adapter_name)
    if not tensors:
        raise ValueError(f"there is no adapter {adapter_name!r} among {len(weights)} tensors")
    return save_safetensors(tensors, path, metadata={"format": "pt", **header})


def read_lora_header(path: str | Path) -> dict[str, str]:
    """What ``save_lora`` kept in the header.

    Raises:
        CheckpointError: It is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
