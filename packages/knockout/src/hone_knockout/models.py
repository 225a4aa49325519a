"""How knockouts and the exit enter real models: ``attach`` and its handle.

The decoder's attention goes through a tap in transformers' registry (``hone_lm.attention``), where the mask of the base
implementation loses the blocked pairs. The exit is a pre-hook on the layers from there on, which hands them the rows
that are left. Nothing is replaced; ``detach`` gives back the model of before, bit for bit.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from hone_lm.attention import AttentionTap, tap_attention
from hone_lm.checkpoints import read_config
from hone_lm.decoders import Decoder, deepstack_layers, find_decoder
from hone_lm.layouts import TokenLayout, find_layouts
from torch import Tensor, nn

from .config import PRESETS, Knockout, KnockoutConfig, format_layers
from .local_attention import RegularFrames, frame_local_attention, regular_frames
from .method import PairRule, Roles, causal_pairs, keep_frames, opposite_rule, pair_rule, random_pairs, span_rule

__all__ = ["KnockoutHandle", "attach", "check_devices", "check_model"]

log = logging.getLogger(__name__)

_LONG = 2048
"""Tokens from which a dense mask is worth a word."""

# Spans that generated tokens belong to, as queries and as keys.
_OPEN_SPANS = ("last", "suffix", "text")


class _Prompt(NamedTuple):
    """A batch of prompts as the masks need it, on the model's device."""

    layouts: list[TokenLayout]
    roles: Roles
    real: Tensor  # [B, S]
    tokens: int
    kept: Tensor | None  # [B, T'] positions that stay after the exit, fillers at the left
    kept_real: Tensor | None  # [B, T'] False for fillers
    even: bool  # no fillers: every row keeps as many
    regular: RegularFrames | None  # frames of one size that follow each other, no padding
    ids: Tensor | None  # [B, S] token ids, if the prompts came as such


class _Step(NamedTuple):
    """One forward of the decoder."""

    start: int  # position of its first query
    queries: int
    prefill: bool


class KnockoutHandle:
    """What is attached to a model. A context manager: leaving it detaches.

    Attributes:
        config: the settings.
        tokens_per_frame: of ``attach``.
        rows: ``[batch, rows]`` positions of the prompt that the last prefill returned logits for, where there is an
            exit; rows of a batch that keep fewer are filled at the left with position 0.
        layouts: of the last prefill.
    """

    def __init__(self, model: nn.Module, config: KnockoutConfig, tokens_per_frame: int | None = None) -> None:
        self.model, self.config, self.tokens_per_frame = model, config, tokens_per_frame
        self.decoder: Decoder = find_decoder(model)
        check_devices(self.decoder)
        config.check(self.decoder.num_layers, self.decoder.deepstack_layers)
        self._by_layer: dict[int, tuple[Knockout, ...]] = {}
        for item in config.knockouts:
            for layer in item.layers:
                self._by_layer[layer] = (*self._by_layer.get(layer, ()), item)
        _check_late_layers(self.decoder.config, config)
        self._given: list[TokenLayout] | None = None
        self._warned = False
        self._prompt: _Prompt | None = None
        self._step: _Step | None = None
        self._masks: dict[Any, Any] = {}
        self._drawn: dict[tuple[int, int], tuple[Tensor, int]] = {}  # the pairs of (knockout, row), and their seed
        self._signature = inspect.signature(model.forward)
        self._tap: AttentionTap | None = tap_attention(self.decoder, self._attend)
        self._hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.model.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ]
        if config.exit is not None:
            self._hooks += [
                layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
                for index, layer in enumerate(self.decoder.layers)
                if index >= config.exit
            ]

    @property
    def layouts(self) -> list[TokenLayout]:
        """Layouts of the last prefill."""
        return [] if self._prompt is None else self._prompt.layouts

    @property
    def rows(self) -> Tensor | None:
        """Positions of the rows that the last prefill returned, where there is an exit."""
        return None if self._prompt is None else self._prompt.kept

    def detach(self) -> None:
        """Give the model back as it was; harmless when repeated."""
        for hook in self._hooks:
            hook.remove()
        if self._tap is not None:
            self._tap.remove()
        self._hooks, self._tap, self._prompt, self._masks, self._drawn = [], None, None, {}, {}

    def __enter__(self) -> KnockoutHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

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
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = inputs | inputs.get("kwargs", {})
        cache = inputs.get("past_key_values")
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
            raise ValueError(f"{pixels[0]} came with a filled cache: pass the whole prompt in one forward")

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
        frame = torch.stack([layout.frame for layout in layouts]).to(device)
        real = torch.stack([layout.real for layout in layouts]).to(device)
        kept = kept_real = None
        even = True
        if self.config.exit is not None:
            kept, kept_real, even = _rows_left(frame)
        self._drawn = {}
        regular = regular_frames(layouts)
        self._prompt = _Prompt(layouts, Roles.of(frame), real, frame.shape[1], kept, kept_real, even, regular, ids)
        self._check_pairs()

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        self.begin(int(states.shape[1]), 0 if cache is None else int(cache.get_seq_length()))

    def begin(self, queries: int, start: int = 0) -> None:
        """Begin a forward of the decoder with so many rows; the forward hooks call this themselves."""
        if self._prompt is None:
            raise ValueError("no prompt yet: run the model, not its decoder, or call start(layouts) first")
        self._step = _Step(start, queries, prefill=start == 0)
        self._masks = {}

    # The exit.

    def _before_layer(self, index: int) -> Callable[..., Any]:
        first = index == self.config.exit

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if not self._step.prefill:
                return None
            kept = self._prompt.kept
            changed = dict(kwargs)
            if first:
                states = args[0] if args else kwargs["hidden_states"]
                gone = states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
                if args:
                    args = (gone, *args[1:])
                else:
                    changed["hidden_states"] = gone
            if kwargs.get("position_embeddings") is not None:
                changed["position_embeddings"] = self._cached(
                    "rope", lambda: tuple(_take_rows(table, kept) for table in kwargs["position_embeddings"])
                )
            if kwargs.get("position_ids") is not None:
                ids = kwargs["position_ids"]
                changed["position_ids"] = self._cached("ids", lambda: _take_rows(ids[..., None], kept)[..., 0])
            return args, changed

        return hook

    def _cached(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

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
        layer = module.layer_idx
        if self._prompt is None or self._step is None:
            raise RuntimeError("the decoder ran without the model around it: call start(layouts) and begin(...) first")
        keys = key.shape[2]
        if self.config.exit is not None and layer >= self.config.exit:
            attention_mask = self._cached(
                ("exit", keys, id(attention_mask)), lambda: self._after_exit(attention_mask, query, keys)
            )
        elif layer in self._by_layer:
            items = self._by_layer[layer]
            if self._is_local(items, module, attention_mask, keys, kwargs):
                # A static cache hands over its spare room after the prompt.
                own = slice(0, self._prompt.tokens)
                out = frame_local_attention(
                    query, key[:, :, own], value[:, :, own], self._prompt.regular, scale=kwargs.get("scaling")
                )
                return out.transpose(1, 2).contiguous(), None
            attention_mask = self._cached(
                (items, keys, id(attention_mask)), lambda: self._knocked(attention_mask, items, query, keys)
            )
        return base(module, query, key, value, attention_mask, **kwargs)

    def _is_local(
        self, items: tuple[Knockout, ...], module: nn.Module, mask: Any, keys: int, kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether this call is VT-K alone over a whole regular prompt, for which no mask is needed."""
        return (
            self._tap.base == "sdpa"
            and mask is None
            and self._step.prefill
            and self._step.queries == self._prompt.tokens <= keys
            and self._prompt.regular is not None
            and all((item.kind, item.frames, item.control) == ("VT", None, "none") for item in items)
            and not module.training
            and kwargs.get("position_bias") is None
        )

    def _knocked(self, mask: Any, items: tuple[Knockout, ...], query: Tensor, keys: int) -> Any:
        """The base's mask without the blocked pairs."""
        step = self._step
        total = step.start + step.queries
        if step.prefill and step.queries >= _LONG and self._tap.base == "sdpa":
            self._warn_of_mask(items)
        # A sliding cache holds the last keys only, a static one has room to spare.
        first_key = max(0, total - keys)
        rule = self._union(items, max(total, first_key + keys))
        batch = query.shape[0]
        if _is_block_mask(mask):
            return _flex_mask(mask, batch, step.queries, keys, lambda b, q, k: ~rule(b, q + step.start, k + first_key))
        b = torch.arange(batch, device=query.device)[:, None, None]
        q = torch.arange(step.queries, device=query.device)[None, :, None] + step.start
        k = torch.arange(keys, device=query.device)[None, None, :] + first_key
        blocked = rule(b, q, k)[:, None]
        if mask is None:
            # None is the base's word for causal, or for one query that reads everything.
            allowed = (k <= q)[:, None] & ~blocked
        elif mask.dtype == torch.bool:
            allowed = mask[..., :keys] & ~blocked
        else:
            return mask[..., :keys].masked_fill(blocked, torch.finfo(mask.dtype).min)
        return allowed

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

    def _after_exit(self, mask: Any, query: Tensor, keys: int) -> Any:
        """The base's mask on the rows and columns that are left."""
        step, prompt = self._step, self._prompt
        total = step.start + step.queries
        kept, real = prompt.kept, prompt.kept_real
        later = torch.arange(prompt.tokens, total, device=kept.device).expand(len(kept), -1)
        columns = torch.cat([kept, later], 1)
        valid = torch.cat([real, torch.ones_like(later, dtype=torch.bool)], 1)
        rows = kept if step.prefill else torch.arange(step.start, total, device=kept.device).expand(len(kept), -1)
        assert columns.shape[1] == keys, f"{columns.shape[1]} keys should be left; the cache holds {keys}"
        if mask is None and prompt.even:
            return None
        if _is_block_mask(mask):
            old = mask.mask_mod
            zero = torch.zeros((), dtype=torch.long, device=kept.device)

            def left(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
                row = rows[b, q] - step.start
                return old(b, zero, row, columns[b, k]) & valid[b, k]

            return _flex_mask(None, len(kept), rows.shape[1], keys, left, query.device)
        if mask is None:
            allowed = (columns[:, None, None, :] <= rows[:, None, :, None]) & valid[:, None, None, :]
        else:
            table = mask.expand(len(kept), -1, -1, -1)
            if step.prefill:
                table = table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
            index = columns[:, None, None, :].expand(-1, table.shape[1], table.shape[2], -1)
            table = table.gather(3, index)
            if table.dtype != torch.bool:
                return table.masked_fill(~valid[:, None, None, :], torch.finfo(table.dtype).min)
            allowed = table & valid[:, None, None, :]
        return allowed

    # Rules.

    def _union(self, items: tuple[Knockout, ...], tokens: int) -> PairRule:
        rules = [self._rule(item, tokens) for item in items]

        def union(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            found = rules[0](b, q, k)
            for rule in rules[1:]:
                found = found | rule(b, q, k)
            return found

        return union

    def _rule(self, item: Knockout, tokens: int) -> PairRule:
        """Blocked pairs of a knockout in a sequence of so many tokens, generated ones included."""
        roles = self._prompt.roles.pad(tokens)
        if item.kind == "span":
            rule = span_rule(self._span(item.source, tokens), self._span(item.target, tokens))
        else:
            rule = pair_rule(item.kind, roles, keep_self=item.keep_self)
        if item.frames is not None:
            rule = keep_frames(rule, roles.frame, item.frames)
        if item.control == "opposite":
            return opposite_rule(rule)
        if item.control == "random":
            return self._random(item, rule, tokens)
        return rule

    def _span(self, name: str, tokens: int) -> Tensor:
        rows = torch.stack([layout.mask(name) for layout in self._prompt.layouts])
        rows = torch.nn.functional.pad(rows, (0, tokens - rows.shape[1]), value=name in _OPEN_SPANS)
        return rows.to(self._prompt.real.device)

    def _random(self, item: Knockout, rule: PairRule, tokens: int) -> PairRule:
        """Drawn once per prompt and knockout, the same in all its layers; generated rows are drawn as they come.

        The draw is a matter of seed and prompt: neither its row in a batch nor padding changes it.
        """
        prompt = self._prompt
        drawn = []
        for row, layout in enumerate(prompt.layouts):
            key = (self.config.knockouts.index(item), row)
            if key not in self._drawn:
                seed = _draw_seed(item.seed, layout, None if prompt.ids is None else prompt.ids[row])
                b = torch.full((1, 1), row, device=prompt.real.device)
                at = torch.arange(prompt.tokens, device=prompt.real.device)
                blocked = rule(b, at[:, None], at[None, :]) & causal_pairs(prompt.tokens, at.device)
                blocked &= prompt.real[row][:, None] & prompt.real[row][None, :]
                self._drawn[key] = random_pairs(blocked, seed=seed, real=prompt.real[row]), seed
            table, seed = self._drawn[key]
            while len(table) < tokens:
                table = _one_more_row(table, rule, row, prompt.real[row], seed)
            self._drawn[key] = table, seed
            drawn.append(table[:tokens, :tokens])
        pairs = torch.stack(drawn)

        def random(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return pairs[b, q, k]

        return random

    def _check_pairs(self) -> None:
        """Refuse a knockout that blocks nothing in some prompt, and a layer that leaves a token without any key."""
        if not self._by_layer:
            return
        prompt = self._prompt
        at = torch.arange(prompt.tokens, device=prompt.real.device)
        for row, layout in enumerate(prompt.layouts):
            b = torch.full((1, 1), row, device=at.device)
            # Causal pairs of real tokens; [S, S] once per prompt.
            open_pairs = (at[None, :] <= at[:, None]) & prompt.real[row][:, None] & prompt.real[row][None, :]
            for item in self.config.knockouts if not self.config.allow_empty else ():
                if not bool((self._rule(item, prompt.tokens)(b, at[:, None], at[None, :]) & open_pairs).any()):
                    raise ValueError(
                        f"{item.label} blocks no pair of prompt {row} ({layout.num_frames} frames, spans "
                        f"{', '.join(layout.spans)}); its result would be the baseline's. Pass allow_empty=True to "
                        "run it anyway"
                    )
            for items in set(self._by_layer.values()):
                left = open_pairs & ~self._union(items, prompt.tokens)(b, at[:, None], at[None, :])
                empty = prompt.real[row] & ~left.any(1)
                if bool(empty.any()):
                    raise ValueError(
                        f"{' + '.join(item.label for item in items)} leaves position {int(empty.nonzero()[0])} of "
                        f"prompt {row} without any key; keep the diagonal (keep_self=True), or put text before the "
                        "video"
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
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {config!r}")
        config = PRESETS[config].config
    elif isinstance(config, Knockout):
        config = KnockoutConfig(knockouts=(config,))
    elif not isinstance(config, KnockoutConfig):
        config = KnockoutConfig(knockouts=tuple(config))
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
    return [name for name, value in inputs.items() if name.startswith("pixel_values") and value is not None]


def _refuse_chunks(inputs: Mapping[str, Any]) -> None:
    """Refuse a prompt that generate hands over in pieces: it leaves the pixels out, and a piece is not the layout."""
    if inputs.get("past_key_values") is not None and inputs.get("input_ids") is not None and not _pixels(inputs):
        raise ValueError(
            f"a prompt of {inputs['input_ids'].shape[1]} tokens came with a cache and without pixels, as in chunked "
            "prefill, which drops the video. Call generate without prefill_chunk_size"
        )


def _rows_left(frame: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Positions without a frame, right-aligned ``[batch, rows]``, which of them are no fillers, and whether all are."""
    stay = frame < 0
    counts = stay.sum(1)
    most = int(counts.max())
    # A stable sort puts the positions that leave first and keeps the order of the others.
    order = stay.int().argsort(dim=1, stable=True)
    kept = order[:, frame.shape[1] - most :]
    real = stay.gather(1, kept)
    return kept.where(real, 0), real, bool((counts == most).all())


def _take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[batch, rows]`` of ``[..., batch or 1, tokens, channels]``."""
    table = table.expand(*table.shape[:-3], len(rows), *table.shape[-2:])
    index = rows[..., None].expand(*table.shape[:-2], rows.shape[1], table.shape[-1])
    return table.gather(-2, index)


def _draw_seed(seed: int, layout: TokenLayout, ids: Tensor | None) -> int:
    """Seed of a random control for one prompt, from what its real positions are: frames and, if known, tokens."""
    digest = hashlib.sha256(str(seed).encode())
    for row in (layout.frame, ids):
        if row is not None:
            digest.update(row.cpu()[layout.real].long().numpy().tobytes())
    return int.from_bytes(digest.digest()[:6], "big")


def _one_more_row(table: Tensor, rule: PairRule, row: int, real: Tensor, seed: int) -> Tensor:
    """A drawn table with one generated token more, which blocks as many keys as its rule does."""
    size = len(table)
    larger = torch.nn.functional.pad(table, (0, 1, 0, 1))
    at = torch.arange(size, device=table.device)
    there = torch.nn.functional.pad(real, (0, size - len(real)), value=True)
    b = torch.full_like(at, row)
    count = int((rule(b, torch.full_like(at, size), at) & there).sum())
    places = there.nonzero().flatten()
    # Counted in real tokens, which padding does not change.
    generator = torch.Generator().manual_seed(seed + len(places))
    chosen = torch.randperm(len(places), generator=generator)[:count].to(places.device)
    larger[size, places[chosen]] = True
    return larger


def _is_block_mask(mask: Any) -> bool:
    return mask is not None and not isinstance(mask, Tensor)


def _flex_mask(
    mask: Any, batch: int, queries: int, keys: int, keep: PairRule, device: torch.device | None = None
) -> Any:
    """A block mask of what ``mask`` (if any) and ``keep`` both allow."""
    from torch.nn.attention.flex_attention import create_block_mask

    old = None if mask is None else mask.mask_mod

    def both(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = keep(b, q, k)
        return allowed if old is None else allowed & old(b, h, q, k)

    device = device or mask.kv_indices.device
    return create_block_mask(both, B=batch, H=None, Q_LEN=queries, KV_LEN=keys, device=device)
