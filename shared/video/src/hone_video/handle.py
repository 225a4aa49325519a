"""``attach_method`` and the handle that it gives back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, Self, TypeVar

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils.torch_utils import is_compiled_module
from hone_core.handles import CallState, Handle
from torch import Tensor, nn

from .attachment import Attachment, Method, Processor
from .families import FAMILIES
from .steps import Steps

__all__ = ["SUPPORTED", "LayerStats", "VideoHandle", "attach_kernel", "attach_method", "transformers_of"]

log = logging.getLogger(__name__)

C = TypeVar("C")
H = TypeVar("H", bound="VideoHandle[Any]")

SUPPORTED: tuple[type[nn.Module], ...] = tuple(family.base for family in FAMILIES)
"""Transformer classes that take a method."""

_SUPPORTED_TEXT = (
    "supported are "
    + ", ".join(kind.__name__ for kind in SUPPORTED)
    + " of diffusers, and pipelines whose transformer (and transformer_2) is one of them"
)


class LayerStats(NamedTuple):
    """Statistics of one self-attention call.

    ``step`` is the denoising step, ``call`` counts the model's forwards within it (0 and 1 where guidance makes two),
    ``layer`` the transformer block, and ``model`` is 1 for the second transformer of a Wan2.2 pipeline. ``stats`` is
    what the method measured.
    """

    step: int
    call: int
    model: int
    layer: int
    stats: Any


class VideoHandle(Handle[C], Generic[C]):
    """A method on a video transformer; a package derives its own handle from it, to have a name of its own.

    Args:
        models: The transformers: one, or both of a Wan2.2 pipeline.
        attachments: One for each.
    """

    def __init__(self, models: tuple[nn.Module, ...], attachments: tuple[Attachment, ...]) -> None:
        super().__init__(attachments[0].method.config, models)
        self._attachments, self._steps = attachments, attachments[0].steps

    @classmethod
    def of(cls, model_or_pipeline: Any) -> Self:
        """The handle of a model that something is attached to: of a deep copy, for example, which nobody attached.

        Raises:
            TypeError: The model's class is not supported.
            ValueError: Nothing is attached to it.
        """
        models = transformers_of(model_or_pipeline)
        attachments = []
        for model in models:
            processor = _family(model).self_attentions(model)[0].processor
            if not isinstance(processor, Processor) or not processor.attachment.attached:
                raise ValueError(f"nothing is attached to this {type(model).__name__}; call attach() first")
            attachments.append(processor.attachment)
        return cls(models, tuple(attachments))

    @property
    def attached(self) -> bool:
        """Whether the models have the method on them."""
        return all(attachment.attached for attachment in self._attachments)

    def detach(self) -> None:
        """Restore the models' own processors and remove every hook; outputs are bit for bit those of before.

        Detaching again does nothing. A processor that someone else installed meanwhile is left in place. Backward of a
        forward with gradient checkpointing has to come first, since it runs the blocks again.
        """
        for attachment, model in zip(self._attachments, self.models, strict=True):
            attachment.remove(model)

    def _states(self) -> Iterable[CallState[Any]]:
        return [attachment.state for attachment in self._attachments]

    @property
    def step(self) -> int:
        """The denoising step of this thread's latest forward, from 0; -1 before the first, or where nothing counts."""
        return self._steps.step

    def begin_step(self, step: int) -> None:
        """Say which denoising step this thread's coming forwards belong to, instead of counting timesteps.

        Without this call steps are counted where they are needed (by a method that goes by steps, or for statistics):
        forwards at the same timestep are one step, so guidance counts once, and a rising timestep starts a new video.
        That reads the timestep back from the device once per forward, and it does not suit training on random
        timesteps. With this call nothing is read, and a model compiles to one graph. It holds until ``reset()``.

        What no timestep shows is a new video that starts at or below the last timestep seen, as video-to-video does, or
        any run after one that was broken off: call ``reset()`` before it.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step counts from 0; got {step}")
        self._steps.set(step)

    def reset(self) -> None:
        """Forget the step: this thread's next forward is step 0 of a new video, counted by timesteps again.

        Only a video whose first timestep does not lie above the last one seen needs it, see ``begin_step``.
        """
        self._steps.reset()

    @contextmanager
    def record(self, **options: Any) -> Iterator[list[LayerStats]]:
        """Collect statistics of every call of the method's attention inside the block, in any thread.

        The list is filled when the block ends, with tensors on the model's device: nothing waits for the device before
        one of them is read, but for the step count (see ``begin_step``). Layers and forwards that run dense leave no
        entry. Meant for a model that is not compiled: recording costs a compiled one a graph per layer.

        Args:
            **options: Of the method's ``measure``.

        Raises:
            RuntimeError: The model is recorded already.
        """
        if any(attachment.recording is not None for attachment in self._attachments):
            raise RuntimeError("record() is open already; leave its block first, or read its list after it")
        result: list[LayerStats] = []
        with ExitStack() as stack:
            forwards = [stack.enter_context(attachment.record(**options)) for attachment in self._attachments]
            try:
                yield result
            finally:
                result.extend(
                    LayerStats(record.step, record.call, record.model, layer, stats)
                    for records in forwards
                    for record in records
                    for layer, stats in record.layers.items()
                )
                result.sort(key=lambda row: row[:4])


def attach_method(model_or_pipeline: Any, method: Method, handle: type[H]) -> H:
    """Give a video diffusion transformer a method's self-attention, until the handle's ``detach()``.

    Weights, state dict and cross-attention stay as they are. Any resolution, frame count and batch size works: the
    token grid is read off each forward's input. Works before or after ``torch.compile``, of the model or of its blocks,
    and with gradient checkpointing. A compiled model gets a graph per size: for more sizes than
    ``torch._dynamo.config.recompile_limit`` (8), raise that limit.

    A model that is attached keeps one order of tokens in all steps, dense ones too, so diffusers' caches on blocks may
    carry tensors from step to step; under such a cache ``disabled()`` keeps the order as well.

    Where steps are counted, a rising timestep tells a new video from the next step. A video that starts at or below the
    last timestep seen (video-to-video, or any run after one that was broken off) has to be announced:
    ``handle.reset()`` before it, or ``handle.begin_step(i)`` before each step.

    Args:
        model_or_pipeline: A model of a class in ``SUPPORTED`` (text-, image- or video-conditioned), or a pipeline that
            holds one; of a Wan2.2 pipeline both transformers, or a sequence of them. They count the steps of one
            video, which two that are attached one by one cannot: each would count its own.
        method: What to attach.
        handle: Class of the handle.

    Raises:
        TypeError: The model's class is not supported.
        ValueError: A method is attached already; a self-attention has a processor that is not the class's own;
            ring or tensor parallelism is on; ``dense_layers`` names a layer that the model does not have. In every case
            the model is untouched.
    """
    models = transformers_of(model_or_pipeline)
    for model in models:
        _family(model).check(model, method, _SUPPORTED_TEXT)
    steps = Steps(method.plan, method.plan_each)
    attachments = tuple(_family(model)(model, method, steps, index) for index, model in enumerate(models))
    made = handle(models, attachments)
    try:
        for attachment, model in zip(attachments, models, strict=True):
            attachment.apply(model)
    except BaseException:
        made.detach()
        raise
    log.debug("attached to %s: %s", ", ".join(type(model).__name__ for model in models), method.config)
    return made


class _Kernel(Method):
    """Dense attention by a given function, on tokens in their own order."""

    name, config = "another kernel", None

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.call = attend

    def plan(self, step: int, timestep: float | None) -> str:
        return "dense"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Tensor:
        return self.call(q, k, v)


def attach_kernel(model_or_pipeline: Any, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> VideoHandle[None]:
    """Give a transformer another kernel for its dense self-attention, to compare with; as ``attach_method``.

    Args:
        model_or_pipeline: As for ``attach_method``.
        attend: Of q, k, v ``[B, H, S, D]``, the attention of all queries over all keys, ``[B, H, S, D]``. No mask
            reaches it, so texts may not be padded.

    Raises:
        TypeError, ValueError: As ``attach_method``.
    """
    return attach_method(model_or_pipeline, _Kernel(attend), VideoHandle)


def transformers_of(model_or_pipeline: Any) -> tuple[nn.Module, ...]:
    """The transformers that ``attach_method`` would take of what it is given, without what ``torch.compile`` wraps.

    Args:
        model_or_pipeline: As for ``attach_method``.

    Raises:
        TypeError: It is, or holds, none of a class in ``SUPPORTED``.
        ValueError: One was given twice.
    """
    if isinstance(model_or_pipeline, DiffusionPipeline | ModularPipeline):
        found = [getattr(model_or_pipeline, name, None) for name in ("transformer", "transformer_2")]
        models = [model for model in found if model is not None]
        if not models:
            raise TypeError(f"{type(model_or_pipeline).__name__} holds no transformer; {_SUPPORTED_TEXT}")
    elif isinstance(model_or_pipeline, list | tuple) and model_or_pipeline:
        models = list(model_or_pipeline)
    else:
        models = [model_or_pipeline]
    models = [model._orig_mod if is_compiled_module(model) else model for model in models]
    for model in models:
        _family(model)
    if len(set(map(id, models))) < len(models):
        raise ValueError("one transformer was given twice; pass each once")
    return tuple(models)


def _family(model: Any) -> type[Attachment]:
    for family in FAMILIES:
        if isinstance(model, family.base):
            return family
    raise TypeError(f"cannot attach to {type(model).__name__}{_unwrapping(model)}; {_SUPPORTED_TEXT}")


def _unwrapping(model: Any) -> str:
    """What to pass instead of a wrapper, or a holder such as a tiny host, of a supported model."""
    if isinstance(getattr(model, "transformer", None), SUPPORTED):
        return f", which holds a {type(model.transformer).__name__}: pass its .transformer"
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, SUPPORTED):
                return f" around a {type(module).__name__}: pass the model inside, its .{path}"
    return ""
