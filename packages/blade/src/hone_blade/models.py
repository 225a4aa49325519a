"""How BLADE enters diffusers' video transformers: ``attach`` and its handle.

A video transformer treats its tokens as a set everywhere but in self-attention and in the position tables, so the
tokens are put in curve order once per forward, at the patch embedding, and back once, at the output projection. In
between only the self-attention processors are replaced.

What a block needs to know about the forward it runs in (the token grid, whether to record statistics) travels with the
rotary tables that the model hands to every block. So a block that is run again later, as gradient checkpointing does,
runs with what it had the first time, whatever was called in between.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline, WanTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils.torch_utils import is_compiled_module
from hone_video.grids import Grid, Order
from hone_video.orders import inverse_order, token_order
from torch import Tensor, nn

from .config import PRESETS, BladeConfig
from .method import Stats, adaptive_sparse_attention

__all__ = ["SUPPORTED", "BladeHandle", "LayerStats", "attach"]

log = logging.getLogger(__name__)


class LayerStats(NamedTuple):
    """Statistics of one self-attention call.

    ``step`` is the denoising step, ``call`` counts the model's forwards within it (0 and 1 where guidance makes two),
    ``layer`` the transformer block, and ``model`` is 1 for the second transformer of a Wan2.2 pipeline.
    """

    step: int
    call: int
    model: int
    layer: int
    stats: Stats


class _Tables(NamedTuple):
    """The rotary tables of a sparse forward, in curve order, with what the processors need beside them.

    ``cos`` and ``sin`` are None for a model without rotary embedding. ``records`` collects statistics by layer, or is
    None. ``traced``: a compiler sees the whole model, not a block alone. A model that runs dense keeps its own tables,
    and the type tells the processors which it is.
    """

    cos: Tensor | None
    sin: Tensor | None
    grid: Grid
    records: dict[int, Stats] | None
    recall: bool
    traced: bool


class _Steps:
    """Which denoising step a forward belongs to, from the timesteps that the model is called with.

    A step is a maximal run of forwards at one timestep, so the conditional and the unconditional call count once. A
    timestep above the previous one starts a new video at step 0; where a new video does not rise above the last
    timestep (video-to-video, or after a run that was broken off), the caller has to ``reset``. The value is the largest
    of the tensor (a batch, or the per-token times of Wan2.2, whose image tokens are at 0).
    """

    def __init__(self, dense_steps: int) -> None:
        self.dense_steps = dense_steps
        self.reset()

    def reset(self) -> None:
        self.step, self.call, self.manual = -1, -1, False
        self.dense = self.dense_steps > 0
        self._last: float | None = None

    def set(self, step: int) -> None:
        self.step, self.call, self.manual = step, -1, True
        self.dense = step < self.dense_steps

    # Python numbers cannot come out of a compiled graph, so a compiled model breaks its graph here.
    @torch.compiler.disable(
        reason="reading the timestep; call handle.begin_step(i) before each step to compile the model as one graph"
    )
    def observe(self, timestep: Tensor | float) -> None:
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        if self._last is None or value > self._last:
            self.step, self.call = 0, -1
        elif value < self._last:
            self.step, self.call = self.step + 1, -1
        self._last = value
        self.dense = self.step < self.dense_steps


class _Processor:
    """Self-attention of one layer: BLADE inside a sparse forward, the model's own processor otherwise."""

    def __init__(self, original: Any, layer: int, config: BladeConfig) -> None:
        self.original, self.layer = original, layer
        self.dense = layer in config.dense_layers
        # Decided here and once per forward; below, the comparisons would cost a compiled graph per layer.
        self.config = replace(config, dense_layers=(), dense_steps=0, min_tokens=0)
        # The compiler makes a graph for each number that it finds on a module, but one for all tensors.
        self.layer_tensor = torch.tensor(layer)
        self.attachment: _Attachment

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: _Tables, text_tokens: int = 0) -> Tensor:
        """``[B, H, S, D]`` each, video tokens in curve order first, then the text."""
        if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
            # Autocast projects in 16 bits, but on a GPU its norms give float32; torch's own attention casts back too.
            q, k = q.to(v.dtype), k.to(v.dtype)
        if torch.compiler.is_compiling():
            _constant(q.shape[2])
            text_tokens = _constant(text_tokens)
        layer = self.layer_tensor if torch.compiler.is_compiling() and not tables.traced else self.layer
        where = {"cfg": self.config, "text_tokens": text_tokens, "layer": layer, "grid": tables.grid}
        if tables.records is None:
            return adaptive_sparse_attention(q, k, v, **where)
        out, stats = adaptive_sparse_attention(q, k, v, **where, return_stats=True, recall=tables.recall)
        tables.records[self.layer] = stats
        return out


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be None: BLADE chooses the keys of video self-attention itself; "
            f"got a mask of shape {list(attention_mask.shape)}. Detach first to use one."
        )


class _WanProcessor(_Processor):
    # diffusers sets these two on the processors of a model; they belong to the one that does dense attention.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        raise RuntimeError(_NO_PARALLELISM)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: _Tables | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not isinstance(rotary_emb, _Tables):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if self.dense:
            tables = (rotary_emb.cos, rotary_emb.sin)
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, tables)
        _refuse_mask(attention_mask)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        q, k = (_rotate_pairs(x, rotary_emb.cos, rotary_emb.sin) for x in (q, k))
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rotary_emb)
        out = out.transpose(1, 2).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of ``x [B, S, H, D]`` by tables ``[1, S, 1, D]`` that hold each angle twice."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


class _CogVideoXProcessor(_Processor):
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: _Tables | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tables = image_rotary_emb
        if not isinstance(tables, _Tables) or self.dense:
            if isinstance(tables, _Tables):
                tables = None if tables.cos is None else (tables.cos, tables.sin)
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, tables)
        _refuse_mask(attention_mask)
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        # The model's own order is text first; joining the two here anyway, the tail costs nothing.
        joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if tables.cos is not None:
            q, k = (_rotate_head(x, video, (tables.cos, tables.sin)) for x in (q, k))
        out = self.attend(q, k, v, tables, text_tokens=text)
        out = out.transpose(1, 2).flatten(2, 3).type_as(joint)
        out = attn.to_out[1](attn.to_out[0](out))
        video_out, text_out = out.split([video, text], dim=1)
        return video_out, text_out


def _rotate_head(x: Tensor, video: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first ``video`` tokens of ``x [B, H, S, D]``, in place where ``x`` is ours to write."""
    x = x.contiguous()
    x[:, :, :video] = apply_rotary_emb(x[:, :, :video], tables)
    return x


def _constant(size: int) -> int:
    """The size as a constant of a compiled graph, which gets a graph per size rather than one with symbols.

    Formatting is what makes the compiler give up the symbol.
    """
    return int(f"{size}")


# An order depends on the grid alone: to the compiler it is a constant of its graph, of fixed size. Traced, its
# construction would take minutes.
@torch.compiler.assume_constant_result
def _order(name: Order, grid: Grid, tile: Grid, device: torch.device) -> Tensor:
    order = token_order(name, *grid, device=device, tile=tile)
    torch._dynamo.mark_static(order)
    return order


_inverses: dict[tuple[object, ...], Tensor] = {}


@torch.compiler.assume_constant_result
def _inverse(name: Order, grid: Grid, tile: Grid, device: torch.device) -> Tensor:
    key = (name, grid, tile, device)
    if key not in _inverses:
        _inverses[key] = inverse_order(_order(name, grid, tile, device))
        torch._dynamo.mark_static(_inverses[key])
    return _inverses[key]


_NO_PARALLELISM = (
    "BLADE attention does not run under diffusers' context or tensor parallelism. "
    "Detach it first (handle.detach()), or leave parallelism off."
)


class _Attachment(ABC):
    """BLADE on one transformer: the replaced processors and the hooks around them.

    The hooks are bound methods of module-level classes, and no hook closes over a tensor: an attached model can be
    deep-copied, pickled and moved.
    """

    base: ClassVar[type[nn.Module]]
    processor: ClassVar[type[_Processor]]
    originals: ClassVar[tuple[type, ...]]

    def __init__(self, model: nn.Module, config: BladeConfig, steps: _Steps, index: int) -> None:
        self.config, self.steps, self.index = config, steps, index
        self.enabled = True
        self.observing = config.dense_steps > 0
        self.recording: list[tuple[int, int, dict[int, Stats]]] | None = None
        self.recall = False
        self.grid: Grid | None = None
        self.text_tokens = 0
        self.records: dict[int, Stats] | None = None
        self.processors = [
            self.processor(attn.processor, layer, config) for layer, attn in enumerate(self.self_attentions(model))
        ]
        for processor in self.processors:
            processor.attachment = self
        self.handles: list[Any] = []

    @staticmethod
    @abstractmethod
    def self_attentions(model: nn.Module) -> list[nn.Module]:
        """The attention modules to replace, in layer order."""

    @abstractmethod
    def hooks(self, model: nn.Module) -> Iterator[Any]:
        """Register the hooks, one after the other."""

    @classmethod
    def check(cls, model: nn.Module, config: BladeConfig) -> None:
        """Raise if this model cannot take BLADE with this config; touch nothing."""
        name = type(model).__name__
        if type(model).forward is not cls.base.forward:
            raise TypeError(
                f"{name} overrides the forward of {cls.base.__name__}, whose token order BLADE changes; "
                f"{_SUPPORTED_TEXT}"
            )
        attentions = cls.self_attentions(model)
        if any(isinstance(attn.processor, _Processor) for attn in attentions):
            raise ValueError(
                f"BLADE is already attached to this {name}; detach it first, by its handle or by "
                "BladeHandle.of(model).detach()"
            )
        if getattr(model, "_parallel_config", None) is not None or any(
            getattr(attn.processor, "_parallel_config", None) is not None for attn in attentions
        ):
            raise ValueError(f"this {name} has an active parallel config. {_NO_PARALLELISM}")
        for layer, attn in enumerate(attentions):
            if type(attn.processor) not in cls.originals:
                raise ValueError(
                    f"layer {layer} of this {name} has the attention processor {type(attn.processor).__name__}; "
                    f"expected {' or '.join(t.__name__ for t in cls.originals)}. Remove what installed it, for example "
                    f"with model.set_attn_processor({cls.originals[0].__name__}())."
                )
        beyond = [layer for layer in config.dense_layers if layer >= len(attentions)]
        if beyond:
            raise ValueError(
                f"dense_layers must be below the {len(attentions)} layers of this {name}; got {config.dense_layers}"
            )

    def apply(self, model: nn.Module) -> None:
        for attn, processor in zip(self.self_attentions(model), self.processors, strict=True):
            attn.set_processor(processor)
        self.handles.extend(self.hooks(model))

    def remove(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        # Also read by compiled graphs, which do not look at a module's hooks again.
        self.enabled = False
        for attn, processor in zip(self.self_attentions(model), self.processors, strict=True):
            if attn.processor is processor:
                attn.set_processor(processor.original)

    def begin(self, model: nn.Module, grid: Grid, text_tokens: int, timestep: Tensor | float) -> bool:
        """Decide how this forward runs; True for sparse."""
        self.grid = self.records = None
        if not self.enabled:
            return False
        for layer, (attn, processor) in enumerate(zip(self.self_attentions(model), self.processors, strict=True)):
            if attn.processor is not processor:
                raise RuntimeError(
                    f"the attention processor of layer {layer} was replaced after attach(), by "
                    f"{type(attn.processor).__name__}. Call handle.detach(), replace it, then attach() again."
                )
        if self.observing and not self.steps.manual:
            self.steps.observe(timestep)
        if self.steps.dense or grid[0] * grid[1] * grid[2] + text_tokens < self.config.min_tokens:
            return False
        self.grid, self.text_tokens = grid, text_tokens
        if self.recording is not None:
            self.steps.call += 1
            self.records = {}
            self.recording.append((self.steps.step, self.steps.call, self.records))
        return True

    @property
    def reorders(self) -> bool:
        """Whether this forward has its tokens in another order than the model's own."""
        return self.grid is not None and self.config.order != "raster"

    def order(self, device: torch.device) -> Tensor:
        return _order(self.config.order, self.grid, self.config.tile, device)

    def tables(self, cos: Tensor | None, sin: Tensor | None, dim: int) -> _Tables:
        if self.reorders and cos is not None:
            cos, sin = (x.index_select(dim, self.order(x.device)) for x in (cos, sin))
        return _Tables(cos, sin, self.grid, self.records, self.recall, torch.compiler.is_compiling())

    def restore(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the output projection, the last thing a forward runs: back to raster order, ``[B, N, C]``."""
        grid, reorders = self.grid, self.reorders
        # From here on the embedding layers are the model's own again, for whoever calls them alone.
        self.grid = None
        if not reorders:
            return None
        return output.index_select(1, _inverse(self.config.order, grid, self.config.tile, output.device))

    def finish(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Hook of the model, also where its forward raised: what ``restore`` does, if the forward did not get there."""
        self.grid = self.records = None


class _WanAttachment(_Attachment):
    base = WanTransformer3DModel
    processor = _WanProcessor
    originals = (WanAttnProcessor,)

    @staticmethod
    def self_attentions(model: nn.Module) -> list[nn.Module]:
        return [block.attn1 for block in model.blocks]

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        yield model.register_forward_pre_hook(self.start, with_kwargs=True)
        yield model.rope.register_forward_hook(self.rotary)
        yield model.patch_embedding.register_forward_hook(self.embed)
        yield model.proj_out.register_forward_hook(self.restore)
        yield model.register_forward_hook(self.finish, always_call=True)

    def start(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook of the model: derive the grid, put per-token times in order."""
        hidden, timestep = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 1, "timestep")
        _check_latents(hidden, "batch, channels, frames, height, width")
        grid = tuple(_constant(n) // patch for n, patch in zip(hidden.shape[2:], model.config.patch_size, strict=True))
        if not self.begin(model, grid, 0, timestep) or not self.reorders or timestep.ndim != 2:
            return None
        # Wan2.2 TI2V: the time of each token. All that is made of it is per token too, up to the output projection.
        return _replace(args, kwargs, 1, "timestep", timestep.index_select(1, self.order(timestep.device)))

    def rotary(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> _Tables | None:
        """Hook of the rotary embedding, ``[1, N, 1, D]`` each."""
        return None if self.grid is None else self.tables(*output, dim=1)

    def embed(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the patch embedding ``[B, C, F, H, W]``: tokens in curve order.

        Gathered channel by channel although token by token is a little faster: the model's own transposition that
        follows then makes a fresh tensor, as it does without BLADE. A block that gets a view compiles to a graph of
        its own.
        """
        if not self.reorders:
            return None
        return output.flatten(2).index_select(2, self.order(output.device)).unflatten(2, self.grid)


class _CogVideoXAttachment(_Attachment):
    base = CogVideoXTransformer3DModel
    processor = _CogVideoXProcessor
    originals = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)

    @staticmethod
    def self_attentions(model: nn.Module) -> list[nn.Module]:
        return [block.attn1 for block in model.transformer_blocks]

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        yield model.register_forward_pre_hook(self.start, with_kwargs=True)
        yield model.patch_embed.register_forward_hook(self.embed)
        yield model.proj_out.register_forward_hook(self.restore)
        yield model.register_forward_hook(self.finish, always_call=True)

    def start(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook of the model: derive the grid, put the rotary tables ``[N, D]`` in order."""
        hidden, text = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 1, "encoder_hidden_states")
        timestep, rotary = _argument(args, kwargs, 2, "timestep"), _argument(args, kwargs, 5, "image_rotary_emb", None)
        patches = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
        _check_latents(hidden, "batch, frames, channels, height, width")
        sizes = (hidden.shape[1], *hidden.shape[3:])
        grid = tuple(_constant(size) // patch for size, patch in zip(sizes, patches, strict=True))
        if not self.begin(model, grid, _constant(text.shape[1]), timestep):
            return None
        cos, sin = (None, None) if rotary is None else rotary
        tokens = grid[0] * grid[1] * grid[2]
        if cos is not None and cos.shape[0] != tokens:
            raise ValueError(
                f"image_rotary_emb must have one row per video token, {tokens} for the grid {grid}; got {cos.shape[0]}"
            )
        return _replace(args, kwargs, 5, "image_rotary_emb", self.tables(cos, sin, dim=0))

    def embed(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook of the patch embedding ``[B, text + N, C]``: video tokens in curve order, text where it is."""
        if not self.reorders:
            return None
        order = self.order(output.device)
        text = torch.arange(self.text_tokens, device=order.device)
        return output.index_select(1, torch.cat([text, order + self.text_tokens]))


_REQUIRED = object()


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str, default: Any = _REQUIRED) -> Any:
    """An argument of the model's forward, however it was passed."""
    value = args[position] if position < len(args) else kwargs.get(name, default)
    if value is _REQUIRED or (value is None and default is _REQUIRED):
        got = "None" if value is None else "a call without it"
        raise TypeError(f"the transformer's forward needs {name} (argument {position + 1}); got {got}. Pass {name}=...")
    return value


def _check_latents(hidden: Tensor, axes: str) -> None:
    if hidden.dim() != 5:
        raise ValueError(
            f"hidden_states must be latents [{axes}]; got {list(hidden.shape)}. A single image has one frame"
        )


def _replace(args: tuple, kwargs: dict[str, Any], position: int, name: str, value: Any) -> tuple[tuple, dict[str, Any]]:
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


_ATTACHMENTS: tuple[type[_Attachment], ...] = (_WanAttachment, _CogVideoXAttachment)

SUPPORTED: tuple[type[nn.Module], ...] = tuple(kind.base for kind in _ATTACHMENTS)
"""Transformer classes that ``attach`` takes."""

_SUPPORTED_TEXT = (
    "supported are "
    + ", ".join(kind.__name__ for kind in SUPPORTED)
    + " of diffusers, and pipelines whose transformer (and transformer_2) is one of them"
)


class BladeHandle:
    """BLADE on a model, as ``attach`` returned it; also a context manager that detaches at the end.

    Attributes:
        config: The settings in use.
        models: The transformers it is attached to: one, or both of a Wan2.2 pipeline.
    """

    def __init__(self, models: tuple[nn.Module, ...], attachments: tuple[_Attachment, ...]) -> None:
        self.config, self.models = attachments[0].config, models
        self._attachments, self._steps = attachments, attachments[0].steps

    @classmethod
    def of(cls, model_or_pipeline: Any) -> BladeHandle:
        """The handle of a model that BLADE is attached to: of a deep copy, for example, which nobody attached.

        Raises:
            TypeError: The model's class is not supported.
            ValueError: BLADE is not attached to it.
        """
        models = _transformers(model_or_pipeline)
        attachments = []
        for model in models:
            processor = _attachment_class(model).self_attentions(model)[0].processor
            if not isinstance(processor, _Processor):
                raise ValueError(f"BLADE is not attached to this {type(model).__name__}; call attach() first")
            attachments.append(processor.attachment)
        return cls(models, tuple(attachments))

    def __enter__(self) -> BladeHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        names = ", ".join(type(model).__name__ for model in self.models)
        return f"<BladeHandle on {names}, {'attached' if self.attached else 'detached'}>"

    @property
    def attached(self) -> bool:
        """Whether the model has BLADE on it."""
        return all(attachment.handles for attachment in self._attachments)

    def detach(self) -> None:
        """Restore the model's own processors and remove every hook; its outputs are bit for bit those of before.

        Detaching again does nothing. A processor that someone else installed meanwhile is left in place.
        """
        for attachment, model in zip(self._attachments, self.models, strict=True):
            attachment.remove(model)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the model dense inside the block, exactly as if detached; cheap, for switching between calls."""
        before = [attachment.enabled for attachment in self._attachments]
        for attachment in self._attachments:
            attachment.enabled = False
        try:
            yield
        finally:
            for attachment, enabled in zip(self._attachments, before, strict=True):
                attachment.enabled = enabled and self.attached

    @property
    def step(self) -> int:
        """The denoising step of the latest forward, from 0; -1 before the first, or where nothing counts steps."""
        return self._steps.step

    def begin_step(self, step: int) -> None:
        """Say which denoising step the coming forwards belong to, instead of counting timesteps.

        Without this call steps are counted where they are needed (``dense_steps`` above 0, or statistics): forwards at
        the same timestep are one step, so guidance counts once, and a rising timestep starts a new video. That reads
        the timestep back from the device once per forward, and it does not suit training on random timesteps. With this
        call nothing is read, and a model with ``dense_steps`` compiles to one graph. It holds until ``reset()``.

        What no timestep shows is a new video that starts at or below the last timestep seen, as video-to-video does, or
        any run after one that was broken off: call ``reset()`` before it.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step counts from 0; got {step}")
        self._steps.set(step)

    def reset(self) -> None:
        """Forget the step: the next forward is step 0 of a new video, counted by timesteps again.

        Only a video whose first timestep does not lie above the last one seen needs it, see ``begin_step``.
        """
        self._steps.reset()

    @contextmanager
    def record(self, *, recall: bool = False) -> Iterator[list[LayerStats]]:
        """Collect statistics of every sparse self-attention call inside the block.

        The list is filled when the block ends, with tensors on the model's device: nothing waits for the device before
        one of them is read, but for the step count (see ``begin_step``). Layers and forwards that run dense leave no
        entry. Meant for a model that is not compiled: recording costs a compiled one a graph per layer.

        Args:
            recall: Also compute how much of dense attention's mass the kept keys hold. Costs a dense attention.
        """
        result: list[LayerStats] = []
        for attachment in self._attachments:
            attachment.recording, attachment.recall, attachment.observing = [], recall, True
        try:
            yield result
        finally:
            for attachment in self._attachments:
                for step, call, records in attachment.recording:
                    for layer, stats in records.items():
                        result.append(LayerStats(step, call, attachment.index, layer, stats))
                attachment.recording, attachment.recall = None, False
                attachment.observing = self.config.dense_steps > 0
            result.sort(key=lambda row: row[:4])


def attach(model_or_pipeline: Any, preset_or_config: str | BladeConfig) -> BladeHandle:
    """Give a video diffusion transformer BLADE's sparse self-attention, until ``detach()``.

    Weights, state dict and cross-attention stay as they are. Any resolution, frame count and batch size works: the
    token grid is read off each forward's input. Works before or after ``torch.compile``, of the model or of its blocks,
    and with gradient checkpointing.

    Where steps are counted (``dense_steps`` above 0, or statistics), a rising timestep tells a new video from the next
    step. A video that starts at or below the last timestep seen (video-to-video, or any run after one that was broken
    off) has to be announced: ``handle.reset()`` before it, or ``handle.begin_step(i)`` before each step.

    Args:
        model_or_pipeline: A ``WanTransformer3DModel`` or ``CogVideoXTransformer3DModel`` (text-, image- or
            video-conditioned), or a pipeline that holds one; of a Wan2.2 pipeline both transformers.
        preset_or_config: Name in ``PRESETS``, or settings.

    Returns:
        The handle. Keep it: it is how to detach.

    Raises:
        TypeError: The model's class is not supported.
        ValueError: The preset is unknown; BLADE is already attached; a self-attention has a processor that is not the
            class's own; parallelism is on; ``dense_layers`` names a layer that the model does not have. In every case
            the model is untouched.
    """
    config = _resolve_config(preset_or_config)
    models = _transformers(model_or_pipeline)
    for model in models:
        _attachment_class(model).check(model, config)
    steps = _Steps(config.dense_steps)
    attachments = tuple(_attachment_class(model)(model, config, steps, index) for index, model in enumerate(models))
    handle = BladeHandle(models, attachments)
    try:
        for attachment, model in zip(attachments, models, strict=True):
            attachment.apply(model)
    except BaseException:
        handle.detach()
        raise
    log.debug("attached to %s: %s", ", ".join(type(model).__name__ for model in models), config)
    return handle


def _resolve_config(preset_or_config: str | BladeConfig) -> BladeConfig:
    if isinstance(preset_or_config, BladeConfig):
        return preset_or_config
    if not isinstance(preset_or_config, str):
        raise TypeError(f"expected a preset's name or a BladeConfig; got {type(preset_or_config).__name__}")
    if preset_or_config not in PRESETS:
        raise ValueError(f"no preset {preset_or_config!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[preset_or_config].config


def _transformers(model_or_pipeline: Any) -> tuple[nn.Module, ...]:
    if isinstance(model_or_pipeline, DiffusionPipeline):
        found = [getattr(model_or_pipeline, name, None) for name in ("transformer", "transformer_2")]
        models = [model for model in found if model is not None]
        if not models:
            raise TypeError(f"{type(model_or_pipeline).__name__} holds no transformer; {_SUPPORTED_TEXT}")
    else:
        models = [model_or_pipeline]
    models = [model._orig_mod if is_compiled_module(model) else model for model in models]
    for model in models:
        _attachment_class(model)
    return tuple(models)


def _attachment_class(model: Any) -> type[_Attachment]:
    for kind in _ATTACHMENTS:
        if isinstance(model, kind.base):
            return kind
    raise TypeError(f"cannot attach to {type(model).__name__}; {_SUPPORTED_TEXT}")
