"""How knockouts and the exit enter real models: ``attach`` and its handle.

The decoder's attention goes through a tap in transformers' registry (``hone_lm.attention``), where the mask of the base
implementation loses the blocked pairs. The exit is a pre-hook on the layers from there on, which hands them the rows
that are left. Nothing is replaced; ``detach`` gives back the model of before, bit for bit.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from hone_core.handles import CallState, Handle, Hooks, resolve
from hone_lm.attention import AttentionTap, tap_attention
from hone_lm.checkpoints import read_config
from hone_lm.decoders import Decoder, cache_of, deepstack_layers, find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from torch import Tensor, nn

from .config import PRESETS, Knockout, KnockoutConfig, format_layers
from .local_attention import RegularFrames, frame_local_attention
from .prompts import Pass, Prompt, by_layer

__all__ = ["KnockoutHandle", "attach", "check_devices", "check_model", "every_row", "reason_against_exit"]

log = logging.getLogger(__name__)

_LONG = 2048
"""Tokens from which a dense mask is worth a word."""
_PASS = "hone_knockout"
"""Argument of the decoder that takes a forward's ``Pass`` to every layer and its attention."""
_BOUND = "_hone_knockout"
"""Attribute of a cache: the ``Prompt`` that it was filled with."""
_CARRIED = {
    "hidden_states",
    "position_embeddings",
    "position_ids",
    "per_layer_input",
    "moe_mm_token_type_ids",
}
"""Arguments of a layer that are per token, and lose rows at an exit."""
_WHOLE = {
    "attention_mask",
    "past_key_values",
    "past_key_value",
    "cache",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "shared_kv_states",
    "kwargs",
    "args",
    _PASS,
}
"""Arguments that are not: masks are cut in attention, the rest holds no tokens, or none of this layer's."""


Positions = tuple[int, int] | Sequence[int] | Tensor
Spans = Mapping[str, Positions]
FindSpans = Callable[[TokenLayout, Tensor | None], Spans]


class KnockoutHandle(Handle[KnockoutConfig]):
    """What is attached to a model. A context manager: leaving it detaches.

    What a forward needs belongs to that forward, and a prompt's layout to the cache that its prefill fills: several
    prompts may take turns, and several threads use the model.

    Attributes:
        config: the settings.
        tokens_per_frame: of ``attach``.
        spans: of ``attach``.
        frame_local: whether VT-K over a regular prompt is computed frame by frame; False takes the mask that it equals.
        rows: ``[batch, rows]`` positions of the prompt that the last prefill returned logits for, where there is an
            exit; rows of a batch that keep fewer are filled at the left with position 0.
        layouts: of the last prefill.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KnockoutConfig,
        tokens_per_frame: int | None = None,
        spans: Spans | FindSpans | None = None,
    ) -> None:
        super().__init__(config, [model])
        self.spans = spans
        self.tokens_per_frame = tokens_per_frame
        self.decoder: Decoder = find_decoder(model)
        check_devices(self.decoder)
        config.check(self.decoder.num_layers, self.decoder.deepstack_layers)
        self._by_layer = by_layer(config)
        _check_late_layers(self.decoder.config, config)
        if config.exit is not None:
            reason = reason_against_exit(self.decoder, config.exit)
            if reason:
                raise ValueError(reason)
        self._warned = False
        self._last: Prompt | None = None
        self._state: CallState[Prompt] = CallState()
        self._given: CallState[list[TokenLayout]] = CallState()
        self._signature = inspect.signature(model.forward)
        self.frame_local = True
        self._tap: AttentionTap | None = tap_attention(self.decoder, self._attend)
        self._hooks = Hooks(model)
        self._hook("", self._before_model)
        self._after("", self._after_model)
        names = {id(module): name for name, module in model.named_modules()}
        decoder = names[id(self.decoder.model)]
        self._hook(decoder, self._before_decoder)
        self._after(decoder, self._after_decoder)
        if config.exit is not None:
            for index, layer in enumerate(self.decoder.layers):
                if index >= config.exit:
                    self._hook(names[id(layer)], self._before_layer(index))

    def _hook(self, path: str, before: Callable[..., Any]) -> None:
        self._hooks.add(path, lambda module: module.register_forward_pre_hook(before, with_kwargs=True))

    def _after(self, path: str, after: Callable[..., Any]) -> None:
        self._hooks.add(
            path, lambda module: module.register_forward_hook(after, with_kwargs=True, always_call=not path)
        )

    @property
    def attached(self) -> bool:
        """Whether the model has it on."""
        return self._tap is not None

    def _states(self) -> tuple[CallState[Prompt]]:
        return (self._state,)

    @property
    def layouts(self) -> list[TokenLayout]:
        """Layouts of the last prefill."""
        return [] if self._last is None else self._last.layouts

    @property
    def rows(self) -> Tensor | None:
        """Positions of the rows that the last prefill returned, where there is an exit."""
        return None if self._last is None or self._last.left is None else self._last.left.rows

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled, as part of a model too: hooks of the model hold the handle."""
        raise TypeError(
            "a model with a knockout or an exit attached cannot be copied or pickled, since its copy would have no "
            "handle. To copy it: handle.detach(), copy, then attach(). To save it: model.save_pretrained(folder) or "
            "torch.save(model.state_dict(), path), which hold nothing of what is attached"
        )

    def detach(self) -> None:
        """Give the model back as it was; harmless when repeated."""
        self._hooks.remove()
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._last = None

    @contextmanager
    def using(self, layouts: Sequence[TokenLayout]) -> Any:
        """Use these layouts for the prompts inside, in this thread, in place of what is found in the inputs.

        For prompts given as embeddings, for layouts with located spans, and for classes without a rule.
        """
        before, self._given.current = self._given.current, list(layouts)
        try:
            yield self
        finally:
            self._given.current = before

    # What happens before a forward.

    def _before_model(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._state.disabled:
            return None
        self._hooks.check()
        assert self._tap is not None, "the hook goes with the tap"
        self._tap.check()
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = inputs | inputs.get("kwargs", {})
        cache = cache_of(inputs)
        if cache is not None and int(cache.get_seq_length()) > 0:
            self._state.current = self._continued(cache, inputs)
            return None
        # Offloading may have come since; what it does to the weights would show as an error of torch's.
        check_devices(self.decoder)
        exit = self.config.exit is not None
        if exit:
            if inputs.get("labels") is not None:
                raise ValueError(
                    "labels need logits of every row; visual rows are gone after the exit. Detach to train"
                )
            if getattr(cache, "is_compileable", False):
                raise ValueError("the exit makes caches of different lengths, which a static cache cannot hold")
        layouts, ids = self._given.current, inputs.get("input_ids")
        if layouts is None:
            _refuse_chunks(inputs)
            layouts = find_layouts(module, inputs, tokens_per_frame=self.tokens_per_frame)
        candidates = _candidates(inputs)
        if candidates and ids is not None:
            ids = ids[:, :-candidates]
            layouts = [layout.cut(ids.shape[1]) for layout in layouts]
        if self.spans is not None:
            layouts = _with_spans(layouts, self.spans, ids)
        prompt = self._take_up(layouts, ids)
        self._state.current = prompt
        if cache is not None:
            setattr(cache, _BOUND, prompt)
        keep = kwargs.get("logits_to_keep")
        if exit and keep is not None and not candidates:
            return args, kwargs | {"logits_to_keep": prompt.kept_logits(keep)}
        return None

    def _continued(self, cache: Any, inputs: Mapping[str, Any]) -> Prompt:
        """The prompt that a filled cache belongs to."""
        prompt = getattr(cache, _BOUND, None)
        if prompt is None or prompt.config != self.config:
            raise ValueError(
                "the cache was filled before this was attached, or under other settings; attach first, then run the "
                "whole prompt"
            )
        pixels = _pixels(inputs)
        if pixels:
            raise ValueError(
                f"{pixels[0]} came with a filled cache: pass the whole prompt in one forward, and call generate "
                "without prefill_chunk_size"
            )
        length = int(cache.get_seq_length())
        if length < prompt.tokens:
            raise ValueError(
                f"the cache was cut to {length} positions, inside its prompt of {prompt.tokens}; run the new prompt "
                "from the start"
            )
        if prompt.left is not None:
            late = int(cache.get_seq_length(cast(int, self.config.exit)))
            if late != prompt.left.rows.shape[1] + length - prompt.tokens:
                raise ValueError(
                    f"the cache was cut to {length} positions in all layers; those after the exit hold {late}, without "
                    "the video. Cut by a count from the end: cache.crop(-2) takes off two positions in every layer"
                )
        rows = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
        return prompt.follow(cache, len(rows))

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        prompt, self._state.current = self._state.current, None
        if prompt is None or output is None:
            return
        cache = cache_of(output) if isinstance(output, Mapping) else None
        if isinstance(output, tuple):
            cache = next((value for value in output if hasattr(value, "get_seq_length")), None)
        if cache is None:
            return
        if not hasattr(cache, _BOUND):
            # The model made it itself.
            setattr(cache, _BOUND, prompt)
        if getattr(cache, _BOUND) is prompt:
            prompt.mark(cache)

    def _take_up(self, layouts: Sequence[TokenLayout], ids: Tensor | None) -> Prompt:
        device = next(self.decoder.model.parameters()).device
        self._last = Prompt.of(list(layouts), self.config, device, ids)
        return self._last

    def prefill(self, layouts: Sequence[TokenLayout], ids: Tensor | None = None) -> dict[str, Any]:
        """Take up a batch of prompts whose layers are called one by one, without the model around them.

        Args:
            layouts: One per row of the batch, of equal padded length.
            ids: ``[batch, tokens]`` token ids, if there are any: a random control differs between prompts of one
                layout by them.

        Returns:
            Arguments to pass to every layer beside its own.

        Raises:
            ValueError: A knockout blocks no pair of a prompt, or leaves a token without any key.
        """
        prompt = self._take_up(layouts, ids)
        return {_PASS: Pass(prompt, 0, prompt.tokens)}

    def _before_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._state.disabled:
            return args, kwargs | {_PASS: None}
        prompt = self._state.current
        if prompt is None:
            raise RuntimeError("no prompt yet: run the model that this is attached to, not its decoder alone")
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        cache = cache_of(kwargs)
        start = 0 if cache is None else int(cache.get_seq_length())
        if (not start and states.shape[1] < prompt.tokens) or len(states) != len(prompt.layouts):
            raise ValueError(
                f"the layouts are of {len(prompt.layouts)} prompts of {prompt.tokens} tokens; the decoder got "
                f"{list(states.shape[:2])}"
            )
        return args, every_row(kwargs) | {_PASS: Pass(prompt, start, int(states.shape[1]))}

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running = kwargs.get(_PASS)
        missed = [] if running is None else [index for index in self._changed if index not in running.seen]
        if missed:
            raise RuntimeError(
                f"the attention of layers {format_layers(tuple(missed))} did not come through the tap, so that nothing "
                "was changed there; layers that are skipped, or attention that ignores transformers' registry, cannot "
                "be knocked out"
            )
        states = output[0] if running is not None else None
        if isinstance(states, Tensor) and states.requires_grad and _recomputes(module):
            states.register_hook(self._check_backward)

    def _check_backward(self, grad: Tensor) -> None:
        """Before the backward of a forward whose layers run again for it."""
        if not self.attached:
            raise RuntimeError(
                "layers of a checkpointed forward that had a knockout or an exit would run again without it. Call "
                "backward before detach()"
            )

    @property
    def _changed(self) -> list[int]:
        """Layers in which something is done."""
        exit = self.config.exit
        return [index for index in range(self.decoder.num_layers) if index in self._by_layer or index >= (exit or 1e9)]

    # The exit.

    def _before_layer(self, index: int) -> Callable[..., Any]:
        first = index == self.config.exit

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            running = kwargs.get(_PASS)
            if running is None or not running.prefill:
                return None
            kept = running.rows()

            def take(name: str, value: Any) -> Any:
                return running.once(name, value, lambda: _carried(name, value, kept, running.queries))

            states = args[0] if args else kwargs["hidden_states"]
            if first:
                states = states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
            names = list(inspect.signature(module.forward).parameters)
            others = tuple(take(name, value) for name, value in zip(names[1:], args[1:], strict=False))
            changed = {name: take(name, value) for name, value in kwargs.items() if name != "hidden_states"}
            if args:
                return (states, *others), changed
            return args, changed | {"hidden_states": states}

        return hook

    # Masks.

    def _attend(
        self,
        base: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if _PASS not in kwargs:
            raise RuntimeError(
                "this layer was called without what its forward needs: run the model that this is attached to, or pass "
                "what handle.prefill(layouts) returns"
            )
        running: Pass | None = kwargs.pop(_PASS)
        if running is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        layer, prompt, keys = cast(int, module.layer_idx), running.prompt, key.shape[2]
        running.seen.add(layer)
        if self.config.exit is not None and layer >= self.config.exit:
            attention_mask = running.once(
                ("exit", keys), attention_mask, lambda: running.after_exit(attention_mask, query, keys)
            )
        elif layer in self._by_layer:
            items = self._by_layer[layer]
            where = self._local(running, items, module, attention_mask, keys, kwargs)
            if where is not None:
                # A static cache hands over its spare room after the prompt.
                own = slice(0, prompt.tokens)
                out = frame_local_attention(query, key[:, :, own], value[:, :, own], where, scale=kwargs.get("scaling"))
                return out.transpose(1, 2).contiguous(), None
            if running.prefill and running.queries >= _LONG and self._base == "sdpa":
                self._warn_of_mask(items)
            kinds = getattr(self.decoder.config, "layer_types", None)
            kind = kinds[layer] if kinds else ""
            attention_mask = running.once(
                (items, keys, kind),
                attention_mask,
                lambda: running.knocked(attention_mask, items, query, keys, kind),
            )
        return base(module, query, key, value, attention_mask, **kwargs)

    @property
    def _base(self) -> str:
        return "" if self._tap is None else self._tap.base

    def _local(
        self,
        running: Pass,
        items: tuple[Knockout, ...],
        module: nn.Module,
        mask: Any,
        keys: int,
        kwargs: Mapping[str, Any],
    ) -> RegularFrames | None:
        """The frames, if this call is VT-K alone over a whole regular prompt, for which no mask is needed."""
        alone = (
            self.frame_local
            and self._base == "sdpa"
            and mask is None
            and running.prefill
            and running.queries == running.prompt.tokens <= keys
            and all((item.kind, item.frames, item.control) == ("VT", None, "none") for item in items)
            and not module.training
            and kwargs.get("position_bias") is None
        )
        return running.prompt.regular if alone else None

    def _warn_of_mask(self, items: tuple[Knockout, ...]) -> None:
        """Say once that frame-local attention saves nothing here."""
        if self._warned or any(item.kind != "VT" or item.control != "none" for item in items):
            return
        self._warned = True
        log.warning(
            "attention within a frame runs under a dense mask here, which is right and no faster: the frames differ in "
            "size, have text between them, or the batch is padded. model.set_attn_implementation('flex_attention') "
            "skips blocked blocks on a GPU, for classes that support it"
        )


def attach(
    model: nn.Module,
    config: KnockoutConfig | Knockout | Sequence[Knockout] | str,
    *,
    tokens_per_frame: int | None = None,
    spans: Spans | FindSpans | None = None,
) -> KnockoutHandle:
    """Attach knockouts and an exit to a transformers Video-LLM.

    Works in prefill, in cached decoding, in left- or right-padded batches, with eager, sdpa and flex attention. With an
    exit the model returns logits of the rows that are left (``handle.rows``); ``logits[:, -1]`` is the last token's.

    Args:
        model: A ``...ForConditionalGeneration`` with a decoder of attention layers.
        config: Settings, one or more knockouts, or the name of a preset.
        tokens_per_frame: Cut the video into frames of so many tokens, in place of the class's rule; needed for a class
            without one whose frames follow each other without text (``hone_lm.find_layouts``).
        spans: Name to positions that ``source``, ``target`` and ``leave`` may name: a pair (start, stop), or a list or
            mask of any positions, counted from the first real token of a prompt, so that padding changes nothing. Or a
            function ``(layout, ids) -> such names`` for spans that differ between prompts, whose positions are those of
            the layout (``hone_lm.locate_spans`` finds text).

    Raises:
        ValueError: Layers are out of range, the exit comes before DeepStack's last layer, the decoder is a hybrid, the
            attention implementation takes no mask, the decoder is spread over devices, or something is attached
            already.
        TypeError: The model has no decoder, or ``config`` is none of these.
    """
    if isinstance(config, Knockout):
        config = KnockoutConfig(knockouts=(config,))
    elif not isinstance(config, (str, KnockoutConfig)):
        config = KnockoutConfig(knockouts=tuple(config))
    config = resolve(config, PRESETS, KnockoutConfig)
    return KnockoutHandle(model, config, tokens_per_frame, spans)


def check_devices(decoder: Decoder) -> None:
    """Refuse a decoder that is not on one device: layouts and masks are made on one.

    The vision tower may be elsewhere.

    Raises:
        ValueError: Its layers are on several devices, or some are offloaded or without weights (``meta``).
    """
    where: dict[str, list[int]] = {}
    for index, layer in enumerate(decoder.layers):
        for device in sorted({str(parameter.device) for parameter in layer.parameters()}):
            where.setdefault(device, []).append(index)
    for parameter in decoder.model.parameters():
        where.setdefault(str(parameter.device), [])
    if len(where) > 1 or "meta" in where:
        shown = "; ".join(
            f"{device}: " + (f"layers {format_layers(tuple(layers))}" if layers else "embeddings or norm")
            for device, layers in where.items()
        )
        raise ValueError(
            "knockouts and exit need a decoder whose weights are all on one device; accelerate has offloaded or spread "
            f"this one ({shown}). Load it with device_map={{'': 0}}, or without a device_map and move it with "
            "model.to('cuda'); a smaller dtype may help it to fit"
        )


def check_model(path: str, config: KnockoutConfig | None = None) -> int:
    """Look at a checkpoint's config, without its weights, and return its number of decoder layers.

    Args:
        path: What ``from_pretrained`` takes, such as llava-hf/llava-onevision-qwen2-7b-ov-hf.
        config: Settings that must fit the decoder.

    Raises:
        ValueError: The checkpoint is no vision-language model, its decoder is a hybrid, or the settings do not fit it.
        OSError: There is no such checkpoint.
    """
    found = read_config(path)
    text = found.get_text_config()
    if config is not None:
        _check_late_layers(text, config)
        config.check(text.num_hidden_layers, deepstack_layers(found))
    return text.num_hidden_layers


def _check_late_layers(text: Any, config: KnockoutConfig) -> None:
    """Refuse an exit that some layer of a decoder with this config cannot take."""
    types = getattr(text, "layer_types", None) or []
    if config.exit is not None and any(kind != "full_attention" for kind in types[config.exit :]):
        raise ValueError("an exit before sliding-window layers is not supported: their caches drop positions")


def reason_against_exit(decoder: Decoder, exit: int) -> str:
    """Why there can be no exit at a layer of this decoder, by what its layers take; empty if there can."""
    instead = "LV-K in all layers from there on gives text the same, without the time saved"
    for index, layer in enumerate(decoder.layers):
        if index < exit:
            continue
        unknown = sorted(set(inspect.signature(layer.forward).parameters) - _CARRIED - _WHOLE)
        if unknown:
            return (
                f"{type(layer).__name__} takes {', '.join(unknown)}, of which it is not known whether it loses rows at "
                f"an exit. {instead}"
            )
        if getattr(layer.self_attn, "is_kv_shared_layer", False):
            return (
                f"layer {index} reads keys of an earlier layer, in which the video still is: no exit at {exit}. "
                f"{instead}"
            )
    return ""


def _carried(name: str, value: Any, rows: Tensor, tokens: int) -> Any:
    """An argument of a layer with the rows that are left, if it is per token."""
    if name in _WHOLE or value is None:
        return value
    if name == "position_embeddings":
        return tuple(_take_rows(table, rows) for table in value)
    if name == "position_ids":
        return _take_rows(value[..., None], rows)[..., 0]
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        flat = value.flatten(2) if value.dim() > 2 else value[..., None]
        return _take_rows(flat, rows).reshape(*rows.shape, *value.shape[2:])
    return value


def _recomputes(decoder: nn.Module) -> bool:
    """Whether backward runs layers again."""
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def _candidates(inputs: Mapping[str, Any]) -> int:
    """Tokens after the prompt that assisted decoding or prompt lookup put into its first forward.

    They come with an empty cache, and with a count of logits that is theirs and one; plain generate asks for one.
    """
    keep = inputs.get("logits_to_keep")
    return keep - 1 if cache_of(inputs) is not None and isinstance(keep, int) and keep > 1 else 0


def _with_spans(layouts: Sequence[TokenLayout], spans: Spans | FindSpans, ids: Tensor | None) -> list[TokenLayout]:
    """Layouts with the spans and positions that ``attach`` was given."""
    found = []
    for row, layout in enumerate(layouts):
        begin = 0 if callable(spans) else int(layout.real.nonzero()[0])
        named = spans(layout, None if ids is None else ids[row]) if callable(spans) else spans
        pairs = {name: at for name, at in named.items() if isinstance(at, tuple) and len(at) == 2}
        others: dict[str, Tensor] = {}
        for name, at in named.items():
            if name not in pairs:
                at = torch.as_tensor(at)
                others[name] = (at.nonzero().flatten() if at.dtype == torch.bool else at) + begin
        layout = layout.with_spans({name: (at[0] + begin, at[1] + begin) for name, at in pairs.items()})
        found.append(layout.with_positions(others))
    return found


def every_row(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder by which it keeps all rows to its end; newer Gemma 4 drops some between its layers."""
    return dict(kwargs) | ({"logits_to_keep": 0} if "logits_to_keep" in kwargs else {})


def _pixels(inputs: Mapping[str, Any]) -> list[str]:
    """Arguments that carry pixels, or in their place the features that newer generate encodes before the prompt."""
    carriers = ("pixel_values", "mm_encoder_outputs")
    return [name for name, value in inputs.items() if name.startswith(carriers) and value is not None]


def _refuse_chunks(inputs: Mapping[str, Any]) -> None:
    """Refuse a prompt that generate hands over in pieces: it leaves the pixels out, and a piece is not the layout."""
    if cache_of(inputs) is not None and inputs.get("input_ids") is not None and not _pixels(inputs):
        raise ValueError(
            f"a prompt of {inputs['input_ids'].shape[1]} tokens came with a cache and without pixels, as in chunked "
            "prefill, which drops the video. Call generate without prefill_chunk_size"
        )


def _take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[batch, rows]`` of ``[..., batch or 1, tokens, channels]``."""
    table = table.expand(*table.shape[:-3], len(rows), *table.shape[-2:])
    index = rows[..., None].expand(*table.shape[:-2], rows.shape[1], table.shape[-1])
    return table.gather(-2, index)
