"""How token selection enters real models: ``attach`` and its handle, and the context ``sparse``.

The decoder's attention goes through a tap in transformers' registry (``hone_lm.attention``), after rotary positions
were applied, so that kept tokens stay where they were. Nothing is replaced; ``detach`` gives back the model of before.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hone_core.handles import CallState, Handle, Hooks, resolve
from hone_kernels.column_mass import column_mass
from hone_kernels.kept_tokens import pack_tokens, unpack_tokens
from hone_kernels.ragged_decode import decode_attention
from hone_kernels.token_select import select_tokens
from hone_lm.attention import AttentionTap, tap_attention
from hone_lm.decoders import Decoder, cache_keyword, cache_of, find_decoder
from hone_lm.layouts import RULES
from torch import Tensor, nn

from . import method
from .cache import Chosen, Counts, Kept, SparseLayer, check_cache, sparse_layers
from .captured import ROOM, FixedLayer, Step
from .config import PRESETS, SparseConfig
from .visionzip import Zipped, check_tower, look, zipped

__all__ = [
    "SparseHandle",
    "Stats",
    "attach",
    "budgets",
    "check_config",
    "choose",
    "masses",
    "packed_attention",
    "packs",
    "selected_attention",
    "sparse",
    "visual_ids",
]

_log = logging.getLogger(__name__)

_PASS = "hone_zipr1"
"""Argument of the decoder that takes a forward's ``_Pass`` to every layer's attention."""
_TOLD = "hone_zipr1_tower"
"""Attribute of a vision tower's output: what its attention looked at."""
_PAIRS = 1 << 26
"""Samples times tokens squared up to which a layer does not wait to hear how much it kept. Torch's attention of unequal
lengths need not be told, but is the slower one: from some length on that costs more than waiting."""


@dataclass
class Stats:
    """What one prefill kept.

    Attributes:
        real: ``[batch, tokens]``, False where padded.
        protected: ``[batch, tokens]``, tokens that stay in any case.
        rows: ``[batch, rows]``, positions of the probe rows, -1 for none; None: all rows.
        keep: per layer ``[batch, tokens]``.
        columns: per layer ``[batch, tokens]``, attention mass of the tokens; only of layers that chose by it.
        soft: per layer ``[batch]``, differentiable size of the mass's support, where asked for.
    """

    real: Tensor
    protected: Tensor
    rows: Tensor | None = None
    keep: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    soft: dict[int, Tensor] = field(default_factory=dict)

    @property
    def mass(self) -> dict[int, Tensor]:
        """Per layer that looked at it ``[batch]``, share of the attention mass that was kept."""
        return {layer: method.kept_mass(mass, self.keep[layer]) for layer, mass in self.columns.items()}

    @property
    def sink(self) -> dict[int, Tensor]:
        """Per layer that looked at the mass ``[batch]``, the share of it that the first token gets."""
        first = self.real.to(torch.uint8).argmax(-1, keepdim=True)
        return {
            layer: (mass.gather(1, first) / mass.sum(-1, keepdim=True))[:, 0] for layer, mass in self.columns.items()
        }

    @property
    def layer_ratio(self) -> Tensor:
        """``[layers, batch]``, kept tokens over tokens."""
        return torch.stack([method.token_ratio(self.keep[layer], self.real) for layer in sorted(self.keep)])

    @property
    def ratio(self) -> Tensor:
        """``[batch]``, tau: the mean over layers."""
        return self.layer_ratio.mean(0)

    @property
    def ratio_without_sink(self) -> Tensor:
        """``[batch]``, tau over all tokens but the first."""
        first = self.real.to(torch.uint8).argmax(-1, keepdim=True)
        real = self.real.scatter(1, first, False)
        return torch.stack([method.token_ratio(self.keep[layer], real) for layer in sorted(self.keep)]).mean(0)

    def uniform(self, p: float) -> Tensor:
        """``[batch]``, the ratio of a map without structure, on the same rows of prompts as long."""
        found = []
        for row, real in enumerate(self.real):
            total, rows = int(real.sum()), None
            if self.rows is not None:
                at = self.rows[row]
                rows = (at[at >= 0] - int(real.nonzero()[0])).cpu()
            found.append(method.uniform_ratio(p, total, rows, int((self.protected[row] & real).sum())))
        return torch.tensor(found)


@dataclass
class _Given:
    """What ``SparseHandle.using`` sets."""

    p: Tensor | None = None
    protected: Tensor | None = None
    prompt_tokens: int | None = None
    soft: bool = False


@dataclass
class _Inputs:
    """What a running forward was given, as its decoder does not see all of it.

    Attributes:
        mask: ``[batch, tokens]``.
        ids: ``[batch, tokens]``.
        candidates: guesses at the end of the ids.
        visual: placeholders among ids that came without pixels, which should be none.
        tower: what a vision tower looked at.
    """

    mask: Tensor | None
    ids: Tensor | None
    candidates: int
    visual: Counts | None = None
    tower: Zipped = field(default_factory=Zipped)


@dataclass
class _Pass:
    """What the attention of one forward needs; it travels with its arguments.

    Attributes:
        p: a number, or one per sample.
        share: ``[batch]``, it as the choice takes it; None where there is a budget.
        budget: ``[batch]``, tokens to keep, where a ratio of them is set.
        prompt: tokens over which the selection is made, earlier turns included; those after it are an answer, and kept.
        earlier: tokens of earlier turns, in the cache.
        stats: of this forward, if it selects.
        real: ``[batch, tokens so far]``, or None without padding.
        cache: that is filled.
        soft: whether the support's size is recorded with gradient.
        fixed: choice that holds for the layers that are left (FastV, VisionZip).
        seen: layers whose attention came through.
        late: what the layer before has still to drop, when the host has heard how much that is.
    """

    p: float | Tensor
    prompt: int
    earlier: int
    stats: Stats | None
    real: Tensor | None
    cache: Any
    soft: bool
    share: Tensor | None = None
    budget: Tensor | None = None
    fixed: Tensor | None = None
    seen: set[int] = field(default_factory=set)
    late: Callable[[], None] | None = None

    def settle(self) -> None:
        """Drop what the layer before has still to drop."""
        late, self.late = self.late, None
        if late is not None:
            late()


class SparseHandle(Handle[SparseConfig]):
    """What is attached to a model. A context manager: leaving it detaches.

    Attributes:
        config: the settings.
        stats: of the last prefill.
    """

    def __init__(self, model: nn.Module, config: SparseConfig) -> None:
        # Of a PeftModel, generate and forward run what is inside.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        super().__init__(config, [model])
        self.decoder: Decoder = find_decoder(model)
        self._visual = visual_ids(model.config)
        check_config(model.config, config)
        implementation = self.decoder.config._attn_implementation
        if implementation == "flex_attention":
            raise ValueError(
                "flex_attention is not supported: token selection makes shorter sequences, no masks. Call "
                "model.set_attn_implementation('sdpa') first"
            )
        self.stats: Stats | None = None
        self._state: CallState[_Inputs] = CallState()
        self._looking: CallState[tuple[Tensor, Zipped]] = CallState()
        self._given: CallState[_Given] = CallState()
        self._signature = inspect.signature(model.forward)
        self._keyword = cache_keyword(self.decoder.model)
        self._tap: AttentionTap | None = tap_attention(self.decoder, self._attend)
        self._hooks = Hooks(model)
        path = next(name for name, module in model.named_modules() if module is self.decoder.model)

        def before(path: str, hook: Callable[..., Any]) -> None:
            self._hooks.add(path, lambda module: module.register_forward_pre_hook(hook, with_kwargs=True))

        before("", self._before_model)
        self._hooks.add(
            "", lambda module: module.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)
        )
        before(path, self._before_decoder)
        self._tower: Any = None
        if config.policy == "visionzip":
            self._tower = model.get_submodule("model.visual")
            if len(self._tower.blocks):
                before("model.visual", self._before_tower)
                self._hooks.add("model.visual", lambda module: module.register_forward_hook(self._after_tower))
                before(f"model.visual.blocks.{len(self._tower.blocks) - 1}.attn", self._before_attention)
        self._hooks.add(path, lambda module: module.register_forward_hook(self._after_decoder, with_kwargs=True))
        self._steps: weakref.WeakKeyDictionary[Any, Step] = weakref.WeakKeyDictionary()
        self._forward: Callable[..., Any] | None = None
        if config.captured:
            self._forward = self.decoder.model.forward
            # The method itself, so that a copy of the model gets the copy's.
            self.decoder.model.forward = self._decode

    @property
    def attached(self) -> bool:
        """Whether the model has it on."""
        return self._tap is not None

    def _states(self) -> tuple[CallState[_Inputs]]:
        return (self._state,)

    def detach(self) -> None:
        """Give the model back as it was; harmless when repeated."""
        self._hooks.remove()
        if self._tap is not None:
            self._tap.remove()
        self._tap = None
        if self._forward is not None:
            del self.decoder.model.forward
            if self.decoder.model.forward != self._forward:
                # Something else, such as a device hook, had put it on the instance.
                self.decoder.model.forward = self._forward
        self._forward = None
        self._steps.clear()

    @contextmanager
    def using(
        self,
        *,
        p: Tensor | None = None,
        protected: Tensor | None = None,
        prompt_tokens: int | None = None,
        soft: bool = False,
    ) -> Iterator[SparseHandle]:
        """Say more of the prefills inside, in this thread.

        Args:
            p: ``[batch]``, a threshold per sample in place of the config's; of a policy that has one.
            protected: ``[batch, tokens]``, tokens that stay in any case; needed where prompts come as embeddings.
            prompt_tokens: Length of the (padded) prompt, where an answer stands after it in the same forward: the
                selection is that of the prompt alone, as it was when the answer was sampled.
            soft: Record the differentiable support size, ``stats.soft``.
        """
        before, self._given.current = self._given.current, _Given(p, protected, prompt_tokens, soft)
        try:
            yield self
        finally:
            self._given.current = before

    # Before a forward.

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._state.disabled:
            return
        self._hooks.check()
        assert self._tap is not None, "the hook goes with the tap"
        self._tap.check()
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = inputs | inputs.get("kwargs", {})
        if inputs.get("output_attentions"):
            raise ValueError("output_attentions is not available while tokens are selected; look at handle.stats")
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            if (given := cache_of(inputs)) is not None:
                check_cache(given)  # masks of pairs are those that generate makes for a static one
            raise ValueError(
                "attention_mask must be [batch, tokens] while tokens are selected; leave masks of pairs out"
            )
        ids, cache = inputs.get("input_ids"), cache_of(inputs)
        pixels = any(
            name.startswith(("pixel_values", "mm_encoder_outputs")) and value is not None
            for name, value in inputs.items()
        )
        # One token after a filled cache is what the model wrote, whatever it is.
        written = ids is not None and ids.shape[1] == 1 and cache is not None and int(cache.get_seq_length()) > 0
        embeds = inputs.get("inputs_embeds")
        # Heard of behind the layers: nothing is to wait for the device before them.
        unseen = ids is not None and not (pixels or written) and embeds is None
        visual = Counts(self._is_visual(ids).sum()[None]) if unseen and ids is not None else None
        # Assisted decoding and prompt lookup put guesses after the prompt, and ask for a logit of each and one more.
        keep = inputs.get("logits_to_keep")
        guesses = keep - 1 if cache is not None and isinstance(keep, int) and keep > 1 else 0
        if guesses and self.config.captured:
            raise ValueError(
                "a captured step reads one token: prompt lookup and assisted decoding bring several. Leave captured "
                "out, or prompt_lookup_num_tokens and assistant_model"
            )
        self._state.current = _Inputs(mask, ids, guesses, visual)
        for output in (inputs.get("mm_encoder_outputs") or {}).values():
            if self._tower is not None and hasattr(output, _TOLD):
                self._state.current.tower.add(getattr(output, _TOLD))

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._state.current = None
        self._reads(cache_of(kwargs), False)  # also where the forward raised

    def _before_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._state.disabled:
            return None
        inputs = self._state.current
        if inputs is None:
            raise RuntimeError("run the model that this is attached to, not its decoder alone")
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        batch, tokens = states.shape[:2]
        cache, given = cache_of(kwargs), self._given.current or _Given()
        use_cache = kwargs.get("use_cache")
        if cache is None and (self.decoder.config.use_cache if use_cache is None else use_cache):
            from transformers import DynamicCache

            cache = DynamicCache()
            kwargs = kwargs | {self._keyword: cache}
        real = None if inputs.mask is None else inputs.mask.bool().to(states.device)
        self._reads(cache, True)
        earlier = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None and earlier:
            if not isinstance(cache.layers[0], SparseLayer):
                raise ValueError(
                    "the cache was filled before this was attached; attach first, then run the whole prompt"
                )
            # A later turn chooses anew among all that is stored; an answer, and guesses at it, are only appended.
            turn = self.config.cache == "retrieve" and tokens > 1 and not inputs.candidates
            if not turn:
                if tokens > 1 and not inputs.candidates and any(layer.lossy for layer in cache.layers):
                    _log.warning(
                        "a later turn of %d tokens reads a prompt of which tokens are gone for good; cache='retrieve' "
                        "keeps them, and chooses anew",
                        tokens,
                    )
                return args, kwargs | {_PASS: _Pass(1.0, 0, earlier, None, real, cache, False)}
        elif cache is not None:
            sparse_layers(cache, self.decoder.num_layers, captured=self.config.captured)
            self._reads(cache, True)
        own = tokens - inputs.candidates if given.prompt_tokens is None else given.prompt_tokens
        if not 1 <= own <= tokens:
            raise ValueError(f"prompt_tokens must lie in 1 .. {tokens}, the tokens of this forward; got {own}")
        prompt = earlier + own
        here = torch.ones(batch, prompt, dtype=torch.bool, device=states.device) if real is None else real[:, :prompt]
        p: float | Tensor = self.config.p
        if given.p is not None:
            if self.config.ratio is not None:
                raise ValueError(
                    f"{self.config.label} keeps a set share of a prompt and has no threshold; leave p out, or attach "
                    "policy='top-p'"
                )
            if given.p.shape != (batch,) or not bool(((given.p > 0) & (given.p <= 1)).all()):
                raise ValueError(
                    f"p must be {batch} numbers in (0, 1], one per sample (each beam and returned sequence is "
                    f"one); got {given.p}"
                )
            p = given.p.to(states.device)
        protected = self._protected(inputs, given, here[:, earlier:])
        if cache is not None and earlier:
            before = cache.layers[0].protected
            written = here.new_ones(batch, earlier - before.shape[1])
            protected = torch.cat([before, written, protected], -1) & here
        stats = Stats(here, protected, self._rows(here[:, earlier:], earlier, padded=real is not None))
        # Once for all layers: each of these operations is a launch.
        share, budget = budgets(p, self.config.ratio, here)
        running = _Pass(p, prompt, earlier, stats, real, cache, given.soft, share, budget)
        if self._tower is not None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None:
                raise ValueError("visionzip needs the embeddings of a prompt with a picture or a video; got token ids")
            running.fixed, kwargs["inputs_embeds"] = self._zipped(inputs, embeds, here, protected)
        return args, kwargs | {_PASS: running}

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        running = kwargs.get(_PASS)
        if running is None:
            return
        running.settle()
        self._reads(running.cache, False)
        inputs = self._state.current
        if inputs is not None and inputs.visual is not None and any(inputs.visual.read()):
            if running.cache is not None and not running.earlier:
                running.cache.reset()  # else the prompt with its pixels would be a later turn
            raise ValueError(
                "visual tokens came without pixels, as in chunked prefill, which drops them. Call generate without "
                "prefill_chunk_size, and give the whole prompt in one forward"
            )
        missed = sorted(set(range(self.decoder.num_layers)) - running.seen)
        if missed:
            raise RuntimeError(
                f"the attention of layers {missed} did not come through the tap: nothing was dropped there"
            )
        if running.stats is not None:
            self.stats = running.stats

    @staticmethod
    def _reads(cache: Any, here: bool) -> None:
        """Say to a cache that its reader knows what it kept, or no longer."""
        layers = getattr(cache, "layers", None)
        reader = getattr(layers[0], "reader", None) if layers else None
        if reader is not None:
            reader.here = here

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._looking.current = (grid, Zipped())

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._looking.current is not None:
            grid, found = self._looking.current
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            look(self._tower, module, states, kwargs, grid, found)

    def _after_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        assert self._looking.current is not None, "the tower has begun"
        (_, found), self._looking.current = self._looking.current, None
        # Newer transformers run the tower before the model that is generated with, and hand its output on.
        setattr(output, _TOLD, found)
        if self._state.current is not None:
            self._state.current.tower.add(found)

    def _zipped(self, inputs: _Inputs, embeds: Tensor, real: Tensor, protected: Tensor) -> tuple[Tensor, Tensor]:
        """VisionZip's choice and the embeddings with merged tokens; see ``visionzip.zipped``."""
        assert self.config.ratio is not None, "the policy needs one"
        prompt = real.shape[1]
        visual = real & ~protected if inputs.ids is None else real & self._is_visual(inputs.ids[:, :prompt])
        if inputs.ids is not None and len(inputs.ids[:, :prompt][visual].unique()) > 1:
            raise ValueError("visionzip takes pictures or a video; got both in one batch")
        known = inputs.tower if len(self._tower.blocks) else None
        keep, merged = zipped(embeds[:, :prompt], visual, real, self.config.ratio, known)
        return keep, torch.cat([merged, embeds[:, prompt:]], 1)

    def _is_visual(self, ids: Tensor) -> Tensor:
        return functools.reduce(torch.logical_or, [ids == visual for visual in self._visual])

    def _protected(self, inputs: _Inputs, given: _Given, real: Tensor) -> Tensor:
        """Tokens that stay: text if so configured, and the last one of each sample, whose output is the answer."""
        place = real.cumsum(-1)
        last = real & (place == place[:, -1:])
        if given.protected is not None:
            if given.protected.shape != real.shape or given.protected.dtype != torch.bool:
                raise ValueError(
                    f"protected must be bool {list(real.shape)}, the tokens of each prompt (each beam and returned "
                    f"sequence has a row); got {given.protected.dtype} {list(given.protected.shape)}"
                )
            return (given.protected.to(real.device) | last) & real
        if self.config.protect == "none":
            return last
        if inputs.ids is None:
            raise ValueError(
                "a prompt of embeddings does not say what is text; pass handle.using(protected=[batch, tokens]) or "
                "attach with protect='none'"
            )
        return (~self._is_visual(inputs.ids[:, : real.shape[1]]) | last) & real

    def _rows(self, real: Tensor, earlier: int, *, padded: bool) -> Tensor | None:
        """Positions of the probe rows of each sample, after those of earlier turns; None for all rows.

        Without padding nothing waits for the device.
        """
        if self.config.rows == "all":
            at = torch.arange(earlier, earlier + real.shape[1], device=real.device)
            return torch.where(real, at, -1).int() if earlier else None
        lengths, starts = [real.shape[1]] * len(real), [0] * len(real)
        if padded:
            lengths, starts = torch.stack([real.sum(-1), real.to(torch.uint8).argmax(-1)]).tolist()
        drawn = {
            length: method.probe_rows(length, self.config.recent, self.config.random, self.config.seed)
            for length in set(lengths)
        }
        found = torch.full((len(real), max(map(len, drawn.values()))), -1)
        for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            found[row, : len(drawn[length])] = drawn[length] + start + earlier
        found = found.int()
        return (found.pin_memory() if real.is_cuda else found).to(real.device, non_blocking=True)

    # In place of a forward of one token.

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward, by a captured step where one token goes on from a cache."""
        forward, running = self._forward, kwargs.get(_PASS)
        assert forward is not None, "it stands here as long as this is attached"
        if running is None or running.stats is not None or args:
            return forward(*args, **kwargs)
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = self.decoder.model.get_input_embeddings()(kwargs["input_ids"])
        if states.shape[1] != 1:
            return forward(**kwargs)
        _check_capture(self.decoder, states)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((len(states), 1), running.earlier, device=states.device)
        taken = ("inputs_embeds", "input_ids", "position_ids", "attention_mask", "use_cache", self._keyword, _PASS)
        others = {name: value for name, value in kwargs.items() if name not in taken and value is not None}
        wrong = [name for name, value in others.items() if not isinstance(value, bool | int | str) or "output" in name]
        if wrong:
            raise ValueError(
                f"a captured step takes embeddings, positions, a mask and a cache; got {', '.join(wrong)}. Leave "
                "captured out"
            )
        step = self._steps.get(running.cache)
        if step is None or not step.fits(running.cache.layers, states, positions):
            weights = _captured_weights(self.decoder, states)
            # A step keeps no cache alive that it is kept for.
            run = functools.partial(_run_step, forward, self._keyword, self.decoder.num_layers, others)
            room = ROOM if step is None or step.left else 2 * step.room
            step = Step(run, running.cache.layers, running.real, states, positions, weights, room)
            self._steps[running.cache] = step
        out = step(states, positions)
        running.seen.update(range(self.decoder.num_layers))
        return type(out)(last_hidden_state=out.last_hidden_state.clone(), **{self._keyword: running.cache})

    # In a layer.

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
        running: _Pass | None = kwargs.pop(_PASS, None)
        if running is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        # Once all have come, a backward may compute them again.
        if layer in running.seen and len(running.seen) < self.decoder.num_layers:
            raise RuntimeError(
                f"the attention of layer {layer} came twice in one forward, as where torch.compile takes one layer for "
                "another: leave it out while this is attached"
            )
        running.seen.add(layer)
        running.settle()
        stored = None if running.cache is None else running.cache.layers[layer]
        if running.stats is None:
            assert stored is not None, "a forward that selects nothing goes on from a cache"
            if isinstance(stored, FixedLayer):
                out = decode_attention(query, key, value, stored.valid, scale=kwargs.get("scaling"))
                return out.transpose(1, 2).contiguous(), None
            if not stored.dropped:
                return base(module, query, key, value, attention_mask, **kwargs)
            if stored.whole and query.shape[2] == 1:
                return base(module, query, key, value, None, **kwargs)
            return _continued(stored, running.real, module, query, key, value, kwargs), None
        if stored is not None:
            stored.protected = running.stats.protected
        whole = self.config.policy == "top-p" and isinstance(running.p, float) and running.p == 1.0
        if whole and not running.soft:
            chosen = Chosen(running.stats.real)
        else:
            chosen = self._choose(running, layer, query, key, kwargs.get("scaling"))
        keep = running.stats.keep[layer] = chosen.keep
        if running.earlier and not (keep is running.stats.real and stored is not None and not stored.dropped):
            assert stored is not None, "that is where earlier turns are"
            return _anew(stored, keep, query, key, value, kwargs), None
        if keep is running.stats.real:
            return base(module, query, key, value, attention_mask, **kwargs)
        after = query.shape[2] - running.prompt
        if after:
            later = torch.ones(len(keep), after, dtype=torch.bool, device=keep.device)
            keep = torch.cat([keep, later if running.real is None else running.real[:, running.prompt :]], -1)
            chosen = Chosen(keep)
        masked, evicted = self.config.compute == "mask", stored is not None and self.config.cache == "evict"
        scaling, dropout = kwargs.get("scaling"), kwargs.get("dropout", 0.0)
        packed = self.config.compute == "varlen" or (not masked and packs(query, chosen, dropout))
        if packed:
            chosen = Chosen(keep, *chosen.located())
        kept, taken = Kept.of(chosen) if not packed and (evicted or not masked) else None, None
        if stored is not None and evicted and chosen.num is not None and kept is None:
            running.late = functools.partial(_drop, stored, chosen, Counts(chosen.num), running.prompt)
        elif stored is not None and evicted and kept is not None:
            stored.evict(kept, running.prompt)
            taken = stored.keys, stored.values
        elif stored is not None:
            stored.read(keep, running.prompt)
        out = selected_attention(
            query, key, value, chosen, scaling=scaling, dropout=dropout, masked=masked, packed=packed, kept=kept,
            taken=taken,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    def _choose(self, running: _Pass, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> Chosen:
        """The kept set of a layer; the object ``stats.real`` where the layer is dense."""
        cfg, stats = self.config, running.stats
        assert stats is not None, "a prefill has them"
        real, protected = stats.real, stats.protected
        if running.fixed is not None:
            return Chosen(running.fixed)
        dense = layer in cfg.dense_layers
        if dense and not running.soft:
            return Chosen(real)
        rows = stats.rows
        if cfg.policy == "fastv":
            if layer < cfg.fastv_layer - 1:
                return Chosen(real)
            place = real.cumsum(-1)
            rows = (real & (place == place[:, -1:])).to(torch.uint8).argmax(-1, keepdim=True)
        with torch.set_grad_enabled(running.soft and torch.is_grad_enabled()):
            mass, rank = masses(
                query[:, :, : running.prompt - running.earlier],
                key[:, :, : running.prompt],
                real=None if running.real is None else real,
                rows=rows - running.earlier if rows is not None and running.earlier else rows,
                scaling=scaling,
                normalizer=cfg.normalizer,
            )
            if running.soft:
                stats.soft[layer] = method.soft_ratio(mass, real, cfg.soft)
        mass, rank = mass.detach(), rank.detach()
        if dense:
            return Chosen(real)
        if cfg.policy == "random":
            rank = _drawn(real, cfg.seed, layer)
        chosen = choose(mass, rank, running.share, running.budget, real, protected)
        if cfg.policy == "fastv":
            running.fixed = chosen.keep
            return Chosen(real)
        stats.columns[layer] = mass
        return chosen


def _check_capture(decoder: Decoder, states: Tensor) -> None:
    """Refuse what a graph would not repeat, before every token.

    Raises:
        ValueError: The step is trained, or runs under autocast.
    """
    if decoder.model.training or (torch.is_grad_enabled() and states.requires_grad):
        raise _uncaptured("has no gradients and no dropout; call model.eval() and run it under torch.no_grad()")
    if torch.is_autocast_enabled(states.device.type):
        raise _uncaptured("runs in the dtype of the weights; leave autocast")


def _captured_weights(decoder: Decoder, states: Tensor) -> list[Tensor]:
    """All that a step reads of the decoder, looked at before one is recorded.

    Raises:
        ValueError: It is spread over devices or processes, or positions change it.
    """
    from torch.distributed.tensor import DTensor  # seconds, where transformers has not taken them yet

    weights = [*decoder.model.parameters(), *decoder.model.buffers()]
    if devices := {str(weight.device) for weight in weights} - {str(states.device)}:
        raise _uncaptured(
            f"needs the whole decoder on one device, {states.device}; some of it is on {', '.join(sorted(devices))}"
        )
    if any(isinstance(weight, DTensor) for weight in weights):
        raise _uncaptured("needs the whole decoder on one device; some of it is shared out over processes")
    kind = getattr(getattr(decoder.model, "rotary_emb", None), "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise _uncaptured(f"cannot follow a rotation ({kind}) that changes with the length of the text")
    return weights


def _uncaptured(reason: str) -> ValueError:
    return ValueError(f"a captured step {reason}. Or attach without captured")


def _run_step(
    forward: Callable[..., Any],
    keyword: str,
    num_layers: int,
    others: dict[str, Any],
    embeds: Tensor,
    positions: Tensor,
    cache: Any,
) -> Any:
    """The decoder's forward of one token, whose layers read what of their cache is valid."""
    running = _Pass(1.0, 0, 1, None, None, cache, False)
    # A mask of four axes is taken as it is; nobody looks at it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    given = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask, "use_cache": True}
    out = forward(**given, **others, **{keyword: cache, _PASS: running})
    assert len(running.seen) == num_layers, "the tap is checked before each forward"
    return out


def masses(
    query: Tensor,
    key: Tensor,
    *,
    real: Tensor | None,
    rows: Tensor | None,
    scaling: float | None = None,
    normalizer: method.Normalizer = "count",
) -> method.Mass:
    """``method.column_mass``, on a GPU by its kernel where no gradient is asked for.

    Args:
        query: ``[batch, heads, queries, dim]``, the last of ``key``'s tokens.
        key: ``[batch, heads_k, tokens, dim]``.
        real: ``[batch, tokens]``, False where padded; None without padding.
        rows: ``[batch, rows]`` of ``query`` to look at, -1 for none; all if None.
        scaling: Of the logits; 1 / sqrt(dim) if None.
        normalizer: See ``method.ranked``.
    """
    if not query.is_cuda or (torch.is_grad_enabled() and query.requires_grad):
        return method.column_mass(query, key, real=real, rows=rows, scaling=scaling, normalizer=normalizer)
    if rows is None:
        at = torch.arange(query.shape[2], device=key.device)
        rows = at.expand(len(key), -1) if real is None else torch.where(real[:, -query.shape[2] :], at, -1)
    found = column_mass(query, key, rows, real=real, scale=scaling)
    if normalizer == "count":
        return method.Mass(found.mass, found.rank)
    everywhere = torch.ones_like(found.mass, dtype=torch.bool) if real is None else real
    return method.ranked(found.mass, found.seen, everywhere, normalizer)


def budgets(p: float | Tensor, ratio: float | None, real: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What ``choose`` takes: shares of the mass ``[batch]``, or else numbers of tokens ``[batch]``.

    Args:
        p: Share of the mass, or ``[batch]`` of them; not looked at where there is a ratio.
        ratio: Share of the tokens; None: the budget is p's.
        real: ``[batch, tokens]``, False where padded.
    """
    if ratio is not None:
        return None, (ratio * real.sum(-1)).ceil().long()
    if isinstance(p, Tensor):
        return p.double(), None
    return torch.full((len(real),), p, dtype=torch.float64, device=real.device), None


def choose(
    mass: Tensor, rank: Tensor, share: Tensor | None, budget: Tensor | None, real: Tensor, protected: Tensor
) -> Chosen:
    """``method.select`` by ``method.topp_budget`` or, where share is None, by a budget; a kernel on a GPU.

    Args:
        mass: ``[batch, tokens]``.
        rank: ``[batch, tokens]``.
        share: ``[batch]``, of the mass; or None.
        budget: ``[batch]``, tokens to keep; or None.
        real: ``[batch, tokens]``, False where padded.
        protected: ``[batch, tokens]``, tokens that stay in any case.
    """
    if mass.is_cuda:
        weights = None if share is None else mass
        return Chosen(*select_tokens(rank, real=real, protected=protected, mass=weights, p=share, budget=budget))
    if budget is None:
        assert share is not None, "one of the two sets the budget"
        budget = method.topp_budget(mass, share, real)
    return Chosen(method.select(rank, budget, real, protected))


def _drawn(real: Tensor, seed: int, layer: int) -> Tensor:
    """Random ranks that depend on the seed, the layer and a token's place in its sample, not on padding."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    ranks = torch.rand(real.shape[1], generator=generator).to(real.device)
    return ranks[(real.cumsum(-1) - 1).clamp(min=0)]


def _drop(stored: SparseLayer, chosen: Chosen, counts: Counts, prompt: int) -> None:
    """Evict what was not chosen, a layer later."""
    stored.evict(Kept.of(chosen, counts), prompt)


def packs(query: Tensor, chosen: Chosen, dropout: float = 0.0) -> bool:
    """Whether attention of the kept tokens is better computed before the host knows how many they are.

    Args:
        query: ``[batch, heads, tokens, dim]``.
        chosen: Of its tokens.
        dropout: Of the weights.
    """
    batch, _, tokens, dim = query.shape
    short = batch * tokens**2 <= _PAIRS and dim <= 256 and dim % 8 == 0
    return short and chosen.num is not None and _packable(query, dropout)


def _packable(query: Tensor, dropout: float) -> bool:
    """Whether torch has attention of unequal lengths for it, and we the moves around it."""
    plain = not dropout and not (torch.is_grad_enabled() and query.requires_grad)
    return plain and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor | Chosen,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    masked: bool = False,
    packed: bool = False,
    kept: Kept | None = None,
    taken: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention among the kept tokens of each sample; the others' output is zero.

    Args:
        query: ``[batch, heads, tokens, dim]``.
        key: ``[batch, heads_k, tokens, dim]``.
        value: Likewise.
        chosen: Or ``[batch, tokens]`` of what is kept.
        scaling: Of the logits; 1 / sqrt(dim) if None.
        dropout: Of the weights.
        masked: Compute all pairs under a mask, which is no faster; else gather the kept tokens and compute theirs.
        packed: Lay the samples' kept tokens one after the other, see ``packed_attention``.
        kept: ``Kept.of(chosen)``, where the caller has it.
        taken: Likewise ``kept.take(key, value)``.

    Returns:
        ``[batch, heads, tokens, dim]``.

    Raises:
        ValueError: They are to be packed, and torch has no such attention for them.
    """
    chosen = Chosen(chosen) if isinstance(chosen, Tensor) else chosen
    if packed:
        return packed_attention(query, key, value, chosen, scaling, dropout)
    settings: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    tokens, keep = query.shape[2], chosen.keep
    if masked:
        at = torch.arange(tokens, device=query.device)
        # A dropped row reads itself, for the softmax to be defined, and is then set to zero.
        pairs = ((at[:, None] >= at) & keep[:, None, :]) | (at[:, None] == at)
        # With a mask and shared heads torch would hold the whole map; with as many heads it does not.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        settings["enable_gqa"] = False
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=pairs[:, None], **settings)
        return out * keep[:, None, :, None]
    kept = Kept.of(chosen) if kept is None else kept
    # Kept tokens stand at the left in their order, so that what fills a row up is seen by no row that counts.
    if taken is None:
        query, key, value = kept.take(query, key, value)
    else:
        (query,), (key, value) = kept.take(query), taken
    return kept.spread(F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings))


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Chosen, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """``selected_attention`` by torch's attention of unequal lengths: samples that keep fewer tokens cost less.

    The host does not wait to hear how many they are: there is room for all, and what is behind the end is not touched.

    Args:
        query: ``[batch, heads, tokens, dim]``.
        key: ``[batch, heads_k, tokens, dim]``.
        value: Likewise.
        chosen: Of the tokens.
        scaling: Of the logits; 1 / sqrt(dim) if None.
        dropout: Of the weights, which has to be none.

    Raises:
        ValueError: Torch has no such attention for them.
    """
    if not _packable(query, dropout):
        raise ValueError(
            f"compute='varlen' is of float16 and bfloat16 on a GPU, without gradients and dropout; got "
            f"{query.dtype} on {query.device}{', with gradients' if query.requires_grad else ''}. Use 'gather'"
        )
    (q, k, v), ends, row = pack_tokens((query, key, value), *chosen.located())
    return unpack_tokens(_unequal_attention(q, k, v, ends, query.shape[2], scaling), chosen.keep, row)


def _unequal_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, most: int, scaling: float | None) -> Tensor:
    """Causal attention of samples one after the other ``[rows, heads, dim]``, of at most so many rows each."""
    from torch.nn.attention import varlen

    # From torch 2.14 on, heads that share keys are to be named.
    attend: Callable[..., Any] = varlen.varlen_attn
    shared = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
    return attend(q, k, v, ends, ends, most, most, scale=scaling, window_size=(-1, 0), **shared)


def _continued(
    stored: SparseLayer, real: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Any
) -> Tensor:
    """Attention of new tokens to what the layer still reads, and among themselves."""
    valid, new, mask = stored.valid, query.shape[2], None
    assert valid is not None, "something was dropped, and then it says what is read"
    if new > 1:
        at = torch.arange(stored.seen - new, stored.seen, device=query.device)
        positions = stored.positions
        assert positions is not None, "likewise"
        if real is not None:
            valid = torch.cat([valid[:, :-new], real[:, -new:]], -1)
            stored.note(positions, valid)
        pairs = valid[:, None, :] & (positions[:, None, :] <= at[:, None])
        mask = (pairs | (positions[:, None, :] == at[:, None]))[:, None]
        stored.whole = stored.whole and (real is None or bool(real[:, -new:].all()))
    elif not stored.whole:
        if query.is_cuda and not (query.requires_grad or kwargs.get("dropout")):
            out = decode_attention(query, key, value, valid, scale=kwargs.get("scaling"))
            return out.transpose(1, 2).contiguous()
        mask = valid[:, None, None, :]
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=kwargs.get("scaling"),
        dropout_p=kwargs.get("dropout", 0.0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _anew(stored: SparseLayer, keep: Tensor, query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> Tensor:
    """Attention of a later turn to what was chosen among all that is stored; its dropped tokens' output is zero."""
    stored.read(keep, keep.shape[1])
    new, tokens = query.shape[2], key.shape[2]
    at = torch.arange(tokens, device=query.device)
    own = at[-new:, None] == at
    pairs = ((at[-new:, None] >= at) & keep[:, None, :]) | own
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=pairs[:, None],
        scale=kwargs.get("scaling"),
        dropout_p=kwargs.get("dropout", 0.0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return (out * keep[:, None, -new:, None]).transpose(1, 2).contiguous()


def attach(model: nn.Module, config: SparseConfig | str) -> SparseHandle:
    """Attach token selection to a vision-language model of transformers.

    Works in prefill and cached decoding, in left- or right-padded batches, with beams and several returned sequences.

    Args:
        model: A ``...ForConditionalGeneration`` with a decoder of attention layers.
        config: Settings, or the name of a preset.

    Raises:
        ValueError: The class has no visual tokens or no known layout, the decoder has sliding windows or is a hybrid,
            the attention implementation is neither eager nor sdpa, or something is attached already.
        TypeError: The model has no decoder.
    """
    return SparseHandle(model, resolve(config, PRESETS, SparseConfig))


@contextmanager
def sparse(model: nn.Module, p: float | Tensor = 0.975, **settings: Any) -> Iterator[SparseHandle]:
    """Select tokens inside the block.

    Args:
        model: As in ``attach``.
        p: Share of the attention mass that the kept tokens hold, or ``[batch]`` of them, one per sample.
        settings: Others of ``SparseConfig``.

    Yields:
        The handle; its ``stats`` say what the last prefill kept.
    """
    rows = p if isinstance(p, Tensor) else None
    config = SparseConfig(p=float(p.max()) if isinstance(p, Tensor) else p, **settings)
    with attach(model, config) as handle, handle.using(p=rows):
        yield handle


def visual_ids(config: Any) -> tuple[int, ...]:
    """Placeholder ids of images and videos, by a model's config.

    Raises:
        ValueError: There are none.
    """
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {value for name in names if isinstance(value := getattr(config, name, None), int)}
    if not found:
        raise ValueError(
            f"{getattr(config, 'model_type', 'this model')} has no visual tokens; expected a vision-language model "
            "such as Qwen2_5_VLForConditionalGeneration"
        )
    return tuple(sorted(found))


def check_config(found: Any, config: SparseConfig) -> None:
    """Look whether a model with this config can take the settings, before its weights are read.

    Raises:
        ValueError: It cannot.
    """
    if found.model_type not in RULES:
        raise ValueError(
            f"{found.model_type} has no rule for where its visual tokens are; the classes with one are "
            f"{', '.join(RULES)}"
        )
    text = found.get_text_config()
    other = sorted({kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"})
    if other:
        raise ValueError(
            f"this decoder has layers of {', '.join(other)}, whose caches drop positions by themselves; token "
            "selection needs full attention in every layer"
        )
    late = [layer for layer in config.dense_layers if layer >= text.num_hidden_layers]
    if late:
        raise ValueError(f"layers are 0 .. {text.num_hidden_layers - 1}; dense_layers names {late}")
    if config.policy == "visionzip":
        check_tower(found.model_type)
    if config.policy == "fastv" and config.fastv_layer >= text.num_hidden_layers:
        raise ValueError(
            f"fastv_layer must be below the {text.num_hidden_layers} layers, or nothing is dropped; "
            f"got {config.fastv_layer}"
        )
