"""How the method enters a masked motion transformer: it chooses which tokens a training hides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from hone_core.handles import CallState, Handle, resolve
from torch import Tensor, nn

from .config import PRESETS, HostConfig, MotionAnythingConfig, TransformerConfig
from .masking import choose_masks, cosine_mask
from .method import Condition, MotionTransformer

__all__ = ["AttentionMasking", "Maskable", "MotionAnythingHandle", "attach", "draw_mask", "tiny"]


@runtime_checkable
class Maskable(Protocol):
    """A masked transformer that the method can be on, such as ``MotionTransformer``."""

    masking: Any

    def scores(self, ids: Tensor, condition: Condition, valid: Tensor, rows: str) -> tuple[Tensor, Tensor]:
        """Attention of time steps ``[B, T]`` and of parts ``[B, T, P]``."""


class AttentionMasking:
    """What ``attach`` puts on a transformer.

    Args:
        config: Of the method.
    """

    def __init__(self, config: MotionAnythingConfig) -> None:
        self.config = config
        self.state: CallState[None] = CallState()

    def __call__(
        self,
        model: Any,
        ids: Tensor,
        condition: Condition,
        valid: Tensor,
        generator: torch.Generator,
        events: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``draw_mask``."""
        config = self.config
        return choose_masks(
            config,
            lambda: model.scores(ids, condition, valid, config.score_rows),
            valid,
            generator,
            events,
            parts=ids.shape[-1],
        )


def draw_mask(
    model: Any,
    ids: Tensor,
    condition: Condition,
    valid: Tensor,
    generator: torch.Generator,
    events: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, T, P]`` that a training step hides, and the rows ``[B]`` whose mask is the method's.

    By what ``attach`` put on the model; without it by MoMask's cosine ratio.

    Args:
        model: A ``Maskable``.
        ids: Tokens ``[B, T, P]``.
        condition: Of the batch.
        valid: Time steps ``[B, T]`` that are there.
        generator: On their device.
        events: Known cells, for the control that hides them.
    """
    masking = model.masking
    if masking is None or masking.state.disabled:
        return cosine_mask(valid, ids.shape[-1], generator), valid.new_zeros(len(valid))
    return masking(model, ids, condition, valid, generator, events)


class MotionAnythingHandle(Handle[MotionAnythingConfig]):
    """The method on a transformer.

    Attributes:
        masking: What chooses the tokens.
    """

    def __init__(self, model: Any, masking: AttentionMasking) -> None:
        super().__init__(masking.config, [model])
        self.masking = masking
        self._model = model

    @property
    def attached(self) -> bool:
        """Whether the transformer's trainings hide what the method chooses."""
        return self._model.masking is self.masking

    def detach(self) -> None:
        """Let trainings hide tokens at random again."""
        if self.attached:
            self._model.masking = None

    def _states(self) -> Iterable[CallState[Any]]:
        return [self.masking.state]


def attach(model: Any, config: str | MotionAnythingConfig = "default") -> MotionAnythingHandle:
    """Let the method choose which tokens a training of the model hides.

    Args:
        model: A ``MotionTransformer``, or another ``Maskable``.
        config: A preset's name, or settings.

    Raises:
        ValueError: There is no such preset, or the model has the method already.
        TypeError: The model cannot say what it attends to.
    """
    config = resolve(config, PRESETS, MotionAnythingConfig)
    if not isinstance(model, nn.Module) or not isinstance(model, Maskable):
        raise TypeError(f"{type(model).__name__} is no masked motion transformer: it needs scores() and masking")
    if model.masking is not None:
        raise ValueError("the model has the method already: detach() its handle first")
    model.masking = AttentionMasking(config)
    return MotionAnythingHandle(model, model.masking)


def tiny(config: TransformerConfig | None = None, *, seed: int = 0) -> MotionTransformer:
    """The tiny host's transformer with random weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MotionTransformer(config or HostConfig().transformer).eval()
