"""MoMask as a pipeline: texts to motions, and edits of an interval, with published weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hone_core.errors import CheckpointError
from jaxtyping import Float
from torch import Tensor

from .checkpoints import load_published
from .decoding import guided, unmask
from .method import Condition
from .published import LengthEstimator, MaskTransformer, ResidualTransformer, refine
from .texts import ClipText
from .tokenizers import RVQVAE

__all__ = ["LONGEST", "MoMaskPipeline"]

LONGEST = 196
"""Frames that HumanML3D's motions have at most."""
_LEAST = 16


@dataclass
class MoMaskPipeline:
    """Texts to features of HumanML3D.

    Attributes:
        tokenizer: Motion to six levels of tokens and back.
        mask: Of the first level.
        residual: Of the others.
        text: Texts to CLIP's vectors ``[B, 512]``.
        mean: ``[263]`` that the tokenizer's features were normalised with, its ``meta/mean.npy``; not the evaluator's.
        std: ``[263]`` likewise.
        length: Frames of a text; None: they have to be given.
    """

    tokenizer: RVQVAE
    mask: MaskTransformer
    residual: ResidualTransformer
    text: Callable[[Sequence[str]], Tensor]
    mean: Float[Tensor, " width"]
    std: Float[Tensor, " width"]
    length: LengthEstimator | None = None

    @classmethod
    def from_files(
        cls,
        *,
        tokenizer: Path,
        mask: Path,
        residual: Path,
        clip: Path,
        meta: Path,
        length: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> MoMaskPipeline:
        """Read the authors' files, or those that ``convert`` made of them.

        Args:
            tokenizer: ``net_best_fid.tar`` of the RVQ-VAE.
            mask: ``latest.tar`` of the masked transformer.
            residual: ``net_best_fid.tar`` of the residual transformer.
            clip: Folder of CLIP's text model and tokenizer.
            meta: Folder with the tokenizer's ``mean.npy`` and ``std.npy``.
            length: ``finest.tar`` of the length estimator.
            device: Where.

        Raises:
            FileNotFoundError: A file is missing.
            CheckpointError: One is damaged, or another one.
        """
        numbers = {}
        for name in ("mean", "std"):
            path = meta / f"{name}.npy"
            if not path.is_file():
                raise FileNotFoundError(f"there is no {path}")
            numbers[name] = torch.from_numpy(np.load(path, allow_pickle=False)).float().to(device)
            if numbers[name].shape != (263,) or not bool(torch.isfinite(numbers[name]).all()):
                raise CheckpointError(f"{path} must hold 263 finite numbers; got {list(numbers[name].shape)}")
        parts: dict[str, Any] = {
            name: load_published(f"momask-{name}", path).to(device)
            for name, path in (("tokenizer", tokenizer), ("mask", mask), ("residual", residual))
        }
        estimator: Any = None if length is None else load_published("momask-length", length).to(device)
        mean, std = numbers["mean"], numbers["std"]
        return cls(**parts, text=ClipText(clip, device), mean=mean, std=std, length=estimator)

    @torch.no_grad()
    def __call__(
        self,
        texts: Sequence[str],
        frames: Sequence[int] | None = None,
        *,
        seed: int = 0,
        steps: int = 10,
        guidance: float = 4.0,
        residual_guidance: float = 5.0,
        temperature: float = 1.0,
    ) -> list[Float[Tensor, "frames 263"]]:
        """One motion for each text.

        Args:
            texts: What the person does.
            frames: Of each, a multiple of 4 from 16 to 196; None: drawn by the length estimator.
            seed: Of the draws.
            steps: Passes of the masked transformer.
            guidance: Of the masked transformer.
            residual_guidance: Of the residual one.
            temperature: Of the draws of both.

        Raises:
            ValueError: A text is empty, a length is none, or lengths are missing without an estimator.
        """
        condition = Condition(text=self.text(texts))
        generator = torch.Generator(self.mean.device).manual_seed(seed)
        if frames is None:
            if self.length is None:
                raise ValueError("say how many frames each motion has, or give the pipeline a length estimator")
            assert condition.text is not None
            frames = self.length.draw(condition.text, generator).clamp(_LEAST, LONGEST).tolist()
        wrong = [count for count in frames if count % 4 or not _LEAST <= count <= LONGEST]
        if wrong or len(frames) != len(texts):
            raise ValueError(
                f"expected a multiple of 4 from {_LEAST} to {LONGEST} for each of {len(texts)} texts; got "
                f"{list(frames)}"
            )
        counts = torch.tensor(list(frames), device=self.mean.device) // 4
        valid = torch.arange(int(counts.max()), device=self.mean.device)[None] < counts[:, None]
        ids = unmask(
            lambda now: guided(self.mask, now, condition, valid, guidance, 1.0),  # type: ignore[arg-type]
            valid,
            1,
            self.mask.mask_id,
            generator,
            steps=steps,
            temperature=temperature,
        )
        return self._decoded(ids, condition, valid, generator, residual_guidance, temperature)

    @torch.no_grad()
    def edit(
        self,
        features: Float[Tensor, "frames 263"],
        text: str,
        seconds: tuple[float, float],
        *,
        seed: int = 0,
        steps: int = 10,
        guidance: float = 4.0,
        residual_guidance: float = 5.0,
        temperature: float = 1.0,
    ) -> Float[Tensor, "frames 263"]:
        """The motion with an interval made anew: in-betweening, prolongation, another action.

        Tokens outside stay as they are at the first level; the further levels are drawn anew, as in the release.

        Args:
            features: Of a multiple of 4 frames.
            text: What happens in the interval.
            seconds: Its start and end.
            seed: Of the draws.
            steps: Passes of the masked transformer.
            guidance: Of the masked transformer.
            residual_guidance: Of the residual one.
            temperature: Of the draws of both.

        Raises:
            ValueError: The interval lies outside the motion, or the number of frames is no multiple of 4.
        """
        count = len(features)
        if count % 4 or not 0 <= seconds[0] < seconds[1] <= count / 20:
            raise ValueError(
                f"expected a multiple of 4 frames and an interval within {count / 20:g} s; got {count} and {seconds}"
            )
        known, _ = self.tokenizer.encode(((features.to(self.mean) - self.mean) / self.std)[None])
        start = known[..., :1]
        made = torch.zeros_like(start, dtype=torch.bool)
        made[:, int(seconds[0] * 5) : -int(-seconds[1] * 5 // 1)] = True
        condition = Condition(text=self.text([text]))
        valid = torch.ones_like(start[..., 0], dtype=torch.bool)
        generator = torch.Generator(self.mean.device).manual_seed(seed)
        ids = unmask(
            lambda now: guided(self.mask, now, condition, valid, guidance, 1.0),  # type: ignore[arg-type]
            valid,
            1,
            self.mask.mask_id,
            generator,
            steps=steps,
            temperature=temperature,
            start=start,
            edit=made,
        )
        return self._decoded(ids, condition, valid, generator, residual_guidance, temperature)[0]

    def _decoded(
        self, ids: Tensor, condition: Condition, valid: Tensor, generator: torch.Generator, scale: float, heat: float
    ) -> list[Tensor]:
        """Features of each row, decoded by itself: in the release, padding reaches into the end of a shorter motion."""
        levels = refine(self.residual, ids, condition, valid, generator, guidance=scale, temperature=heat)
        rows = [row[there, 0][None] for row, there in zip(levels, valid, strict=True)]
        return [self.tokenizer.forward_decoder(row)[0] * self.std + self.mean for row in rows]
