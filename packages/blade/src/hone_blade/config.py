"""Settings of BLADE's attention, presets with where they come from, and settings of each verb. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from hone_core.config import Dtype, Preset, check_least, flag
from hone_core.io import read_prompts
from hone_core.training import check_budget
from hone_video.grids import ORDERS, Order
from hone_video.host_config import HostConfig, Solver
from hone_video.prompts import parse_prompt
from hone_video.training_config import LoopConfig
from hone_video.vbench_config import Protocol, VBenchConfig
from hone_video.workloads import WORKLOADS

__all__ = [
    "FACTORS",
    "PACKAGED_LORA",
    "PRESETS",
    "PROMPTS",
    "TDM_PRESETS",
    "TEACHER_STEPS",
    "BenchConfig",
    "BladeConfig",
    "Claim",
    "Comparison",
    "DemoConfig",
    "DistillConfig",
    "EncodeConfig",
    "EvalConfig",
    "GenerateConfig",
    "InspectConfig",
    "Mask",
    "Offsets",
    "Part",
    "PipelineDistillConfig",
    "ReproduceConfig",
    "Rollout",
    "Score",
    "Selection",
    "StudentsConfig",
    "TDMConfig",
    "TrainHostConfig",
    "known_preset",
]

Score = Literal["paper", "official", "mean", "lse"]
Offsets = Literal["seeded", "strided", "random"]
Selection = Literal["threshold", "topk"]
Mask = Literal["adaptive", "pyramid", "window", "random", "dense"]
Backend = Literal["auto", "reference", "triton", "gluon"]
Part = Literal["attention", "host", "forward", "e2e", "training"]

_KINDS = {
    bool: "True or False",
    int: "a whole number (int)",
    float: "a number (float)",
    str: "a string",
    tuple: "a tuple of whole numbers, such as (0,)",
}

FACTORS = (1, 2, 4, 8)
"""Tokens that the pyramid averages into one, finest first."""

TEACHER_STEPS = 50
"""Guided steps that a student's teacher is shown with."""

PACKAGED_LORA = Path(str(files("hone_blade") / "assets" / "lora.safetensors"))
"""Where the tiny host's distilled student ships, in versions that have one."""

_TILES = {16: (1, 4, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}


@dataclass(frozen=True, kw_only=True, slots=True)
class BladeConfig:
    """How attention is made sparse: which blocks are looked at, how they are scored, how many are kept.

    "Blocks" are runs of ``block`` consecutive tokens in ``order``; the same blocks cut queries and keys.
    """

    max_density: float = 0.17
    """Upper clamp: of every row of blocks at most this fraction is kept (Wan: 0.17, CogVideoX: 0.10). With
    ``selection="topk"`` and with the static masks exactly this fraction. Range (0, 1]."""
    min_density: float = 0.05
    """Lower clamp, same unit. Range [0, max_density]. The published value is 0.05."""
    mass: float = 0.95
    """Cumulative share of a row's scores to keep (tau in the paper). Range (0, 1]."""
    pool: int = 0
    """Tokens averaged into one global key that every query reads: 0 is ASA, n > 0 is ASA_G (Wan: 30, CogVideoX: 15)."""
    block: int = 128
    """Tokens in a block, one of 16, 32, 64, 128, 256; the published method has 128."""
    score: Score = "paper"
    """``paper``: max-pooled softmax over sampled keys. ``official``: the release's ratio to each row's largest logit,
    without the softmax denominator, rounded as there to the dtype of the tensors. ``mean``: softmax of the logits of
    whole-block means. ``lse``: softmax mass per block, averaged over the sampled rows."""
    samples: int = 16
    """Tokens sampled from each block (paper: 16, release: 32); unused by ``mean``. Range [1, block]."""
    offsets: Offsets = "seeded"
    """Where in a block the samples lie. ``seeded``: drawn per layer from ``seed``, so that the same call gives the same
    mask. ``strided``: evenly spaced. ``random``: a new draw from torch's generator at each call, per batch element and
    head, as in the release."""
    seed: int = 0
    """Seed of ``offsets="seeded"`` and ``mask="random"``."""
    selection: Selection = "threshold"
    """``threshold``: as few blocks as reach ``mass``, between the clamps. ``topk``: always the upper clamp."""
    inclusive: bool = True
    """Whether the block that reaches ``mass`` is kept (the paper) or is not (the release keeps one block fewer)."""
    order: Order = "gilbert"
    """Token order that makes a block a compact piece of video."""
    keep_diagonal: bool = True
    """Whether the block a query lies in is always kept, in place of the lowest-ranked one. The release does not."""
    force_text: bool = True
    """Whether blocks that hold a text token read, and are read by, every block (models with text in the sequence)."""
    pool_text: bool = False
    """Whether text tokens are pooled too (the release does)."""
    pool_exact: bool = True
    """Whether a short last group counts with its true size, or is filled up with copies of the last token."""
    dense_steps: int = 0
    """Denoising steps at the start that run dense."""
    dense_layers: tuple[int, ...] = ()
    """Layers that always run dense, counted from 0."""
    min_tokens: int = 0
    """Sequences shorter than this run dense."""
    mask: Mask = "adaptive"
    """``adaptive`` is BLADE. ``pyramid`` is Pyramid Sparse Attention, its authors' next method: blocks of less weight
    are read coarsely rather than skipped. Controls of equal density: ``window`` keeps the blocks nearest in the video,
    ``random`` seeded random ones. ``dense`` keeps everything."""
    levels: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    """Of the pyramid: bounds up to which a row's blocks, best first, are read at pool factors 1, 2, 4, 8; the rest is
    skipped. Cumulative shares of the row's scores with ``selection="threshold"``, of its blocks with ``"topk"``. It has
    no ``mass`` and no ``max_density``; with thresholds ``min_density`` is the least share read at factor 1."""
    similarity: tuple[float, ...] = ()
    """Of the pyramid: least mean cosines between the first and last keys of groups of 2, 4, 8 for a block to be read at
    that factor; blocks below are read finer. Empty: no such cap."""
    backend: Backend = "auto"
    """Backend of the attention, as in ``hone_kernels``. Prober and selection have no Gluon kernel: with ``gluon`` they
    take Triton's."""

    @property
    def scoring_backend(self) -> Backend:
        """Backend of prober and selection."""
        return "triton" if self.backend == "gluon" else self.backend

    def __post_init__(self) -> None:
        self._check_types()
        for name, options in (
            ("score", get_args(Score)),
            ("offsets", get_args(Offsets)),
            ("selection", get_args(Selection)),
            ("order", ORDERS),
            ("mask", get_args(Mask)),
            ("backend", get_args(Backend)),
            ("block", tuple(_TILES)),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}; got {getattr(self, name)!r}")
        if not 0 < self.max_density <= 1:
            raise ValueError(f"max_density is a fraction in (0, 1]; got {self.max_density}. 1 keeps every block")
        if not 0 <= self.min_density <= self.max_density:
            raise ValueError(f"min_density must lie in [0, max_density = {self.max_density}]; got {self.min_density}")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is a share of the row's scores in (0, 1]; got {self.mass}")
        if not 1 <= self.samples <= self.block:
            raise ValueError(f"samples must lie in [1, block = {self.block}]; got {self.samples}")
        for name in ("pool", "seed", "dense_steps", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        self._check_pyramid()
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers counts layers from 0; got {self.dense_layers}")

    def _check_pyramid(self) -> None:
        for name in ("levels", "similarity"):
            if not all(type(value) in (int, float) for value in getattr(self, name)):
                raise TypeError(f"{name} must be a tuple of numbers; got {getattr(self, name)!r}")
        bounds = (0, *self.levels, 1)
        if len(self.levels) != len(FACTORS) or list(bounds) != sorted(bounds) or self.levels[-1] <= 0:
            raise ValueError(
                f"levels must be {len(FACTORS)} ascending shares in [0, 1], the last above 0, for pool factors "
                f"{FACTORS}; got {self.levels}"
            )
        if len(self.similarity) not in (0, len(FACTORS) - 1):
            raise ValueError(f"similarity must be empty or a cosine for each of {FACTORS[1:]}; got {self.similarity}")
        if self.mask == "pyramid" and self.pool:
            raise ValueError(
                f"the pyramid reads pooled blocks already, so pool must be 0 with mask='pyramid'; got {self.pool}"
            )

    def _check_types(self) -> None:
        for entry in fields(self):
            value, kind = getattr(self, entry.name), type(entry.default)
            # bool is a subclass of int, and True for a count is a mistake; a whole number will do for a fraction.
            if type(value) is kind or (kind is float and type(value) is int):
                continue
            raise TypeError(f"{entry.name} must be {_KINDS[kind]}; got {value!r} of type {type(value).__name__}")
        if not all(type(layer) is int for layer in self.dense_layers):
            raise TypeError(f"dense_layers must be {_KINDS[tuple]}; got {self.dense_layers!r}")

    @property
    def tile(self) -> tuple[int, int, int]:
        """Tokens of a tile along (frames, height, width) for ``order="tile"``: a near-cube of ``block`` tokens."""
        return _TILES[self.block]

    def keep_bounds(self, blocks: int) -> tuple[int, int]:
        """Least and most blocks kept in a row of ``blocks``: at least one; fractions of a block are dropped.

        Source: ``max(1, int(blocks * ratio))`` of the release.
        """
        # The small term undoes binary fractions such as int(100 * 0.29) == 28.
        low, high = (max(1, int(blocks * ratio + 1e-9)) for ratio in (self.min_density, self.max_density))
        return low, high


_PUBLISHED = (
    "Constants of the release (threshold 0.95, least density 0.05, most {density}, pooling {pool}) with the paper's "
    "score and 16 samples, and this package's corrections: seeded samples, true group sizes, an inclusive threshold, "
    "own block kept."
)
_PSA = (
    "Pyramid Sparse Attention: bounds, similarity cap, block size, samples and dense first steps of its release, with "
    "the paper's score and this package's corrections. Not run on the real weights."
)
_RELEASE = (
    "The release as it runs: ratio score on 32 random samples, one block fewer than the threshold, replicated tails."
)


def _official(max_density: float, pool: int, pool_text: bool) -> BladeConfig:
    return BladeConfig(
        max_density=max_density,
        pool=pool,
        score="official",
        samples=32,
        offsets="random",
        inclusive=False,
        keep_diagonal=False,
        pool_text=pool_text,
        pool_exact=False,
    )


PRESETS: dict[str, Preset[BladeConfig]] = {
    "wan2.1-1.3b": Preset(
        config=BladeConfig(max_density=0.17, pool=30),
        model="Wan2.1-T2V-1.3B, 21x30x52 tokens",
        provenance=_PUBLISHED.format(density=0.17, pool=30),
    ),
    "wan2.1-1.3b-official": Preset(
        config=_official(0.17, 30, False),
        model="Wan2.1-T2V-1.3B, 21x30x52 tokens",
        provenance=_RELEASE + " The paper reports sparsity 0.80.",
    ),
    "wan2.1-14b": Preset(
        config=BladeConfig(max_density=0.17, pool=30),
        model="Wan2.1-T2V-14B, 21x30x52 or 21x45x80 tokens",
        provenance="Ours: the 1.3B constants on the larger model, which the paper does not try.",
    ),
    "cogvideox-5b": Preset(
        config=BladeConfig(max_density=0.10, pool=15),
        model="CogVideoX-5b, 13x30x45 video and 226 text tokens",
        provenance=_PUBLISHED.format(density=0.10, pool=15) + " Text blocks kept in both directions; text not pooled.",
    ),
    "cogvideox-5b-official": Preset(
        config=_official(0.10, 15, True),
        model="CogVideoX-5b, 13x30x45 video and 226 text tokens",
        provenance=_RELEASE + " Text pooled with the video; its two blocks kept in both directions. The paper reports "
        "sparsity 0.82.",
    ),
    "wan2.1-1.3b-free": Preset(
        config=BladeConfig(max_density=0.5, dense_steps=12, dense_layers=(0,)),
        model="Wan2.1-T2V-1.3B, undistilled, 50 steps",
        provenance="Ours, for models that were not trained with sparse attention: ASA without pooled keys, a quarter "
        "of the steps and the first layer dense, at most half of the blocks. Not measured on the real weights.",
    ),
    "cogvideox-5b-free": Preset(
        config=BladeConfig(max_density=0.5, dense_steps=12, dense_layers=(0,)),
        model="CogVideoX-5b, undistilled, 50 steps",
        provenance="Ours, as wan2.1-1.3b-free. Not measured on the real weights.",
    ),
    "wan2.1-1.3b-8step-free": Preset(
        config=BladeConfig(max_density=0.25, dense_steps=2),
        model="Wan2.1-T2V-1.3B, distilled to 8 steps with dense attention",
        provenance="The paper's training-free comparison (Table 3): first 2 of 8 steps dense, sparsity 0.75. Score, "
        "samples and offsets are ours; the paper does not give them for this table.",
    ),
    "wan2.1-1.3b-psa": Preset(
        config=BladeConfig(
            mask="pyramid",
            levels=(0.5, 0.6, 0.7, 0.8),
            similarity=(0.7, 0.65, 0.6),
            min_density=0.06,
            samples=32,
            dense_steps=15,
        ),
        model="Wan2.1-T2V-1.3B, undistilled, 50 steps",
        provenance=_PSA,
    ),
    "cogvideox-5b-psa": Preset(
        config=BladeConfig(
            mask="pyramid", selection="topk", levels=(0.1, 0.15, 0.15, 0.35), samples=32, dense_steps=15
        ),
        model="CogVideoX-5b, undistilled, 50 steps",
        provenance=_PSA,
    ),
    "tiny": Preset(
        config=BladeConfig(block=32, max_density=0.2, min_density=0.05, pool=16, samples=8),
        model="The tiny host of the demo, and small test models",
        provenance="Ours: the published proportions on blocks of 32 tokens.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Sparse attention at one density, six ways."""

    density: float = 0.25
    """Query-key pairs computed over all pairs, the pooled keys of ASA_G included. Fractions of a block are dropped, so
    what is computed can be less: the outcomes say."""
    block: int = 32
    """Tokens in a block."""
    pool: int = 16
    """Tokens averaged into one global key of ASA_G."""
    samples: int = 8
    """Tokens sampled from each block to score it."""
    score: Score = "paper"
    """How blocks are scored."""
    order: Order = "gilbert"
    """Token order that makes a block a compact piece of video."""
    dense_steps: int = 0
    """First denoising steps that every variant runs dense; fewer than there are."""
    steps: int | None = None
    """Denoising steps (default: the host's own number)."""
    seed: int = 0
    """Of the starting noise, and of the random masks."""

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(
                f"pool must be at least 1, the tokens averaged into a global key; got {self.pool}. Take a larger one, "
                "such as 16, for fewer global keys"
            )
        if self.steps is not None:
            self.check_steps(self.steps)
        elif self.dense_steps < 0:
            self.check_steps(1)
        if not 1 / self.pool < self.density <= 1:
            raise ValueError(
                f"density must lie in (1 / pool, 1] = ({1 / self.pool:g}, 1]: ASA_G spends 1 / pool of it on pooled "
                f"keys; got {self.density}"
            )

    def check_steps(self, steps: int) -> None:
        """Refuse numbers of steps of which none would be sparse.

        Raises:
            ValueError: ``steps`` is not positive, or ``dense_steps`` does not lie in [0, steps).
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}. Leave it out for the host's own number")
        if not 0 <= self.dense_steps < steps:
            raise ValueError(
                f"dense_steps must lie in [0, steps = {steps}), so that a step is left to the sparse variants; got "
                f"{self.dense_steps}. Take fewer dense steps, or more steps"
            )

    def configs(self, tokens: int) -> dict[str, BladeConfig | None]:
        """Settings of each variant by name; None is dense.

        Blocks are chosen by rank, so that counts are equal: ASA and the static masks keep as many whole blocks as
        ``density`` holds, ASA_G as many as leave room for its pooled keys within that, and the pyramid reads as many
        keys as those blocks have.

        Args:
            tokens: Length of the sequence.

        Raises:
            ValueError: The pooled keys leave no room for a single block.
        """
        blocks, pooled = -(-tokens // self.block), -(-tokens // self.pool)
        count = int(blocks * self.density + 1e-9)  # the small term undoes binary fractions
        beside_pooled = (count * self.block - pooled) // self.block
        if beside_pooled < 1:
            least = (1 + -(-pooled // self.block)) / blocks
            advice = f"at least {least:.4g}, or a larger pool" if least <= 1 else f"a larger pool than {self.pool}"
            raise ValueError(
                f"ASA_G cannot keep to density {self.density:g} on {tokens} tokens: that is {count} of {blocks} blocks "
                f"of {self.block}, of which its {pooled} pooled keys leave less than one. Expected {advice}"
            )

        def sparse(**changes: Any) -> BladeConfig:
            common: dict[str, Any] = {
                "block": self.block,
                "samples": self.samples,
                "score": self.score,
                "order": self.order,
            }
            common |= {"dense_steps": self.dense_steps, "seed": self.seed, "selection": "topk", "min_density": 0.0}
            return BladeConfig(**(common | {"max_density": self.density} | changes))

        return {
            "dense": None,
            "asa": sparse(),
            "asa_g": sparse(max_density=beside_pooled / blocks, pool=self.pool),
            "psa": sparse(mask="pyramid", levels=_pyramid_levels(count, blocks)),
            "window": sparse(mask="window"),
            "random": sparse(mask="random"),
        }


def _pyramid_levels(count: int, blocks: int) -> tuple[float, ...]:
    """Bounds of a pyramid that costs no more than ``count`` of ``blocks`` read whole.

    Up to a density of 5/9, 60 % of the cost is read at factor 1, a fifth at 2 and a fifth at 4: the best of the
    paper's ablation at equal cost, 15, 10 and 20 % of the blocks at a quarter. Above, no block is left to skip, and
    part of the row stays whole.
    """
    coarse = min(count, (blocks - count) / 0.8)
    half, quarter = int(0.4 * coarse + 1e-9), int(0.8 * coarse + 1e-9)
    whole = int(count - half / 2 - quarter / 4)
    rest = count - whole - half / 2 - quarter / 4
    half += int(2 * rest)
    quarter += int(4 * rest % 2)
    bounds = (whole, whole + half, whole + half + quarter)
    return tuple(min(bound, blocks) / blocks for bound in (*bounds, bounds[-1]))


PROMPTS = (
    "a red 7 moving left, slow",
    "a green 3 moving down-right, fast",
    "a yellow 0 moving up, medium, textured",
    "a blue 5 moving right, fast, textured",
)
"""What the demo draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo draws."""

    prompts: tuple[str, ...] = field(default=PROMPTS, metadata=flag("prompt"))
    """What to draw, a clip each."""
    limit: int | None = None
    """Use only so many of the prompts."""
    comparison: Comparison = field(default_factory=Comparison)
    stats_every: int = 6
    """Density and recall are measured on every so-many-th denoising step."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    lora: Path | None = None
    """A lora.safetensors made by distill, drawn in few steps beside its teacher in many (default: the packaged one, if
    there is one, and no other host is given)."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("the demo needs at least one prompt, such as 'a red 7 moving left, slow'")
        check_least(self, 1, "limit", "stats_every")
        for prompt in self.prompts:
            parse_prompt(prompt)

    @property
    def student(self) -> Path | None:
        """The distilled student; None if there is none."""
        return _student(self.lora, self.host)


def _student(lora: Path | None, host: Path | None) -> Path | None:
    """The student that is asked for, or else the packaged host's."""
    return PACKAGED_LORA if lora is None and host is None and PACKAGED_LORA.is_file() else lora


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """The comparison on many random prompts, or a pipeline by VBench."""

    protocol: Protocol = "clips"
    """``clips``: the comparison on the tiny host. ``vbench``: videos of a pipeline for VBench."""
    vbench: VBenchConfig = field(default_factory=VBenchConfig)
    """Of that protocol."""
    preset: str | None = None
    """VBench: attention settings by name (default: as for generate)."""
    lora: str | None = None
    """VBench: LoRA weights: a safetensors file, its folder, or a hub address. Wan2.2: of its first transformer."""
    lora_2: str | None = None
    """VBench: likewise of the second transformer of Wan2.2."""
    transformer: str | None = None
    """VBench: folder of a transformer that distill-pipeline trained whole, in place of the pipeline's own."""
    prompts: int | None = field(default=None, metadata=flag("limit"))
    """Number of prompts (default: 64 random ones; VBench: all)."""
    comparison: Comparison = field(default_factory=Comparison)
    batch: int = 16
    """Clips at a time."""
    stats_every: int = 4
    """Density and recall are measured on every so-many-th step, which is then not timed: recall costs a dense
    attention."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""

    def __post_init__(self) -> None:
        self.vbench.check(self.protocol)
        if (self.prompts is not None and self.prompts < 1) or self.batch < 1 or self.stats_every < 2:
            raise ValueError(
                "prompts and batch must be at least 1, and stats_every at least 2, so that steps are left to time; got "
                f"{self.prompts}, {self.batch} and {self.stats_every}"
            )
        known_preset(self.preset)
        given = [name for name in ("preset", "lora", "lora_2", "transformer") if getattr(self, name) is not None]
        if self.protocol == "clips" and given:
            raise ValueError(
                f"{' and '.join(given)}: for protocol vbench; the clips compare settings of one density. Pass "
                "--protocol vbench, or leave it out"
            )
        if self.protocol == "vbench" and self.host is not None:
            raise ValueError("host is the tiny one of protocol clips; VBench takes a pipeline, --model FOLDER")

    def videos(self, prompts: tuple[str, ...]) -> GenerateConfig:
        """What VBench's videos are made with.

        Args:
            prompts: One for each video.
        """
        own = self.vbench
        plain = GenerateConfig(model=str(own.model), prompts=prompts)
        return replace(
            plain, preset=self.preset, lora=self.lora, lora_2=self.lora_2, transformer=self.transformer,
            negative_prompt=own.negative_prompt, dense=own.dense,
            steps=self.comparison.steps, seed=self.comparison.seed,
            guidance=plain.guidance if own.guidance is None else own.guidance, height=own.height, width=own.width,
            frames=own.frames, dtype=own.dtype, offload=own.offload, local_files_only=own.local_files_only,
        )  # fmt: skip


def _densities() -> dict[str, Comparison]:
    return {
        "0.5": Comparison(density=0.5),
        "0.25": Comparison(density=0.25),
        "0.25, a quarter of the steps dense": Comparison(density=0.25, dense_steps=3),
        "0.125": Comparison(density=0.125, pool=32),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainHostConfig:
    """One training run of the tiny host."""

    host: HostConfig = field(default_factory=HostConfig, metadata=flag(hidden=True))
    start: Path | None = None
    """A host.safetensors whose weights and word table to begin with (default: random weights)."""
    seed: int = 0
    """Of weights and data."""
    minutes: float = 7.0
    """Wall-clock budget of the transformer's training, compilation included; the learning rate follows it."""
    steps: int | None = None
    """Optimiser steps in place of a time: reproducible, where minutes are not."""
    batch: int = 256
    """Clips of a step."""
    lr: float = 5e-3
    """Peak learning rate of the blocks' matrices, which Muon updates."""
    adamw_lr: float = 2e-3
    """Peak learning rate of everything else (embeddings, biases, norms, modulation, output), which AdamW updates."""
    warmup_steps: int = 200
    """Steps over which the learning rates rise."""
    weight_decay: float = 0.01
    """Of the blocks' matrices."""
    ema: float = 0.999
    """Decay of the weights' moving average, which is what is kept."""
    drop: float = 0.1
    """Probability of training a clip without its prompt."""
    train_shift: float = 3.0
    """Timestep shift of the training noise levels."""
    uniform: float = 0.2
    """Share of uniform noise levels; the rest is logit-normal. Both are shifted."""
    compile: bool = True
    """Compile the transformer's blocks on a GPU."""
    classifier_steps: int = 2000
    """Steps of the classifier that grades, which is trained first."""
    classifier_batch: int = 512
    """Frames per step of it."""
    glyphs: Literal["handwritten", "segments"] = "handwritten"
    """``segments`` needs no scikit-learn and is for smoke runs."""
    eval_clips: int = 512
    """Clips that each sampler is graded on."""
    eval_samplers: tuple[tuple[Solver, int, float], ...] = field(
        default=(
            ("unipc", 8, 1.0),
            ("unipc", 12, 3.0),
            ("euler", 12, 1.0),
            ("euler", 50, 1.0),
            ("euler", 50, 3.0),
        ),
        metadata=flag(hidden=True),
    )
    """(solver, steps, guidance) graded beside the host's own."""
    log_every: int = 50
    """Steps between two logged ones."""
    checkpoint_seconds: float = 90.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        check_budget(
            self, "batch", "lr", "adamw_lr", "warmup_steps", "classifier_steps", "classifier_batch", "eval_clips"
        )
        check_least(self, 0, "weight_decay")
        if not 0 <= self.drop < 1 or not 0 <= self.uniform <= 1:
            raise ValueError(f"drop must be in [0, 1) and uniform in [0, 1]; got {self.drop} and {self.uniform}")


Intervals = Literal["separate", "overlapping"]
FakeWeight = Literal["velocity", "uniform", "min_snr"]
FakeAttention = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TDMConfig:
    """What distillation asks of student, fake score and teacher (Trajectory Distribution Matching)."""

    student_steps: int = 8
    """Network calls of the student's rollout, in training and afterwards."""
    eta: float = 0.9
    """Share of the predicted noise that the rollout keeps from step to step; 1 is deterministic. Range [0, 1]."""
    intervals: Intervals = "separate"
    """Where a step's estimate is compared: ``separate``: at times of its own interval, as in the paper;
    ``overlapping``: of any later noise as well, as in the release."""
    first_time: int = 20
    """Least of these times, of 1000. TDM's demo: 20; release: 0, where a flow's target is 0 / 0."""
    last_time: int = 979
    """Largest of them."""
    teacher_guidance: float = 5.0
    """Guidance weight of the teacher. Release: 5 for Wan2.1, 3.5 for CogVideoX."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels, time over 1000, between which the teacher is guided. Ours: a teacher that samples best so."""
    fake_attention: FakeAttention = "sparse"
    """Attention of the fake score: the student's (the release), or dense; the paper does not say."""
    fake_weight: FakeWeight = "velocity"
    """Weight of the fake score's error in its clean estimate. ``velocity``: 1 / sigma^2, as in the release;
    ``uniform``: 1; ``min_snr``: signal-to-noise ratio up to 5, as in TDM's demo."""
    regularisation: float = 0.0
    """Weight of the fake score's distance from the unguided teacher. Release: 0.5 for CogVideoX, 0 for Wan2.1."""
    skip_above: float | None = None
    """A fake score whose loss is above this is not updated (release: 2 for Wan2.1), which hides a divergence."""
    huber: float = 1e-3
    """Constant of the student's pseudo-Huber loss. TDM's demo: 1e-3; release: 0.0113 for Wan2.1, 7.4e-9 for
    CogVideoX."""
    normalise: bool = True
    """Whether each sample's loss is divided by its distance from the teacher's estimate, as the release does for
    CogVideoX and not for Wan2.1."""

    def __post_init__(self) -> None:
        for name, options in (
            ("intervals", get_args(Intervals)),
            ("fake_weight", get_args(FakeWeight)),
            ("fake_attention", get_args(FakeAttention)),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}; got {getattr(self, name)!r}")
        if not 1 <= self.student_steps <= 1000:
            raise ValueError(f"student_steps must lie in [1, 1000]; got {self.student_steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta}")
        if not 1 <= self.first_time <= self.last_time < 999:
            raise ValueError(
                "first_time and last_time must be 1 <= first <= last < 999, since there is no noise at 0 and no signal "
                f"left at 999; got {self.first_time} and {self.last_time}"
            )
        low, high = self.guidance_interval
        if self.teacher_guidance < 1 or not 0 <= low <= high <= 1:
            raise ValueError(
                "teacher_guidance must be at least 1, which is none, and guidance_interval 0 <= low <= high <= 1; got "
                f"{self.teacher_guidance} and {self.guidance_interval}"
            )
        if self.regularisation < 0 or self.huber <= 0:
            raise ValueError(
                f"regularisation must not be negative and huber be above 0; got {self.regularisation}, {self.huber}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """The sampling that a student was trained for."""

    steps: int = 8
    """Network calls."""
    eta: float = 0.9
    """See ``TDMConfig``."""

    def __post_init__(self) -> None:
        TDMConfig(student_steps=self.steps, eta=self.eta)


TDM_PRESETS: dict[str, Preset[TDMConfig]] = {
    "wan2.1-1.3b": Preset(
        config=TDMConfig(),
        model="Wan2.1-T2V-1.3B",
        provenance="Steps, eta and guidance of the release's Wan2.1 script; intervals of the paper; least time, "
        "pseudo-Huber constant and division of TDM's demo.",
    ),
    "wan2.1-1.3b-official": Preset(
        config=TDMConfig(intervals="overlapping", first_time=1, skip_above=2.0, huber=0.011312, normalise=False),
        model="Wan2.1-T2V-1.3B",
        provenance="The release's Wan2.1 script, with noise levels computed in place of its table, and no time 0.",
    ),
    "cogvideox-5b": Preset(
        config=TDMConfig(teacher_guidance=3.5, regularisation=0.5),
        model="CogVideoX-5b",
        provenance="Steps, eta, guidance and regularisation of the release's CogVideoX script; the rest as in "
        "wan2.1-1.3b.",
    ),
    "cogvideox-5b-official": Preset(
        config=TDMConfig(
            teacher_guidance=3.5, regularisation=0.5, intervals="overlapping", first_time=1, huber=7.3717e-9
        ),
        model="CogVideoX-5b",
        provenance="The release's CogVideoX script, without time 0.",
    ),
    "tiny": Preset(
        config=TDMConfig(teacher_guidance=3.0, guidance_interval=(0.6, 0.96)),
        model="The tiny host",
        provenance="Ours: the tiny host's own guidance, within the noise levels where it samples with it.",
    ),
}


LR, FAKE_LR = 1e-4, 5e-4
"""The release's learning rates of student and fake score."""

TINY_LR, TINY_FAKE_LR = 1e-3, 2e-4
"""Those of the tiny host, ours: the best of five pairs tried (results/blade/distill_rates_*.json)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One distillation of the tiny host."""

    host: Path | None = None
    """A host.safetensors made by train-host, which is the teacher (default: the packaged one)."""
    preset: str = "tiny"
    """Attention of the student, by name."""
    attention: BladeConfig | None = field(default=None, metadata=flag(hidden=True))
    """Attention settings in full, instead of ``preset``."""
    tdm: TDMConfig = field(default_factory=lambda: TDM_PRESETS["tiny"].config)
    dense_share: float = 0.0
    """Share of the training, at its start, in which student and fake score attend densely: 0 is the paper's joint
    training, 1 plain TDM, between them dense first and sparse after."""
    seed: int = 0
    """Of adapters, prompts and noise."""
    steps: int = 300
    """Updates of student and fake score, one each; the release has 300."""
    batch: int = 32
    """Clips of an update."""
    accumulate: int = 1
    """Parts that a batch is cut into, to fit memory."""
    lora_rank: int = 64
    """Of the student's and the fake score's LoRA, whose alpha is the rank."""
    lr: float = TINY_LR
    """Peak learning rate of the student: warm-up, then one cosine down to 0."""
    fake_lr: float = TINY_FAKE_LR
    """Learning rate of the fake score, constant after the warm-up."""
    warmup_steps: int = 5
    """Steps over which both rates rise. The release's fake score has none."""
    weight_decay: float = 1e-4
    """Of AdamW, like the next."""
    beta2: float = 0.95
    """Decay of the squared gradients; there is no momentum (beta1 = 0), as in the release."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward rather than store them."""
    graphs: bool = True
    """On a GPU, record an update's launches once and replay them (CUDA graphs): the same kernels, without the host's
    time. Not with ``gradient_checkpointing``."""
    eval_clips: int = 256
    """Clips that the stored student is graded on, and the teacher beside it."""
    log_every: int = 10
    """Steps between two logged ones."""
    checkpoint_seconds: float = 120.0
    """Least time between two checkpoints, from which a stopped run goes on."""

    def __post_init__(self) -> None:
        known_preset(self.preset)
        check_budget(self, "batch", "accumulate", "lora_rank", "eval_clips", "lr", "fake_lr", "clip")
        check_least(self, 0, "weight_decay", "warmup_steps")
        if not 0 <= self.dense_share <= 1:
            raise ValueError(f"dense_share must lie in [0, 1]; got {self.dense_share}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch = {self.batch}; got {self.accumulate}")
        if self.gradient_checkpointing and self.graphs:
            raise ValueError("gradient_checkpointing does not go with graphs; add --no-graphs")
        if self.settings.dense_steps:
            raise ValueError(
                "distillation visits the steps of a video at random, so the attention must be the same in all: "
                f"expected dense_steps 0, got {self.settings.dense_steps}. Take a preset that is not '-free'"
            )

    @property
    def rollout(self) -> Rollout:
        """How the student is sampled."""
        return Rollout(steps=self.tdm.student_steps, eta=self.tdm.eta)

    @property
    def minutes(self) -> float:
        """No budget of time: a batch and a number of steps are what students are compared at."""
        return math.inf

    @property
    def settings(self) -> BladeConfig:
        """The student's attention."""
        return self.attention or PRESETS[self.preset].config


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """Prompts to encode once."""

    model: str
    """Folder of a diffusers pipeline, or its hub address, such as ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``."""
    prompt_file: Path | None = field(default=None, metadata=flag(instead_of=("image_folder",)))
    """UTF-8 text, one prompt a line; empty lines are skipped."""
    image_folder: Path | None = field(default=None, metadata=flag(instead_of=("prompt_file",)))
    """For an image-to-video pipeline, a folder of images instead, with a ``metadata.jsonl`` of lines like
    ``{"file_name": "a.png", "text": "the fox turns its head"}``."""
    limit: int | None = None
    """Use only so many of the prompts."""
    height: int | None = None
    """Pixels of the videos that begin with the images (default: as published, see distill-pipeline)."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Frames."""
    dtype: Dtype = "auto"
    """Of the text encoder and of what it makes."""
    local_files_only: bool = False
    """Never ask the hub, only its local cache."""

    def __post_init__(self) -> None:
        check_least(self, 1, "limit", "height", "width", "frames")
        if (self.prompt_file is None) == (self.image_folder is None):
            raise ValueError(
                "give prompts: --prompt-file FILE, one a line, or for an image-to-video pipeline --image-folder "
                f"FOLDER; got {'neither' if self.prompt_file is None else 'both'}"
            )
        if self.image_folder is None and (self.height, self.width, self.frames) != (None, None, None):
            raise ValueError("height, width and frames are those of videos that begin with images; pass --image-folder")


def _release_loop() -> LoopConfig:
    return LoopConfig(
        steps=300, batch=80, lr=LR, warmup_steps=5, ema=0.0, gradient_checkpointing=True, log_every=1,
        checkpoint_every=15,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineDistillConfig:
    """One distillation of a pipeline's transformer."""

    model: str
    """Folder of a diffusers pipeline, or its hub address, such as ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``."""
    prompt_file: Path | None = field(default=None, metadata=flag(instead_of=("cache",)))
    """UTF-8 text, one prompt a line, encoded into the run's folder first."""
    cache: Path | None = field(default=None, metadata=flag(instead_of=("prompt_file",)))
    """Folder of prompts that encode-prompts made, instead; for image-to-video with their images."""
    loop: LoopConfig = field(default_factory=_release_loop)
    """How it is trained: by default as the release, 300 steps of 80 videos. ``lr`` is the student's, which after the
    warm-up falls by a cosine."""
    fake_lr: float = FAKE_LR
    """Learning rate of the fake score."""
    beta2: float = 0.95
    """Decay of AdamW's squared gradients; there is no momentum (beta1 = 0), as in the release."""
    lora_rank: int = 64
    """Of the student's and the fake score's LoRA, whose alpha is the rank; 0 trains all weights of both, beside a
    frozen teacher."""
    preset: str | None = None
    """Attention of the student, by name (default: that of the model's kind)."""
    attention: BladeConfig | None = field(default=None, metadata=flag(hidden=True))
    """Attention settings in full, instead of ``preset``."""
    objective: str | None = None
    """Settings of the objective by name, such as ``wan2.1-1.3b-official`` (default: that of the model's kind)."""
    tdm: TDMConfig | None = field(default=None, metadata=flag(hidden=True))
    """Settings of the objective in full, instead."""
    height: int | None = None
    """Pixels (default: as published, 480 x 832 x 81 for Wan, 480 x 720 x 49 for CogVideoX; of image-to-video, as the
    images were encoded)."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Frames."""
    shard: bool = False
    """Share the transformer out over the processes (FSDP2) instead of holding it whole in each: for one that does not
    fit a card. Results are the same up to the order of sums."""
    sample_every: int = 0
    """Steps between two sheets of samples in the run's figures; 0 for none."""
    samples: int = 2
    """Prompts on a sheet, the first ones."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of frozen weights and of the forward; what is trained stays in float32. ``auto``: bfloat16 on a GPU."""
    local_files_only: bool = False
    """Never ask the hub, only its local cache."""

    def __post_init__(self) -> None:
        if (self.prompt_file is None) == (self.cache is None):
            raise ValueError(
                "give prompts: --prompt-file FILE, one a line, or --cache FOLDER of encode-prompts; got "
                f"{'neither' if self.cache is None else 'both'}"
            )
        for name, settings in (("preset", "attention"), ("objective", "tdm")):
            if None not in (getattr(self, name), getattr(self, settings)):
                raise ValueError(f"give {name} or {settings}, not both")
        known_preset(self.preset)
        if self.objective is not None and self.objective not in TDM_PRESETS:
            raise ValueError(f"no objective {self.objective!r}; there are {', '.join(TDM_PRESETS)}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be positive, or 0 to train every weight; got {self.lora_rank}")
        check_least(self, 1, "height", "width", "frames", "samples")
        if self.sample_every < 0:
            raise ValueError(f"sample_every must not be negative; got {self.sample_every}")
        if self.loop.micro_batch != 1:
            raise ValueError(
                f"a forward of a distillation holds one video, so micro_batch must be 1; got {self.loop.micro_batch}"
            )


Claim = Literal["masks", "distillation", "recall", "decomposition"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentsConfig:
    """Training that all students of a comparison share."""

    updates: int = 150
    """Of student and fake score, one each. The published Wan2.1 weights have 150."""
    train_batch: int = 32
    """Clips of an update."""
    lora_rank: int = 64
    """Of the adapters."""
    lr: float = TINY_LR
    """Peak learning rate of a student."""
    fake_lr: float = TINY_FAKE_LR
    """Learning rate of the fake score."""
    tdm: TDMConfig = field(default_factory=lambda: TDM_PRESETS["tiny"].config)
    comparison: Comparison = field(default_factory=lambda: Comparison(density=0.1875), metadata=flag(hidden=True))
    """Sparse attention: 0.1875 of all pairs on 1,024 tokens is a sparsity of 0.81, the paper's 0.80."""

    def __post_init__(self) -> None:
        check_least(self, 1, "updates", "train_batch", "lora_rank")

    def run(self, attention: BladeConfig, seed: int, **changes: Any) -> DistillConfig:
        """The training of one student.

        Args:
            attention: Of the student.
            seed: Of adapters, prompts and noise.
            changes: To the other settings.
        """
        common: dict[str, Any] = {
            "steps": self.updates,
            "batch": self.train_batch,
            "lora_rank": self.lora_rank,
            "lr": self.lr,
        }
        common |= {"fake_lr": self.fake_lr, "tdm": self.tdm, "checkpoint_seconds": 30.0}
        return DistillConfig(attention=attention, seed=seed, **(common | changes))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """One of the paper's claims over seeds."""

    claim: Claim = "masks"
    """``masks``: masks that look at the content beat static ones, in a model as it is, at several densities.
    ``distillation``: training with the sparse attention beats putting it into a student that was trained densely, and
    training dense first and sparse after; arms A to K, a student each, on one GPU about a quarter of an hour.
    ``recall``: how much of dense attention's mass masks keep, by score, density, samples and order of tokens, under the
    best mask. ``decomposition``: what fewer steps, no guidance and sparse attention each save and cost."""
    settings: dict[str, Comparison] = field(default_factory=_densities, metadata=flag(hidden=True))
    """What ``masks`` compares, by name."""
    students: StudentsConfig = field(default_factory=StudentsConfig)
    """What ``distillation`` trains."""
    prompts: int = field(default=256, metadata=flag("limit"))
    """Number of random prompts of each seed."""
    seeds: int = 3
    """Number of seeds of prompts and noise, and of students."""
    gate: float = 0.9
    """Share of digits and of directions that the teacher has to get right for ``distillation``, at 50 guided steps."""
    batch: int = 64
    """Clips at a time."""
    workers: int = field(default=1, metadata=flag(stored=False))
    """Processes that ``distillation`` trains students in, side by side; results are the same. With ``--device cuda``
    they are spread over all visible GPUs. Start NVIDIA's MPS first (``nvidia-cuda-mps-control -d``): without it the
    processes of a GPU take turns. Five to a GPU is a good number."""
    host: Path | None = None
    """A host.safetensors made by train-host (default: the packaged one)."""
    lora: Path | None = None
    """A lora.safetensors made by distill, for ``decomposition`` (default: the packaged one, if there is one, and no
    other host is given)."""

    def __post_init__(self) -> None:
        if not self.settings:
            raise ValueError("settings must name at least one comparison")
        check_least(self, 1, "prompts", "seeds", "batch", "workers")
        if not 0 <= self.gate <= 1:
            raise ValueError(f"gate is a share in [0, 1]; got {self.gate}")
        if self.lora is not None and self.claim != "decomposition":
            raise ValueError(f"lora is for claim decomposition; claim {self.claim} reads none. Leave it out")

    @property
    def student(self) -> Path | None:
        """The distilled student; None if there is none."""
        return _student(self.lora, self.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What to generate, and how."""

    model: str
    """Folder of a diffusers pipeline (it holds ``model_index.json``), or its hub address, such as
    ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers`` or ``THUDM/CogVideoX-5b``."""
    prompts: tuple[str, ...] = field(default=(), metadata=flag("prompt", instead_of=("prompt_file",)))
    """What to make, one video each."""
    prompt_file: str | None = field(default=None, metadata=flag(instead_of=("prompts",)))
    """UTF-8 text, one prompt a line, instead; empty lines are skipped."""
    limit: int | None = None
    """Use only so many of the prompts."""
    images: tuple[str, ...] = field(default=(), metadata=flag("image"))
    """Files of the images that the videos begin with, for an image-to-video pipeline: one for each prompt, or one for
    all. Scaled to cover the video, and cut to its middle."""
    negative_prompt: str = ""
    """What guidance leads away from; used when ``guidance`` is above 1."""
    preset: str | None = field(default=None, metadata=flag(instead_of=("attention",)))
    """Attention settings by name; hone-blade info lists them (default: those that the LoRA file states, else the preset
    of the model's kind)."""
    attention: BladeConfig | None = field(default=None, metadata=flag(hidden=True))
    """Attention settings in full, instead of ``preset``."""
    dense: bool = False
    """Leave attention as it is."""
    lora: str | None = None
    """LoRA weights: a safetensors file, its folder, or a hub address. Wan2.2: of its first transformer, which draws at
    high noise."""
    lora_2: str | None = None
    """Likewise of the second transformer of Wan2.2, which draws at low noise."""
    transformer: str | None = None
    """Folder of a transformer that distill-pipeline trained whole (``--lora-rank 0``), in place of the pipeline's
    own."""
    scheduler: Literal["auto", "tdm", "unipc", "dpm", "default"] = "auto"
    """``tdm``: the rollout that BLADE's distillation trains. ``unipc`` (Wan) and ``dpm`` (CogVideoX, trailing times):
    what the release samples with. ``default``: the pipeline's own. ``auto``: ``unipc`` with flow shift 3 for Wan with
    LoRA weights that state no settings, as the published ones do not, else ``tdm``."""
    flow_shift: float | None = None
    """Of ``unipc`` (default: the pipeline's own, else 3)."""
    steps: int | None = None
    """Network calls per video, twice as many with guidance (default: those that the LoRA file was trained for, else
    8)."""
    eta: float | None = None
    """Of ``tdm``: share of the predicted noise that is kept from step to step (default: as the LoRA file was trained,
    else 0.9)."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none, as distilled models need."""
    height: int | None = None
    """Pixels (default: the pipeline's own, like width and frames)."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Frames."""
    fps: int | None = None
    """Frames per second of the file (default: 16 for Wan, 8 for CogVideoX)."""
    seed: int = 0
    """Of the first prompt; the following ones count up. Noise is drawn on the CPU, the same for every device."""
    dtype: Dtype = "auto"
    """Of transformer and text encoder; Wan's VAE stays in float32, as the release has it."""
    offload: bool = False
    """Keep on the GPU only the part that is running."""
    local_files_only: bool = False
    """Never ask the hub, only its local cache."""

    def __post_init__(self) -> None:
        if self.transformer is not None and self.lora is not None:
            raise ValueError("give lora or transformer, a student that was trained whole; not both")
        if bool(self.prompts) == (self.prompt_file is not None):
            what = "both" if self.prompts else "no prompt"
            raise ValueError(
                f"give prompts (--prompt TEXT) or prompt_file (--prompt-file FILE, one a line); got {what}"
            )
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt must not be empty")
        if self.preset is not None and self.attention is not None:
            raise ValueError("give preset or attention, not both")
        known_preset(self.preset)
        if self.dense and (self.preset is not None or self.attention is not None):
            raise ValueError("dense leaves attention as it is; drop preset and attention, or dense")
        check_least(self, 1, "limit", "steps", "height", "width", "frames", "fps")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is none; got {self.guidance}")
        if self.flow_shift is not None and (self.scheduler != "unipc" or self.flow_shift <= 0):
            raise ValueError(
                f"flow_shift is positive and goes with scheduler 'unipc'; got {self.flow_shift} with {self.scheduler!r}"
            )
        if self.eta is not None and (self.scheduler not in ("auto", "tdm") or not 0 <= self.eta <= 1):
            raise ValueError(
                f"eta lies in [0, 1] and goes with scheduler 'tdm'; got {self.eta} with {self.scheduler!r}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")

    def read_prompts(self) -> tuple[str, ...]:
        """The prompts, read from their file if there is one.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no prompt, or is not text.
        """
        if self.prompt_file is None:
            return self.prompts
        return read_prompts(self.prompt_file)


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """What to look at while it draws."""

    model: str | None = field(default=None, metadata=flag(instead_of=("host",)))
    """A diffusers pipeline as for generate (default: the tiny host)."""
    host: Path | None = field(default=None, metadata=flag(instead_of=("model", "lora", "lora_2", "image")))
    """A host.safetensors made by train-host (default: the packaged one)."""
    prompt: str = "a red 7 moving left, slow"
    """What to draw."""
    preset: str | None = None
    """Attention settings by name (default: tiny for the tiny host, else those of the LoRA or the model)."""
    lora: str | None = None
    """LoRA weights for a pipeline; Wan2.2: for its first transformer."""
    lora_2: str | None = None
    """For the second transformer of Wan2.2."""
    image: str | None = None
    """File of the image that the video of an image-to-video pipeline begins with."""
    steps: int | None = None
    """Denoising steps (default: the host's own number, or 8)."""
    guidance: float | None = None
    """Classifier-free guidance weight; 1 is none (default: the host's own, or 1)."""
    recall: bool = True
    """Also measure the share of dense attention's mass that is kept, which costs a dense attention per call."""
    dtype: Dtype = "auto"
    """Of a pipeline's transformer and text encoder."""
    height: int | None = None
    """Pixels of a pipeline's video (default: its own, like width and frames)."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Frames."""
    offload: bool = False
    """Keep on the GPU only the part of the pipeline that is running."""
    seed: int = 0
    """Of the starting noise."""

    def __post_init__(self) -> None:
        if self.model is not None and self.host is not None:
            raise ValueError("give model, a pipeline, or host, a tiny host; not both")
        if self.model is None:
            pipelines = ("lora", "lora_2", "image", "height", "width", "frames")
            given = [name for name in pipelines if getattr(self, name) is not None]
            given += ["dtype"] * (self.dtype != "auto") + ["offload"] * self.offload
            if given:
                raise ValueError(f"{' and '.join(given)}: for a pipeline; pass --model too")
        check_least(self, 1, "steps", "height", "width", "frames")
        known_preset(self.preset)
        if self.model is None:
            parse_prompt(self.prompt)

    @property
    def pipeline(self) -> GenerateConfig:
        """The settings of a pipeline's run.

        Raises:
            ValueError: They are those of the tiny host.
        """
        if self.model is None:
            raise ValueError("these settings are for the tiny host; they name no pipeline")
        given: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance}
        return GenerateConfig(
            model=self.model,
            prompts=(self.prompt,),
            images=() if self.image is None else (self.image,),
            preset=self.preset,
            lora=self.lora,
            lora_2=self.lora_2,
            height=self.height,
            width=self.width,
            frames=self.frames,
            dtype=self.dtype,
            offload=self.offload,
            seed=self.seed,
            **{name: value for name, value in given.items() if value is not None},
        )


def known_preset(name: str | None) -> None:
    """Raise if there is no preset of a name; None is none.

    Raises:
        ValueError: There is none.
    """
    if name is not None and name not in PRESETS:
        raise ValueError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")


def _own_preset(model: str) -> str:
    """Attention settings that go with a model."""
    return "tiny" if model.startswith("tiny") else model


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to measure."""

    model: str = "wan2.1-1.3b"
    """wan2.1-1.3b, wan2.1-14b or cogvideox-5b, or on a CPU tiny-wan or tiny-cogvideox."""
    parts: tuple[Part, ...] = ("attention", "forward", "e2e")
    """``attention``: one layer, and the pieces of BLADE in it. ``forward``: one call of the transformer. ``e2e``: whole
    denoising loops, many dense steps with guidance down to few sparse ones without. Only if asked for: ``host``, what
    one eager layer costs the host of a GPU, at 2 heads of 1,000 tokens; ``training``, one update of a distillation, by
    part."""
    preset: str | None = None
    """Attention settings by name (default: the model's own)."""
    rounds: int = 20
    """Timed rounds of one attention; each calls every variant once, in a random order. Of the host, 20 times."""
    forward_rounds: int = 5
    """Likewise of one forward."""
    steps: int = 50
    """Denoising steps of the undistilled model."""
    few_steps: int = 8
    """Denoising steps of the distilled one."""
    guidance: float = 5.0
    """Guidance weight of the undistilled model; two network evaluations per step."""
    repeats: int = 3
    """How often each few-step loop runs, one after the other."""
    max_steps: int | None = None
    """Run at most so many steps of a loop and scale the time up; its rows say how many were measured (default: all)."""
    updates: int = 2
    """Timed updates of ``training``, of one video each; one more comes before them."""
    lora_rank: int = 64
    """Of the LoRA of student and fake score."""
    compile_blocks: bool = False
    """Also time the forward with transformer blocks compiled by Inductor, of dense kernels with torch's own alone."""
    dtype: Dtype = "auto"
    """Of weights and inputs."""
    seed: int = 0
    """Of weights, inputs and noise."""

    def __post_init__(self) -> None:
        if self.model not in WORKLOADS:
            raise ValueError(f"model must be one of {', '.join(WORKLOADS)}; got {self.model!r}")
        known_preset(self.preset)
        if not self.parts or not set(self.parts) <= set(get_args(Part)):
            raise ValueError(f"parts must name some of {', '.join(get_args(Part))}; got {self.parts}")
        check_least(
            self, 1, "rounds", "forward_rounds", "steps", "few_steps", "repeats", "max_steps", "updates", "lora_rank"
        )
        if self.attention.mask == "pyramid":
            raise ValueError(
                f"bench times asa and asa_g, whose settings are not those of a pyramid; got preset {self.preset}. Take "
                "one that is not '-psa'"
            )
        if self.steps == self.few_steps:
            raise ValueError(f"few_steps must differ from steps, the undistilled model's; got {self.steps} for both")
        dense_steps = self.attention.dense_steps
        if "e2e" in self.parts and dense_steps:
            name = self.preset or _own_preset(self.model)
            if dense_steps >= self.few_steps:
                raise ValueError(
                    f"few_steps must be above the {dense_steps} first steps that preset {name} leaves dense, or whole "
                    f"videos would hold no sparse step; got {self.few_steps}. Take more steps, or parts without e2e"
                )
            if self.max_steps is not None and self.max_steps < self.few_steps:
                raise ValueError(
                    f"max_steps must be at least few_steps = {self.few_steps} with preset {name}, whose first "
                    f"{dense_steps} steps are dense, so that a part does not stand for the whole; got {self.max_steps}"
                )
        if self.guidance <= 1:
            raise ValueError(f"guidance must be above 1, below which pipelines do not guide; got {self.guidance}")

    @property
    def attention(self) -> BladeConfig:
        """The attention settings in use."""
        return PRESETS[self.preset or _own_preset(self.model)].config

    @property
    def variants(self) -> dict[str, BladeConfig | None]:
        """Settings of each variant by name; None is dense. A preset without pooling takes that of the model's own."""
        pool = self.attention.pool or PRESETS[_own_preset(self.model)].config.pool
        return {"dense": None, "asa": replace(self.attention, pool=0), "asa_g": replace(self.attention, pool=pool)}
