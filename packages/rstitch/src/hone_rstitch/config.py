"""Who writes the next token, and the settings of every verb."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.training import check_budget

__all__ = [
    "LARGE",
    "NAMES",
    "PACKAGED",
    "PRESETS",
    "SMALL",
    "BenchConfig",
    "CalibrateConfig",
    "DecoderConfig",
    "DemoConfig",
    "EngineConfig",
    "EvalConfig",
    "GenerateConfig",
    "HostConfig",
    "ProfileConfig",
    "ReproduceConfig",
    "ServeConfig",
    "SimulateConfig",
    "StitchConfig",
    "TrainHostConfig",
    "TrainRouterConfig",
]

SMALL, LARGE = 0, 1
"""The two models wherever an integer says who."""
NAMES = ("small", "large")
"""Theirs in words."""

PACKAGED = (0, 1, 2)
"""Pairs that ship, by the seeds that they were trained with."""

TAU = 0.02
"""The paper's balanced threshold, of the entropy."""
TAUS = (0.001, TAU, 0.03)
"""All three."""
LONGEST = 2**20
"""Tokens that any text has at most."""
COLDEST = 1e-3
"""Least temperature above 0: logits divided by less may overflow, and the likeliest token comes anyway."""

Policy = Literal["stitch", "one-token", "router", "random", "small", "large"]
GateSignal = Literal["entropy", "confidence"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StitchConfig:
    """Policy and gate of one request."""

    policy: Policy = "stitch"
    """``stitch``: the gate in both directions. ``one-token``: the large model hands back after each token. ``router``:
    the gate, where a trained network may keep a doubtful small token (R-Stitch+). ``random``: drawn, see ``share``.
    ``small`` and ``large``: that model alone."""
    gate: GateSignal = "entropy"
    """``entropy``: of the next token over ln V (the paper from v3 on). ``confidence``: its largest probability (v1)."""
    tau: float = TAU
    """Threshold: the small model's token is thrown away at entropy > tau (confidence < tau). Entropies of vocabularies
    of different sizes are no more comparable than the models: choose it with ``calibrate``."""
    tau_back: float | None = None
    """Threshold at which the large model hands back, on the certain side of ``tau`` (default: ``tau`` itself)."""
    window: int = 1
    """Tokens over which the gate's signal is averaged, this one included; 1 is the paper."""
    min_large_run: int = 1
    """Tokens that the large model writes at least before it hands back."""
    entropy_on: Literal["raw", "processed"] = "raw"
    """``raw``: hard masks are applied and nothing else. ``processed``: temperature, top-k and top-p too, which makes a
    model look surer than it is, and under top-k 1 always sure."""
    share: float | None = None
    """``random``: share of tokens that the large model writes."""
    run_length: float | None = None
    """``random``: mean run of large tokens (default: each token is drawn by itself)."""
    discards: bool = False
    """``random``: where the large model takes over, the small one is asked first and its token thrown away, so that a
    text costs what a gated one does."""
    prefill: Literal["lazy", "both"] = "lazy"
    """When the large model reads the prompt: at its first token, or at the start, which spares that token the wait."""

    def __post_init__(self) -> None:
        for name, allowed in (("policy", Policy), ("gate", GateSignal)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        if not math.isfinite(self.tau) or (self.tau_back is not None and not math.isfinite(self.tau_back)):
            raise ValueError(f"tau and tau_back must be finite; got {self.tau} and {self.tau_back}")
        back = self.tau if self.tau_back is None else self.tau_back
        if (back > self.tau) if self.gate == "entropy" else (back < self.tau):
            side = "at most" if self.gate == "entropy" else "at least"
            raise ValueError(f"tau_back must be {side} tau, the more certain side; got {back} and {self.tau}")
        if not 1 <= self.window <= LONGEST or not 1 <= self.min_large_run <= LONGEST:
            raise ValueError(
                f"window and min_large_run must lie in 1 .. {LONGEST}; got {self.window} and {self.min_large_run}"
            )
        if (self.policy == "random") != (self.share is not None):
            raise ValueError(
                f"share belongs to policy='random', which needs it; got policy {self.policy!r} and share {self.share}"
            )
        if self.share is None:
            if self.run_length is not None or self.discards:
                raise ValueError("run_length and discards belong to policy='random'")
            return
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1]; got {self.share}")
        shortest = max(1.0, self.share / (1 - self.share)) if self.share < 1 else 1.0
        if self.run_length is not None and not self.run_length >= shortest:
            raise ValueError(
                f"large runs of a share of {self.share} have a mean of at least {shortest:.4g}; got {self.run_length}"
            )

    def uncertain(self, signal: float) -> bool:
        """Whether the small model's token is thrown away."""
        return signal > self.tau if self.gate == "entropy" else signal < self.tau

    def certain(self, signal: float) -> bool:
        """Whether the large model hands back."""
        tau = self.tau if self.tau_back is None else self.tau_back
        return signal <= tau if self.gate == "entropy" else signal >= tau

    @property
    def label(self) -> str:
        """Short name, such as ``tau 0.02``."""
        if self.policy in ("small", "large"):
            return self.policy
        if self.policy == "random":
            runs = "" if self.run_length is None else f", runs of {self.run_length:.3g}"
            return f"random {self.share:.3g}{runs}"
        text = f"{'tau' if self.gate == 'entropy' else 'confidence'} {self.tau:g}"
        text += "" if self.tau_back is None else f", back {self.tau_back:g}"
        text += "" if self.window == 1 else f", window {self.window}"
        text += "" if self.min_large_run == 1 else f", runs from {self.min_large_run}"
        return text if self.policy == "stitch" else f"{self.policy} {text}"


_PAIRS = "L1-1.5B-Short with R1-Distill-Qwen-7B, R1-Distill-Qwen-14B or QwQ-32B"
_V1 = "Qwen2.5-Math-1.5B-Oat-Zero with R1-Distill-Qwen-7B"

PRESETS: dict[str, Preset[StitchConfig]] = {
    "accurate": Preset(
        config=StitchConfig(tau=0.001), model=_PAIRS, provenance="Paper v3, Table 1: the rows of tau 0.001."
    ),
    "balanced": Preset(
        config=StitchConfig(tau=0.02), model=_PAIRS, provenance="Paper v3, Table 1: the rows of tau 0.02."
    ),
    "fast": Preset(config=StitchConfig(tau=0.03), model=_PAIRS, provenance="Paper v3, Table 1: the rows of tau 0.03."),
    "v1-fast": Preset(
        config=StitchConfig(gate="confidence", tau=0.6), model=_V1, provenance="Paper v1, Table 1: threshold 0.6."
    ),
    "v1-accurate": Preset(
        config=StitchConfig(gate="confidence", tau=0.8), model=_V1, provenance="Paper v1, Table 1: threshold 0.8."
    ),
    "tiny": Preset(
        config=StitchConfig(tau=0.03),
        model="The packaged pair of the demo (16 characters)",
        provenance="Ours: see the README's curve.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Architecture of one model of the tiny pair."""

    layers: int = 2
    """Decoder layers."""
    width: int = 64
    """Channels."""
    heads: int = 4
    """Query heads."""
    heads_k: int = 2
    """Key-value heads."""
    intermediate: int = 128
    """Channels within a feed-forward layer."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.heads_k:
            raise ValueError(
                "width must be a multiple of heads, and heads of heads_k; "
                f"got {self.width}, {self.heads}, {self.heads_k}"
            )


def _small_decoder() -> DecoderConfig:
    return DecoderConfig(width=40, intermediate=80)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny pair: two Qwen2 decoders over single characters."""

    small: DecoderConfig = field(default_factory=_small_decoder)
    """Of the small model."""
    large: DecoderConfig = field(default_factory=DecoderConfig)
    """Of the large model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """Training of the tiny pair: a small model, a large one, and the large one taught to check itself."""

    seed: int = 0
    """Of weights and data."""
    small: DecoderConfig = field(default_factory=_small_decoder)
    """Architecture of the small model."""
    large: DecoderConfig = field(default_factory=DecoderConfig)
    """Architecture of the large model."""
    small_steps: int = 1000
    """Optimiser steps of the small model."""
    large_steps: int = 2400
    """Optimiser steps of the large model."""
    verbose_steps: int = 400
    """Steps in which the large model, once trained, learns to check itself before it answers."""
    batch: int = 128
    """Products of a step."""
    lr: float = 6e-3
    """Peak learning rate of the matrices, under Muon."""
    adamw_lr: float = 3e-3
    """Peak learning rate of everything else, under AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    decay: float = 0.4
    """Share of the steps over which the learning rate falls to zero."""
    held_out: int = 512
    """Problems of the final grade, none of which is trained on."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        stages = ("small_steps", "large_steps", "verbose_steps")
        check_budget(self, *stages, "batch", "lr", "adamw_lr", "warmup_steps", "held_out")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share; got {self.decay}")

    @property
    def steps(self) -> int:
        """Of all three stages."""
        return self.small_steps + self.large_steps + self.verbose_steps

    @property
    def minutes(self) -> float:
        """No budget of time: who repeats the command gets the same pair."""
        return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo asks the tiny pair."""

    items: int = field(default=200, metadata=flag("limit"))
    """Problems of each point of the curve."""
    taus: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
    """Thresholds of the curve; the answers shown are those of the preset ``tiny``."""
    shown: int = 6
    """Answers printed."""
    batch: int = 128
    """Problems at a time."""
    pair: int = 0
    """Which of the packaged pairs: the seed that it was trained with."""
    seed: int = 0
    """Of the problems and of random routing."""

    def __post_init__(self) -> None:
        if self.items < 2 or not 1 <= self.shown <= self.items or self.batch < 1:
            raise ValueError(
                f"expected at least 2 items, 1 .. items shown and a positive batch; got {self.items}, {self.shown}, "
                f"{self.batch}"
            )
        _check_taus(self.taus)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsConfig:
    """Two models and what they share."""

    small: str | None = None
    """Folder or hub address of the small model; the packaged tiny pair unless both are given."""
    large: str | None = None
    """Folder or hub address of the large model."""
    pair: int = 0
    """Which of the packaged pairs: the seed that it was trained with."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    small_prompt: str = "{question}"
    """What the small model is asked, where it wants more than the question (L1: a length instruction)."""
    large_prompt: str = "{question}"
    """What the large model is asked."""
    chat: bool = True
    """Put prompts through each model's chat template, where it has one."""
    servers: tuple[str, ...] = ()
    """Addresses of two vLLM servers, of the small and the large model, in place of their weights; tokenizers are those
    of small and large. HONE_RSTITCH_SERVER_KEY in the environment is the key that they want."""
    top: int = 20
    """Log-probabilities that servers give for each token, at most what they allow (vLLM's --max-logprobs)."""

    def __post_init__(self) -> None:
        if len(self.servers) not in (0, 2) or self.top < 1:
            raise ValueError(f"servers are two addresses, top at least 1; got {self.servers} and {self.top}")
        if (self.small is None) != (self.large is None):
            raise ValueError("give small and large, or neither for the packaged pair")
        given = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        if "top" in given and not self.servers:
            raise ValueError(f"top is what servers give of each token; got {self.top} without servers. Leave it out")
        if "dtype" in given and self.servers:
            raise ValueError(f"dtype is of weights, which servers hold; got {self.dtype} beside servers. Leave it out")
        of_models = [name for name in ("small_prompt", "large_prompt", "chat", "dtype") if name in given]
        if self.small is None and of_models:
            raise ValueError(
                f"{', '.join(of_models)} is of models that small and large name; got neither, and the packaged pair "
                "reads products such as 123*45 in float32, without a template"
            )
        if self.small is not None and "pair" in given:
            raise ValueError(f"pair is of the packaged ones; got {self.pair} beside small and large. Leave one out")
        for name in ("small_prompt", "large_prompt"):
            if "{question}" not in getattr(self, name):
                raise ValueError(f"{name} must hold {{question}}; got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How tokens are drawn; the same for both models."""

    max_new_tokens: int = 64
    """Emitted tokens at most, thrown-away ones not counted."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Least mass of likeliest tokens that is drawn from; 1 is off."""
    top_k: int = 0
    """0 is off."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature must be 0 (greedy) or at least {COLDEST}; got {self.temperature}")
        if self.max_new_tokens < 1 or not 0 < self.top_p <= 1 or not 0 <= self.top_k < 2**31:
            raise ValueError(
                "expected max_new_tokens >= 1, 0 < top_p <= 1 and top_k of 31 bits; got "
                f"{self.max_new_tokens}, {self.top_p}, {self.top_k}"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("top_p and top_k change nothing when temperature is 0; give a temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much an engine takes on."""

    max_batch: int = 16
    """Requests that are written at once."""
    max_queue: int = 256
    """Requests that wait at most; beyond them one is refused."""
    max_tokens: int = 65536
    """Tokens of prompts and answers that the requests being written may come to, in each model's cache. ``serve``
    refuses bodies of more than 16 bytes for each."""
    large_batch: int = 1
    """The large model runs when so many requests are at it, or all are: fewer, fuller calls."""
    cache: Literal["auto", "paged", "dynamic"] = "auto"
    """``paged``: dense decoders (Qwen2, Qwen3, Llama) on pages, on a GPU as CUDA graphs. ``dynamic``: transformers' own
    forward and caches. auto is paged where both models can."""
    page: int = 64
    """Tokens of a page: 16, 32 or a multiple of 64."""
    graphs: bool = True
    """Capture calls as CUDA graphs, on pages and on a GPU."""
    timeout: float = 600.0
    """Seconds from its arrival after which a request is ended."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_tokens", "large_batch", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if self.page not in (16, 32) and (self.page < 1 or self.page % 64):
            raise ValueError(f"page must be 16, 32 or a multiple of 64; got {self.page}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """One prompt, one answer."""

    ask: str = ""
    """The question; for the tiny pair a product such as 123*45."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """The pair."""
    stitch: StitchConfig = field(default_factory=StitchConfig)
    """Policy and gate."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    seed: int = 0
    """Of the draws."""
    router: Path | None = None
    """Made by train-router, for policy ``router``."""

    def __post_init__(self) -> None:
        if not self.ask.strip():
            raise ValueError("what is the question? Give --ask")
        _check_tau(self.stitch)
        _check_router(self.models, self.stitch, self.router)
        if self.router is not None and self.stitch.policy != "router":
            raise ValueError(f"a router is asked by policy 'router' alone; got policy {self.stitch.policy!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A server of one pair; HONE_RSTITCH_API_KEY in the environment is the key that requests must bear."""

    models: ModelsConfig = field(default_factory=ModelsConfig)
    """The pair."""
    stitch: StitchConfig = field(default_factory=StitchConfig)
    """Policy and gate of requests that say nothing of it."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How much it takes on."""
    router: Path | None = None
    """Made by train-router, for policy ``router``."""
    address: str = "127.0.0.1"
    """Where it listens: this machine alone unless told, such as 0.0.0.0."""
    port: int = 8000
    """0 takes a free one."""

    def __post_init__(self) -> None:
        _check_tau(self.stitch)
        _check_router(self.models, self.stitch, self.router)
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in [0, 65535]; got {self.port}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Accuracy, shares and cost over a set of problems, for a curve of thresholds and its baselines."""

    data: str | None = None
    """JSON lines or parquet with question and answer (or problem and solution), here or on the hub
    (hf://datasets/OWNER/NAME/FILE), or aime24, amc, math500 (default: generated products)."""
    format: Literal["number", "math"] = "number"
    """How an answer is graded: ``number`` compares the last number of the text, ``math`` uses math-verify (extra)."""
    limit: int | None = None
    """Problems at most (default: all, or 500 generated ones)."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """The pair."""
    stitch: StitchConfig = field(default_factory=StitchConfig)
    """Gate of the curve; its tau is replaced by each of ``taus``."""
    taus: tuple[float, ...] = TAUS
    """Thresholds of the curve (default: the paper's of the entropy)."""
    baselines: tuple[Literal["small", "large", "random", "cascade", "speculative"], ...] = (
        "small",
        "large",
        "random",
        "cascade",
    )
    """``random``: at the share that each threshold came to. ``cascade``: the small model answers, and the large one
    answers anew where the small one was once unsure. ``speculative``: the large model's greedy text, the small model
    drafting."""
    draft: int = 5
    """Tokens of a draft, of ``speculative``."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn."""
    samples: int = 1
    """Answers per problem; more than one needs a temperature."""
    batch: int = 64
    """Problems at a time."""
    seed: int = 0
    """Of the draws, and of generated problems."""

    def __post_init__(self) -> None:
        _check_taus(self.taus)
        if self.stitch.gate == "confidence" and self.taus == TAUS:
            raise ValueError(
                f"the thresholds {TAUS} are of the entropy; the gate 'confidence' wants others. Give taus, such as "
                "v1's 0.5 0.6 0.7 0.8"
            )
        if self.samples < 1 or self.batch < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("samples, batch and limit must be at least 1")
        if self.models.servers and "speculative" in self.baselines:
            raise ValueError("the baseline speculative asks for both models' choices, which servers do not give")
        if "speculative" in self.baselines and (self.sampling.temperature > 0 or self.draft < 1):
            raise ValueError("the baseline speculative is greedy, with drafts of a token at least")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError("several greedy samples of a problem are the same one; give a temperature")
        if self.stitch.policy not in ("stitch", "one-token"):
            raise ValueError(f"a curve over tau needs a gated policy; got {self.stitch.policy!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Choose tau for a wanted share of large tokens, or for a wanted time per token."""

    data: str | None = None
    """Problems, as ``eval`` takes them (default: generated products). Not the set that is reported on."""
    limit: int = 100
    """Problems at most."""
    share: float = 0.2
    """Wanted share of tokens that the large model writes."""
    time: float | None = None
    """Wanted time per token over the large model's alone, with ``time_ratio``, in place of a share."""
    time_ratio: float = 4.0
    """Time of a large step over that of a small one."""
    tolerance: float = 0.01
    """How near to the wanted value is near enough."""
    rounds: int = 12
    """Runs at most; each halves the interval."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """The pair."""
    stitch: StitchConfig = field(default_factory=StitchConfig)
    """Gate; its tau is what is looked for."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn."""
    batch: int = 64
    """Problems at a time."""
    seed: int = 0
    """Of the draws, and of generated problems."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1); got {self.share}")
        if self.time is not None and not 0 < self.time < 2:
            raise ValueError(f"time is a multiple of the large model's, in (0, 2); got {self.time}")
        if self.time_ratio <= 0 or self.tolerance <= 0 or self.rounds < 1 or self.limit < 1 or self.batch < 1:
            raise ValueError("time_ratio, tolerance, rounds, limit and batch must be positive")
        if self.stitch.policy not in ("stitch", "one-token"):
            raise ValueError(f"only a gated policy has a tau; got {self.stitch.policy!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """How the paper's claims are put to the test on tiny pairs of several seeds."""

    pairs: tuple[int, ...] = field(default=(), metadata=flag(instead_of=("hosts",)))
    """Which of the packaged pairs: the seeds that they were trained with (default: all, 0, 1 and 2)."""
    hosts: tuple[Path, ...] = field(default=(), metadata=flag(instead_of=("pairs",)))
    """Files made by train-host, of several seeds (default: the packaged pairs)."""
    routers: tuple[Path, ...] = ()
    """Routers made by train-router, one for each pair in its order; without them R-Stitch+ is not tested."""
    asked: float = 0.001
    """Tau above which a router is asked: that of its training."""
    items: int = field(default=500, metadata=flag("limit"))
    """Held-out problems per pair."""
    taus: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
    """Thresholds of the curves."""
    judged: float = 0.03
    """Threshold at which the claims are judged; chosen before any pair was run (the paper's largest)."""
    window: int = 8
    """Of the smoothed gate that is compared with the plain one."""
    batch: int = 128
    """Problems at a time."""
    seed: int = 0
    """Of the problems and of random routing."""

    def __post_init__(self) -> None:
        _check_taus(self.taus)
        if self.judged not in self.taus:
            raise ValueError(f"judged must be one of taus; got {self.judged}")
        if self.items < 2 or self.batch < 1 or self.window < 2:
            raise ValueError("expected items and window of at least 2 and a positive batch")
        for name in ("pairs", "hosts", "routers"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: one is named twice")
        if self.pairs and self.hosts:
            raise ValueError("give pairs, which are packaged, or hosts, files of others; not both")
        pairs = len(self.hosts or self.pairs or PACKAGED)
        if len(self.routers) not in (0, pairs):
            raise ValueError(f"a router for each of the {pairs} pairs, or none; got {len(self.routers)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Step times and rates, where who writes is drawn: weights may be random."""

    loop: Literal["transformers", "engine"] = "transformers"
    """``transformers``: the loop of ``stitch_generate``, one text. ``engine``: the engine on pages, beside what memory
    bandwidth allows."""
    model: Literal["tiny", "1.5b-7b", "1.5b-14b", "1.5b-32b"] = "tiny"
    """``tiny``: the packaged pair. Others: random weights in the shapes of R1-Distill-Qwen-1.5B and 7B, 14B, or 32B."""
    context: int = 32
    """Tokens that both models have read before anything is timed."""
    gaps: tuple[int, ...] = (1, 4, 16, 64)
    """Tokens read at once; 1 is a plain decoding step."""
    tokens: int = 32
    """Tokens written per timed text."""
    batches: tuple[int, ...] = (1, 8, 32)
    """``engine``: requests at once."""
    peers: tuple[Literal["eager", "static", "assisted"], ...] = ("eager",)
    """``engine``: what of transformers is run beside it. ``static``: a static cache, compiled on a GPU (minutes).
    ``assisted``: the small model drafts for the large one; random weights accept nothing."""
    share: float = 0.2
    """Share of tokens that the large model writes in the stitched text."""
    run_length: float = 2.0
    """Mean run of large tokens in it."""
    rounds: int = 10
    """Turns that each variant gets after two that warm up; a text of the engine gets three after one."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of random weights and of who writes."""

    def __post_init__(self) -> None:
        if min(self.context, self.tokens, self.rounds, *self.gaps, *self.batches) < 1:
            raise ValueError("context, gaps, tokens, batches and rounds must be at least 1")
        if max(self.gaps) > 64 and self.loop == "engine":
            raise ValueError(f"the engine packs gaps of up to 64 tokens; got {max(self.gaps)}")
        if self.model == "tiny" and self.context + max(*self.gaps, self.tokens) > 256:
            raise ValueError("the tiny pair has 256 positions; shorten context, gaps or tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Calls to time on this machine, for the latency estimate of R-Stitch+."""

    models: ModelsConfig = field(default_factory=ModelsConfig)
    """The pair."""
    cached: tuple[int, ...] = (0, 32, 64, 128)
    """Tokens that a call finds in its cache."""
    tokens: tuple[int, ...] = (1, 2, 8, 32, 64)
    """Tokens that it reads; 1 is a decoding step."""
    rounds: int = 20
    """Times that each call is timed."""

    def __post_init__(self) -> None:
        _check_weights(self.models)
        if min(self.rounds, *self.tokens) < 1 or min(self.cached) < 0:
            raise ValueError("rounds and tokens must be at least 1, cached at least 0")
        # The estimate has a square in the tokens read, and a product with those cached.
        if len({count for count in self.tokens if count > 1}) < 3 or len(set(self.cached)) < 2:
            raise ValueError(
                "the fit wants three different numbers of tokens above 1, and two of cached ones; got "
                f"{self.tokens} and {self.cached}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRouterConfig:
    """Training of the router of R-Stitch+ on a pair, both models frozen."""

    models: ModelsConfig = field(default_factory=ModelsConfig)
    """The pair."""
    data: str | None = None
    """Problems to train on, as ``eval`` takes them (default: generated products)."""
    held_out_data: str | None = None
    """Problems that the router is held against thresholds on (default: generated products)."""
    format: Literal["number", "math"] = "number"
    """How an answer is graded."""
    stitch: StitchConfig = field(default_factory=lambda: StitchConfig(policy="router", tau=0.001))
    """Gate of the positions at which the router is asked: a low tau leaves it many."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn."""
    latency: Path | None = None
    """Latencies in milliseconds, made by ``profile``; without them a call costs what its weights do, in steps
    of the large model."""
    price: float | None = None
    """lambda, what a unit of latency takes from a right answer's reward of 1 (default: the paper's 5e-6 with
    ``latency``, in milliseconds; 0.01 without, in steps)."""
    width: int = 128
    """Of the router's inner layer."""
    steps: int = 150
    """Updates."""
    batch: int = 32
    """Problems per update."""
    rollouts: int = 8
    """Answers per problem."""
    epochs: int = 4
    """Passes over an update's routes."""
    lr: float = 1e-3
    """Learning rate."""
    scale: Literal["group", "batch"] = "group"
    """What advantages are divided by. ``group``: the spread of a problem's own answers (DAPO), so that a saved step
    among right answers weighs as much as a right answer among wrong ones. ``batch``: that of all answers (ours)."""
    clip_low: float = 0.2
    """Lower bound of the clipped ratio is 1 less this."""
    clip_high: float = 0.28
    """Upper bound is 1 and this."""
    items: int = field(default=500, metadata=flag("limit"))
    """Held-out problems at most."""
    taus: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
    """Thresholds that the router is held against."""
    log_every: int = 5
    """Updates between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    seed: int = 0
    """Of the router's weights, the problems and the routes."""

    def __post_init__(self) -> None:
        _check_taus(self.taus)
        _check_weights(self.models)
        check_budget(self, "batch", "epochs", "width", "lr", "clip_high")
        if self.price is not None:
            check_least(self, 0, "price")
        check_least(self, 2, "rollouts", "items")
        if not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low must lie in (0, 1); got {self.clip_low}")
        if self.stitch.policy != "router":
            raise ValueError(f"the router is asked by policy 'router'; got {self.stitch.policy!r}")
        if (self.data is None) != (self.held_out_data is None):
            raise ValueError("give data and held_out_data, two sets of problems, or neither")

    @property
    def minutes(self) -> float:
        """No budget of time."""
        return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateConfig:
    """Two models that serve requests at different points of their texts, in time steps."""

    requests: tuple[int, ...] = (1, 2, 3, 4)
    """Requests in flight; a finished one is replaced at once."""
    p: float = 0.35
    """Chance that a step of the small model ends in a call of the large one."""
    q: float = 1.0
    """Chance that the large model hands back after a token; 1 is one-token routing (R2R)."""
    discard: bool = True
    """The step of the small model that calls the large one leaves no token."""
    small_ms: float = 6.0
    """Time of a small step."""
    large_ms: float = 27.9
    """Time of a large step."""
    small_batch: int = 1
    """The small model starts when so many requests wait for it."""
    large_batches: tuple[int, ...] = (1, 2, 3, 4)
    """The large model starts when so many wait for it; each is tried that cannot deadlock."""
    shared: bool = False
    """Both models are on one device and run one at a time, in turn."""
    tokens: int = 1_000_000
    """Tokens simulated per setting."""
    seed: int = 0
    """Of the chances."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or not 0 < self.q <= 1:
            raise ValueError(f"expected p in [0, 1] and q in (0, 1]; got {self.p} and {self.q}")
        if min(self.small_ms, self.large_ms) <= 0 or self.small_batch < 1 or self.tokens < 1:
            raise ValueError("times, small_batch and tokens must be positive")
        if min(self.requests, default=0) < 1 or min(self.large_batches, default=0) < 1:
            raise ValueError("requests and large_batches are lists of numbers from 1")


def _check_taus(taus: tuple[float, ...]) -> None:
    if not taus or len(set(taus)) < len(taus) or not all(map(math.isfinite, taus)):
        raise ValueError(f"taus must be distinct finite numbers, at least one; got {taus}")


def _check_tau(stitch: StitchConfig) -> None:
    """Refuse the entropy's own threshold for the other gate, which it would never throw a token away at."""
    if stitch.gate == "confidence" and stitch.tau == TAU and stitch.policy in ("stitch", "one-token", "router"):
        raise ValueError(
            f"tau {TAU} is a threshold of the entropy; the gate 'confidence' wants one of its own, v1's lie in 0.5 .. "
            "0.8. Give tau"
        )


def _check_router(models: ModelsConfig, stitch: StitchConfig, router: Path | None) -> None:
    if models.servers and (router is not None or stitch.policy == "router"):
        raise ValueError("the router reads hidden states, which servers do not give")
    if stitch.policy == "router" and router is None:
        raise ValueError("policy 'router' needs a router; make one with train-router")


def _check_weights(models: ModelsConfig) -> None:
    if models.servers:
        raise ValueError(
            "this verb runs the models itself: leave servers out (generate, eval, calibrate and serve take them)"
        )
