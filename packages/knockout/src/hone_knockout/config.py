"""What is knocked out where, and when visual tokens leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from .evaluate import SweepConfig

__all__ = [
    "KINDS",
    "PRESETS",
    "QUESTIONS",
    "ClipConfig",
    "Control",
    "Kind",
    "Knockout",
    "KnockoutConfig",
    "Preset",
    "ReproduceConfig",
    "parse_layers",
]

Kind = Literal["LV", "VT", "VS", "VV", "VT-strict", "span"]
Control = Literal["none", "random", "opposite"]
KINDS: tuple[Kind, ...] = get_args(Kind)
QUESTIONS = ("shape", "place", "order", "direction")
"""Kinds of questions on generated clips. The first two need one frame, the last two need several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knockout:
    """One set of blocked query-key pairs in some decoder layers. Layers are counted from 0; the paper counts from 1."""

    kind: Kind
    """``LV``: text may not read video. ``VT``: a frame may not read other frames. ``VS``: a frame may not read itself.
    ``VV``: both. ``VT-strict``: VT, and the text between frames (timestamps) carries nothing from frame to frame
    either. ``span``: ``target`` may not read ``source``."""
    layers: tuple[int, ...]
    """Decoder layers, counted from 0."""
    keep_self: bool = True
    """Whether a visual token may still read itself under VS and VV. The paper does not say."""
    frames: tuple[int, ...] | None = None
    """Only pairs whose key lies in these frames of the layout, counted from 0; every frame if None. Where a class fuses
    sampled frames (Qwen: two), frame 0 is the first two sampled."""
    source: str = ""
    """Span that is read (the keys) of ``kind="span"``: visual, text, between, prefix, suffix, last, or one located."""
    target: str = ""
    """Span that reads (the queries). Generated tokens count as ``last``, ``text`` and ``suffix``."""
    control: Control = "none"
    """``random``: as many pairs, drawn among all causal ones. ``opposite``: everything but these pairs."""
    seed: int = 0
    """Of ``control="random"``."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.control not in get_args(Control):
            raise ValueError(f"control must be one of {', '.join(get_args(Control))}; got {self.control!r}")
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
    allow_empty: bool = False
    """Accept a knockout that blocks no pair of a prompt. Otherwise it is an error: it would pass for a result."""

    def __post_init__(self) -> None:
        if self.exit is None:
            return
        if self.exit < 1:
            raise ValueError(f"exit must leave visual tokens at least one layer; got {self.exit}")
        late = sorted({layer for item in self.knockouts for layer in item.layers if layer >= self.exit})
        if late:
            raise ValueError(
                f"layers {late} have no visual tokens after the exit at layer {self.exit}; knock out earlier"
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
            parts.append(f"exit {self.exit}")
        return " + ".join(parts) or "baseline"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named recipe and where it comes from.

    Attributes:
        config: the settings.
        model: what they are for.
        provenance: published, or ours.
    """

    config: KnockoutConfig
    model: str
    provenance: str


def _recipe(exit: int, window: int) -> KnockoutConfig:
    knockouts = (Knockout(kind="VT", layers=tuple(range(window))),) if window else ()
    return KnockoutConfig(knockouts=knockouts, exit=exit)


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
class ReproduceConfig:
    """How the findings are put to the test."""

    items: int = 400
    """Questions per host, the four kinds in turn."""
    batch: int = 40
    max_drop: float = 1.0
    """Budget of the exit and window recipe, in points on the choosing half."""
    gate_clips: int = 512
    hosts: tuple[str, ...] = ()
    """Checkpoints, one per seed; the packaged one if none is given."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.items < 16 or self.batch < 1 or self.gate_clips < 1:
            raise ValueError(
                f"expected at least 16 questions and positive batch and gate_clips; got {self.items}, {self.batch}, "
                f"{self.gate_clips}"
            )
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError(f"expected hosts of different seeds; one is named twice: {', '.join(self.hosts)}")

    @property
    def sweep(self) -> SweepConfig:
        """The sweep that every host is put through."""
        from .evaluate import SweepConfig

        return SweepConfig(
            settings=("global1", "global2", "window", "local"),
            kinds=("LV", "VT", "VS"),
            stride=1,
            step=1,
            controls=("none", "random"),
            batch=self.batch,
            style="text",
            shuffle=False,
            seed=self.seed,
        )


PRESETS: dict[str, Preset] = {
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
