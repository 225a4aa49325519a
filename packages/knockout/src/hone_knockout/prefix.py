"""Prefix reuse: many configurations of one prompt, each layer that they share computed once.

A configuration that first intervenes at layer j sees the baseline's hidden states up to there. So the baseline runs
once and keeps the states that enter each layer; a configuration starts from those of its own first layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hone_lm.decoders import find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from torch import Tensor, nn

from .config import KnockoutConfig
from .models import attach

__all__ = ["Counts", "PrefixRunner", "as_exit"]


@dataclass
class Counts:
    """Work done, and what it would be without reuse.

    Attributes:
        layers: decoder layers evaluated, the repeated last one of the baseline's check among them.
        layers_without: the same, had every configuration run from the first layer.
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
        layouts: Of the prompts; found in the inputs if None.
        tokens_per_frame: As in ``attach``, for finding them.
        exits: Run LV-K in all layers from some on as the exit that it equals.

    Attributes:
        counts: of all runs so far.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        layouts: list[TokenLayout] | None = None,
        tokens_per_frame: int | None = None,
        exits: bool = True,
    ) -> None:
        self.model, self.inputs, self.exits = model, dict(inputs), exits
        found = find_layouts(model, inputs, tokens_per_frame=tokens_per_frame) if layouts is None else layouts
        self.layouts = list(found)
        self.decoder = find_decoder(model)
        self.counts = Counts()
        self._entering: list[tuple[Tensor, dict[str, Any]]] = []
        self._decoder_kwargs: dict[str, Any] = {}
        self._baseline: Tensor | None = None

    @torch.no_grad()
    def run(self, config: KnockoutConfig) -> Tensor:
        """Logits of the last position, ``[batch, vocabulary]``."""
        if self._baseline is None:
            self._run_baseline()
        num_layers = self.decoder.num_layers
        tokens = len(self.layouts[0].frame)
        self.counts.layers_without += num_layers
        self.counts.rows_without += num_layers * tokens
        if not config.knockouts and config.exit in (None, num_layers):
            return self._baseline
        if self.exits:
            types = getattr(self.decoder.config, "layer_types", None) or ()
            config = as_exit(config, num_layers, self.decoder.deepstack_layers, types)
        first = min([min(item.layers) for item in config.knockouts] + [config.exit or num_layers])
        with attach(self.model, config) as handle, handle.using(self.layouts):
            handle.start(self.layouts)
            handle.begin(tokens)
            states = self._entering[first][0]
            for index in range(first, num_layers):
                states = self._layer(index, states)
            return self._logits(states)

    @torch.no_grad()
    def _run_baseline(self) -> None:
        """Run the model as it is, and keep what enters each layer."""
        self._entering = []

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            states = args[0] if args else kwargs.pop("hidden_states")
            self._entering.append((states, kwargs))

        def keep_decoder(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._decoder_kwargs = kwargs

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
        last = self._layer(num_layers - 1, self._entering[-1][0])
        if not torch.allclose(self._logits(last), logits, atol=1e-3, rtol=1e-3):
            raise ValueError(
                f"{type(self.model).__name__} does more between its last layer and its logits than norm and head; "
                "prefix reuse would change its answers. Run each configuration from the start (reuse=False)"
            )
        self._baseline = logits

    def _layer(self, index: int, states: Tensor) -> Tensor:
        states = self._call(index, states)
        self.counts.layers += 1
        # Of what comes out: at an exit the layer gets every row and drops some before it begins.
        self.counts.rows += states.shape[1]
        return states

    def _call(self, index: int, states: Tensor) -> Tensor:
        kwargs = self._entering[index][1]
        out = self.decoder.layers[index](states, **kwargs)
        states = out[0] if isinstance(out, tuple) else out
        features = self._decoder_kwargs.get("deepstack_visual_embeds")
        if features is not None and index < len(features):
            states = self.decoder.model._deepstack_process(
                states, self._decoder_kwargs["visual_pos_masks"], features[index]
            )
        return states

    def _logits(self, states: Tensor) -> Tensor:
        return self.decoder.head(self.decoder.model.norm(states[:, -1:]))[:, 0]
