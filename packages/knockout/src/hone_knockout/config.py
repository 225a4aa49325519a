"""What is knocked out where, when visual tokens leave, and the settings of each verb. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, get_args

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.training import check_budget

from .flops import WORKLOADS

__all__ = [
    "KINDS",
    "PRESETS",
    "QUESTIONS",
    "SIZES",
    "BenchConfig",
    "ClipConfig",
    "Control",
    "DemoConfig",
    "EvalConfig",
    "GenerateConfig",
    "HostConfig",
    "Kind",
    "Knockout",
    "KnockoutConfig",
    "RecommendConfig",
    "ReproduceConfig",
    "Setting",
    "Source",
    "TrainConfig",
    "TrainHostConfig",
    "parse_layers",
]

Kind = Literal["LV", "VT", "VS", "VV", "VT-strict", "span"]
PlainKind = Literal["LV", "VT", "VS", "VV", "VT-strict"]
"""Kinds that need no spans."""
Control = Literal["none", "random", "opposite"]
Setting = Literal["global1", "global2", "window", "local"]
"""``global1``: LV-K after layer i. ``global2``: a kind in all layers. ``window``: a kind in ``width`` layers.
``local``: VT-K in the first w layers, which is where frames read only themselves."""
Style = Literal["letter", "text"]
"""As in ``hone_lm.choices``."""
Format = Literal["jsonl", "videomme", "mvbench", "egoschema", "tvbench"]
"""As in ``hone_lm.question_sets``."""
KINDS: tuple[Kind, ...] = get_args(Kind)
QUESTIONS = ("shape", "place", "order", "direction")
"""Kinds of questions on generated clips. The first two need one frame, the last two need several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knockout:
    """One set of blocked query-key pairs in some decoder layers. Layers are counted from 0; the paper counts from 1."""

    kind: Kind
    """``LV``: text may not read video. ``VT``: a frame may not read other frames. ``VS``: a frame may not read itself.
    ``VV``: both. ``VT-strict``: VT, and the text between frames (timestamps), which counts with the frame after it,
    carries nothing to another frame either. ``span``: ``target`` may not read ``source``."""
    layers: tuple[int, ...]
    """Decoder layers, counted from 0."""
    keep_self: bool = True
    """Whether a visual token may still read itself under VS and VV. The paper does not say."""
    frames: tuple[int, ...] | None = None
    """Only pairs whose key lies in these frames of the layout, counted from 0 (default: every frame). Where a class
    fuses sampled frames (Qwen: two), frame 0 is the first two sampled."""
    source: str = ""
    """Span that is read (the keys) of ``kind="span"``: visual, text, between, prefix, suffix, last, or one located."""
    target: str = ""
    """Span that reads (the queries). Generated tokens count as ``last``, ``text`` and ``suffix``."""
    control: Control = "none"
    """``random``: as many pairs, drawn among those of the model's mask. ``opposite``: everything but these pairs."""
    seed: int = 0
    """Of the pairs of ``control="random"``."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.control not in get_args(Control):
            raise ValueError(f"control must be one of {', '.join(get_args(Control))}; got {self.control!r}")
        for name, given in (("layers", self.layers), ("frames", self.frames)):
            if given is not None and not (isinstance(given, tuple) and all(type(i) is int for i in given)):
                raise TypeError(f"{name} must be a tuple of whole numbers, such as (4, 5); got {given!r}")
        if not self.layers:
            raise ValueError("a knockout needs at least one layer; leave the knockout out for the baseline")
        if min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers are distinct and counted from 0; got {self.layers}")
        if self.frames is not None and (not self.frames or min(self.frames) < 0):
            raise ValueError(f"frames are counted from 0 and at least one; got {self.frames}")
        named = bool(self.source) and bool(self.target)
        if (self.kind == "span") != named or bool(self.source) != bool(self.target):
            raise ValueError(
                "source and target belong to kind='span', which needs both; "
                f"got kind {self.kind!r}, source {self.source!r}, target {self.target!r}"
            )

    @property
    def label(self) -> str:
        """Short name, such as ``LV 12-15`` (layers from 0)."""
        name = f"{self.source}->{self.target}" if self.kind == "span" else self.kind
        name += {"none": "", "random": " random", "opposite": " opposite"}[self.control]
        if self.frames is not None:
            name += f" frames {format_layers(self.frames)}"
        return f"{name} {format_layers(self.layers)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnockoutConfig:
    """What ``attach`` does to a model."""

    knockouts: tuple[Knockout, ...] = ()
    """Blocked pairs; where several name a layer, their union."""
    exit: int | None = None
    """Visual tokens take part in layers 0 .. exit - 1 and are gone from layer ``exit`` on, from hidden states and
    caches (the paper's "exit after layer 18" is ``exit=18``)."""
    leave: str = "visual"
    """Which visual tokens leave at the exit: all, or a span or named positions of the layout, such as what a pruning
    method would drop (``attach(..., spans=)``). For Python only."""
    allow_empty: bool = False
    """Accept a knockout that blocks no pair of a prompt. Otherwise it is an error: it would pass for a result."""

    def __post_init__(self) -> None:
        if not (isinstance(self.knockouts, tuple) and all(isinstance(item, Knockout) for item in self.knockouts)):
            raise TypeError(f"knockouts must be a tuple of Knockout; got {self.knockouts!r}")
        if self.exit is None:
            if self.leave != "visual":
                raise ValueError(f"leave={self.leave!r} says what leaves at an exit, and there is none; give exit")
            return
        if type(self.exit) is not int:
            raise TypeError(f"exit must be a whole number of layers, such as 18; got {self.exit!r}")
        if self.exit < 1:
            raise ValueError(f"exit must leave visual tokens at least one layer; got {self.exit}")
        late = sorted({layer for item in self.knockouts for layer in item.layers if layer >= self.exit})
        if late:
            raise ValueError(
                f"layers {late} have no {self.leave} tokens after the exit at layer {self.exit}; knock out earlier"
            )

    def check(self, num_layers: int, deepstack_layers: int = 0) -> None:
        """Raise if a model with so many layers cannot take this.

        Raises:
            ValueError: A layer does not exist, no layer is left without visual tokens, or they would leave before the
                model has added all visual features to them (DeepStack).
        """
        for item in self.knockouts:
            if max(item.layers) >= num_layers:
                raise ValueError(
                    f"layers are 0 .. {num_layers - 1} (1 .. {num_layers} in the paper's count); "
                    f"{item.label} asks for {max(item.layers)}"
                )
        if self.exit is not None and self.exit >= num_layers:
            raise ValueError(
                f"exit must be at most {num_layers - 1}, or the {num_layers} layers all run with visual tokens and "
                f"nothing leaves; got {self.exit}"
            )
        if self.exit is not None and self.exit < deepstack_layers:
            raise ValueError(
                f"this model adds visual features after each of its first {deepstack_layers} layers (DeepStack): exit "
                f"must be at least {deepstack_layers}; got {self.exit}"
            )

    @property
    def label(self) -> str:
        """Short name; ``baseline`` if nothing is done."""
        parts = [item.label for item in self.knockouts]
        if self.exit is not None:
            parts.append(f"exit {self.exit}" + ("" if self.leave == "visual" else f" of {self.leave}"))
        return " + ".join(parts) or "baseline"


def _recipe(exit: int, window: int) -> KnockoutConfig:
    knockouts = (Knockout(kind="VT", layers=tuple(range(window))),) if window else ()
    return KnockoutConfig(knockouts=knockouts, exit=exit)


PRESETS: dict[str, Preset[KnockoutConfig]] = {
    "exit-7b": Preset(
        config=_recipe(18, 0),
        model="28-layer 7B decoders (LLaVA-OneVision-7B, LLaVA-Video-7B), 32 frames",
        provenance="Paper, efficiency table: visual tokens leave after layer 18 of 28.",
    ),
    "exit-window-7b": Preset(
        config=_recipe(18, 8),
        model="28-layer 7B decoders (LLaVA-OneVision-7B, LLaVA-Video-7B), 32 frames",
        provenance="Paper, efficiency table: exit after layer 18, attention within a frame in the first 8 layers.",
    ),
    "tiny": Preset(
        config=_recipe(8, 2),
        model="The tiny host of the demo (12 layers), and small test models",
        provenance="Ours: the published proportions on 12 layers.",
    ),
}


def format_layers(layers: tuple[int, ...]) -> str:
    """Runs of numbers, such as ``0-3,7``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_layers(text: str, num_layers: int | None = None) -> tuple[int, ...]:
    """Read ``0-7,12`` or ``all`` as layers counted from 0.

    Args:
        text: Numbers and ranges, ends included; ``8-`` runs to the last layer.
        num_layers: Of the model; needed for ``all`` and open ranges.

    Raises:
        ValueError: It is no such list, or a layer does not exist.
    """
    found: list[int] = []
    for part in ["0-"] if text.strip() == "all" else text.split(","):
        start, dash, stop = part.strip().partition("-")
        if not start.isdecimal() or (stop and not stop.isdecimal()):
            raise ValueError(f"layers are numbers from 0 and ranges such as 0-7,12 or 8- or all; got {text!r}")
        if dash and not stop and num_layers is None:
            raise ValueError(f"{text!r} needs the number of layers; name the last layer")
        last = int(stop) if stop else (num_layers - 1 if dash and num_layers is not None else int(start))
        if last < int(start):
            raise ValueError(f"a range runs upwards; got {part.strip()!r}")
        found += range(int(start), last + 1)
    if num_layers is not None and max(found) >= num_layers:
        raise ValueError(f"layers are 0 .. {num_layers - 1}; got {text!r}")
    if len(set(found)) != len(found):
        raise ValueError(f"a layer is named twice in {text!r}")
    return tuple(sorted(found))


# The tiny host.


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Size of a generated clip, in which two shapes of the size of a cell move a cell every other frame."""

    frames: int = 8
    grid: int = 5
    """Cells along a side."""
    cell: int = 8
    """Pixels along a side of a cell."""
    noise: float = 0.05
    """Standard deviation of pixel noise, of the range [0, 1]."""

    def __post_init__(self) -> None:
        if self.frames < 4 or self.grid < self.steps + 2:
            raise ValueError(
                f"expected at least 4 frames and a grid of {self.steps + 2} cells for them; got {self.frames} and "
                f"{self.grid}"
            )

    @property
    def steps(self) -> int:
        """Cells that a shape moves in a clip."""
        return (self.frames - 1) // 2

    @property
    def size(self) -> int:
        """Pixels along a side of a frame."""
        return self.grid * self.cell


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    layers: int = 12
    width: int = 128
    heads: int = 4
    heads_k: int = 2
    intermediate: int = 320
    vision_layers: int = 1
    vision_width: int = 64

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.heads_k:
            raise ValueError(
                "width must be a multiple of heads, and heads of heads_k; "
                f"got {self.width}, {self.heads}, {self.heads_k}"
            )
        if self.clip.cell % 2:
            raise ValueError(f"a cell is two vision patches wide; got {self.clip.cell} pixels")

    @property
    def tokens(self) -> int:
        """Visual tokens of a clip."""
        return self.clip.frames * self.clip.grid**2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run of the tiny host."""

    host: HostConfig = field(default_factory=HostConfig)
    seed: int = 0
    minutes: float = 4.5
    """Wall-clock budget of the training itself, compilation included."""
    steps: int | None = None
    """Number of optimiser steps instead of a time budget: reproducible, where ``minutes`` is not."""
    batch: int = 256
    """Clips of a step; each is asked six questions."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the matrices of the layers; everything else is AdamW's."""
    lr: float = 4e-3
    """Peak learning rate of the matrices under Muon; under AdamW ``adamw_lr`` is used for all."""
    adamw_lr: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.02
    decay: float = 0.25
    """The learning rate is constant, then falls to zero over this share of the steps done when the fall begins: when
    every gate is passed by ``margin`` without the second loss, or when the budget leaves just so much."""
    margin: float = 0.02
    aux: float = 1.0
    """Weight of the second loss at the start."""
    aux_until: float = 0.5
    """Share of the budget at which the second loss begins to fade at the latest; it does so earlier once every gate is
    passed."""
    aux_fade: float = 0.3
    """It fades to zero over this share of the steps before that."""
    aux_layer: int | None = None
    """Layer after which it looks, counted from 0 (default: the middle)."""
    eval_every: int = 200
    eval_clips: int = 1024
    compile: bool = False
    """Compile the decoder's layers (CUDA only). Worth its first minute in long runs only."""
    log_every: int = 50
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_budget(self, "batch", "lr", "adamw_lr", "warmup_steps", "eval_every", "eval_clips")
        check_least(self, 0, "weight_decay", "aux")
        if not 0 < self.decay < 1 or not 0 <= self.aux_until <= 1 or not 0 < self.aux_fade <= 1:
            raise ValueError(
                f"decay, aux_until and aux_fade are shares; got {self.decay}, {self.aux_until} and {self.aux_fade}"
            )
        if self.aux_layer is not None and not 0 <= self.aux_layer < self.host.layers:
            raise ValueError(f"aux_layer must be one of 0 .. {self.host.layers - 1}; got {self.aux_layer}")


SIZES: dict[str, TrainConfig] = {
    "full": TrainConfig(),
    "small": TrainConfig(
        host=HostConfig(clip=ClipConfig(frames=6, grid=4, cell=4), width=64, intermediate=128, vision_width=32),
        minutes=9.5,
        batch=48,
        warmup_steps=50,
        eval_clips=256,
    ),
}
"""``full`` wants a GPU. ``small``, on smaller clips, learns all four kinds in ten minutes on two CPU cores."""


# One per verb.


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where model and questions come from, so that a run can be repeated. What is a path is absolute in a run."""

    model: str | None = field(default=None, metadata=flag(instead_of=("host",)))
    """Folder or hub address of a Video-LLM (default: the tiny host)."""
    data: Path | None = field(default=None, metadata=flag(instead_of=("host", "format", "videos")))
    """Question file, or the folder of MVBench or TVBench; belongs to --model (default: generated clips)."""
    format: Format = "jsonl"
    """Of the file (jsonl: a line {"video", "question", "options", "answer", "category"} each)."""
    videos: Path | None = None
    """Folder of the videos (default: the file's own). Those of Video-MME, MVBench and TVBench are found in its
    subfolders."""
    host: Path | None = field(default=None, metadata=flag(instead_of=("model", "data", "format", "videos", "dtype")))
    """A host.safetensors made by train-host (default: the packaged one)."""
    limit: int | None = None
    """Ask only so many questions (default: all of a file, 256 on generated clips)."""
    dtype: Dtype = "auto"
    """Of the model's weights; auto is bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        if self.model is not None and self.host is not None:
            raise ValueError("give model, a Video-LLM, or host, a tiny host; not both")
        if (self.data is None) != (self.model is None):
            raise ValueError(
                "data and model belong together: give both, or neither for the tiny host's generated clips"
            )
        given = {"format": self.format != "jsonl", "videos": self.videos is not None, "dtype": self.dtype != "auto"}
        if self.model is None and any(given.values()):
            lost = ", ".join(name for name, there in given.items() if there)
            raise ValueError(f"{lost} belong to --model and --data; the tiny host has its own")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive; got {self.limit}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Which knockouts a sweep runs, and how questions are put (``eval``)."""

    source: Source = field(default_factory=Source)
    settings: tuple[Setting, ...] = field(default=("global1", "global2", "window"), metadata=flag("setting"))
    """global1 (LV-K after layer i), global2 (all layers), window, local (VT-K in the first layers)."""
    kinds: tuple[PlainKind, ...] = field(default=("LV", "VT", "VS"), metadata=flag("knock"))
    """Kinds of global2 and window."""
    width: int = field(default=4, metadata=flag("window"))
    """Layers of a window."""
    stride: int = 4
    """Between windows: 1 slides, as the paper says; 4 tiles, as its figures look."""
    step: int = 2
    """Between the layers of global1 and local; the paper has 2."""
    random_control: bool = False
    """Add a control of as many random pairs to every configuration of global2."""
    frames: int = 32
    """Frames sampled from a video, before a class fuses any: at 32, the decoder of a Qwen sees 16."""
    tokens_per_frame: int | None = None
    """Cut the video into frames of so many tokens (default: the rule of the model's class)."""
    batch: int = 1
    """Questions at a time."""
    style: Style = field(default="letter", metadata=flag(hidden=True))
    """How options are put; a tiny host has no letters."""
    shuffle: bool = field(default=True, metadata=flag(hidden=True))
    """Put the options in a random order per question, so that a liking for a letter is no knowledge."""
    reuse: bool = True
    """Compute layers that configurations share once, and LV-K in all later layers as the exit that it equals."""
    seed: int = 0
    """Of option order, random controls and bootstrap."""
    retry_failed: bool = field(default=False, metadata=flag(stored=False))
    """Ask the questions that failed in a finished run again. An unfinished one does so anyway."""

    def __post_init__(self) -> None:
        if not self.settings or any(value not in get_args(Setting) for value in self.settings):
            raise ValueError(f"settings must be some of {', '.join(get_args(Setting))}; got {self.settings}")
        for name in ("settings", "kinds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} must differ; got {getattr(self, name)}")
        if "span" in self.kinds:
            raise ValueError("a sweep has no span targets; use attach")
        for name in ("width", "stride", "step", "frames", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.tokens_per_frame is not None and self.tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame must be positive; got {self.tokens_per_frame}")


def _host_sweep(batch: int, seed: int, **changes: Any) -> EvalConfig:
    """Every setting, on a tiny host."""
    return EvalConfig(
        settings=get_args(Setting), random_control=True, batch=batch, style="text", shuffle=False, seed=seed, **changes
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo asks."""

    items: int = field(default=128, metadata=flag("limit"))
    """Number of questions, four kinds in turn."""
    batch: int = 32
    """Questions at a time."""
    max_drop: float = 2.0
    """Points of accuracy that exit and window may cost on the choosing half."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    seed: int = 0
    """Of clips and questions."""

    def __post_init__(self) -> None:
        least = 2 * len(QUESTIONS)
        if self.items < least:
            raise ValueError(f"the demo needs at least {least} questions, two of each kind; got {self.items}")
        if self.batch < 1:
            raise ValueError(f"batch must be positive; got {self.batch}")

    @property
    def sweep(self) -> EvalConfig:
        """The sweep that the demo runs."""
        return _host_sweep(self.batch, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """A video, a question, and what to attach for its answer."""

    model: str
    """Folder or hub address of a Video-LLM."""
    video: Path
    """File, folder of pictures or .npy array."""
    ask: str
    """Question."""
    options: tuple[str, ...] = field(default=(), metadata=flag("option"))
    """Options to score instead of writing an answer, as in --option up down."""
    knock: tuple[PlainKind, ...] = field(default=(), metadata=flag(instead_of=("preset",)))
    """Knockouts in --layers."""
    layers: str | None = field(default=None, metadata=flag(instead_of=("preset",)))
    """Layers of --knock, counted from 0, such as 0-7,12 or 8- (default: all)."""
    exit: int | None = field(default=None, metadata=flag(instead_of=("preset",)))
    """Layer at which visual tokens leave, counted from 0: 18 keeps them in the first 18 layers."""
    local: str | None = field(default=None, metadata=flag(instead_of=("preset",)))
    """Layers in which frames read only themselves, such as 0-7."""
    preset: str | None = None
    """Recipe by name, in place of the four flags above."""
    frames: int = 32
    """Frames to sample, all that there are if fewer. A class that fuses two of them (Qwen) shows the decoder half as
    many: those are the frames of a layout."""
    tokens_per_frame: int | None = None
    """Cut the video into frames of so many tokens (default: the rule of the model's class)."""
    max_new_tokens: int | None = None
    """Length of a written answer (default: 64)."""
    start: float | None = None
    """Seconds from which (default: the beginning)."""
    end: float | None = None
    """Seconds up to which (default: the end)."""
    rounds: int = 3
    """Answers of each variant that are timed, in turns after one that warms up; times are medians."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 on a CPU."""
    style: Style = field(default="letter", metadata=flag(hidden=True))
    """How options are put."""

    def __post_init__(self) -> None:
        if not self.ask.strip():
            raise ValueError("the question is empty")
        if len(self.options) == 1:
            raise ValueError("one option is no choice; give at least two, or none for a written answer")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"options must differ; got {list(self.options)}")
        if self.style == "letter" and len(self.options) > len(ascii_uppercase):
            raise ValueError(f"there are letters for {len(ascii_uppercase)} options; got {len(self.options)}")
        if self.max_new_tokens is not None and self.options:
            raise ValueError("max-new-tokens is of a written answer; with --option none is written")
        if self.preset is not None and (self.knock or (self.layers, self.exit, self.local) != (None, None, None)):
            raise ValueError("preset stands for knock, layers, exit and local; give one or the other")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        if self.layers is not None and not self.knock:
            raise ValueError("layers are those of --knock, which was not given")
        if len(set(self.knock)) != len(self.knock):
            raise ValueError(f"a knockout is named twice in --knock {' '.join(self.knock)}")
        for name in ("frames", "max_new_tokens", "tokens_per_frame", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive; got {value}")

    def attached(self, num_layers: int) -> KnockoutConfig:
        """What is attached to a decoder of so many layers.

        Raises:
            ValueError: A layer does not exist.
        """
        if self.preset is not None:
            return PRESETS[self.preset].config
        chosen = parse_layers(self.layers or "all", num_layers)
        items = [Knockout(kind=kind, layers=chosen) for kind in self.knock]
        if self.local is not None:
            items.append(Knockout(kind="VT", layers=parse_layers(self.local, num_layers)))
        return KnockoutConfig(knockouts=tuple(items), exit=self.exit)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendConfig:
    """From which run a recipe is chosen, and how."""

    run: Path
    """Folder of an eval run with the settings global1 and, for the window, local."""
    max_drop: float = 1.0
    """Points of accuracy that exit and window may each cost on the choosing half."""
    verify: bool = True
    """Run both together on the reporting half, which loads the model."""
    seed: int = 0
    """Of the halves."""

    def __post_init__(self) -> None:
        if self.max_drop < 0:
            raise ValueError(f"max_drop is a loss in points and not negative; got {self.max_drop}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What is timed."""

    model: Literal["llava-onevision-7b", "qwen2.5-vl-7b", "tiny"] = "llava-onevision-7b"
    """Shape of the model; tiny for a CPU."""
    frames: tuple[int, ...] = (8, 16, 32, 64)
    """Frames sampled; a model that fuses two (Qwen) shows the decoder half as many."""
    decode_tokens: int = 32
    """Steps of a timed decoding."""
    rounds: int = 9
    """Timed prefills and decodings of each variant, in turns."""
    dtype: Dtype = "auto"
    """Of weights and inputs; auto is bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of weights and inputs."""

    def __post_init__(self) -> None:
        if self.model not in WORKLOADS:
            raise ValueError(f"model must be one of {', '.join(WORKLOADS)}; got {self.model!r}")
        fused = WORKLOADS[self.model].source_frames
        if not self.frames or any(count < 2 * fused or count % fused for count in self.frames):
            raise ValueError(f"frames must be multiples of {fused} and at least {2 * fused}; got {self.frames}")
        for name in ("decode_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """How the findings are put to the test."""

    items: int = field(default=400, metadata=flag("limit"))
    """Questions per host, four kinds in turn."""
    batch: int = 40
    """Questions at a time."""
    max_drop: float = 1.0
    """Points of accuracy that the recipe's exit and window may cost on the choosing half."""
    gate_clips: int = 512
    """Clips that a host is graded on before it is swept."""
    hosts: tuple[Path, ...] = ()
    """Files made by train-host, of several seeds (default: the packaged one)."""
    seed: int = 0
    """Of the questions."""

    def __post_init__(self) -> None:
        if self.items < 16 or self.batch < 1 or self.gate_clips < 1:
            raise ValueError(
                f"expected at least 16 questions and positive batch and gate_clips; got {self.items}, {self.batch}, "
                f"{self.gate_clips}"
            )
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError(
                f"expected hosts of different seeds; one is named twice: {', '.join(map(str, self.hosts))}"
            )

    @property
    def sweep(self) -> EvalConfig:
        """The sweep that every host is put through."""
        return _host_sweep(self.batch, self.seed, stride=1, step=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """A size of the tiny host, and what its training does otherwise (``train-host``)."""

    size: Literal["full", "small"] = "full"
    """full (minutes on a GPU) or small (smaller clips, ten minutes on two CPU cores)."""
    minutes: float | None = field(default=None, metadata=flag(instead_of=("steps",)))
    """Budget of the training itself (default: 4.5, small 9.5)."""
    steps: int | None = field(default=None, metadata=flag(instead_of=("minutes",)))
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int | None = None
    """Clips of a step, six questions on each (default: 256, small 48)."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the matrices of the layers; everything else is AdamW's."""
    lr: float | None = None
    """Peak learning rate of the matrices under Muon (default: 0.004)."""
    adamw_lr: float | None = None
    """Peak learning rate of everything else, and of all under AdamW (default: 0.0015)."""
    compile: bool = False
    """Compile the decoder's layers on a GPU; worth its first minute in long runs only."""
    seed: int = 0
    """Of weights and data."""

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise ValueError("give minutes, a time budget, or steps; not both")
        self.training  # noqa: B018 - looks at the values

    @property
    def training(self) -> TrainConfig:
        """The settings of the training."""
        given = {name: getattr(self, name) for name in ("minutes", "steps", "batch", "lr", "adamw_lr")}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(SIZES[self.size], optimizer=self.optimizer, compile=self.compile, seed=self.seed, **given)
