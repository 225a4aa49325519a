"""What of a scale runs, and the settings of every verb. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Literal, get_args

from hone_core.config import Dtype, Preset, flag
from hone_core.training import check_budget

__all__ = [
    "PRESETS",
    "BenchConfig",
    "BenchmarkConfig",
    "CalibrateConfig",
    "DemoConfig",
    "EvalConfig",
    "GenerateConfig",
    "HostConfig",
    "ImageConfig",
    "InspectConfig",
    "ReproduceConfig",
    "SparseVARConfig",
    "TrainHostConfig",
]

Score = Literal["map", "inverse", "random", "distance"]
Fill = Literal["anchor", "anchor_code", "bilinear", "expected", "expected_bilinear", "prev", "zero"]
Metric = Literal["abs", "rel"]
KV = Literal["drop", "fill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseVARConfig:
    """Which tokens are left out, and what stands in for them."""

    ratio: float = 0.6
    """Share of the tokens beside the anchors that is left out of a sparse scale, in [0, 1]."""
    window: int | None = 4
    """Side of the windows that keep one anchor each; None: no anchors, which ``fill`` must not ask for."""
    start_scale: int = -3
    """First sparse scale; negative counts from the end, and as many as there are scales leaves all dense."""
    detector: int | None = None
    """Block whose change is the map (default: half the depth; of the tiny host, the one that some images choose). Find
    it with ``calibrate``."""
    select: Literal["topk", "threshold"] = "topk"
    """``topk``: as many tokens in every image, so that lengths are static. ``threshold``: those above one, and as many
    in every image as in the batch's fullest, so that what comes out depends on the company."""
    threshold: float = 1.0
    """``threshold``: of the map's mean."""
    bucket: int = 128
    """``threshold``: kept tokens are rounded up to a multiple of this."""
    metric: Metric = "abs"
    """``abs``: mean squared change. ``rel``: over the mean square before."""
    score: Score = "map"
    """``map``: the method. ``inverse``: the flat parts run. ``random``: chance. ``distance``: squared distance of a
    scale's input tokens to their mean, as FastVAR scores."""
    fill: Fill = "anchor"
    """What excluded positions are drawn from: their ``anchor``'s logits; its drawn code (``anchor_code``); logits
    interpolated between kept tokens (``bilinear``); the mean code of those (``expected``, ``expected_bilinear``); the
    last block's output at the scale before (``prev``); or they add nothing (``zero``)."""
    kv: KV = "drop"
    """Keys at excluded positions: none (``drop``), or their anchor's with their own rotary row (``fill``)."""
    backend: Literal["torch", "auto", "triton", "reference"] = "torch"
    """What runs around the blocks of an Infinity's sparse scales. ``torch``: its own operations, with which a ratio of
    0 is dense bit for bit. Else the fused ones of ``hone_kernels.kept_tokens``, equal up to rounding: ``triton`` on a
    GPU, their ``reference`` anywhere, or ``auto``."""
    seed: int = 0
    """Of ``random``, beside the image's own."""

    def __post_init__(self) -> None:
        for name, allowed in (("metric", Metric), ("score", Score), ("fill", Fill), ("kv", KV)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        if self.backend not in ("torch", "auto", "triton", "reference"):
            raise ValueError(f"backend must be torch, auto, triton or reference; got {self.backend!r}")
        if self.select not in ("topk", "threshold"):
            raise ValueError(f"select must be topk or threshold; got {self.select!r}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is a share of tokens and must lie in [0, 1]; got {self.ratio}")
        if not 0 <= self.threshold < inf or self.bucket < 1:
            raise ValueError(
                f"threshold must be finite and not negative, bucket at least 1; got {self.threshold}, {self.bucket}"
            )
        if self.window is None:
            if self.fill not in ("zero", "prev") or self.kv == "fill":
                raise ValueError(
                    f"without anchors fill must be zero or prev and kv drop; got fill={self.fill!r}, kv={self.kv!r}. "
                    "Give window a side, such as 4"
                )
            if self.ratio == 1:
                raise ValueError("a ratio of 1 without anchors leaves nothing to run; use EarlyStop, or window=4")
        elif self.window < 1:
            raise ValueError(f"window must be at least 1; got {self.window}")
        if self.detector is not None and self.detector < 0:
            raise ValueError(f"detector is the number of a block, from 0; got {self.detector}")


_NAMES = "Ratio and window occur in the release's evaluation folder names (its issue 2); what they mean is our reading."

PRESETS: dict[str, Preset[SparseVARConfig]] = {
    **{
        f"infinity-{ratio:g}": Preset(
            config=SparseVARConfig(ratio=ratio),
            model="Infinity-2B and 8B at 1M pixels",
            provenance=f"{_NAMES} Start scale, detector and fill are ours.",
        )
        for ratio in (0.5, 0.6, 0.7)
    },
    "var-512": Preset(
        config=SparseVARConfig(ratio=0.6, start_scale=-2), model="VAR-d36 at 512 px", provenance="Ours, not measured."
    ),
    "tiny": Preset(
        config=SparseVARConfig(ratio=0.7, start_scale=-2, bucket=8),
        model="The tiny host (64 px)",
        provenance="Ours: as many tokens run as where one scale is left out whole.",
    ),
}


VARIANTS = (
    "dense", "sparse", "early-stop-1", "early-stop-2", "skip-uncond-2", "fastvar", "random", "inverse", "distance",
    "no-anchors", "kv-fill", "threshold", "anchor_code", "bilinear", "expected", "expected_bilinear", "prev", "zero",
)  # fmt: skip
"""Ways to draw an image that ``eval`` compares: the method, its baselines, and what replaces one part of it."""


_WITHOUT_SETTINGS = ("dense", "early-stop-1", "early-stop-2", "skip-uncond-2")


def _check_variant(name: str, *, given: bool) -> None:
    """Refuse an unknown variant, or settings that are ``given`` to one that has none."""
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {name!r}")
    if given and name in _WITHOUT_SETTINGS:
        raise ValueError(f"variant {name} has no settings of the method: leave the preset, --ratio and the like out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How a saved pipeline draws; a VAR's size is its weights'."""

    pixels: str = "1M"
    """Size."""
    aspect: float = 1.0
    """Height over width."""
    guidance: float | None = None
    """Strength of guidance (default: 4 of Infinity, of which 1 is none; 1.5 of VAR, of which 0 is none)."""
    temperature: float = 1.0
    """Of bits or tokens."""
    dtype: Dtype = "auto"
    """Of transformer blocks and text encoder."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < inf:
            raise ValueError(f"temperature must be positive and finite; got {self.temperature}")
        if self.guidance is not None and not isfinite(self.guidance):
            raise ValueError(f"guidance must be finite; got {self.guidance}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Architecture of the tiny host: tokenizer, small Infinity and grader, over generated scenes of 64 px."""

    code_dim: int = 12
    """Bits of a code."""
    ae_channels: int = 32
    """Width of the tokenizer's first level."""
    ae_multipliers: tuple[int, ...] = (1, 2, 2)
    """Width of each level over it."""
    ae_blocks: int = 1
    """Residual blocks of a level."""
    depth: int = 6
    """Blocks of the transformer."""
    width: int = 144
    """Channels of the transformer."""
    heads: int = 3
    """Attention heads."""
    grader_channels: int = 32
    """Width of the grader's first layer."""
    guidance: float = 2.0
    """Guidance that the host is sampled with."""
    temperature: float = 0.5
    """Temperature that the host is sampled with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """Training of the tiny host: tokenizer, then grader, then transformer."""

    host: HostConfig = field(default_factory=HostConfig, metadata=flag(hidden=True))
    """Architecture."""
    seed: int = 0
    """Of weights and data."""
    minutes: float = 4.0
    """Wall clock of the training itself, where steps is not given; compiling comes before."""
    steps: int | None = None
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int = 64
    """Images of a step."""
    tokenizer_share: float = 0.25
    """Share of the budget that trains the tokenizer."""
    grader_share: float = 0.04
    """Share of the budget that trains the grader."""
    tokenizer_lr: float = 2e-3
    """Peak learning rate of tokenizer and grader."""
    lr: float = 2e-3
    """Peak learning rate of the transformer."""
    flip: float = 0.2
    """Most bits of a scale that are flipped, as a share, so that later scales learn to repair (self-correction)."""
    drop: float = 0.1
    """Share of prompts that are dropped, for guidance."""
    ema: float = 0.998
    """Decay of the weights' moving average, which is what is kept."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 120.0
    """Least time between two checkpoints, from which a stopped run goes on."""
    eval_images: int = 512
    """Images that the grades are over."""

    def __post_init__(self) -> None:
        check_budget(self, "batch", "tokenizer_lr", "lr", "eval_images")
        if not 0 < self.tokenizer_share + self.grader_share < 1 or min(self.tokenizer_share, self.grader_share) <= 0:
            raise ValueError(
                "tokenizer_share and grader_share must be positive and leave the transformer some; got "
                f"{self.tokenizer_share} and {self.grader_share}"
            )
        if not 0 <= self.flip <= 1 or not 0 <= self.drop <= 1:
            raise ValueError(f"flip and drop are shares in [0, 1]; got {self.flip} and {self.drop}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay in [0, 1); got {self.ema}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The same scenes dense, sparse, stopped early and with other masks.

    Without a detector, 16 further images choose one, as ``calibrate`` does; so in ``eval`` and ``inspect``.
    """

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    settings: SparseVARConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """Settings of the method."""
    limit: int = 48
    """Images."""
    seed: int = 0
    """Of the first image; the prompts go with it."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1; got {self.limit}")


Protocol = Literal["scenes", "geneval", "hps", "imagereward", "dpg"]
IMAGES_PER_PROMPT = {"geneval": 4, "hps": 1, "imagereward": 10, "dpg": 4}
"""As each benchmark asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """Images of a benchmark's prompts, under its file names; ``protocol="scenes"`` does not look at these."""

    model: Path | None = None
    """Benchmarks: folder of an ``InfinityPipeline``, as its ``save_pretrained`` writes it."""
    prompts: Path | None = None
    """Benchmarks: the prompts as they are published: ``evaluation_metadata.jsonl`` of GenEval; the folder of text files
    of DPG-Bench; the folder of ``anime.json``, ``concept-art.json`` ... of HPS v2; ``benchmark-prompts.json`` of
    ImageReward."""
    variant: str = "sparse"
    """Benchmarks: what runs, by its name among ``variants``."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Benchmarks: how images are drawn."""
    images_per_prompt: int | None = None
    """Benchmarks: default 4 (GenEval, DPG), 10 (ImageReward), 1 (HPS)."""
    grade: bool = True
    """Benchmarks: run the scorer, which must be there; without, only draw."""
    scorer: Path | None = None
    """GenEval and DPG: checkout of djghosh13/geneval or TencentQQGYLab/ELLA."""
    scorer_python: str = "python"
    """Benchmarks: interpreter that has the scorer's own, older packages."""
    weights: Path | None = None
    """GenEval: folder of the Mask2Former weights."""
    fid: Path | None = None
    """Benchmarks: folder of images that the drawn ones are held against, by torch-fidelity (extra ``fid``)."""

    def check(self, protocol: str) -> None:
        """Refuse a protocol that is unknown, or that lacks its inputs or has some too many.

        Raises:
            ValueError: See above.
        """
        if protocol not in get_args(Protocol):
            raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}; got {protocol!r}")
        if protocol == "scenes":
            if self != BenchmarkConfig():
                raise ValueError("protocol scenes takes a host and no pipeline, prompts or scorer; name a benchmark")
            return
        if self.model is None or self.prompts is None:
            raise ValueError(f"protocol {protocol} needs a pipeline and its prompts: --model FOLDER --prompts PATH")
        if self.images_per_prompt is not None and self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be at least 1; got {self.images_per_prompt}")
        if protocol == "dpg" and self.images_per_prompt not in (None, 4):
            raise ValueError(f"DPG-Bench reads a square of four images; got images_per_prompt={self.images_per_prompt}")
        if protocol == "dpg" and self.grade and self.image.aspect != 1:
            raise ValueError(f"DPG-Bench cuts squares; got aspect {self.image.aspect:g}. Take aspect 1, or --no-grade")
        if self.grade and protocol in ("geneval", "dpg") and self.scorer is None:
            raise ValueError(f"{protocol} is scored by its own checkout: give --scorer FOLDER, or --no-grade")
        if self.grade and protocol == "geneval" and self.weights is None:
            raise ValueError("GenEval needs the folder of its Mask2Former weights: --weights FOLDER, or --no-grade")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Quality against work of many images of the tiny host, variant by variant; or a pipeline under a benchmark."""

    protocol: Protocol = "scenes"
    """``scenes``: the tiny host's variants. ``geneval``, ``hps``, ``imagereward``, ``dpg``: a pipeline's images."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    """Of the other protocols."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    settings: SparseVARConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """Settings that variants start from."""
    preset: str | None = None
    """Benchmarks: settings by name, in place of single ones; what is not given is the tiny host's otherwise."""
    variants: tuple[str, ...] = VARIANTS
    """What is compared; ``dense`` always is."""
    limit: int | None = None
    """Images (default: 256); prompts of a benchmark (default: all)."""
    batch: int = 64
    """Images at a time."""
    seed: int = 0
    """Of the first image; the prompts go with it. Of a benchmark, of each prompt's first image."""
    greedy: bool = False
    """Take the likeliest bits in place of drawing."""

    def __post_init__(self) -> None:
        self.benchmark.check(self.protocol)
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ValueError(f"no variant {', '.join(unknown)}; expected of {', '.join(VARIANTS)}")
        scenes = self.protocol == "scenes"
        least = 2 if scenes else 1
        if (self.limit is not None and self.limit < least) or self.batch < 1:
            raise ValueError(f"limit must be at least {least} and batch 1; got {self.limit} and {self.batch}")
        if scenes and self.preset is not None:
            raise ValueError("preset is for benchmarks; scenes take single settings, such as --ratio")
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
            if self.settings != PRESETS["tiny"].config:
                raise ValueError("give a preset or single settings, not both")
        if not scenes:
            own = self.preset is not None or self.settings != PRESETS["tiny"].config
            _check_variant(self.benchmark.variant, given=own)
            if not own and self.benchmark.variant not in _WITHOUT_SETTINGS:
                raise ValueError("these settings are the tiny host's: name a --preset, such as infinity-0.6")
        if not scenes and (self.host is not None or self.variants != VARIANTS or self.greedy):
            raise ValueError(f"host, variants and greedy are for protocol scenes; {self.protocol} takes --variant")

    @property
    def used(self) -> SparseVARConfig:
        """Settings of a benchmark."""
        return self.settings if self.preset is None else PRESETS[self.preset].config


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Images from prompts or classes, with a saved pipeline."""

    model: Path
    """Folder of an ``InfinityPipeline`` or ``VARPipeline``, as its ``save_pretrained`` writes it."""
    prompts: tuple[str, ...] = field(default=(), metadata=flag("prompt"))
    """What an Infinity draws, one image each."""
    classes: tuple[int, ...] = ()
    """What a VAR draws, one image each."""
    settings: SparseVARConfig = field(default_factory=lambda: PRESETS["infinity-0.6"].config)
    """Settings of the method."""
    variant: str = "sparse"
    """What runs, by its name among those that ``eval`` compares: ``sparse``, ``dense``, ``early-stop-1`` ..."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """How they are drawn."""
    batch: int = 1
    """Images at a time."""
    seed: int = 0
    """Of the first image; the following ones count up."""

    def __post_init__(self) -> None:
        _check_variant(self.variant, given=self.settings != PRESETS["infinity-0.6"].config)
        if bool(self.prompts) == bool(self.classes) or self.batch < 1:
            raise ValueError(
                f"expected prompts (Infinity) or classes (VAR), and a batch of 1 or more; got {len(self.prompts)} "
                f"prompts, {len(self.classes)} classes and {self.batch}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Which block tells textured from flat."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    model: Path | None = None
    """Folder of an ``InfinityPipeline`` in place of a host."""
    prompt_file: Path | None = None
    """UTF-8 text, one prompt a line, that the pipeline draws; 32 or more make a choice that holds."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """How the pipeline draws."""
    limit: int = 64
    """Images."""
    batch: int = 1
    """Images of the pipeline at a time."""
    start_scale: int | None = None
    """First sparse scale, whose map comes from the scale before (default: -2 of the host, -3 of a pipeline)."""
    seed: int = 0
    """Of the images."""

    def __post_init__(self) -> None:
        if self.limit < 1 or self.batch < 1:
            raise ValueError(f"limit and batch must be at least 1; got {self.limit} and {self.batch}")
        if (self.model is None) != (self.prompt_file is None):
            raise ValueError("a pipeline and its prompts go together: --model FOLDER --prompt-file FILE")
        if self.model is not None and self.host is not None:
            raise ValueError("give a host or a pipeline, not both")
        if self.model is None and (self.image != ImageConfig() or self.batch != 1):
            raise ValueError("how images are drawn is for a pipeline, --model FOLDER; the host has its own settings")

    @property
    def start(self) -> int:
        """The first sparse scale."""
        return (-2 if self.model is None else -3) if self.start_scale is None else self.start_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """What the method did in one image, scale by scale."""

    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    settings: SparseVARConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """Settings of the method."""
    seed: int = 0
    """Of the image; the prompt goes with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """The claims, on tiny hosts and several sampling seeds.

    Without a detector, 128 images of each host choose one, as ``calibrate`` does.
    """

    hosts: tuple[Path, ...] = ()
    """Files made by train-host, of several seeds (default: the packaged one)."""
    settings: SparseVARConfig = field(default_factory=lambda: PRESETS["tiny"].config)
    """Settings of the method."""
    ratios: tuple[float, ...] = (0.3, 0.5, 0.9)
    """Further ratios of the method, for its line of quality against work."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Sampling seeds; each draws its own prompts and images."""
    limit: int = 2000
    """Images of a seed."""
    batch: int = 250
    """Images at a time."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be different and at least one; got {self.seeds}")
        if not all(0 <= ratio <= 1 for ratio in self.ratios) or self.settings.ratio in self.ratios:
            raise ValueError(
                f"ratios are shares in [0, 1] other than that of the settings, {self.settings.ratio}; got {self.ratios}"
            )
        if self.limit < 2 or self.batch < 1:
            raise ValueError(f"limit must be at least 2 and batch 1; got {self.limit} and {self.batch}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time of the transformer at real sizes with random weights."""

    model: str = "tiny"
    """``tiny``, or a published size such as infinity_2b (needs a CUDA device)."""
    pixels: str = "1M"
    """Image size of an Infinity."""
    aspect: float = 1.0
    """Height over width of an Infinity's images."""
    batch: int = 1
    """Images at a time."""
    settings: SparseVARConfig = field(default_factory=SparseVARConfig)
    """Settings of the method; masks come from smooth random maps, since random weights make none."""
    modes: tuple[str, ...] = ("eager",)
    """``eager``, ``graphs`` (a CUDA graph per scale), ``compiled`` (compiled blocks and graphs; comes last)."""
    stops: tuple[int, ...] = (1, 2, 3)
    """Scales that early stopping leaves out."""
    kernels: bool = False
    """Time the method with fused kernels too, on a CUDA device."""
    dtype: Dtype = "auto"
    """Of the blocks."""
    text_tokens: int | None = None
    """Words of a prompt (default: 64; of tiny 16, more than which it does not read)."""
    warmup: int = 5
    """Untimed images first."""
    rounds: int = 20
    """Timed images of each variant."""
    seed: int = 0
    """Of weights and maps."""

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in ("eager", "graphs", "compiled")]
        if unknown or not self.modes:
            raise ValueError(f"modes must be of eager, graphs, compiled; got {', '.join(self.modes) or 'none'}")
        if "compiled" in self.modes[:-1]:
            raise ValueError("compiled must be the last mode: blocks stay compiled from then on")
        if self.settings.select != "topk" and set(self.modes) != {"eager"}:
            raise ValueError("graphs need static lengths; take select=topk, or mode eager")
        if min(self.batch, self.words, self.rounds) < 1 or self.warmup < 0:
            raise ValueError("batch, text_tokens and rounds must be at least 1, warmup not negative")
        if self.model == "tiny" and (self.pixels, self.aspect, self.dtype) != ("1M", 1.0, "auto"):
            raise ValueError("pixels, aspect and dtype are of published sizes; tiny has its own: leave them out")

    @property
    def words(self) -> int:
        """Words of a prompt."""
        return (16 if self.model == "tiny" else 64) if self.text_tokens is None else self.text_tokens
