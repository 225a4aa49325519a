"""Published video language models: what a checkpoint is before its weights are read, its licence, and loading it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from .addresses import find_checkpoint
from .decoders import check_attention

__all__ = ["find_licence", "load_model", "read_config"]

log = logging.getLogger(__name__)


def read_config(path: str) -> Any:
    """Look at a checkpoint's config, without its weights, and return it.

    Args:
        path: What ``from_pretrained`` takes, such as llava-hf/llava-onevision-qwen2-7b-ov-hf.

    Raises:
        ValueError: The checkpoint is no vision-language model, or its decoder is a hybrid.
        OSError: There is no such checkpoint.
    """
    from transformers import AutoConfig

    find_checkpoint(path)
    found = AutoConfig.from_pretrained(path)
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    if not any(isinstance(getattr(found, name, None), int) for name in names):
        raise ValueError(
            f"{path} is a {found.model_type} model without visual tokens; expected a video language model such as "
            "llava-hf/llava-onevision-qwen2-7b-ov-hf"
        )
    check_attention(found.get_text_config(), path)
    return found


def load_model(path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a Video-LLM and its processor from a folder or the hub. What licence its weights have is logged.

    Args:
        path: What ``from_pretrained`` takes.
        device: Where the model goes.
        dtype: Of the weights; the checkpoint's own if None.

    Raises:
        ValueError: The checkpoint is no vision-language model, or its decoder is a hybrid. Known before its weights are
            read.
        OSError: There is no such checkpoint.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    read_config(path)
    licence = find_licence(path)
    restricted = licence is not None and re.search(r"(^|[-_ ])(nc|non-?commercial)([-_ ]|$)", licence.lower())
    log.log(
        logging.WARNING if restricted else logging.INFO,
        "licence of %s: %s",
        path,
        "unknown, neither its config nor its model card names one; read its page before you use it"
        if licence is None
        else licence + (" (no commercial use)" if restricted else ""),
    )
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or "auto", attn_implementation="sdpa")
    return model.to(device).eval(), processor


def find_licence(path: str) -> str | None:
    """Licence that a checkpoint's config or model card names, or None.

    Args:
        path: What ``from_pretrained`` takes; the card is the README.md beside the config.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    named = getattr(AutoConfig.from_pretrained(path), "license", None)
    if isinstance(named, str) and named:
        return named
    try:
        card = Path(cached_file(path, "README.md")).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    header = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    if header is None:
        return None
    fields = dict(re.findall(r"^(license(?:_name|_link)?):[ \t]*[\"']?([^\"'\n#]+)", header[1], re.MULTILINE))
    # "other" is named by the two fields after it.
    parts = [fields.get(name, "").strip() for name in ("license", "license_name", "license_link")]
    return ", ".join(part for part in parts if part) or None
