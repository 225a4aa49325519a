"""Prefix reuse: many configurations of one prompt, each layer that they share computed once.

A configuration that first intervenes at layer j sees the baseline's hidden states up to there. So the baseline runs
once and keeps the states that enter each layer that some configuration starts at; a configuration starts from those of
its own first layer.

What is kept costs ``hidden_size`` values per token and such layer: 7 KiB in a 7B decoder in 16 bits, so 0.6 GiB for the
14 layers of a two-stage sweep over a prompt of 6333 tokens (32 frames), times the batch. The states of a layer are let
go after the last configuration that starts there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from hone_lm.decoders import find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from torch import Tensor, nn

from .config import KnockoutConfig
from .models import attach, check_devices, every_row, reason_against_exit

__all__ = ["Counts", "PrefixRunner", "as_exit"]


@dataclass
class Counts:
    """Work done, and what it would be without reuse: every configuration from the first layer, as often as it is run.

    The paper's Global 1 over L layers runs i = 0, 2, ..., L beside the run without a knockout. Its i = L blocks nothing
    and is that run again, which costs nothing here; a sweep that leaves it out saves less by one run.

    Attributes:
        layers: decoder layers evaluated, the repeated last one of the baseline's check among them.
        layers_without: the same without reuse.
        rows: token rows through a layer, which an exit makes fewer.
        rows_without: likewise.
    """

    layers: int = 0
    layers_without: int = 0
    rows: int = 0
    rows_without: int = 0

    @property
    def saving(self) -> float:
        """Layer evaluations without reuse over those done."""
        return self.layers_without / self.layers if self.layers else 1.0


def as_exit(
    config: KnockoutConfig, num_layers: int, deepstack_layers: int = 0, layer_types: Sequence[str] = ()
) -> KnockoutConfig:
    """The exit that equals a configuration for every text row, where there is one; else the configuration.

    LV-K in all layers from j on is an exit at j: visual rows from there on are read by nobody (section 2.5). Before
    sliding-window layers there can be no exit, so it stays a knockout; ``layer_types`` are those of the decoder's
    config, if it has any.
    """
    if config.exit is not None:
        return config
    for item in config.knockouts:
        start = min(item.layers)
        whole = item.layers == tuple(range(start, num_layers))
        plain = (item.kind, item.frames, item.control) == ("LV", None, "none")
        others = tuple(other for other in config.knockouts if other is not item)
        early = all(max(other.layers) < start for other in others)
        full = all(kind == "full_attention" for kind in layer_types[start:])
        if plain and whole and early and full and start >= max(1, deepstack_layers):
            return KnockoutConfig(knockouts=others, exit=start, allow_empty=config.allow_empty)
    return config


class PrefixRunner:
    """A prompt (or a left-padded batch of them) to be run under many configurations.

    Args:
        model: A ``...ForConditionalGeneration``, in evaluation mode.
        inputs: What the processor made.
        configs: What will be run, each as often as it stands here: states that none of them needs any more are let go.
            None keeps those of every layer.
        layouts: Of the prompts; found in the inputs if None.
        tokens_per_frame: As in ``attach``, for finding them.
        exits: Run LV-K in all layers from some on as the exit that it equals.

    Attributes:
        counts: of all runs so far.

    Raises:
        ValueError: The decoder is spread over devices.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        configs: Sequence[KnockoutConfig] | None = None,
        *,
        layouts: list[TokenLayout] | None = None,
        tokens_per_frame: int | None = None,
        exits: bool = True,
    ) -> None:
        self.model, self.inputs, self.exits = model, dict(inputs), exits
        found = find_layouts(model, inputs, tokens_per_frame=tokens_per_frame) if layouts is None else layouts
        self.layouts = list(found)
        self.decoder = find_decoder(model)
        check_devices(self.decoder)
        self.counts = Counts()
        self._needed: Counter[int] | None = None
        if configs is not None:
            self._needed = Counter(first for first in map(self._first, configs) if first is not None)
        self._entering: dict[int, Tensor] = {}
        self._layer_args: list[tuple] = []
        self._layer_kwargs: list[dict[str, Any]] = []
        self._written: list[dict[int, Any]] = []
        self._deepstack: tuple[Any, Any] | None = None
        self._baseline: Tensor | None = None

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers whose entering states are held."""
        return tuple(sorted(self._entering))

    @property
    def kept_bytes(self) -> int:
        """Memory that these states take."""
        return sum(states.numel() * states.element_size() for states in self._entering.values())

    def _first(self, config: KnockoutConfig) -> int | None:
        """Layer that a configuration starts at; None for the baseline."""
        num_layers = self.decoder.num_layers
        if not config.knockouts and config.exit in (None, num_layers):
            return None
        return min([min(item.layers) for item in config.knockouts] + [config.exit or num_layers])

    @torch.no_grad()
    def run(self, config: KnockoutConfig) -> Tensor:
        """Logits of the last position, ``[batch, vocabulary]``.

        Raises:
            ValueError: This is not, or no longer, one of the configurations that were to be run; or the class does more
                than prefix reuse can repeat.
        """
        first = self._first(config)
        if first is not None and self._needed is not None and not self._needed[first]:
            raise ValueError(
                f"the states that enter layer {first} are not kept: {config.label} is not among the configurations to "
                "be run, or was run already. Name it in configs, as often as it is to be run"
            )
        if self._baseline is None:
            self._baseline = self._run_baseline()
        num_layers = self.decoder.num_layers
        tokens = len(self.layouts[0].frame)
        self.counts.layers_without += num_layers
        self.counts.rows_without += num_layers * tokens
        if first is None:
            return self._baseline
        if self.exits:
            types = getattr(self.decoder.config, "layer_types", None) or ()
            shorter = as_exit(config, num_layers, self.decoder.deepstack_layers, types)
            if shorter.exit is None or not reason_against_exit(self.decoder, shorter.exit):
                config = shorter
        states = self._entering[first]
        if self._needed is not None:
            self._needed[first] -= 1
            if not self._needed[first]:
                del self._entering[first]
        with attach(self.model, config) as handle, handle.using(self.layouts):
            more = handle.prefill(self.layouts, self.inputs.get("input_ids"))
            shared: dict[int, Any] = {}
            for index in range(first, num_layers):
                states = self._layer(index, states, more, shared)
            return self._logits(states)

    @torch.no_grad()
    def _run_baseline(self) -> Tensor:
        """Run the model as it is, and keep what enters the layers that configurations start at."""
        self._entering, self._layer_args, self._layer_kwargs, self._written = {}, [], [], []
        self._deepstack = None
        final = self.decoder.num_layers - 1

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            states = args[0] if args else kwargs.pop("hidden_states")
            index = len(self._layer_kwargs)
            # What layers write into for later ones is kept as it was before this one.
            before = {id(value): copy(value) for value in kwargs.values() if isinstance(value, MutableMapping)}
            self._layer_args.append(args[1:])
            self._layer_kwargs.append(kwargs)
            self._written.append(before)
            # The last layer is run again, as a check.
            if self._needed is None or self._needed[index] or index == final:
                self._entering[index] = states

        def keep_decoder(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if kwargs.get("deepstack_visual_embeds") is not None:
                self._deepstack = kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
            return args, every_row(kwargs)

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.decoder.layers]
        hooks.append(self.decoder.model.register_forward_pre_hook(keep_decoder, with_kwargs=True))
        try:
            logits = self.model(**self.inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        num_layers, tokens = self.decoder.num_layers, len(self.layouts[0].frame)
        self.counts.layers += num_layers
        self.counts.rows += num_layers * tokens
        # What follows repeats the decoder's loop and head by hand; a class that does more there is refused here.
        last = self._layer(final, self._entering[final], {})
        if self._needed is not None and not self._needed[final]:
            del self._entering[final]
        if not torch.allclose(self._logits(last), logits, atol=1e-3, rtol=1e-3):
            raise ValueError(
                f"{type(self.model).__name__} does more between its last layer and its logits than norm and head; "
                "prefix reuse would change its answers. Run each configuration from the start (--no-reuse)"
            )
        return logits

    def _layer(
        self, index: int, states: Tensor, more: Mapping[str, Any], shared: dict[int, Any] | None = None
    ) -> Tensor:
        states = self._call(index, states, more, {} if shared is None else shared)
        self.counts.layers += 1
        # Of what comes out: at an exit the layer gets every row and drops some before it begins.
        self.counts.rows += states.shape[1]
        return states

    def _call(self, index: int, states: Tensor, more: Mapping[str, Any], shared: dict[int, Any]) -> Tensor:
        """One layer as the baseline called it; ``shared`` is what the layers of one run write for each other."""
        kwargs = dict(self._layer_kwargs[index])
        for name, value in kwargs.items():
            if isinstance(value, MutableMapping):
                kwargs[name] = shared.setdefault(id(value), copy(self._written[index][id(value)]))
        out = self.decoder.layers[index](states, *self._layer_args[index], **kwargs, **more)
        states = out[0] if isinstance(out, tuple) else out
        if self._deepstack is not None:
            visual, features = self._deepstack
            if index < len(features):
                states = self.decoder.model._deepstack_process(states, visual, features[index])
        return states

    def _logits(self, states: Tensor) -> Tensor:
        head = self.decoder.head
        assert head is not None, "the model gave logits"
        return head(self.decoder.model.norm(states[:, -1:]))[:, 0]
