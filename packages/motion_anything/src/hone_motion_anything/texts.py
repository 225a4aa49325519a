"""CLIP's vector of a text, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hone_core.errors import CheckpointError
from jaxtyping import Float
from torch import Tensor

__all__ = ["ClipText"]


class ClipText:
    """The projected vector of ``openai/clip-vit-base-patch32``, 512 numbers, as MoMask and MoGenTS take it.

    Args:
        folder: Of the saved text model and tokenizer.
        device: Where.

    Raises:
        CheckpointError: The folder holds none.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no CLIP: expected a folder with config.json, weights and tokenizer")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval().to(device)
        self.device = torch.device(device)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch: int = 256) -> Float[Tensor, "texts width"]:
        """Vectors of texts; what goes beyond CLIP's 77 tokens is cut off, as in the releases.

        Raises:
            ValueError: A text is empty.
        """
        if empty := [number for number, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"text {empty[0]} is empty: say what the person does")
        found = []
        for begin in range(0, len(texts), batch):
            part = list(texts[begin : begin + batch])
            most = self.model.config.max_position_embeddings
            ids = self.tokenizer(part, padding=True, truncation=True, max_length=most, return_tensors="pt")
            ids = ids.to(self.device)
            found.append(self.model(**ids).text_embeds.float())
        return torch.cat(found)
