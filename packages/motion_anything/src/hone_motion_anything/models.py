"""How the method enters a masked motion transformer: it chooses which tokens a training hides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from hone_core.handles import CallState, Handle, resolve
from torch import Tensor, nn

from .conditions import check_tokens
from .config import PRESETS, HostConfig, MotionAnythingConfig, TransformerConfig
from .masking import choose_masks, cosine_mask, inside, refuse_recomputation
from .method import Condition, MotionTransformer

__all__ = ["AttentionMasking", "Maskable", "MotionAnythingHandle", "attach", "draw_mask", "tiny"]


@runtime_checkable
class Maskable(Protocol):
    """A masked transformer that the method can be on, such as ``MotionTransformer``."""

    masking: Any
    mask_id: int
    pad_id: int

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
        model: A ``Maskable``, also one that peft, ``torch.compile`` or ``DistributedDataParallel`` wrapped.
        ids: Tokens ``[B, T, P]``, of codes where a time step is there.
        condition: Of the batch.
        valid: Time steps ``[B, T]`` that are there, one at least of each row.
        generator: On their device.
        events: Known cells ``[B, T, P]``, for the control that hides them.

    Raises:
        TypeError: The model is no ``Maskable``, or an argument is of another type or dtype.
        ValueError: A shape, a device or an id does not fit, or a row has no time step.
        RuntimeError: Gradient checkpointing runs it again.
    """
    refuse_recomputation("draw_mask")
    own = inside(model)
    if not isinstance(own, Maskable):
        raise TypeError(_no_maskable(model))
    _check_batch(own, ids, condition, valid, generator, events)
    masking = own.masking
    if masking is None or masking.state.disabled:
        return cosine_mask(valid, ids.shape[-1], generator), valid.new_zeros(len(valid))
    return masking(own, ids, condition, valid, generator, events)


def _no_maskable(model: Any) -> str:
    return f"{type(model).__name__} is no masked motion transformer: it needs scores(), masking, mask_id and pad_id"


def _check_batch(model: Maskable, ids: Any, condition: Any, valid: Any, generator: Any, events: Any) -> None:
    """Refuse what is no batch of tokens with its condition."""
    given = {"ids": (ids, Tensor), "condition": (condition, Condition), "valid": (valid, Tensor)}
    given["generator"] = (generator, torch.Generator)
    if events is not None:
        given["events"] = (events, Tensor)
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
    check_tokens(ids, valid)
    if events is not None and (events.shape != ids.shape or events.dtype != torch.bool or events.device != ids.device):
        raise ValueError(
            f"events must be bool {list(ids.shape)} on {ids.device}, as ids are; got {events.dtype} "
            f"{list(events.shape)} on {events.device}"
        )
    if condition.batch != len(ids):
        raise ValueError(f"the condition has {condition.batch} rows and ids have {len(ids)}; give one for each")
    if generator.device.type != ids.device.type:
        raise ValueError(
            f"the generator draws on {generator.device} and ids are on {ids.device}; make it with "
            f"torch.Generator({str(ids.device)!r})"
        )
    # Out of range an embedding's kernel on a GPU would end the process's use of it.
    wrong = (ids < 0) | (ids > model.pad_id) | (valid[..., None] & (ids >= model.mask_id))
    ended, empty = torch.stack([wrong.any(), (~valid.any(1)).any()]).tolist()
    if ended:
        row, time, part = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"ids must be codes from 0 to {model.mask_id - 1} where a time step is there, and past the end at most "
            f"{model.pad_id}, padding's; row {row}, time step {time}, part {part} has {int(ids[row, time, part])}"
        )
    if empty:
        row = int((~valid.any(1)).nonzero()[0])
        raise ValueError(f"row {row} of valid has no time step: leave empty motions out of the batch")


class MotionAnythingHandle(Handle[MotionAnythingConfig]):
    """The method on a transformer.

    Attributes:
        masking: What chooses the tokens.
    """

    def __init__(self, model: Any, masking: AttentionMasking) -> None:
        super().__init__(masking.config, [model])
        self.masking = masking
        self._model = model

    @classmethod
    def of(cls, model: Any) -> MotionAnythingHandle:
        """The handle of what is on a model: a copy, or a model that was saved whole and loaded, has the method too.

        Raises:
            ValueError: It has none.
        """
        own = inside(model)
        if not isinstance(getattr(own, "masking", None), AttentionMasking):
            raise ValueError(f"nothing is attached to this {type(own).__name__}: call attach() first")
        return cls(own, own.masking)

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
        model: A ``MotionTransformer``, or another ``Maskable``; of what peft, ``torch.compile`` or
            ``DistributedDataParallel`` wrapped, the model inside gets the method.
        config: A preset's name, or settings.

    Raises:
        ValueError: There is no such preset, or the model has the method already.
        TypeError: The model cannot say what it attends to.
    """
    config = resolve(config, PRESETS, MotionAnythingConfig)
    own = inside(model)
    if not isinstance(own, nn.Module) or not isinstance(own, Maskable):
        raise TypeError(_no_maskable(model))
    if own.masking is not None:
        raise ValueError(
            "the model has the method already: detach() its handle first, which of a copy or a loaded model is "
            "MotionAnythingHandle.of(model)"
        )
    own.masking = AttentionMasking(config)
    return MotionAnythingHandle(own, own.masking)


def tiny(config: TransformerConfig | None = None, *, seed: int = 0) -> MotionTransformer:
    """The tiny host's transformer with random weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MotionTransformer(config or HostConfig().transformer).eval()
