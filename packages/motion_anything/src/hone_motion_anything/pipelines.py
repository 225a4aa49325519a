"""Pipelines: MoMask and MoGenTS with published weights, Motion Anything with weights that ``train`` wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from hone_core.errors import CheckpointError
from jaxtyping import Float, Int
from torch import Tensor

from .checkpoints import load_published
from .config import UnmaskConfig
from .decoding import Passes, check_finite, draw_motion, edited, passes, unmask
from .method import Condition, MotionTransformer
from .mogents import COLUMNS, MoGenTSTokenizer
from .music import music_features, pooled
from .published import (
    LengthEstimator,
    MaskTransformer,
    MaskTransformer2D,
    ResidualTransformer,
    ResidualTransformer2D,
    refine,
)
from .skeletons import PARTS
from .texts import ClipText
from .tokenizers import RVQVAE, PartTokenizer

__all__ = ["LONGEST", "MoGenTSPipeline", "MoMaskPipeline", "MotionAnythingPipeline"]

LONGEST = 196
"""Frames that HumanML3D's motions have at most."""
_LEAST = 16


class _Pipeline:
    """What both share: every stream of tokens is drawn from the text alone, and one decoder joins them."""

    text: Callable[[Sequence[str]], Tensor]
    mean: Tensor
    std: Tensor
    length: LengthEstimator | None
    whole = False
    """Whether every grid is as long as the longest motion."""

    def streams(self) -> list[tuple[Any, Any, int]]:
        """Masked transformer, residual one and columns of each kind of tokens."""
        raise NotImplementedError

    def encode(self, normal: Float[Tensor, "1 frames width"]) -> list[Int[Tensor, "1 time parts levels"]]:
        """Tokens of each stream."""
        raise NotImplementedError

    def decode(self, levels: list[Int[Tensor, "1 time parts levels"]]) -> Float[Tensor, "1 frames width"]:
        """Normalised features of the tokens of one motion."""
        raise NotImplementedError

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
            steps: Passes of the masked transformers.
            guidance: Of the masked transformers.
            residual_guidance: Of the residual ones.
            temperature: Of the draws of both.

        Raises:
            TypeError: Texts are one string.
            ValueError: There is no text, one is empty, a length is none, or lengths are missing without an estimator.
        """
        if not _listed(texts):
            raise ValueError("expected at least one text; got none")
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
        valid = self._valid([count // 4 for count in frames])
        options: dict[str, Any] = {"steps": steps, "temperature": temperature}
        return self._made(condition, valid, generator, guidance, residual_guidance, options)

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
            steps: Passes of the masked transformers.
            guidance: Of the masked transformers.
            residual_guidance: Of the residual ones.
            temperature: Of the draws of both.

        Raises:
            ValueError: The interval lies outside the motion, or the number of frames is no multiple of 4 up to 196.
        """
        count = len(features)
        if count % 4 or count > LONGEST or not 0 <= seconds[0] < seconds[1] <= count / 20:
            raise ValueError(
                f"expected a multiple of 4 frames up to {LONGEST} and an interval within {count / 20:g} s; got {count} "
                f"and {seconds}"
            )
        known = self.encode(((features.to(self.mean) - self.mean) / self.std)[None])
        valid = self._valid([count // 4])
        # What stands past the end is not looked at.
        known = [F.pad(stream, (0, 0, 0, 0, 0, valid.shape[1] - stream.shape[1])) for stream in known]
        made = torch.zeros_like(valid)
        made[:, int(seconds[0] * 5) : -int(-seconds[1] * 5 // 1)] = True
        condition = Condition(text=self.text([text]))
        generator = torch.Generator(self.mean.device).manual_seed(seed)
        options: dict[str, Any] = {"steps": steps, "temperature": temperature}
        return self._made(condition, valid, generator, guidance, residual_guidance, options, known, made)[0]

    def _valid(self, counts: Sequence[int]) -> Tensor:
        """Time steps ``[B, T]`` that are there."""
        steps = LONGEST // 4 if self.whole else max(counts)
        device = self.mean.device
        return torch.arange(steps, device=device)[None] < torch.tensor(counts, device=device)[:, None]

    def _made(
        self,
        condition: Condition,
        valid: Tensor,
        generator: torch.Generator,
        guidance: float,
        residual_guidance: float,
        options: dict[str, Any],
        known: list[Tensor] | None = None,
        made: Tensor | None = None,
    ) -> list[Tensor]:
        """Features of each row, decoded by itself: in the releases padding reaches into the end of a shorter one.

        Raises:
            ValueError: A guidance or the temperature is not finite, or there is no step.
            RuntimeError: A transformer's logits are not finite.
        """
        for strength in (guidance, residual_guidance):
            UnmaskConfig(**options, text_guidance=strength)
        levels = []
        for number, (mask, residual, parts) in enumerate(self.streams()):
            edit: dict[str, Any] = {}
            if known is not None and made is not None:
                start = known[number][..., 0]
                edit = {"start": start, "edit": made[..., None].expand_as(start)}

            last: list[Tensor] = []

            def asked(ids: Tensor, model: Any = mask, last: list[Tensor] = last) -> Passes:
                found = passes(model, ids, condition, valid, guidance, 1.0)
                last[:] = [found.logits]
                return found

            ids = unmask(asked, valid, parts, mask.mask_id, generator, **options, **edit)
            check_finite(last[0], valid)
            more: dict[str, Any] = {"guidance": residual_guidance, "temperature": options["temperature"]}
            levels.append(refine(residual, ids, condition, valid, generator, last=last, **more))
            check_finite(last[0], valid)
        rows = [[stream[row, there][None] for stream in levels] for row, there in enumerate(valid)]
        return [self.decode(row)[0] * self.std + self.mean for row in rows]


@dataclass
class MoMaskPipeline(_Pipeline):
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
    ) -> Self:
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
        numbers = _statistics(meta, device)
        paths = {"tokenizer": tokenizer, "mask": mask, "residual": residual}
        parts = {name: load_published(f"momask-{name}", path).to(device) for name, path in paths.items()}
        return cls(**parts, **numbers, text=ClipText(clip, device), length=_estimator(length, device))  # type: ignore[arg-type]

    def streams(self) -> list[tuple[Any, Any, int]]:
        """See ``_Pipeline``."""
        return [(self.mask, self.residual, 1)]

    def encode(self, normal: Tensor) -> list[Tensor]:
        """See ``_Pipeline``."""
        return [self.tokenizer.encode(normal)[0][:, :, None]]

    def decode(self, levels: list[Tensor]) -> Tensor:
        """See ``_Pipeline``."""
        return self.tokenizer.forward_decoder(levels[0][:, :, 0])


@dataclass
class MoGenTSPipeline(_Pipeline):
    """Texts to features of HumanML3D, by tokens of whole frames and tokens of time and six columns.

    Differs: a temperature acts on the draws of the first level; in the release it is lost there. Every grid has 49 time
    steps, as all had in training: its residual transformer mixes time steps by the grid's length, and in the release
    a motion changes with the longest one of its batch.

    Attributes:
        tokenizer: Motion to both streams and back.
        mask_aux: Of the frames' first level.
        residual_aux: Of their others.
        mask: Of the columns' first level.
        residual: Of their others.
        text: Texts to CLIP's vectors ``[B, 512]``.
        mean: ``[263]`` that the tokenizer's features were normalised with; not the evaluator's.
        std: ``[263]`` likewise.
        length: Frames of a text, MoMask's; None: they have to be given.
    """

    tokenizer: MoGenTSTokenizer
    mask_aux: MaskTransformer
    residual_aux: ResidualTransformer
    mask: MaskTransformer2D
    residual: ResidualTransformer2D
    text: Callable[[Sequence[str]], Tensor]
    mean: Float[Tensor, " width"]
    std: Float[Tensor, " width"]
    length: LengthEstimator | None = None
    whole = True

    @classmethod
    def from_files(
        cls,
        *,
        tokenizer: Path,
        masks: Path,
        residuals: Path,
        clip: Path,
        meta: Path,
        length: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read the authors' files, each of which holds both streams.

        Args:
            tokenizer: ``pretrain_vq/model/net_best_fid.tar``.
            masks: ``pretrain_mtrans/model/net_best_fid.tar``.
            residuals: ``pretrain_rtrans/model/net_best_fid.tar``.
            clip: Folder of CLIP's text model and tokenizer.
            meta: Folder with the tokenizer's ``mean.npy`` and ``std.npy``.
            length: ``finest.tar`` of MoMask's length estimator.
            device: Where.

        Raises:
            FileNotFoundError: A file is missing.
            CheckpointError: One is damaged, or another one.
        """
        numbers = _statistics(meta, device)
        paths = {
            "tokenizer": tokenizer,
            "mask-aux": masks,
            "mask": masks,
            "residual-aux": residuals,
            "residual": residuals,
        }
        parts = {
            name.replace("-", "_"): load_published(f"mogents-{name}", path).to(device) for name, path in paths.items()
        }
        return cls(**parts, **numbers, text=ClipText(clip, device), length=_estimator(length, device))  # type: ignore[arg-type]

    def streams(self) -> list[tuple[Any, Any, int]]:
        """See ``_Pipeline``."""
        return [(self.mask_aux, self.residual_aux, 1), (self.mask, self.residual, COLUMNS)]

    def encode(self, normal: Tensor) -> list[Tensor]:
        """See ``_Pipeline``."""
        frames, columns = self.tokenizer.encode(normal)
        return [frames[:, :, None], columns]

    def decode(self, levels: list[Tensor]) -> Tensor:
        """See ``_Pipeline``."""
        return self.tokenizer.forward_decoder(levels[0][:, :, 0], levels[1])


@dataclass
class MotionAnythingPipeline:
    """Texts, music or both to features of HumanML3D, with what ``train`` wrote.

    Attributes:
        tokenizer: Motion to tokens of time and part of the body, and back.
        transformer: Masked transformer with the method.
        text: Texts to CLIP's vectors ``[B, D]``; None: music alone is followed.
        length: Frames of a text, MoMask's; None: they have to be given, or the music says them.
    """

    tokenizer: PartTokenizer
    transformer: MotionTransformer
    text: Callable[[Sequence[str]], Tensor] | None = None
    length: LengthEstimator | None = None

    @classmethod
    def from_files(
        cls,
        *,
        tokenizer: Path,
        transformer: Path,
        clip: Path | None = None,
        length: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read weights.

        Args:
            tokenizer: ``tokenizer.safetensors`` of ``train --stage tokenizer``.
            transformer: ``transformer.safetensors`` of ``train --stage transformer``.
            clip: Folder of CLIP's text model and tokenizer, the one that was trained with.
            length: ``finest.tar`` of MoMask's length estimator.
            device: Where.

        Raises:
            CheckpointError: A file is missing, damaged or another one.
        """
        from .finetune import load_tokenizer, load_transformer

        return cls(
            load_tokenizer(tokenizer, device),
            load_transformer(transformer, device),
            None if clip is None else ClipText(clip, device),
            _estimator(length, device),
        )

    @torch.no_grad()
    def __call__(
        self,
        texts: Sequence[str] = (),
        frames: Sequence[int] | None = None,
        *,
        music: Float[Tensor, " samples"] | None = None,
        seed: int = 0,
        settings: UnmaskConfig | None = None,
    ) -> list[Float[Tensor, "frames 263"]]:
        """One motion for each text, all to the same music; without texts one to the music.

        Args:
            texts: What the person does.
            frames: Of each, a multiple of 4; None: as long as the music, else drawn by the length estimator.
            music: One channel in [-1, 1] at ``music.RATE`` samples a second, from the first frame on.
            seed: Of the draws.
            settings: Of the generation.

        Raises:
            TypeError: Texts are one string.
            ValueError: There is nothing to follow, a text is empty, a length is none, or the music is shorter.
        """
        texts = _listed(texts)
        heard = None if music is None else pooled(music_features(music, 20))
        condition = self._condition(texts, heard)
        generator = torch.Generator(self._device).manual_seed(seed)
        most = self.transformer.cfg.max_tokens
        if frames is None and heard is not None:
            frames = [4 * min(len(heard), most)] * condition.batch
        elif frames is None:
            if self.length is None:
                raise ValueError("say how many frames each motion has, or give the pipeline a length estimator")
            assert condition.text is not None
            frames = self.length.draw(condition.text, generator).clamp(_LEAST, 4 * most).tolist()
        if len(frames) != condition.batch or any(count % 4 or not 4 <= count <= 4 * most for count in frames):
            raise ValueError(
                f"expected a multiple of 4 up to {4 * most} for each of {condition.batch} motions; got {list(frames)}"
            )
        counts = torch.tensor(list(frames), device=self._device) // 4
        valid = torch.arange(int(counts.max()), device=self._device)[None] < counts[:, None]
        ids = draw_motion(self.transformer, condition, valid, generator, settings)
        return [self.tokenizer.decode(row[there][None])[0] for row, there in zip(ids, valid, strict=True)]

    @torch.no_grad()
    def edit(
        self,
        features: Float[Tensor, "frames 263"],
        text: str | None = None,
        *,
        seconds: tuple[float, float] | None = None,
        parts: Sequence[str] = (),
        music: Float[Tensor, " samples"] | None = None,
        seed: int = 0,
        settings: UnmaskConfig | None = None,
    ) -> Float[Tensor, "frames 263"]:
        """The motion with an interval, some parts of the body, or both made anew.

        Tokens outside stay, and with them the columns that they decode to, but for a few frames beside the interval.

        Args:
            features: Of a multiple of 4 frames.
            text: What happens there.
            seconds: Start and end; all of it if None: an edit by part.
            parts: Of ``skeletons.PARTS``; all if none is named: in-betweening.
            music: As for a call.
            seed: Of the draws.
            settings: Of the generation.

        Raises:
            ValueError: The interval lies outside the motion, there is no such part, or as for a call.
        """
        count, most = len(features), 4 * self.transformer.cfg.max_tokens
        first, last = seconds or (0.0, count / 20)
        if count % 4 or not 4 <= count <= most or not 0 <= first < last <= count / 20:
            raise ValueError(
                f"expected a multiple of 4 frames up to {most} and an interval within {count / 20:g} s; got {count} "
                f"and {seconds}"
            )
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"no part {', '.join(unknown)}; they are {', '.join(PARTS)}")
        heard = None if music is None else pooled(music_features(music, 20))
        condition = self._condition([] if text is None else [text], heard)
        start = self.tokenizer.encode(features.to(self._device)[None])
        valid = torch.ones_like(start[..., 0], dtype=torch.bool)
        made = edited(count // 4, (first, last), parts).to(self._device)
        generator = torch.Generator(self._device).manual_seed(seed)
        ids = draw_motion(self.transformer, condition, valid, generator, settings, start=start, edit=made)
        return self.tokenizer.decode(ids)[0]

    @property
    def _device(self) -> torch.device:
        return self.tokenizer.mean.device

    def _condition(self, texts: Sequence[str], heard: Tensor | None) -> Condition:
        if not texts and heard is None:
            raise ValueError("say what to make: texts, music, or both")
        if texts and self.text is None:
            raise ValueError("the pipeline has no CLIP to read texts with: give it one, or music alone")
        said = self.text(texts) if texts and self.text is not None else None
        if heard is None:
            return Condition(text=said)
        many = max(1, len(texts))
        return Condition(text=said, music=heard.to(self._device)[None].expand(many, -1, -1))


def _listed(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list, a motion for each; got one string. Pass [{texts[:40]!r}]")
    return texts


def _statistics(meta: Path, device: torch.device | str) -> dict[str, Tensor]:
    numbers = {}
    for name in ("mean", "std"):
        path = meta / f"{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        numbers[name] = torch.from_numpy(np.load(path, allow_pickle=False)).float().to(device)
        if numbers[name].shape != (263,) or not bool(torch.isfinite(numbers[name]).all()):
            raise CheckpointError(f"{path} must hold 263 finite numbers; got {list(numbers[name].shape)}")
    return numbers


def _estimator(path: Path | None, device: torch.device | str) -> Any:
    return None if path is None else load_published("momask-length", path).to(device)
