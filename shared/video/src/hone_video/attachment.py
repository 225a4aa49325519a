"""How a method's self-attention enters a video transformer of diffusers.

A video transformer treats its tokens as a set everywhere but in self-attention and in the position tables, so the
tokens are put in the method's order once per forward, before the first block, and the output is put back at the end. In
between only the self-attention processors are replaced.

Nothing that belongs to one forward is kept on a module. What a block needs to know about the forward it runs in
travels with the rotary tables that the model hands to every block. So a block that is run again later, as gradient
checkpointing does, runs with what it had the first time, whatever was called in between, and two threads keep apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hone_core.handles import CallState, Hooks
from torch import Tensor, nn

from .grids import Grid, Order
from .orders import token_order
from .parallel import refusal
from .steps import Steps

__all__ = ["Attachment", "Forward", "Method", "Processor", "Recorded", "Tables", "fixed_size", "reorder_patches"]


class Method(ABC):
    """What a package plugs into a transformer: how self-attention is computed, in which order of tokens.

    One instance serves all layers, threads and transformers that it is attached to, so it keeps nothing of a forward.

    Attributes:
        name: In messages.
        config: The settings, as the handle shows them.
        order: Order of the video tokens that ``attend`` gets.
        tile: Of ``order="tile"``.
        counts_steps: Whether ``plan`` depends on the step. Counting reads the timestep back from the device once per
            forward, unless the caller says the step.
        dense_layers: Layers that keep the model's own attention, from 0.
        min_tokens: Forwards on shorter sequences run as if nothing were attached.
        rotates: Whether ``attend`` does the rotary embedding itself: it then gets ``rope`` too, a pair as in
            ``Tables.rope`` and q and k before it, or None where they are rotated already or the model has none.
    """

    name: ClassVar[str]
    config: Any
    order: Order = "raster"
    tile: Grid = (4, 4, 8)
    counts_steps: bool = False
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 0
    rotates: bool = False

    @abstractmethod
    def plan(self, step: int, timestep: float | None) -> Any:
        """How the forwards of a step run; None for the model's own attention, on tokens in ``order`` all the same.

        A compiled graph is specialised on what this returns, so there should be few values.

        Args:
            step: From 0; 0 where nothing counts.
            timestep: The largest of the step; None where it was not read.
        """

    def plan_each(self, timesteps: Sequence[float]) -> Any:
        """How a forward runs whose samples are at different times, as in training.

        Args:
            timesteps: One for each sample; of a sample with a time for each token, the largest.

        Raises:
            ValueError: The method goes by the denoising step, which such samples do not share.
        """
        raise ValueError(
            f"the samples of this batch are at different timesteps, from {min(timesteps):g} to {max(timesteps):g}, and "
            f"{self.name} goes by the denoising step, which they must share; call handle.begin_step(i) to say which "
            "step it is, or pass them one by one"
        )

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, plan: Any, layer: int | Tensor, grid: Grid, text_tokens: int
    ) -> Tensor:
        """Attention of one layer.

        Args:
            q: ``[B, H, S, D]`` after norms and rotary embedding: video tokens in ``order``, then the text. Nobody reads
                it afterwards, so where no gradient is recorded its memory may be written to.
            k: Likewise.
            v: Likewise.
            plan: Of this forward; not None.
            layer: From 0; a tensor in a compiled block, which serves all layers with one graph.
            grid: Video tokens along (frames, height, width).
            text_tokens: Text tokens at the end of the sequence; 0 where text has its own cross-attention.

        Returns:
            Like q.
        """

    def measure(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: Any,
        layer: int | Tensor,
        grid: Grid,
        text_tokens: int,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """``attend`` with statistics of the call, for a handle's ``record(**options)``."""
        raise TypeError(f"{self.name} keeps no statistics of its attention; got a call of record()")


@dataclass
class Recorded:
    """Statistics of one forward.

    Attributes:
        step: Denoising step.
        call: Counts the recorded forwards within the step.
        model: Which transformer, from 0.
        options: Of ``record``.
        layers: Layer to what ``Method.measure`` said.
    """

    step: int
    call: int
    model: int
    options: dict[str, Any]
    layers: dict[int, Any] = field(default_factory=dict)


@dataclass
class Forward:
    """What one forward needs to know.

    Attributes:
        grid: Video tokens along (frames, height, width).
        text_tokens: Text tokens within self-attention.
        plan: From ``Method.plan``; None for the model's own attention.
        order: Of the video tokens.
        tile: Of ``order="tile"``.
        record: Where statistics go, or None.
        traced: Whether a compiler sees the whole model, not a block alone.
    """

    grid: Grid
    text_tokens: int
    plan: Any
    order: Order
    tile: Grid
    record: Recorded | None
    traced: bool

    @property
    def reorders(self) -> bool:
        """Whether the tokens have another order than the model's own."""
        return self.order != "raster"

    def permutation(self, device: torch.device, *, inverse: bool = False) -> Tensor:
        """Raster index of the token at each position, or with ``inverse`` the position of each; int64 ``[N]``."""
        return token_order(self.order, *self.grid, device=device, tile=self.tile, inverse=inverse)

    def sort(self, x: Tensor, dim: int) -> Tensor:
        """Video tokens along an axis, from raster order into this forward's."""
        return x.index_select(dim, self.permutation(x.device)) if self.reorders else x


class Tables:
    """The rotary tables of a forward, in its order of tokens, with the forward itself.

    Blocks get it in place of the pair that the model makes, which tells the processors how they run.

    Attributes:
        cos: None for a model without rotary embedding, like ``sin``.
        sin: Of the same shape.
        forward: Which forward.
        local: ``cos`` and ``sin`` of this process's tokens where context parallelism splits them.
        rope: Of a method that rotates, cosines and sines ``[S, D / 2]`` of pairs of neighbouring channels, 1 and 0 for
            text; else None.
    """

    def __init__(
        self,
        cos: Tensor | None,
        sin: Tensor | None,
        forward: Forward,
        rope: tuple[Tensor, Tensor] | None = None,
        local: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.cos, self.sin, self.forward, self.rope, self.local = cos, sin, forward, rope, local

    @classmethod
    def of(
        cls, cos: Tensor, sin: Tensor, forward: Forward, method: Method, local: tuple[Tensor, Tensor] | None = None
    ) -> Tables:
        """Tables whose last axis holds each angle of a pair twice, the tokens in the forward's order."""
        rope = None
        if method.rotates and forward.plan is not None:
            rope = (_of_pairs(cos, 0, forward.text_tokens, 1.0), _of_pairs(sin, 1, forward.text_tokens, 0.0))
        return cls(cos, sin, forward, rope, local)

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """As the model's own processor expects them."""
        if self.local is not None:
            return self.local
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)

    def to(self, device: Any, non_blocking: bool = False) -> Tables:
        """A copy on another device, which is what offloading asks of a block's arguments."""

        def move(x: Tensor | None) -> Any:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        rope, local = (None if x is None else (move(x[0]), move(x[1])) for x in (self.rope, self.local))
        return Tables(move(self.cos), move(self.sin), self.forward, rope, local)

    def __iter__(self) -> Iterator[Tensor]:
        raise RuntimeError(
            "a block that ran with a method attached runs again after detach(), for the backward of a checkpointed "
            "forward. Call backward before detach()."
        )


def _of_pairs(table: Tensor, first: int, text_tokens: int, value: float) -> Tensor:
    """One value of each pair, and ``value`` for the text behind."""
    half = table.reshape(-1, table.shape[-1])[:, first::2]
    return F.pad(half, (0, 0, 0, text_tokens), value=value).contiguous()


class Processor:
    """Self-attention of one layer: the method's inside a forward that the attachment began, else the model's own."""

    def __init__(self, original: Any, layer: int, attachment: Attachment) -> None:
        self.original, self.layer, self.attachment = original, layer, attachment
        self.method = attachment.method
        self.dense = layer in self.method.dense_layers
        # The compiler makes a graph for each number that it finds on a module, but one for all tensors.
        self.layer_tensor = torch.tensor(layer)

    def own(self, tables: Tables) -> bool:
        """Whether the model's own processor computes this call."""
        return self.dense or tables.forward.plan is None

    def rope(self, q: Tensor, v: Tensor, tables: Tables) -> tuple[Tensor, Tensor] | None:
        """What the method rotates q and k by; None where that is the processor's to do.

        Norms that run in more bits than the attention (under autocast) do not go to the method: q would be rounded
        before its rotation and once more after it.
        """
        return tables.rope if q.dtype == v.dtype else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Tables,
        attention_mask: Tensor | None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The method's attention: ``[B, H, S, D]`` each, video tokens in order first, then the text."""
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask must be None: {self.method.name} chooses the keys of video self-attention itself; "
                f"got a mask of shape {list(attention_mask.shape)}. Detach first to use one."
            )
        if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
            # Autocast projects in 16 bits, but on a GPU its norms give float32; torch's own attention casts back too.
            q, k = q.to(v.dtype), k.to(v.dtype)
        forward, text_tokens = tables.forward, tables.forward.text_tokens
        layer: int | Tensor = self.layer
        if torch.compiler.is_compiling():
            fixed_size(q.shape[2])
            text_tokens = fixed_size(text_tokens)
            layer = self.layer if forward.traced else self.layer_tensor
        where = {"plan": forward.plan, "layer": layer, "grid": forward.grid, "text_tokens": text_tokens}
        if self.method.rotates:
            where["rope"] = rope
        if forward.record is None:
            return self.method.attend(q, k, v, **where)
        out, statistics = self.method.measure(q, k, v, **where, **forward.record.options)
        forward.record.layers[self.layer] = statistics
        return out


class Attachment(ABC):
    """A method on one transformer: the replaced processors and the hooks around them.

    The hooks are bound methods of module-level classes, and no hook closes over a tensor: an attached model can be
    deep-copied, pickled and moved. They sit on the model itself and, in the subclass, on modules that make positions.

    Args:
        model: The transformer.
        method: What to attach.
        steps: Shared by the transformers of one pipeline.
        index: Which of them this is.
    """

    base: ClassVar[type[nn.Module]]
    processor: ClassVar[type[Processor]]
    originals: ClassVar[tuple[type, ...]]
    parallel: ClassVar[bool] = False
    """Whether the class runs under diffusers' context parallelism."""

    def __init__(self, model: nn.Module, method: Method, steps: Steps, index: int) -> None:
        self.method, self.steps, self.index = method, steps, index
        self.state: CallState[Forward] = CallState()
        self.hooks = Hooks(model)
        self.attached = False
        self.recording: list[Recorded] | None = None
        self.options: dict[str, Any] = {}
        self.processors = [
            self.processor(_own_processor(attn), layer, self) for layer, attn in enumerate(self.self_attentions(model))
        ]

    @staticmethod
    @abstractmethod
    def self_attentions(model: Any) -> list[Any]:
        """The attention modules to replace, in layer order."""

    @abstractmethod
    def start(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook of the model: derive the grid, ``begin``, put what is given per token in order."""

    @abstractmethod
    def place_hooks(self) -> None:
        """Register the hooks of modules inside the model."""

    @abstractmethod
    def restore(self, output: Tensor, forward: Forward) -> Tensor:
        """The model's output, back in raster order."""

    @classmethod
    def check(cls, model: nn.Module, method: Method, supported: str) -> None:
        """Raise if this model cannot take the method; touch nothing."""
        name = type(model).__name__
        if type(model).forward is not cls.base.forward:
            raise TypeError(
                f"{name} overrides the forward of {cls.base.__name__}, whose token order {method.name} changes; "
                f"{supported}"
            )
        attentions = cls.self_attentions(model)
        for attn in attentions:
            if isinstance(attn.processor, Processor) and attn.processor.attachment.attached:
                raise ValueError(
                    f"{attn.processor.method.name} is already attached to this {name}; detach it first, by its handle "
                    "or by VideoHandle.of(model).detach()"
                )
        configs = [getattr(x, "_parallel_config", None) for x in (model, *map(_own_processor, attentions))]
        for config in configs:
            if config is not None and (reason := cls.refuse_parallelism(config, method)) is not None:
                raise ValueError(f"this {name} has an active parallel config. {reason}")
        for layer, attn in enumerate(attentions):
            if type(_own_processor(attn)) not in cls.originals:
                raise ValueError(
                    f"layer {layer} of this {name} has the attention processor {type(attn.processor).__name__}; "
                    f"expected {' or '.join(t.__name__ for t in cls.originals)}. Remove what installed it, for example "
                    f"with model.set_attn_processor({cls.originals[0].__name__}())."
                )
        if any(layer >= len(attentions) for layer in method.dense_layers):
            raise ValueError(
                f"dense_layers must be below the {len(attentions)} layers of this {name}; got {method.dense_layers}"
            )

    @classmethod
    def refuse_parallelism(cls, config: Any, method: Method) -> str | None:
        """Why the method does not run with this parallel config; None if it does."""
        if not cls.parallel:
            return (
                f"diffusers has no context parallelism for {cls.base.__name__}, nor does {method.name} attention run "
                "under one on it. Leave parallelism off"
            )
        return refusal(config, method.name)

    def apply(self, model: nn.Module) -> None:
        """Replace the processors and register the hooks."""
        for attn, processor in zip(self.self_attentions(model), self.processors, strict=True):
            attn.set_processor(processor)
        self.attached = True
        _forget_steps(model)
        self.hooks.add("", lambda module: module.register_forward_pre_hook(self.start, with_kwargs=True))
        self.place_hooks()
        self.hooks.add("", lambda module: module.register_forward_hook(self.finish, always_call=True))

    def remove(self, model: nn.Module) -> None:
        """Undo ``apply``; a processor that someone else installed meanwhile is left in place."""
        self.hooks.remove()
        # Also read by compiled graphs, which do not look at a module's hooks again.
        if self.attached:
            _forget_steps(model)
        self.attached = False
        for attn, processor in zip(self.self_attentions(model), self.processors, strict=True):
            if attn.processor is processor:
                attn.set_processor(processor.original)

    @contextmanager
    def record(self, **options: Any) -> Iterator[list[Recorded]]:
        """Collect statistics of every call of ``Method.attend`` inside the block."""
        self.recording, self.options = [], options
        try:
            yield self.recording
        finally:
            self.recording, self.options = None, {}

    def begin(self, model: nn.Module, grid: Grid, text_tokens: int, timestep: Tensor | float) -> Forward | None:
        """Decide how the forward that starts now runs; None for as if detached."""
        self.state.current = None
        tokens, disabled = grid[0] * grid[1] * grid[2] + text_tokens, self.state.disabled
        if not self.attached or tokens < self.method.min_tokens:
            return None
        if disabled and not any(_keeps_steps(module) for module in model.modules()):
            return None
        self.hooks.check()
        for layer, (attn, processor) in enumerate(zip(self.self_attentions(model), self.processors, strict=True)):
            if attn.processor is not processor:
                raise RuntimeError(
                    f"the attention processor of layer {layer} was replaced after attach(), by "
                    f"{type(attn.processor).__name__}. Call handle.detach(), replace it, then attach() again."
                )
        if self.method.order != "raster" and _keeps_steps(model):
            raise RuntimeError(
                f"a cache on this {type(model).__name__} (FasterCache, SeaCache) looks at whole latents inside its "
                f"forward, where {self.method.name} has their tokens in order {self.method.order!r}. Take one that "
                "works on blocks (first-block, PAB, MagCache, TaylorSeer), or order 'raster', or detach first."
            )
        if (self.method.counts_steps or self.recording is not None) and not self.steps.manual and not disabled:
            self.steps.observe(timestep)
        # What a cache of diffusers keeps from one step for the next stays in one order.
        plan, record = None if disabled else self.steps.plan, None
        if self.recording is not None and plan is not None:
            self.steps.call += 1
            record = Recorded(self.steps.step, self.steps.call, self.index, self.options)
            self.recording.append(record)
        traced = torch.compiler.is_compiling()
        forward = Forward(grid, text_tokens, plan, self.method.order, self.method.tile, record, traced)
        self.state.current = forward
        return forward

    def finish(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Hook of the model, also where its forward raised: the output back in raster order."""
        forward = self.state.current
        self.state.current = None
        if forward is None or not forward.reorders or output is None:
            return None
        if isinstance(output, tuple):
            return (self.restore(output[0], forward), *output[1:])
        return type(output)(sample=self.restore(output.sample, forward))


def _own_processor(attn: nn.Module) -> Any:
    """The processor that is there, or that a detached one stands for (diffusers' unfuse brings such back)."""
    processor: Any = attn.processor
    return processor.original if isinstance(processor, Processor) and not processor.attachment.attached else processor


def _keeps_steps(module: Any) -> bool:
    """Whether a cache of diffusers on this module keeps tensors of one step for the next."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(hook._is_stateful for hook in registry.hooks.values())


def _forget_steps(model: nn.Module) -> None:
    """Empty the caches of diffusers, which hold tokens in the order of before."""
    module: Any
    for module in model.modules():
        if _keeps_steps(module):
            registry: Any = module._diffusers_hook
            registry.reset_stateful_hooks(recurse=False)


def fixed_size(size: int) -> int:
    """The size as a constant of a compiled graph, which gets a graph per size rather than one with symbols.

    Formatting is what makes the compiler give up the symbol.
    """
    return int(f"{size}")


def reorder_patches(video: Tensor, order: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """Put the patches of latents in another order: that at raster index ``order[i]`` comes to raster place ``i``.

    Args:
        video: ``[B, C, F, H, W]``; what is beyond the last whole patch of an axis is cut off.
        order: int64 ``[N]``, a permutation.
        grid: Patches along each axis.
        patch: Latents of a patch along each axis.

    Returns:
        ``[B, C, F, H, W]`` of whole patches.
    """
    (f, h, w), (pf, ph, pw) = grid, patch
    parts = video[:, :, : f * pf, : h * ph, : w * pw].unflatten(4, (w, pw)).unflatten(3, (h, ph)).unflatten(2, (f, pf))
    tokens = parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5).index_select(5, order)  # [B, C, pf, ph, pw, N]
    return tokens.unflatten(5, grid).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
