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
from typing import Any, cast

from hone_core.handles import CallState, Handle, Hooks, resolve
from hone_lm.attention import AttentionTap, tap_attention
from hone_lm.checkpoints import read_config
from hone_lm.decoders import Decoder, cache_of, deepstack_layers, find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from torch import Tensor, nn

from .config import PRESETS, Knockout, KnockoutConfig, format_layers
from .local_attention import RegularFrames, frame_local_attention
from .prompts import Prompt, by_layer

__all__ = ["KnockoutHandle", "attach", "check_devices", "check_model"]

log = logging.getLogger(__name__)

_LONG = 2048
"""Tokens from which a dense mask is worth a word."""


class KnockoutHandle(Handle[KnockoutConfig]):
    """What is attached to a model. A context manager: leaving it detaches.

    Attributes:
        config: the settings.
        tokens_per_frame: of ``attach``.
        frame_local: whether VT-K over a regular prompt is computed frame by frame; False takes the mask that it equals.
        rows: ``[batch, rows]`` positions of the prompt that the last prefill returned logits for, where there is an
            exit; rows of a batch that keep fewer are filled at the left with position 0.
        layouts: of the last prefill.
    """

    def __init__(self, model: nn.Module, config: KnockoutConfig, tokens_per_frame: int | None = None) -> None:
        super().__init__(config, [model])
        self.tokens_per_frame = tokens_per_frame
        self.decoder: Decoder = find_decoder(model)
        check_devices(self.decoder)
        config.check(self.decoder.num_layers, self.decoder.deepstack_layers)
        self._by_layer = by_layer(config)
        _check_late_layers(self.decoder.config, config)
        self._given: list[TokenLayout] | None = None
        self._warned = False
        self._prompt: Prompt | None = None
        self._state: CallState[None] = CallState()
        self._signature = inspect.signature(model.forward)
        self.frame_local = True
        self._tap: AttentionTap | None = tap_attention(self.decoder, self._attend)
        self._base = self._tap.base
        self._hooks = Hooks(model)
        self._hook("", self._before_model)
        names = {id(module): name for name, module in model.named_modules()}
        self._hook(names[id(self.decoder.model)], self._before_decoder)
        if config.exit is not None:
            for index, layer in enumerate(self.decoder.layers):
                if index >= config.exit:
                    self._hook(names[id(layer)], self._before_layer(index))

    def _hook(self, path: str, before: Callable[..., Any]) -> None:
        self._hooks.add(path, lambda module: module.register_forward_pre_hook(before, with_kwargs=True))

    @property
    def attached(self) -> bool:
        """Whether the model has it on."""
        return self._tap is not None

    def _states(self) -> tuple[CallState[None]]:
        return (self._state,)

    @property
    def layouts(self) -> list[TokenLayout]:
        """Layouts of the last prefill."""
        return [] if self._prompt is None else self._prompt.layouts

    @property
    def rows(self) -> Tensor | None:
        """Positions of the rows that the last prefill returned, where there is an exit."""
        return None if self._prompt is None or self._prompt.left is None else self._prompt.left.rows

    def detach(self) -> None:
        """Give the model back as it was; harmless when repeated."""
        self._hooks.remove()
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._prompt = None

    @contextmanager
    def using(self, layouts: Sequence[TokenLayout]) -> Any:
        """Use these layouts for the prompts inside, in place of what is found in the inputs.

        For prompts given as embeddings, for layouts with located spans, and for classes without a rule.
        """
        before, self._given = self._given, list(layouts)
        try:
            yield self
        finally:
            self._given = before

    # What happens before a forward.

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._state.disabled:
            return
        self._hooks.check()
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = inputs | inputs.get("kwargs", {})
        cache = cache_of(inputs)
        if cache is not None and int(cache.get_seq_length()) > 0:
            self._refuse_late_video(inputs)
            return
        if self.config.exit is not None:
            if inputs.get("labels") is not None:
                raise ValueError(
                    "labels need logits of every row; visual rows are gone after the exit. Detach to train"
                )
            if getattr(cache, "is_compileable", False):
                raise ValueError("the exit makes caches of different lengths, which a static cache cannot hold")
        layouts = self._given
        if layouts is None:
            _refuse_chunks(inputs)
            layouts = find_layouts(module, inputs, tokens_per_frame=self.tokens_per_frame)
        self.start(layouts, inputs.get("input_ids"))

    def _refuse_late_video(self, inputs: Mapping[str, Any]) -> None:
        if self._prompt is None:
            raise ValueError("the cache was filled before this was attached; attach first, then run the whole prompt")
        pixels = _pixels(inputs)
        if pixels:
            raise ValueError(
                f"{pixels[0]} came with a filled cache: pass the whole prompt in one forward, and call generate "
                "without prefill_chunk_size"
            )

    def start(self, layouts: list[TokenLayout], ids: Tensor | None = None) -> None:
        """Take up a batch of prompts; the forward hooks call this themselves.

        Args:
            layouts: One per row of the batch, of equal padded length.
            ids: ``[batch, tokens]`` token ids, if there are any: a random control differs between prompts of one
                layout by them.

        Raises:
            ValueError: A knockout blocks no pair of a prompt, or leaves a token without any key.
        """
        device = next(self.decoder.model.parameters()).device
        self._prompt = Prompt.of(layouts, self.config, device, ids)

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._state.disabled:
            return
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = cache_of(kwargs)
        self.begin(int(states.shape[1]), 0 if cache is None else int(cache.get_seq_length()))

    def begin(self, queries: int, start: int = 0) -> None:
        """Begin a forward of the decoder with so many rows; the forward hooks call this themselves."""
        if self._prompt is None:
            raise ValueError("no prompt yet: run the model, not its decoder, or call start(layouts) first")
        self._prompt.begin(queries, start)

    # The exit.

    def _before_layer(self, index: int) -> Callable[..., Any]:
        first = index == self.config.exit

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            prompt = self._prompt
            if self._state.disabled or prompt is None or prompt.left is None or not prompt.step.prefill:
                return None
            kept = prompt.left.rows
            changed = dict(kwargs)
            if first:
                states = args[0] if args else kwargs["hidden_states"]
                gone = states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
                if args:
                    args = (gone, *args[1:])
                else:
                    changed["hidden_states"] = gone
            if kwargs.get("position_embeddings") is not None:
                changed["position_embeddings"] = prompt.once(
                    "rope", lambda: tuple(_take_rows(table, kept) for table in kwargs["position_embeddings"])
                )
            if kwargs.get("position_ids") is not None:
                ids = kwargs["position_ids"]
                changed["position_ids"] = prompt.once("ids", lambda: _take_rows(ids[..., None], kept)[..., 0])
            return args, changed

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
        if self._state.disabled:
            return base(module, query, key, value, attention_mask, **kwargs)
        layer, prompt = cast(int, module.layer_idx), self._prompt
        if prompt is None:
            raise RuntimeError("the decoder ran without the model around it: call start(layouts) and begin(...) first")
        step, keys = prompt.step, key.shape[2]
        if self.config.exit is not None and layer >= self.config.exit:
            attention_mask = prompt.once(
                ("exit", keys, id(attention_mask)), lambda: prompt.after_exit(attention_mask, query, keys)
            )
        elif layer in self._by_layer:
            items = self._by_layer[layer]
            where = self._local(prompt, items, module, attention_mask, keys, kwargs)
            if where is not None:
                # A static cache hands over its spare room after the prompt.
                own = slice(0, prompt.tokens)
                out = frame_local_attention(query, key[:, :, own], value[:, :, own], where, scale=kwargs.get("scaling"))
                return out.transpose(1, 2).contiguous(), None
            if step.prefill and step.queries >= _LONG and self._base == "sdpa":
                self._warn_of_mask(items)
            attention_mask = prompt.once(
                (items, keys, id(attention_mask)), lambda: prompt.knocked(attention_mask, items, query, keys)
            )
        return base(module, query, key, value, attention_mask, **kwargs)

    def _local(
        self,
        prompt: Prompt,
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
            and prompt.step.prefill
            and prompt.step.queries == prompt.tokens <= keys
            and all((item.kind, item.frames, item.control) == ("VT", None, "none") for item in items)
            and not module.training
            and kwargs.get("position_bias") is None
        )
        return prompt.regular if alone else None

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
) -> KnockoutHandle:
    """Attach knockouts and an exit to a transformers Video-LLM.

    Works in prefill, in cached decoding, in left- or right-padded batches, with eager, sdpa and flex attention. With an
    exit the model returns logits of the rows that are left (``handle.rows``); ``logits[:, -1]`` is the last token's.

    Args:
        model: A ``...ForConditionalGeneration`` with a decoder of attention layers.
        config: Settings, one or more knockouts, or the name of a preset.
        tokens_per_frame: Cut the video into frames of so many tokens, in place of the class's rule; needed for a class
            without one whose frames follow each other without text (``hone_lm.find_layouts``).

    Raises:
        ValueError: Layers are out of range, the exit comes before DeepStack's last layer, the decoder is a hybrid, the
            attention implementation takes no mask, the decoder is spread over devices, or something is attached
            already.
        TypeError: The model has no decoder.
    """
    if isinstance(config, Knockout):
        config = KnockoutConfig(knockouts=(config,))
    elif not isinstance(config, (str, KnockoutConfig)):
        config = KnockoutConfig(knockouts=tuple(config))
    config = resolve(config, PRESETS, KnockoutConfig)
    return KnockoutHandle(model, config, tokens_per_frame)


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
