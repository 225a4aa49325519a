"""A tap on the attention of a decoder, through transformers' own registries.

transformers looks the attention function up by the name in the config at every call, and the mask builder likewise. So
a tap registers a function under a name of its own for each base implementation, sets that name on one decoder, and
sets the old one back when it is removed. No method is replaced, and other models in the process are not touched.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn

from .decoders import Decoder

__all__ = ["BASES", "AttentionTap", "tap_attention"]

BASES = ("eager", "sdpa", "flex_attention")
"""Base implementations that take an arbitrary mask."""

_PREFIX = "hone_tap_"
_COPIED = (
    "this model is a copy of one with something attached to its attention, or made of its config, and cannot run: call "
    "handle.detach(), copy the model, then attach() to the copy"
)
_TAPS: weakref.WeakKeyDictionary[nn.Module, AttentionTap] = weakref.WeakKeyDictionary()


class Attend(Protocol):
    """What a tap calls in place of attention."""

    def __call__(
        self,
        base: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention, usually by ``base(module, query, key, value, mask, **kwargs)`` with another mask."""


class AttentionTap:
    """A tap that is in place; ``remove`` takes it out.

    Attributes:
        base: the implementation that is in use, one of ``BASES``.
    """

    def __init__(self, decoder: Decoder, attend: Attend, base: str) -> None:
        self.decoder, self.attend, self.base = decoder, attend, base

    def check(self) -> None:
        """Look, before a forward, whether every attention call of the decoder still goes through this tap.

        Another base that was set since (``model.set_attn_implementation``) is followed.

        Raises:
            RuntimeError: An attention module was replaced, or the model is a copy of the tapped one.
            ValueError: The implementation that was set takes no arbitrary mask.
        """
        implementation = self.decoder.config._attn_implementation
        if implementation != _PREFIX + self.base:
            base = implementation.removeprefix(_PREFIX)
            if base not in BASES:
                raise ValueError(
                    f"the attention implementation was set to {implementation!r} while something is attached; it takes "
                    f"no arbitrary mask. Expected {', '.join(BASES)}"
                )
            self.base = base
            self.decoder.model.set_attn_implementation(_PREFIX + base)
        if not any(module in _TAPS for module in _attentions(self.decoder)):
            raise RuntimeError(_COPIED)
        for index, module in enumerate(_attentions(self.decoder)):
            if _TAPS.get(module) is not self or getattr(module, "config", self.decoder.config) is not (
                self.decoder.config
            ):
                raise RuntimeError(
                    f"the attention of layer {index} was replaced after attach(), and would not be changed. Call "
                    "handle.detach(), replace it, then attach() again."
                )

    def remove(self) -> None:
        """Give the decoder its own attention back; harmless when repeated."""
        for module in _attentions(self.decoder):
            if _TAPS.get(module) is self:
                del _TAPS[module]
        if self.decoder.config._attn_implementation == _PREFIX + self.base:
            self.decoder.model.set_attn_implementation(self.base)


def tap_attention(decoder: Decoder, attend: Attend) -> AttentionTap:
    """Route every attention call of a decoder through ``attend``.

    Args:
        decoder: From ``find_decoder``.
        attend: Called with the base function and the arguments of the call. ``attention_mask`` is what the base would
            get: for sdpa None (causal) or boolean, True where a query may look; for eager additive; for flex a
            ``BlockMask``.

    Raises:
        ValueError: The decoder is tapped already, or a copy of such a one, or its implementation takes no arbitrary
            mask (flash attention).
    """
    implementation = decoder.config._attn_implementation
    if implementation.startswith(_PREFIX):
        if not any(module in _TAPS for module in _attentions(decoder)):
            raise ValueError(_COPIED)
        raise ValueError("this decoder is tapped already; detach what is attached to it first")
    if implementation not in BASES:
        raise ValueError(
            f"attention implementation {implementation!r} takes no arbitrary mask; expected {', '.join(BASES)}. "
            "Call model.set_attn_implementation('sdpa') first"
        )
    _register()
    tap = AttentionTap(decoder, attend, implementation)
    for module in _attentions(decoder):
        _TAPS[module] = tap
    decoder.model.set_attn_implementation(_PREFIX + implementation)
    return tap


def _attentions(decoder: Decoder) -> list[nn.Module]:
    return [cast(nn.Module, layer.self_attn) for layer in decoder.layers]


def _register() -> None:
    # These cost seconds, which what is refused before a model is loaded does not need.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for base in BASES:
        name = _PREFIX + base
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, _tapped(base))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _tapped(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tap = _TAPS.get(module)
        if tap is None:
            # A deep copy keeps the name in its config and has no tap: running it as it is would pass for a result.
            raise RuntimeError(_COPIED)
        return tap.attend(_base(module, base), module, query, key, value, attention_mask, **kwargs)

    return attention


def _base(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The base function; each modeling file has its own eager one."""
    if name != "eager":
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward
