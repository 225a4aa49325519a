"""The decoder inside a vision-language model: its layers, its head, its cache, and what it can take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoder", "cache_keyword", "cache_of", "check_attention", "deepstack_layers", "find_decoder"]

_CACHE_NAMES = ("cache", "past_key_values")  # of newer and of older forwards

SOFTMAX_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""``layer_types`` whose attention is a softmax over pairs, so that a pair can be blocked."""


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a vision-language model.

    Attributes:
        model: the module with the loop over layers.
        layers: its layers, in order; each has a ``self_attn``.
        config: the config that its attention modules look at.
        head: hidden states to logits, or None for a model without one.
        deepstack_layers: first layers after which visual features are added to visual rows (Qwen3-VL: 3).
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    config: Any
    head: nn.Module | None
    deepstack_layers: int

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a transformers model.

    Args:
        model: A ``...ForConditionalGeneration`` or its ``.model``.

    Raises:
        TypeError: It has none.
        ValueError: A layer is not softmax attention (hybrid decoders with linear attention): blocking pairs there is
            undefined, and blocking only the others leaves the recurrent path open.
    """
    get = getattr(model, "get_decoder", None)
    decoder: Any = get() if callable(get) else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TypeError(
            f"{type(model).__name__} has no decoder with layers; expected a transformers vision-language model such as "
            "LlavaOnevisionForConditionalGeneration"
        )
    check_attention(
        decoder.config,
        type(decoder).__name__,
        [index for index, layer in enumerate(layers) if not hasattr(layer, "self_attn")],
    )
    head = getattr(model, "lm_head", None)
    return Decoder(decoder, layers, decoder.config, head, deepstack_layers(getattr(model, "config", None)))


def check_attention(config: Any, whose: str, without: Sequence[int] = ()) -> None:
    """Refuse a hybrid decoder.

    Args:
        config: Of the decoder.
        whose: What the message calls it.
        without: Layers that are known to have no attention.

    Raises:
        ValueError: A layer is not softmax attention.
    """
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(SOFTMAX_LAYERS))
    if other or without:
        found = ", ".join(other) or f"layers {list(without)} without self_attn"
        raise ValueError(
            f"{whose} has a hybrid decoder ({found}): a recurrent layer has no attention to change, and video would "
            "flow through it. Use a decoder of attention layers only."
        )


def deepstack_layers(config: Any) -> int:
    """First layers after which visual features are added to visual rows (DeepStack), by a model's config."""
    vision = getattr(config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward or in its output, under whichever name it has; None without one."""
    return next((values[name] for name in _CACHE_NAMES if name in values and values[name] is not None), None)


def cache_keyword(model: nn.Module) -> str:
    """Name of the argument that takes the cache in this model's forward.

    Raises:
        TypeError: The forward takes none.
    """
    taken = inspect.signature(model.forward).parameters
    for name in _CACHE_NAMES:
        if name in taken:
            return name
    raise TypeError(f"{type(model).__name__}.forward takes no cache; expected one of {', '.join(_CACHE_NAMES)}")
