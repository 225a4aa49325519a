"""Folders of adapters, as ``train`` writes them, in place of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["base_of", "load_model"]


def base_of(path: str) -> str:
    """The model that adapters were trained on, where a path is a folder of adapters; else the path.

    Args:
        path: Folder or hub address.

    Raises:
        ValueError: The adapters do not name it.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return path
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{file} does not name the model that the adapters were trained on; expected its folder or hub address as "
            "base_model_name_or_path. Write it there"
        )
    return str(base)


def load_model(path: str, *, device: torch.device | str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """``hone_lm.checkpoints.load_model``, with the adapters where a path is a folder of them.

    Args:
        path: Folder or hub address.
        device: Where the model goes.
        dtype: Of the weights, adapters among them.

    Raises:
        ValueError: See ``base_of`` and ``hone_lm.checkpoints.load_model``.
        OSError: There is no such model.
    """
    from hone_lm import checkpoints

    base = base_of(path)
    model, processor = checkpoints.load_model(base, device=device, dtype=dtype)
    if base != path:
        from peft import PeftModel

        # As they were trained: in the dtype of the weights.
        model = PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False).get_base_model().eval()
    return model, processor
