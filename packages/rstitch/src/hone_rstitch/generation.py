"""R-Stitch on any two causal language models of transformers, with both KV caches, in ragged batches.

``stitch_decoding`` is a decoding method in the sense of ``model.generate(custom_generate=...)``: transformers prepares
processors, stopping criteria and the large model's cache, and this loop runs in place of its own. ``stitch_generate``
is that call with the parts that ``generate`` does not hand to a callable.

Each model has a cache of its own. A model that gets control reads what it has not seen (the gap) and one token's logits
come out. K/V of a token are written when it is fed, not when it is drawn, so that a thrown-away token leaves nothing to
take back. Rows of a batch are at different models and of different lengths: a cache has slots that are holes for some
rows, masked there, and closed when they get many.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hone_core.handles import resolve
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationMode,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.utils import ModelOutput

from .config import LARGE, PRESETS, SMALL, StitchConfig
from .method import Gate, choose, read_logits, uniform
from .router import Routing, route_features
from .vocabulary import Vocabulary

__all__ = ["StitchOutput", "StitchToken", "Usage", "stitch_decoding", "stitch_generate"]

log = logging.getLogger(__name__)

CONSTRAINTS = (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
"""Processors that say what may come, and are applied before the entropy is read. Any other is one if it has a true
attribute ``is_constraint``."""

BLIND = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that do not look at the ids, so that rows of different lengths share a call."""

BATCHED = (
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
)
"""Processors that count on one call per position for the batch as a whole, which there is not."""

PLUMBING = ("position_ids", "attention_mask", "logits_to_keep", "use_cache")
CACHES = ("cache", "past_key_values")
"""Names under which models take their cache, newest first."""


@dataclass(frozen=True, slots=True)
class StitchToken:
    """One emitted token, as ``on_token`` gets it: after the gate, so it stays.

    Attributes:
        row: of the batch.
        position: from 0, prompt not counted.
        token: id of the large model.
        model: who wrote it, ``SMALL`` or ``LARGE``.
        entropy: of the writer's distribution over ln V, in [0, 1].
        confidence: largest probability of that distribution.
        logprob: of this token in it, in nats.
        discarded_entropy: of the small model's distribution, where its token was thrown away first; else None.
        seconds: since the call began.
        last: it ends its row.
    """

    row: int
    position: int
    token: int
    model: int
    entropy: float
    confidence: float
    logprob: float
    discarded_entropy: float | None
    seconds: float
    last: bool


@dataclass(slots=True)
class Usage:
    """What one row cost.

    Attributes:
        tokens: written by the small and the large model and kept.
        calls: of each.
        prompt_tokens: read by each.
        gaps: of each: tokens read by every call after its first.
        seconds: of each; in a batch, a call's time is divided among its rows.
        discarded: small tokens thrown away.
        switches: times that the large model took over.
    """

    tokens: list[int] = field(default_factory=lambda: [0, 0])
    calls: list[int] = field(default_factory=lambda: [0, 0])
    prompt_tokens: list[int] = field(default_factory=lambda: [0, 0])
    gaps: list[list[int]] = field(default_factory=lambda: [[], []])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    discarded: int = 0
    switches: int = 0

    @property
    def share(self) -> float:
        """Share of the tokens that the large model wrote."""
        return self.tokens[LARGE] / max(1, sum(self.tokens))


_ALWAYS_GIVEN: Any = None  # a ModelOutput has one field without a default


@dataclass
class StitchOutput(ModelOutput):
    """What ``return_dict_in_generate=True`` gives. N is the longest row's new tokens; rows are padded at the end.

    Attributes:
        sequences: ``[batch, prompt + N]`` ids.
        models: ``[batch, N]``, who wrote each token: 0 small, 1 large, -1 padding.
        entropy: ``[batch, N]``, of the writer over ln V; NaN is padding.
        confidence: ``[batch, N]``.
        logprobs: ``[batch, N]``, nats.
        discarded_entropy: ``[batch, N]``, of the small model where its token was thrown away, NaN elsewhere.
        seconds: ``[batch, N]``, when each token was there.
        usage: a ``Usage`` per row.
    """

    sequences: Tensor
    models: Tensor = _ALWAYS_GIVEN
    entropy: Tensor = _ALWAYS_GIVEN
    confidence: Tensor = _ALWAYS_GIVEN
    logprobs: Tensor = _ALWAYS_GIVEN
    discarded_entropy: Tensor = _ALWAYS_GIVEN
    seconds: Tensor = _ALWAYS_GIVEN
    usage: list[Usage] = _ALWAYS_GIVEN

    @classmethod
    def of(
        cls, prompts: Tensor, texts: Sequence[Sequence[StitchToken]], usage: list[Usage], *, pad: int = 0
    ) -> StitchOutput:
        """Records of every row, padded to the longest.

        Args:
            prompts: ``[batch, prompt]`` ids.
            texts: Tokens of each row.
            usage: Of each row.
            pad: Id after a row's end.
        """
        width = max(map(len, texts))
        names = ("entropy", "confidence", "logprob", "discarded_entropy", "seconds")
        values = torch.full((len(names), len(texts), width), math.nan)
        models = torch.full((len(texts), width), -1, dtype=torch.int8)
        new = torch.full((len(texts), width), pad, dtype=prompts.dtype)
        for row, tokens in enumerate(texts):
            for token in tokens:
                at = row, token.position
                new[at], models[at] = token.token, token.model
                for i, name in enumerate(names):
                    value = getattr(token, name)
                    values[i][at] = math.nan if value is None else value
        return cls(torch.cat([prompts, new.to(prompts.device)], 1), models, *values, usage)


def stitch_generate(
    large: PreTrainedModel,
    small: PreTrainedModel,
    input_ids: Tensor,
    *,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    on_token: Callable[[StitchToken], None] | None = None,
    **kwargs: Any,
) -> Tensor | StitchOutput:
    """Write with two models; ``large.generate`` with R-Stitch as its decoding method.

    Args:
        large: The model whose ids prompts and answers are in.
        small: Its partner.
        input_ids: ``[batch, tokens]``, padded on the left.
        stop_strings: Texts that end a row; needs ``tokenizer``.
        tokenizer: Of the large model.
        streamer: One of transformers', for a batch of one.
        on_token: Called with each ``StitchToken``.
        kwargs: Those of ``generate`` and of ``stitch_decoding``: ``stitch``, ``vocabulary``, ``seed`` ...

    Returns:
        ``[batch, tokens]`` ids, or a ``StitchOutput`` with ``return_dict_in_generate=True``.

    Raises:
        ValueError: A stop string without a tokenizer, a streamer with several rows, an ``assistant_model``, or what
            ``stitch_decoding`` raises.
    """
    if kwargs.pop("assistant_model", None) is not None:
        # generate() does not hand it to a callable, and would leave it out in silence.
        raise ValueError("assistant_model drafts for one model, and here two write one text; leave it out")
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings are compared with text: give the large model's tokenizer")
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        # generate() would look for the tokenizer among arguments that it does not hand on to a callable, and its own
        # criterion would find a string that begins in the prompt.
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or [])])
        criteria.append(StopStrings(tokenizer, strings, input_ids.shape[1]))
        kwargs["stopping_criteria"] = criteria
    if streamer is not None:
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"a streamer shows one row; got {input_ids.shape[0]}. Use on_token, which says whose it is"
            )
        streamer.put(input_ids.cpu())
        told = on_token

        def on_token(token: StitchToken) -> None:
            streamer.put(torch.tensor([token.token]))
            if told is not None:
                told(token)

    result = large.generate(input_ids, custom_generate=stitch_decoding, slm=small, on_token=on_token, **kwargs)
    if streamer is not None:
        streamer.end()
    return result


@torch.no_grad()
def stitch_decoding(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    *,
    slm: PreTrainedModel,
    stitch: str | StitchConfig | None = None,
    vocabulary: Vocabulary | None = None,
    small_input_ids: Tensor | None = None,
    small_attention_mask: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    on_token: Callable[[StitchToken], None] | None = None,
    routing: Routing | None = None,
    **model_kwargs: Any,
) -> Tensor | StitchOutput:
    """R-Stitch as a decoding method: ``large.generate(ids, custom_generate=stitch_decoding, slm=small)``.

    Args:
        model: The large model.
        input_ids: ``[batch, tokens]``, its prompts, padded on the left.
        logits_processor: Made by ``generate``. Constraints are applied before the entropy is read, others after.
        stopping_criteria: Made by ``generate``; asked after every emitted token, a row at a time.
        generation_config: Made by ``generate``.
        slm: The small model.
        stitch: Policy and gate, or a preset's name; the paper's at tau 0.02 if None.
        vocabulary: What the ids are to the small model; the same, padding apart, if None.
        small_input_ids: ``[batch, tokens]``, prompts of the small model in its own ids, padded on the left; the large
            model's prompts in the small model's ids if None.
        small_attention_mask: Where they are no padding; all of them if None.
        seed: Seed of the draws: one per row, or that of the first row, the next row's being one more. None takes one
            from torch's generator. Only what is drawn depends on it.
        on_token: Called with each ``StitchToken``.
        routing: The router of R-Stitch+, with policy ``router``.
        model_kwargs: What ``generate`` prepares: attention mask, positions, cache.

    Raises:
        ValueError: An option of ``generate`` that cannot hold here, a vocabulary that does not fit, a prompt that is
            padded elsewhere than on the left, or a cache whose rows cannot be of different lengths, or that holds more
            than the prompt.
    """
    stitch = StitchConfig() if stitch is None else resolve(stitch, PRESETS, StitchConfig)
    if (stitch.policy == "router") != (routing is not None):
        raise ValueError(f"routing belongs to policy='router', which needs it; got policy {stitch.policy!r}")
    _check_options(generation_config, logits_processor, model_kwargs)
    vocabulary = _shared(slm, model) if vocabulary is None else vocabulary
    rows_large = _rows(model)
    if len(vocabulary.to_small) != rows_large or int(vocabulary.to_small.max()) >= _rows(slm):
        raise ValueError(
            f"the vocabulary is of models with {len(vocabulary.to_small)} and more than "
            f"{int(vocabulary.to_small.max())} logits; these have {rows_large} and {_rows(slm)}"
        )
    prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"), "input_ids")
    if small_input_ids is None:
        small_prompts = [vocabulary.small_ids(prompt) for prompt in prompts]
    else:
        small_prompts = _unpadded(small_input_ids, small_attention_mask, "small_input_ids")
        # num_return_sequences has repeated the large prompts.
        copies = generation_config.num_return_sequences or 1
        if copies * len(small_prompts) != len(prompts):
            raise ValueError(
                f"expected a small prompt per row; got {len(small_prompts)} for {len(prompts) // copies} rows"
            )
        small_prompts = [prompt for prompt in small_prompts for _ in range(copies)]
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _counts(positions, prompts):
        raise ValueError("position_ids other than those that count a row's tokens are not supported")
    limit = getattr(slm.config.get_text_config(), "max_position_embeddings", None)
    budget = (generation_config.max_length or 0) - input_ids.shape[1]
    if limit is not None and max(map(len, small_prompts)) + budget > limit:
        log.warning("the small model has positions for %d tokens, fewer than its prompt and %d new ones", limit, budget)
    cache = next((model_kwargs[name] for name in CACHES if model_kwargs.get(name) is not None), None)
    loop = _Loop(
        models=(slm, model),
        stitch=stitch,
        vocabulary=vocabulary,
        prompts=(small_prompts, prompts),
        shown=input_ids,
        processors=logits_processor,
        criteria=stopping_criteria,
        sample=bool(generation_config.do_sample),
        seeds=_seeds(seed, len(prompts)),
        on_token=on_token,
        routing=routing,
    )
    loop.run(cache)
    pad = generation_config._pad_token_tensor
    output = StitchOutput.of(
        input_ids, [row.done for row in loop.rows], [row.usage for row in loop.rows], pad=0 if pad is None else int(pad)
    )
    return output if generation_config.return_dict_in_generate else output.sequences


class StopStrings(StoppingCriteria):
    """Ends a row when the text that was written ends with or holds one of some strings.

    Args:
        tokenizer: Of the ids.
        strings: Any of them ends a row.
        prompt: Tokens of the prompt, padding included, which are not looked at.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt: int) -> None:
        if not strings or not all(strings):
            raise ValueError(f"stop_strings must be texts, at least one; got {list(strings)}")
        self.tokenizer, self.strings, self.prompt = tokenizer, tuple(strings), prompt
        # A token is a character at least, but for the parts of one; what lies further back has been looked at.
        self.tail = max(map(len, strings)) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """``[batch]``, which rows are at their end."""
        texts = [self.tokenizer.decode(row[self.prompt :][-self.tail :]) for row in input_ids]
        return torch.tensor([any(string in text for string in self.strings) for text in texts])


@dataclass(slots=True)
class _Row:
    """One request: its gate, what was emitted, and what each model has read of it."""

    index: int
    seed: int
    gate: Gate
    prompts: tuple[list[int], list[int]]
    tokens: list[int] = field(default_factory=list)
    small_tokens: list[int] = field(default_factory=list)
    done: list[StitchToken] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    discarded: float | None = None

    def gap(self, model: int, read: int) -> list[int]:
        """Tokens of prompt and text that a model has not read, in its own ids."""
        prompt, text = self.prompts[model], self.tokens if model == LARGE else self.small_tokens
        return [*prompt[read:], *text[max(0, read - len(prompt)) :]]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a call said of each of its rows.

    ``stuck`` is a row without an allowed token; ``warped`` is there where stopping criteria may ask for it, ``hidden``
    where a router may.
    """

    tokens: list[int]
    entropy: list[float]
    confidence: list[float]
    logprobs: list[float]
    forced: list[bool]
    stuck: list[bool]
    warped: Tensor | None
    logits: Tensor
    hidden: Tensor | None


class _Loop:
    """The state of one call, which dies with it."""

    def __init__(
        self,
        *,
        models: tuple[PreTrainedModel, PreTrainedModel],
        stitch: StitchConfig,
        vocabulary: Vocabulary,
        prompts: tuple[list[list[int]], list[list[int]]],
        shown: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        sample: bool,
        seeds: list[int],
        on_token: Callable[[StitchToken], None] | None,
        routing: Routing | None = None,
    ) -> None:
        self.models, self.stitch, self.vocabulary = models, stitch, vocabulary
        self.size, self.small_ids = vocabulary.size, vocabulary.to_small.tolist()
        self.views = [vocabulary.to(model.device) for model in models]
        self.shown, self.sample, self.on_token = shown, sample, on_token
        self.device, self.routing = shown.device, routing
        self.hard = [item for item in processors if _is_constraint(item)]
        self.soft = [item for item in processors if not _is_constraint(item)]
        self.ends = {
            int(id) for item in criteria if isinstance(item, EosTokenCriteria) for id in item.eos_token_id.flatten()
        }
        self.max_length = min(
            (item.max_length for item in criteria if isinstance(item, MaxLengthCriteria)), default=math.inf
        )
        self.criteria = [item for item in criteria if not isinstance(item, (EosTokenCriteria, MaxLengthCriteria))]
        self.rows = [
            _Row(index, seed, Gate(stitch, seed), (small, large))
            for index, (seed, small, large) in enumerate(zip(seeds, *prompts, strict=True))
        ]
        self.began = time.perf_counter()

    def run(self, cache: Any) -> None:
        """Write all rows: together where the models' caches allow holes, else one after the other.

        Raises:
            ValueError: The cache is of a kind that holds no gaps, or holds tokens of one row where there are several.
        """
        caches = [DynamicCache(config=self.models[SMALL].config.get_text_config()), cache]
        if cache is None:
            caches[LARGE] = DynamicCache(config=self.models[LARGE].config.get_text_config())
        elif not isinstance(cache, DynamicCache):
            raise ValueError(
                f"the two models read rows by gaps of changing length, which a {type(cache).__name__} does not hold; "
                "leave cache_implementation out"
            )
        if len(self.rows) == 1 or all(map(_allows_holes, caches)):
            self._write(self.rows, caches)
            return
        if cache is not None and cache.get_seq_length():
            raise ValueError("a cache that holds tokens already goes with one row, in models of this kind")
        for row in self.rows:
            self._write([row], [DynamicCache(config=model.config.get_text_config()) for model in self.models])

    def _write(self, rows: list[_Row], caches: Sequence[Any]) -> None:
        sides = [_Side(model, cache, rows) for model, cache in zip(self.models, caches, strict=True)]
        sides[SMALL].wants_hidden = self.routing is not None
        if self.stitch.prefill == "both":
            # All but the last token: the first step must have something to read.
            gaps = [row.gap(LARGE, sides[LARGE].read[row.index])[:-1] for row in rows]
            wanted = [(row, gap) for row, gap in zip(rows, gaps, strict=True) if gap]
            if wanted:
                self._count(LARGE, wanted, sides[LARGE], sides[LARGE].extend(wanted)[2], step=False)
        live = rows
        while live:
            for model in (SMALL, LARGE):
                asked = [row for row in live if row.gate.active == model]
                if asked:
                    self._step(model, asked, sides[model])
                    live = [row for row in live if not (row.done and row.done[-1].last)]
            for side in sides:
                side.shrink(live)

    def _step(self, model: int, rows: list[_Row], side: Any) -> None:
        """One token of one model for each of some rows."""
        wanted = [(row, row.gap(model, side.read[row.index])) for row in rows]
        seen, started = self._look(model, wanted, side)
        self._count(model, wanted, side, started, step=True)
        keep = self._kept(model, rows, seen)
        for at, (row, none) in enumerate(zip(rows, seen.stuck, strict=True)):
            signal = (seen.entropy if row.gate.config.gate == "entropy" else seen.confidence)[at]
            if math.isnan(signal):
                self._broken(
                    row,
                    ValueError(
                        f"the {('small', 'large')[model]} model's logits are not numbers at token {len(row.tokens)} of "
                        f"row {row.index}; float16 overflows where bfloat16 and float32 do not"
                    ),
                )
                continue
            if none and model == LARGE:
                raise ValueError(f"no token is allowed at position {len(row.tokens)} of row {row.index}")
            emit, next_model = (
                row.gate.delegate() if none else row.gate.step(signal, forced=seen.forced[at], keep=keep[at])
            )
            if not emit:
                row.discarded = 1.0 if none else seen.entropy[at]
                row.usage.discarded += 1
                row.usage.switches += 1
                continue
            row.usage.switches += int(model == SMALL and next_model == LARGE)
            scores = None if seen.warped is None else seen.warped[at : at + 1]
            self._emit(
                row, model, seen.tokens[at], seen.entropy[at], seen.confidence[at], seen.logprobs[at], scores
            )  # fmt: skip

    def _look(self, model: int, wanted: list[tuple[_Row, list[int]]], side: Any) -> tuple[_Seen, float]:
        """Read gaps and what comes after them; also when the call began."""
        logits, hidden, started = side.extend(wanted)
        # The two models may be on two devices; processors and criteria are where the prompts are.
        logits = self.views[model].read(logits, model).float().to(self.device)
        return self._judge([row for row, _ in wanted], logits, hidden), started

    def _kept(self, model: int, rows: list[_Row], seen: _Seen) -> list[bool]:
        """Rows whose doubtful small token the router keeps."""
        found = [False] * len(rows)
        if self.routing is None or model != SMALL:
            return found
        asked = []
        for at, row in enumerate(rows):
            signal = (seen.entropy if row.gate.config.gate == "entropy" else seen.confidence)[at]
            stuck = seen.stuck[at] or row.gate.config.policy != "router"
            if not stuck and row.gate.doubts(signal, forced=seen.forced[at]):
                asked.append(at)
        if asked:
            assert seen.hidden is not None, "the small model's hidden states are kept for the router"
            lengths = torch.tensor([len(rows[at].prompts[SMALL]) + len(rows[at].tokens) for at in asked])
            entropy = torch.tensor([seen.entropy[at] for at in asked])
            features = route_features(seen.hidden[asked], seen.logits[asked], entropy, lengths)
            whose = [rows[at] for at in asked]
            actions = self.routing.decide(
                features, [row.index for row in whose], [row.seed for row in whose], [len(row.tokens) for row in whose]
            )
            for at, action in zip(asked, actions, strict=True):
                found[at] = action == SMALL
        return found

    def _judge(self, rows: list[_Row], logits: Tensor, hidden: Tensor | None) -> _Seen:
        """Signals of masked logits ``[rows, vocabulary]``, and a token of each."""
        logits = self._constrain(rows, logits)
        # A grammar may want what only the large model has. No distribution is left then, and nothing to read off it.
        stuck = (logits == -torch.inf).all(-1)
        logits = logits.masked_fill(stuck[:, None], 0.0)
        warped = self._warp(rows, logits)
        processed = torch.tensor([row.gate.config.entropy_on == "processed" for row in rows], device=logits.device)
        signals = read_logits(torch.where(processed[:, None], warped, logits), self.size)
        tokens = self._choose(rows, warped)
        chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
        logprobs = (chosen - logits.logsumexp(-1)).tolist()
        entropy, confidence, forced = (value.tolist() for value in signals)
        return _Seen(tokens, entropy, confidence, logprobs, forced, stuck.tolist(), warped, logits, hidden)

    def _count(
        self, model: int, wanted: list[tuple[_Row, list[int]]], side: Any, started: float, *, step: bool
    ) -> None:
        """Book a call that began at ``started`` to its rows; reading its results has waited for it."""
        if not step and side.model.device.type == "cuda":
            torch.cuda.synchronize(side.model.device)
        seconds = (time.perf_counter() - started) / len(wanted)
        for row, gap in wanted:
            usage = row.usage
            usage.seconds[model] += seconds
            first = not usage.prompt_tokens[model]
            usage.prompt_tokens[model] = len(row.prompts[model])
            if step:
                usage.calls[model] += 1
            if not first:
                usage.gaps[model].append(len(gap))

    def _constrain(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` with minus infinity at what may not come."""
        return self._process(self.hard, rows, logits)

    def _warp(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """What is drawn from: temperature and the like applied."""
        return self._process(self.soft, rows, logits)

    def _choose(self, rows: Sequence[_Row], warped: Tensor) -> list[int]:
        """A token per row."""
        return choose(warped, [uniform(row.seed, len(row.tokens)) for row in rows] if self.sample else None)

    def _ended(self, row: _Row, token: int, scores: Tensor | None) -> bool:
        """Whether the token that was just added to a row is its last."""
        if token in self.ends or self.shown.shape[1] + len(row.tokens) >= self.max_length:
            return True
        if not self.criteria:
            return False
        ids = self._ids(row)
        return any(bool(torch.as_tensor(item(ids, (scores,))).any()) for item in self.criteria)

    def _emit(
        self,
        row: _Row,
        model: int,
        token: int,
        entropy: float,
        confidence: float,
        logprob: float,
        scores: Tensor | None,
    ) -> None:
        row.tokens.append(token)
        row.usage.tokens[model] += 1
        last = self._ended(row, token, scores)
        if not last:
            small = self.small_ids[token]
            if small < 0:
                self.vocabulary.small_ids([token])  # says so
            row.small_tokens.append(small)
        found = StitchToken(
            row=row.index,
            position=len(row.tokens) - 1,
            token=token,
            model=model,
            entropy=entropy,
            confidence=confidence,
            logprob=logprob,
            discarded_entropy=row.discarded,
            seconds=time.perf_counter() - self.began,
            last=last,
        )
        row.discarded = None
        row.done.append(found)
        self._told(found)

    def _broken(self, row: _Row, error: ValueError) -> None:
        """What becomes of a row whose logits are no numbers."""
        raise error

    def _told(self, found: StitchToken) -> None:
        if self.on_token is not None:
            self.on_token(found)

    def _ids(self, row: _Row) -> Tensor:
        """``[1, tokens]``, prompt with its padding and text, as processors and criteria of ``generate`` see them."""
        text = torch.tensor(row.tokens, dtype=self.shown.dtype, device=self.shown.device)
        return torch.cat([self.shown[row.index], text])[None]

    def _process(self, processors: Sequence[Any], rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Put logits ``[rows, vocabulary]`` through processors; those that look at ids see one row at a time."""
        for item in processors:
            if isinstance(item, BLIND):
                logits = item(self.shown[[row.index for row in rows]], logits)
            elif isinstance(item, PrefixConstrainedLogitsProcessor):
                # Its function is told the row's number, which a call for one row would set to 0.
                allowed = torch.full_like(logits, -torch.inf)
                for at, row in enumerate(rows):
                    allowed[at, item._prefix_allowed_tokens_fn(row.index, self._ids(row)[0])] = 0
                logits = logits + allowed
            else:
                parts = [
                    _of_row(item, row.index)(self._ids(row).to(logits.device), logits[at : at + 1])
                    for at, row in enumerate(rows)
                ]
                logits = torch.cat(parts)
        return logits


class _Side:
    """One model with its cache: which slots are whose, and how far each row was read."""

    def __init__(self, model: PreTrainedModel, cache: Any, rows: Sequence[_Row]) -> None:
        self.model, self.cache = model, cache
        self.order = [row.index for row in rows]
        held = cache.get_seq_length()
        if held and len(rows) > 1:
            raise ValueError("a cache that holds tokens already goes with one row; the rows' lengths are not in it")
        if held and held > (asked := len(rows[0].prompts[LARGE])):
            raise ValueError(f"the cache holds {held} tokens, and the prompt, which must begin with them, has {asked}")
        if held and held == asked:
            cache.crop(-1)  # a call reads one token at least, to say what comes after it
            held -= 1
        self.read = dict.fromkeys(self.order, held)
        self.valid = torch.ones(len(rows), held, dtype=torch.bool)
        self.cache_name = cache_argument(model)
        self.wants_hidden = False
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def admit(self, row: _Row) -> None:
        """Take a row in, whose slots so far are holes."""
        self.order.append(row.index)
        self.read[row.index] = 0
        self.valid = torch.cat([self.valid, torch.zeros(1, self.valid.shape[1], dtype=torch.bool)])
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (
                    torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (layer.keys, layer.values)
                )

    def extend(self, wanted: Sequence[tuple[_Row, list[int]]]) -> tuple[Tensor, Tensor | None, float]:
        """Read a gap for each of some rows; the others' slots of this call stay holes.

        Returns:
            Logits after the last token of each gap ``[rows, vocabulary]``, the hidden states there ``[rows, channels]``
            if they are wanted, and when the call began.
        """
        started = time.perf_counter()
        width = max(len(gap) for _, gap in wanted)
        place = {index: at for at, index in enumerate(self.order)}
        ids = torch.zeros(len(self.order), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        new = torch.zeros(len(self.order), width, dtype=torch.bool)
        for row, gap in wanted:
            at, read = place[row.index], self.read[row.index]
            ids[at, width - len(gap) :] = torch.tensor(gap)
            positions[at, width - len(gap) :] = torch.arange(read, read + len(gap))
            new[at, width - len(gap) :] = True
            self.read[row.index] += len(gap)
        # A row without any visible slot would have a softmax over nothing: in this call it sees its own last hole.
        visible = torch.cat([self.valid, new], 1)
        visible[:, -1] = True
        self.valid = torch.cat([self.valid, new], 1)
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
        inputs[self.cache_name] = self.cache
        if not bool(visible.all()):
            inputs["attention_mask"] = visible.long().to(device)
        if self.wants_hidden:
            inputs["output_hidden_states"] = True
        out = self.model(**inputs, use_cache=True, return_dict=True, **self.keep)
        whose = [place[row.index] for row, _ in wanted]
        hidden = out.hidden_states[-1][whose, -1] if self.wants_hidden else None
        return out.logits[whose, -1], hidden, started

    def shrink(self, live: Sequence[_Row]) -> None:
        """Drop finished rows once they are half of all, and close holes once they are half of all slots."""
        if not live:
            return
        if 2 * len(live) <= len(self.order):
            kept = [at for at, index in enumerate(self.order) if index in {row.index for row in live}]
            chosen = torch.tensor(kept)
            self.cache.batch_select_indices(chosen.to(self.model.device))
            self.valid, self.order = self.valid[chosen], [self.order[at] for at in kept]
        longest = int(self.valid.sum(1).max()) if self.valid.numel() else 0
        if self.valid.shape[1] > 2 * longest + 32 and _allows_holes(self.cache):
            # Valid slots move to the end, in their order; the longest row has no holes then.
            slots = self.valid.int().argsort(dim=1, stable=True)[:, self.valid.shape[1] - longest :]
            self.valid = self.valid.gather(1, slots)
            for layer in self.cache.layers:
                at = slots.to(layer.keys.device)[:, None, :, None]
                layer.keys = layer.keys.gather(2, at.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
                layer.values = layer.values.gather(2, at.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))


def cache_argument(model: PreTrainedModel) -> str:
    """Name under which a model takes its cache; transformers has changed it.

    Raises:
        ValueError: It takes none.
    """
    names = [name for name in CACHES if name in inspect.signature(model.forward).parameters]
    if not names:
        raise ValueError(f"{type(model).__name__} takes no cache, which two models that take turns need")
    return names[0]


def _allows_holes(cache: Any) -> bool:
    """Whether every layer keeps plain keys and values, of which a mask can leave some out."""
    return all(type(layer) is DynamicLayer for layer in cache.layers) and (
        bool(cache.layers) or cache.layer_class_to_replicate is DynamicLayer
    )


def _is_constraint(processor: Any) -> bool:
    return getattr(processor, "is_constraint", isinstance(processor, CONSTRAINTS))


def _of_row(processor: Any, row: int) -> Any:
    """A processor as it is for one row: newer repetition penalties know the length of each row's prompt."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(lengths, Tensor):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = lengths[row : row + 1]
    return own


def _rows(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


def end_ids(model: PreTrainedModel) -> list[int]:
    """Ids that end its text."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _shared(small: PreTrainedModel, large: PreTrainedModel) -> Vocabulary:
    """The vocabulary of two models that number their tokens alike.

    Raises:
        ValueError: They end their texts differently, so they do not.
    """
    ends = end_ids(small), end_ids(large)
    if set(ends[0]) != set(ends[1]):
        raise ValueError(
            f"the models end a text by different ids (small {ends[0]}, large {ends[1]}), so they do not number their "
            "tokens alike; pass vocabulary=Vocabulary.of(...) of their tokenizers, or load them as a Pair"
        )
    return Vocabulary.shared(_rows(small), _rows(large), ends[1])


def _unpadded(ids: Tensor, mask: Tensor | None, name: str) -> list[list[int]]:
    """Rows without their padding.

    Raises:
        ValueError: A row is padded elsewhere than on the left, or is empty.
    """
    if mask is None:
        mask = torch.ones_like(ids)
    mask = mask.bool()
    if mask.shape != ids.shape or not bool((mask.int().diff(dim=1) >= 0).all()):
        raise ValueError(f"{name} must be padded on the left, with a mask of its shape; got {tuple(mask.shape)}")
    if not bool(mask.any(1).all()):
        raise ValueError(f"each row of {name} needs a token; got an empty one")
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def _counts(positions: Tensor, prompts: Sequence[list[int]]) -> bool:
    """Whether positions are those of ``_Side``; of padded places they may be anything."""
    if positions.dim() != 2:
        return False
    tails = [
        row[len(row) - min(len(prompt), len(row)) :].tolist() for row, prompt in zip(positions, prompts, strict=True)
    ]
    return all(
        tail == list(range(len(prompt) - len(tail), len(prompt))) for tail, prompt in zip(tails, prompts, strict=True)
    )


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows or min(seeds) < 0:
        raise ValueError(f"expected a seed of at least 0, or one per row; got {len(seeds)} for {rows} rows")
    return seeds


def _check_options(config: Any, processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> None:
    """Refuse what this loop would have to leave out in silence."""
    if (config.num_beams or 1) > 1:
        raise ValueError(f"two models write one text, not {config.num_beams} beams; leave num_beams out")
    if (mode := config.get_generation_mode()) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"two models write one text by turns, not by {mode.replace('_', ' ')}; leave its options out")
    if model_kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False: each model must keep what it has read; leave it out")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(
                f"{name} is not supported: two models answer. entropy, confidence and logprobs are returned"
            )
    unknown = [name for name, value in model_kwargs.items() if name not in (*PLUMBING, *CACHES) and value is not None]
    if unknown:
        raise ValueError(f"the prompts are text, and the small model would not get {', '.join(unknown)}")
    for item in processors:
        if type(item).__name__ in BATCHED:
            raise ValueError(f"{type(item).__name__} counts on one call per position, which two models do not make")
