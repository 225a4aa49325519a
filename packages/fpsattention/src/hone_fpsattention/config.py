"""Settings of FPSAttention, presets with where their numbers come from, and settings of each verb. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.training import check_budget
from hone_video.host_config import HostConfig as DenseHostConfig
from hone_video.prompts import parse_prompt
from hone_video.training_config import DataConfig, LoopConfig, LoraTargets, check_lora
from hone_video.vbench_config import Protocol, VBenchConfig
from hone_video.workloads import HD_WORKLOADS, WORKLOADS

__all__ = [
    "ARMS",
    "BLOCKS",
    "PRESETS",
    "PROMPTS",
    "BenchConfig",
    "Border",
    "CalibrateConfig",
    "Delta",
    "DemoConfig",
    "EvalConfig",
    "FPSAttentionConfig",
    "GenerateConfig",
    "HostConfig",
    "InspectConfig",
    "Loss",
    "Regime",
    "ReproduceConfig",
    "Scales",
    "Size",
    "TrainConfig",
    "TrainHostConfig",
    "VideoConfig",
]

Border = Literal["shift", "cut"]
Scales = Literal["tensor", "tile", "token"]
Delta = Literal["exact", "forward"]
Backend = Literal["auto", "reference", "triton"]
Part = Literal["attention", "forward", "loop", "parallel"]
Loss = Literal["flow", "distillation"]
Size = tuple[int, int, int]
"""Along (frames, height, width)."""

BLOCKS = (64, 128)
"""Tokens of a kernel's block."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 3 or not all(type(n) is int for n in value):
        raise TypeError(f"{name} must be three whole numbers (frames, height, width), such as (6, 8, 8); got {value!r}")
    if min(value) < 1:
        raise ValueError(f"{name} must be positive along each axis (frames, height, width); got {value}")


def _check_boundaries(boundaries: Any, regimes: int) -> None:
    if not isinstance(boundaries, tuple) or not all(_is_number(b) for b in boundaries):
        raise TypeError(f"boundaries must be a tuple of numbers, such as (0.2, 0.8); got {boundaries!r}")
    if len(boundaries) != regimes - 1:
        raise ValueError(
            f"boundaries must be one fewer than regimes: {regimes - 1} for {regimes}; got {boundaries}. They part one "
            "regime from the next"
        )
    if not all(0 < b < 1 for b in boundaries) or any(a >= b for a, b in pairwise(boundaries)):
        raise ValueError(
            f"boundaries are fractions of the denoising steps, between 0 and 1 and ascending; got {boundaries}. The "
            "first regime is that of the noisiest steps"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """How attention runs in one part of the denoising trajectory: S(t) of the paper's equation 6.

    Source: ``window`` is W(t) and ``scale_tile`` g(t), the tile that shares a scale.
    """

    window: Size | None = None
    """Tiles that a tile of queries reads along (frames, height, width), itself in the middle: ``w // 2`` to each side,
    so an even size works as the next odd one. An axis with fewer tiles is read whole. None: every tile."""
    e4m3: bool = True
    """Whether operands and probabilities are rounded to E4M3, or attention stays in the model's own precision."""
    scales: Scales = "tile"
    """What shares one scale of Q and of K, per head. ``tile``: the tokens of a 3-D box, ``scale_tile``. ``tensor``: all
    of them. ``token``: none, each has its own; no kernel does that, it runs in the emulation only."""
    scale_tile: Size | None = None
    """Tokens of that box along (frames, height, width), multiples of the config's ``tile``; None: its ``tile``."""

    def __post_init__(self) -> None:
        for name in ("window", "scale_tile"):
            value = getattr(self, name)
            if value is not None:
                _check_size(name, value)
        if self.scales not in get_args(Scales):
            raise ValueError(f"scales must be one of {get_args(Scales)}; got {self.scales!r}")
        if self.scale_tile is not None and self.scales != "tile":
            raise ValueError(
                f"scale_tile is the box of scales='tile'; with scales={self.scales!r} leave it out, got "
                f"{self.scale_tile}"
            )
        if type(self.e4m3) is not bool:
            raise TypeError(f"e4m3 must be True or False; got {self.e4m3!r}")

    @property
    def plain(self) -> bool:
        """Whether this is the model's own attention: every tile, nothing rounded."""
        return self.window is None and not self.e4m3


@dataclass(frozen=True, kw_only=True, slots=True)
class FPSAttentionConfig:
    """Tiles, and the regimes along the denoising trajectory, noisiest first.

    Regime i holds for the steps after the fraction ``boundaries[i - 1]`` of them and up to the fraction
    ``boundaries[i]``; a forward finds its regime by its noise level, see ``schedule``.
    """

    regimes: tuple[Regime, ...] = (Regime(window=(6, 6, 1)),)
    """One per part of the trajectory; one alone holds everywhere."""
    boundaries: tuple[float, ...] = ()
    """Fractions of the denoising steps in (0, 1), ascending, one fewer than regimes (the paper's alpha_1, alpha_2)."""
    shift: float = 5.0
    """Timestep shift ``s`` of the sampler, ``sigma = s u / (1 + (s - 1) u)``, that maps fractions of steps to noise
    levels. Take the pipeline's own (Wan: 3 at 480p, 5 at 720p and in training); 1 for none, as in CogVideoX."""
    tile: Size = (6, 8, 8)
    """Tokens of a tile along (frames, height, width). The grid need not be a multiple of it."""
    block: int = 128
    """Tokens of a kernel's block, 64 or 128. A tile takes whole blocks, so its volume had better be a multiple."""
    border: Border = "shift"
    """What a window does at the border of the grid. ``shift``: it moves inwards, and every tile reads equally many.
    ``cut``: it loses what sticks out."""
    smooth_k: bool = True
    """Whether the mean key is subtracted before rounding, which softmax does not notice."""
    delta: Delta = "exact"
    """Gradient through rounded probabilities. ``exact`` (as Attn-QAT) subtracts what the unrounded ones give, so that
    the gradients of a query's logits sum to zero; ``forward`` (as SLA2) takes the rounded output, which is there."""
    dense_layers: tuple[int, ...] = ()
    """Layers that keep the model's own attention, counted from 0."""
    backend: Backend = "auto"
    """Backend of attention and rounding, as in ``hone_kernels``."""

    def __post_init__(self) -> None:
        _check_size("tile", self.tile)
        if not isinstance(self.regimes, tuple) or not all(isinstance(r, Regime) for r in self.regimes):
            raise TypeError(f"regimes must be a tuple of Regime; got {self.regimes!r}")
        if not self.regimes:
            raise ValueError("regimes must hold at least one Regime, which then holds at every step")
        _check_boundaries(self.boundaries, len(self.regimes))
        for name, options in (
            ("border", get_args(Border)),
            ("delta", get_args(Delta)),
            ("backend", get_args(Backend)),
            ("block", BLOCKS),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}; got {getattr(self, name)!r}")
        if not _is_number(self.shift) or not 0 < self.shift < float("inf"):
            raise ValueError(f"shift must be a positive number, 1 for none; got {self.shift!r}")
        if type(self.smooth_k) is not bool:
            raise TypeError(f"smooth_k must be True or False; got {self.smooth_k!r}")
        layers = self.dense_layers
        if not isinstance(layers, tuple) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"dense_layers must be a tuple of layer numbers from 0, such as (0,); got {layers!r}")
        for i, regime in enumerate(self.regimes):
            self._check_regime(i, regime)

    def _check_regime(self, i: int, regime: Regime) -> None:
        box = regime.scale_tile
        if box is not None and any(b % t for b, t in zip(box, self.tile, strict=True)):
            raise ValueError(
                f"scale_tile of regime {i} must be a multiple of tile {self.tile} along each axis, since tiles are "
                f"what the sequence is made of; got {box}. Make the tile smaller, or the box larger"
            )
        if regime.e4m3 and regime.scales == "token" and self.backend == "triton":
            raise ValueError(
                f"regime {i} has scales='token', which no kernel does; set backend='reference' (slow), or take 'tile'"
            )

    def parts(self) -> dict[str, FPSAttentionConfig]:
        """Rounding alone, the window alone, and both: this config without the one or the other."""
        rounded = tuple(replace(regime, window=None) for regime in self.regimes)
        windows = tuple(replace(regime, e4m3=False) for regime in self.regimes)
        return {"e4m3": replace(self, regimes=rounded), "window": replace(self, regimes=windows), "both": self}

    def constant(self, regime: Regime | int) -> FPSAttentionConfig:
        """This config with one regime, given or by number, at every step."""
        kept = self.regimes[regime] if isinstance(regime, int) else regime
        return replace(self, regimes=(kept,), boundaries=())


def _preset(
    config: FPSAttentionConfig, model: str, *, published: str = "", suggested: str = "", ours: str
) -> Preset[FPSAttentionConfig]:
    """A preset that says of its numbers what the paper states, what its text hints at, and what we chose.

    No weights trained with what is ours exist, and nothing here was measured on published weights.
    """
    parts = {"Published": published, "Suggested": suggested, "Ours": ours}
    return Preset(config, model, " ".join(f"{name}: {text}" for name, text in parts.items() if text))


_PUBLISHED = (
    "Tile (6, 8, 8) as the throughput choice (Table 3), window (6, 6, 1) as the best (Table 4), one scale per tile and "
    "head for Q and K, per channel for V, 1/448 for P (equation 4), three regimes (equation 6)."
)
_SUGGESTED = (
    "Early: coarse scales, sparse window. Middle: fine scales, dense window. Late: in between. Whether the format is "
    "E4M3 it does not say; 1/448 implies it."
)
_OURS = (
    "Boundaries 0.2 and 0.8, which regime has which window and scales, the border, K smoothing. Measured on synthetic "
    "data, scale granularity changes next to nothing."
)
_FIRST = "As wan2.1-1.3b."
"""What is long stands once in the list that ``info`` prints."""
_CONSTANT = "One regime: the boundaries and the other windows are not published."


def _staged(middle: Size | None, late: Size | None, shift: float) -> FPSAttentionConfig:
    return FPSAttentionConfig(
        regimes=(
            Regime(window=(6, 6, 1), scales="tensor"),
            Regime(window=middle, scales="tile"),
            Regime(window=late, scales="tile", scale_tile=(12, 16, 16)),
        ),
        boundaries=(0.2, 0.8),
        shift=shift,
    )


def _tiny(middle: Size, late: Size) -> FPSAttentionConfig:
    return FPSAttentionConfig(
        regimes=(
            Regime(window=(1, 1, 3), scales="tensor"),
            Regime(window=middle, scales="tile"),
            Regime(window=late, scales="tile", scale_tile=(16, 4, 4)),
        ),
        boundaries=(0.25, 0.75),
        shift=3.0,
        tile=(16, 2, 2),
        block=64,
    )


PRESETS: dict[str, Preset[FPSAttentionConfig]] = {
    "wan2.1-1.3b": _preset(
        config=_staged((6, 6, 5), (6, 6, 3), 3.0),
        model="Wan2.1-T2V-1.3B at 480p: 21x30x52 tokens, 4x4x7 tiles, flow shift 3",
        published=_PUBLISHED,
        suggested=_SUGGESTED,
        ours=_OURS,
    ),
    "wan2.1-14b": _preset(
        config=_staged((6, 6, 5), (6, 6, 3), 5.0),
        model="Wan2.1-T2V-14B at 720p: 21x45x80 tokens, 4x6x10 tiles, flow shift 5",
        published=_FIRST,
        suggested=_FIRST,
        ours=_FIRST,
    ),
    "window-661": _preset(
        config=FPSAttentionConfig(),
        model="Any model; at 720p (4x6x10 tiles) a tenth of the tiles is read, at 480p (4x4x7) a seventh",
        published=_FIRST,
        ours=_CONSTANT + " The border, K smoothing.",
    ),
    "fp8-only": _preset(
        config=FPSAttentionConfig(regimes=(Regime(),)),
        model="Any model: every tile is read, in E4M3",
        published='The paper\'s "quant only" row (Table 2): scales per tile (equation 4).',
        ours="K smoothing.",
    ),
    "window-only": _preset(
        config=FPSAttentionConfig(regimes=(Regime(window=(6, 6, 1), e4m3=False),)),
        model="Any model: the window in the model's own precision",
        published="Window (6, 6, 1) (Table 4).",
        ours=_CONSTANT + " The border.",
    ),
    "cogvideox-5b": _preset(
        config=_staged((3, 5, 5), (3, 3, 3), 1.0),
        model="CogVideoX-5b, 13x30x45 tokens, 3x4x6 tiles, and 226 text tokens",
        published=_FIRST,
        suggested=_FIRST,
        ours=_FIRST + " The paper does not try this model.",
    ),
    "hunyuan-video": _preset(
        config=_staged((6, 6, 5), (6, 6, 3), 7.0),
        model="HunyuanVideo at 720p, 129 frames: 33x45x80 tokens, 6x6x10 tiles, and its text; flow shift 7",
        published=_FIRST,
        suggested=_FIRST,
        ours=_FIRST + " The paper does not try this model.",
    ),
    "tiny": _preset(
        config=_tiny((1, 3, 3), (1, 1, 5)),
        model="The tiny host of the demo, 16x8x8 tokens, 1x4x4 tiles, and small test models",
        suggested=_FIRST,
        ours="All numbers. Read at 8 steps are 0.39 of all pairs, and each token hears of every other in the middle.",
    ),
    "tiny-wide": _preset(
        config=_tiny((1, 5, 3), (1, 3, 3)),
        model="As tiny, for a comparison with one window at every step",
        suggested=_FIRST,
        ours="All numbers. The mean density over the steps is 0.5625, that of window (1, 3, 3) at every step.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to measure."""

    model: str = "wan2.1-14b-720p"
    """wan2.1-1.3b, wan2.1-14b or cogvideox-5b at 480p, wan2.1-1.3b-720p, wan2.1-14b-720p or hunyuan-video-720p, or on a
    CPU tiny-wan, tiny-cogvideox or tiny-hunyuan."""
    parts: tuple[Part, ...] = ("attention", "forward")
    """``attention``: one layer, and the pieces of FPSAttention in it. ``forward``: one call of the transformer.
    ``loop``: all denoising steps, also with the preset that has the model's name. ``parallel``: one call by one GPU and
    by all that torchrun started, of Wan."""
    preset: str = "window-661"
    """Attention settings; its first regime, the sparsest, is what is timed (on tiny models: tiny)."""
    layers: int | None = None
    """Build only so many layers for the forward, which then stand for all of them (default: all)."""
    rounds: int = 20
    """Timed rounds of one attention; each calls every variant once, in a random order."""
    forward_rounds: int = 5
    """Likewise of one forward."""
    loop_steps: int = 10
    """Denoising steps of the loop."""
    compile_blocks: bool = False
    """Also time the forward with transformer blocks compiled by Inductor."""
    e4m3_linears: bool = False
    """Also time the forward with linear layers in E4M3, by torchao (extra linears)."""
    dtype: Dtype = "auto"
    """Of weights and inputs; tiny models are float32."""
    seed: int = 0
    """Of weights, inputs and noise."""

    def __post_init__(self) -> None:
        if self.model not in WORKLOADS | HD_WORKLOADS:
            raise ValueError(f"model must be one of {', '.join(WORKLOADS | HD_WORKLOADS)}; got {self.model!r}")
        _known_preset(self.preset)
        if not self.parts or not set(self.parts) <= set(get_args(Part)):
            raise ValueError(f"parts must name some of {', '.join(get_args(Part))}; got {self.parts}")
        if "parallel" in self.parts and ("wan" not in self.model or len(self.parts) > 1):
            raise ValueError(
                f"parts=('parallel',) stands alone and is of Wan, which diffusers can split; got {self.parts} of "
                f"{self.model}"
            )
        if self.model.startswith("tiny") and self.dtype not in ("auto", "float32"):
            raise ValueError(f"tiny models are float32; leave dtype out, got {self.dtype!r}")
        check_least(self, 1, "layers", "rounds", "forward_rounds", "loop_steps")

    @property
    def schedule(self) -> str:
        """The preset of the loop."""
        return next((name for name in PRESETS if self.model.startswith(name)), "tiny")

    @property
    def attention(self) -> FPSAttentionConfig:
        """The settings in use: one regime."""
        return PRESETS["tiny" if self.model.startswith("tiny") else self.preset].config.constant(0)

    @property
    def variants(self) -> dict[str, FPSAttentionConfig]:
        """What stands beside dense attention: the window alone, rounding alone, and both."""
        parts = self.attention.parts()
        return {"window": parts["window"], "e4m3": parts["e4m3"], "e4m3 window": parts["both"]}


def _check_shift(shift: float | None) -> None:
    if shift is not None and not 0 < shift < float("inf"):
        raise ValueError(f"flow_shift must be a positive number, 1 for none; got {shift}")


PROMPTS = (
    "a red 7 moving left, slow",
    "a green 3 moving down-right, fast",
)
"""What the demo draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """A tiny host that was fine-tuned, and what for."""

    host: DenseHostConfig
    attention: FPSAttentionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """A pipeline, and what it is to make."""

    model: str | None = None
    """Folder of a diffusers pipeline (it holds ``model_index.json``), or its hub address, such as
    ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``."""
    prompts: tuple[str, ...] = field(default=(), metadata=flag("prompt"))
    """What to make, one video each."""
    negative_prompt: str = ""
    """What guidance leads away from; used when ``guidance`` is above 1."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance weight; 1 is none."""
    flow_shift: float | None = None
    """Timestep shift of the sampler; Wan is made for 3 at 480p and 5 at 720p (default: the pipeline's own)."""
    height: int | None = None
    """Pixels (default: the pipeline's own, like width and frames)."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Frames."""
    seed: int = 0
    """Of the first prompt; the following ones count up. Noise is drawn on the CPU, the same for every device."""
    dtype: Dtype = "auto"
    """Of transformer and text encoder; Wan's VAE stays in float32."""
    offload: bool = False
    """Keep on the GPU only the part that is running."""
    local_files_only: bool = False
    """Never ask the hub, only its local cache."""

    def __post_init__(self) -> None:
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt must not be empty")
        check_least(self, 1, "steps", "height", "width", "frames")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is none; got {self.guidance}")
        _check_shift(self.flow_shift)

    def check_host(self) -> None:
        """Refuse what the tiny host, which has its own size and steps, would not read.

        Raises:
            ValueError: More than prompts and a seed is given.
        """
        read = ("model", "prompts", "seed")
        given = [f.name for f in fields(self) if f.name not in read and getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"{', '.join(given)}: of a pipeline, not of the tiny host; pass --model FOLDER, or leave out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What to generate, and how."""

    video: VideoConfig = field(default_factory=VideoConfig)
    preset: str | None = None
    """Attention settings by name; hone-fpsattention info lists them (default: those of the model's kind)."""
    schedule: Path | None = None
    """A file that calibrate wrote, instead of a preset; it must be of this model and sampler."""
    attention: FPSAttentionConfig | None = field(default=None, metadata=flag(hidden=True))
    """Attention settings in full, instead of either."""
    tuned: Path | None = None
    """A folder that train exported: its weights, with the attention that they are for unless another is given."""
    dense: bool = False
    """Leave attention as it is."""
    e4m3_linears: bool = False
    """Linear layers of the blocks in E4M3 too, by torchao (extra linears): no part of FPSAttention's attention."""
    fps: int | None = None
    """Frames per second of the file (default: 16 for Wan, 8 for CogVideoX)."""

    def __post_init__(self) -> None:
        if self.video.model is None or not self.video.prompts:
            raise ValueError("generate needs a pipeline and a prompt: --model FOLDER --prompt TEXT")
        given = [self.preset is not None, self.schedule is not None, self.attention is not None, self.dense]
        if sum(given) > 1:
            raise ValueError("give one of preset, schedule and dense")
        if self.preset is not None:
            _known_preset(self.preset)
        check_least(self, 1, "fps")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """What to measure, and how much the schedule may read."""

    video: VideoConfig = field(default_factory=lambda: VideoConfig(prompts=PROMPTS))
    host: Path | None = None
    """Without a pipeline: a dense host.safetensors made by hone-blade train-host (default: the packaged one)."""
    preset: str | None = None
    """Tile, block, border and shift (default: tiny for the tiny host, else those of the model's kind)."""
    windows: tuple[Size, ...] = field(default=(), metadata=flag(hidden=True))
    """Windows to choose from; empty for 1, 3 and all tiles along each axis."""
    scales: tuple[Scales, ...] = ("tile",)
    """What may share a scale."""
    e4m3: bool = True
    """Whether the candidates round."""
    regimes: int = 3
    """Parts of the trajectory."""
    budget: float = 0.4
    """Most mean density over the steps, of tiles."""

    def __post_init__(self) -> None:
        if not self.video.prompts:
            raise ValueError("calibrate needs a prompt: --prompt TEXT")
        if self.video.model is None:
            self.video.check_host()
            for prompt in self.video.prompts:
                parse_prompt(prompt)
        if self.video.model is not None and self.host is not None:
            raise ValueError("give model, a pipeline, or host, a tiny host; not both")
        if self.preset is not None:
            _known_preset(self.preset)
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is a mean density in (0, 1]; got {self.budget}")
        if not self.scales or not set(self.scales) <= set(get_args(Scales)):
            raise ValueError(f"scales must name some of {get_args(Scales)}; got {self.scales}")
        check_least(self, 1, "regimes")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo draws."""

    prompts: tuple[str, ...] = field(default=PROMPTS, metadata=flag("prompt"))
    """What to draw, a clip each."""
    limit: int | None = None
    """Use only so many of the prompts."""
    steps: int | None = None
    """Denoising steps (default: the host's own number)."""
    host: Path | None = None
    """A dense host.safetensors made by hone-blade train-host (default: the packaged one)."""
    tuned: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one; with --host, none)."""
    preset: str | None = None
    """Attention settings by name, without the tuned host, which has its own (default: that of the tuned host)."""
    seed: int = 0
    """Of the starting noise."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("the demo needs at least one prompt, such as 'a red 7 moving left, slow'")
        for prompt in self.prompts:
            parse_prompt(prompt)
        _one_attention(self.preset, self.tuned)
        check_least(self, 1, "limit", "steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """The variants of the demo on many random prompts, or a pipeline by VBench."""

    protocol: Protocol = "clips"
    """``clips``: the tiny host's variants, graded by what they show. ``vbench``: videos of a pipeline for VBench."""
    vbench: VBenchConfig = field(default_factory=VBenchConfig)
    """Of that protocol."""
    prompts: int | None = field(default=None, metadata=flag("limit"))
    """Number of prompts (default: 64 random ones; VBench: all)."""
    batch: int = 16
    """Clips at a time."""
    steps: int | None = None
    """Denoising steps (default: the host's own number; VBench: 50)."""
    host: Path | None = None
    """A dense host.safetensors made by hone-blade train-host (default: the packaged one)."""
    tuned: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one; with --host, none).
    VBench: a folder that train exported (default: the pipeline's own weights)."""
    preset: str | None = None
    """Attention settings by name, of the clips without what was tuned, which has its own (default: that of the tuned
    host; VBench: that of what was tuned, or of the model's kind)."""
    schedule: Path | None = None
    """VBench: a file that calibrate wrote for this model and sampler, instead of a preset."""
    flow_shift: float | None = None
    """VBench: timestep shift of the sampler; Wan is made for 3 at 480p and 5 at 720p (default: the pipeline's own)."""
    seed: int = 0
    """Of prompts and noise."""

    def __post_init__(self) -> None:
        self.vbench.check(self.protocol)
        if self.preset is not None:
            _known_preset(self.preset)
        check_least(self, 1, "prompts", "batch", "steps")
        if self.protocol == "vbench":
            if self.host is not None:
                raise ValueError("host is the tiny one of protocol clips; VBench takes a pipeline, --model FOLDER")
            if self.batch != 16:
                raise ValueError("batch is of protocol clips; VBench's videos are made one by one")
            return
        given = [name for name in ("schedule", "flow_shift") if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: of a pipeline, for protocol vbench; the tiny host takes --preset")
        _one_attention(self.preset, self.tuned)

    def videos(self, prompts: tuple[str, ...]) -> GenerateConfig:
        """What VBench's videos are made with.

        Args:
            prompts: One for each video.
        """
        own = self.vbench
        video = VideoConfig(
            model=own.model, prompts=prompts, negative_prompt=own.negative_prompt, steps=self.steps or 50,
            guidance=5.0 if own.guidance is None else own.guidance, flow_shift=self.flow_shift, height=own.height,
            width=own.width, frames=own.frames, seed=self.seed, dtype=own.dtype, offload=own.offload,
            local_files_only=own.local_files_only,
        )  # fmt: skip
        return GenerateConfig(
            video=video, preset=self.preset, schedule=self.schedule, tuned=self.tuned, dense=own.dense
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """Fine-tuning of the tiny host with the attention in its forward pass."""

    host: Path | None = None
    """The dense host.safetensors to start from (default: the packaged one)."""
    attention: FPSAttentionConfig | None = field(default=None, metadata=flag(hidden=True))
    """Attention settings in full, instead of ``preset``."""
    preset: str = "tiny"
    """Attention settings by name."""
    loss: Loss = "distillation"
    """``flow``: rectified flow, the paper's. ``distillation``: the velocity of the dense host, frozen; ours."""
    seed: int = 0
    """Of data and noise."""
    minutes: float = 5.0
    """Wall clock of the training itself, compilation included."""
    steps: int | None = None
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int = 64
    """Clips of a step; all of one regime."""
    lr: float = 2e-3
    """Peak learning rate of Muon; AdamW, for what is no matrix, takes 0.4 of it (the paper: 5e-6 of Adam, on models of
    a billion parameters and more). It rises, and falls to a hundredth over the budget."""
    weight_decay: float = 1e-4
    """As published."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises (the paper: 200)."""
    ema: float = 0.99
    """Decay of the weights' moving average, which is what is kept; as published."""
    drop: float = 0.2
    """Probability of training a clip without its prompt (the paper: 0.1). The host's guidance counts an error of that
    branch two times, and one of the other three times."""
    uniform: float = 0.5
    """Share of uniform noise levels, where the sampler's steps are; the rest is logit-normal (the paper: all), which
    hardly has the first step. Both are shifted as the host's sampler is."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping what they made."""
    glyphs: Literal["handwritten", "segments"] = "handwritten"
    """``segments`` needs no scikit-learn and is for smoke runs."""
    eval_clips: int = 256
    """Clips that the result is graded on."""
    log_every: int = 20
    """Steps between two logged ones."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(self, "batch", "lr", "warmup_steps", "eval_clips")
        _known_preset(self.preset)
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {get_args(Loss)}; got {self.loss!r}")
        check_least(self, 0, "weight_decay")
        if not 0 <= self.drop < 1 or not 0 <= self.uniform <= 1 or not 0 <= self.ema < 1:
            raise ValueError(
                f"drop and ema must be in [0, 1) and uniform in [0, 1]; got {self.drop}, {self.ema} and {self.uniform}"
            )

    @property
    def settings(self) -> FPSAttentionConfig:
        """The attention in use."""
        return self.attention or PRESETS[self.preset].config


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Fine-tuning of a pipeline's transformer with the attention in its forward pass."""

    model: str
    """Folder of a diffusers pipeline (it holds ``model_index.json``), or its hub address, such as
    ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How it is trained. The paper, which trains every weight: learning rate 5e-6, decay 1e-4, clip 1, 200 steps of
    warm-up, EMA 0.99."""
    part: Literal["transformer", "transformer_2"] = "transformer"
    """Which transformer; the second is that of Wan2.2 for its less noisy steps."""
    preset: str | None = None
    """Attention settings by name; hone-fpsattention info lists them (default: those of the model's kind)."""
    schedule: Path | None = None
    """A file that calibrate wrote, instead of a preset; it must be of this model and sampler."""
    attention: FPSAttentionConfig | None = field(default=None, metadata=flag(hidden=True))
    """Attention settings in full, instead of either."""
    straight_through: Delta = "exact"
    """Gradient through rounded probabilities, in the two published styles. ``exact``: as Attn-QAT. ``forward``: as
    SLA2."""
    loss: Loss = "flow"
    """``flow``: on the data, the paper's; for CogVideoX its v-prediction. ``distillation``: the velocity of the dense
    model, frozen; ours."""
    lora_rank: int = 64
    """Rank of the LoRA that is trained; 0 trains every weight, as the paper does."""
    lora_targets: LoraTargets = "attention"
    """Layers with a LoRA: the four projections of every attention, or ``all``, the feed-forward layers too."""
    flow_shift: float | None = None
    """Timestep shift of the sampler that the model is trained for; Wan is made for 3 at 480p and 5 at 720p, and the
    paper trains with 5 (default: the pipeline's own)."""
    drop: float = 0.1
    """Probability of training a video without its caption; as published."""
    uniform: float = 0.0
    """Share of uniform noise levels; the rest is logit-normal, as published. Both are shifted as the sampler is.
    CogVideoX: all are uniform."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of frozen weights and of the forward; what is trained stays in float32 (default: bfloat16 on a GPU)."""
    local_files_only: bool = False
    """Never ask the hub, only its local cache."""

    def __post_init__(self) -> None:
        if self.data.videos is None and self.data.cache is None:
            raise ValueError("train needs videos: --videos FOLDER, which holds a metadata.jsonl, or --cache FOLDER")
        if sum(value is not None for value in (self.preset, self.schedule, self.attention)) > 1:
            raise ValueError("give one of preset and schedule")
        if self.preset is not None:
            _known_preset(self.preset)
        check_lora(self.lora_rank, self.lora_targets)
        _check_shift(self.flow_shift)
        for name, kind in (("loss", Loss), ("straight_through", Delta)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {get_args(kind)}; got {getattr(self, name)!r}")
        if not 0 <= self.drop < 1 or not 0 <= self.uniform <= 1:
            raise ValueError(f"drop must be in [0, 1) and uniform in [0, 1]; got {self.drop} and {self.uniform}")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """What to look at while it draws one prompt."""

    video: VideoConfig = field(default_factory=lambda: VideoConfig(prompts=PROMPTS[:1]))
    host: Path | None = None
    """Without a pipeline: a dense host.safetensors made by hone-blade train-host (default: the packaged one)."""
    tuned: Path | None = None
    """A folder that train exported for the pipeline, or without one a host.safetensors made by train-host instead of
    ``host``; it brings its own attention."""
    preset: str | None = None
    """Attention settings by name (default: tiny for the tiny host, else those of the model's kind)."""
    schedule: Path | None = None
    """A file that calibrate wrote for the pipeline, instead of a preset."""

    def __post_init__(self) -> None:
        if not self.video.prompts:
            raise ValueError("inspect needs a prompt: --prompt TEXT")
        if len(self.video.prompts) > 1:
            raise ValueError(f"inspect looks at one video; got {len(self.video.prompts)} prompts")
        if self.video.model is None:
            self.video.check_host()
            if self.schedule is not None:
                raise ValueError("a schedule is for a pipeline; pass --model too, or take --preset")
            if self.tuned is not None and (self.host is not None or self.preset is not None):
                raise ValueError("tuned is a host with its attention; drop host and preset, or tuned")
            parse_prompt(self.video.prompts[0])
        elif self.host is not None:
            raise ValueError("give model, a pipeline, or host, a tiny host; not both")
        else:
            self.pipeline  # noqa: B018  # it checks what is left
        if self.preset is not None:
            _known_preset(self.preset)

    @property
    def pipeline(self) -> GenerateConfig:
        """The settings of a pipeline's run."""
        return GenerateConfig(video=self.video, preset=self.preset, schedule=self.schedule, tuned=self.tuned)


ARMS = {
    "dense": "A, nothing attached",
    "e4m3": "B1, E4M3 alone",
    "window": "B2, window alone",
    "both": "B, both, untrained",
    "flow": "C, both, trained on flow",
    "distillation": "C', both, trained on dense velocity",
    "schedule": "E, wide schedule, untrained",
    "schedule-trained": "E, wide schedule, trained",
    "constant": "E, one window, untrained",
    "constant-trained": "E, one window, trained",
    "tensor": "G, E4M3, scale per tensor",
    "tile": "G, E4M3, scale per tile",
    "token": "G, E4M3, scale per token",
}
"""What ``reproduce`` compares: name -> what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The paper's claims on the tiny host, over seeds."""

    arms: tuple[str, ...] = ()
    """Which arms, beside dense (default: all): e4m3, window, both, and trained with both, flow and distillation;
    schedule and constant, and both -trained; tensor, tile and token. One alone has its rows; a verdict needs what it
    compares."""
    host: Path | None = None
    """A dense host.safetensors made by hone-blade train-host (default: the packaged one)."""
    preset: str = "tiny"
    """Attention settings of the arms but schedule and constant."""
    schedule_preset: str = "tiny-wide"
    """Attention settings of schedule; constant has one window, of the same mean density or the next less."""
    prompts: int = field(default=256, metadata=flag("limit"))
    """Number of random prompts of each seed."""
    seeds: int = 3
    """Number of seeds of prompts, noise and training."""
    train_steps: int = 300
    """Optimiser steps of each fine-tuning; there are 4 of each seed."""
    train_batch: int = 32
    """Clips of a step."""
    lr: float = 2e-3
    """Peak learning rate, as of train-host."""
    gate: float = 0.9
    """Share of digits and of directions that the dense host has to get right."""
    batch: int = 32
    """Clips at a time."""
    workers: int = field(default=1, metadata=flag(stored=False))
    """Processes, a job each (an arm with a seed), with ``--device cuda`` over all visible GPUs; results are the
    same."""
    glyphs: Literal["handwritten", "segments"] = "handwritten"
    """``segments`` needs no scikit-learn and is for smoke runs."""

    def __post_init__(self) -> None:
        _known_preset(self.preset)
        _known_preset(self.schedule_preset)
        check_least(self, 1, "prompts", "seeds", "train_steps", "train_batch", "batch", "workers")
        unknown = set(self.arms) - set(ARMS)
        if unknown:
            raise ValueError(f"no arm {', '.join(sorted(unknown))}; the arms are {', '.join(ARMS)}")
        if self.lr <= 0 or not 0 <= self.gate <= 1:
            raise ValueError(f"lr must be positive and gate a share in [0, 1]; got {self.lr} and {self.gate}")


def _one_attention(preset: str | None, tuned: Path | None) -> None:
    if preset is not None:
        _known_preset(preset)
    if preset is not None and tuned is not None:
        raise ValueError("tuned is a host with its attention; drop preset, or tuned")


def _known_preset(name: str) -> None:
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")
