"""Settings of BLADE's sparse attention, and presets with where they come from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from hone_video.grids import ORDERS, Order

__all__ = ["PRESETS", "BladeConfig", "Mask", "Offsets", "Preset", "Score", "Selection"]

Score = Literal["paper", "official", "mean", "lse"]
Offsets = Literal["seeded", "strided", "random"]
Selection = Literal["threshold", "topk"]
Mask = Literal["adaptive", "window", "random", "dense"]
Backend = Literal["auto", "reference", "triton", "gluon"]

_KINDS = {
    bool: "True or False",
    int: "a whole number (int)",
    float: "a number (float)",
    str: "a string",
    tuple: "a tuple of whole numbers, such as (0,)",
}

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
    without the softmax denominator. ``mean``: softmax of the logits of whole-block means. ``lse``: softmax mass per
    block, averaged over the sampled rows."""
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
    """``adaptive`` is BLADE. Controls of equal density: ``window`` keeps the blocks nearest in the video, ``random``
    seeded random ones. ``dense`` keeps everything."""
    backend: Backend = "auto"
    """Backend of the attention, as in ``hone_kernels``. Prober and selection have no Gluon kernel: with ``gluon`` they
    take Triton's."""

    @property
    def scoring_backend(self) -> str:
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
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers counts layers from 0; got {self.dense_layers}")

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named configuration and where it comes from.

    Attributes:
        config: The settings.
        model: What they are for.
        provenance: Published constants, or ours.
        expected: Known figures at the model's default size, by name.
    """

    config: BladeConfig
    model: str
    provenance: str
    expected: dict[str, float] = field(default_factory=dict)


_PUBLISHED = (
    "Constants of the release (threshold 0.95, least density 0.05, most {density}, pooling {pool}) with the paper's "
    "score and 16 samples, and this package's corrections: seeded samples, true group sizes, an inclusive threshold, "
    "own block kept."
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


PRESETS: dict[str, Preset] = {
    "wan2.1-1.3b": Preset(
        config=BladeConfig(max_density=0.17, pool=30),
        model="Wan2.1-T2V-1.3B, 21x30x52 tokens",
        provenance=_PUBLISHED.format(density=0.17, pool=30),
        expected={"blocks": 256, "kept_blocks": 43, "sparsity": 1 - 43 / 256 - 1 / 30},
    ),
    "wan2.1-1.3b-official": Preset(
        config=_official(0.17, 30, False),
        model="Wan2.1-T2V-1.3B, 21x30x52 tokens",
        provenance=_RELEASE + " The paper reports sparsity 0.80.",
        expected={"blocks": 256, "kept_blocks": 43, "sparsity": 1 - 43 / 256 - 1 / 30},
    ),
    "wan2.1-14b": Preset(
        config=BladeConfig(max_density=0.17, pool=30),
        model="Wan2.1-T2V-14B, 21x30x52 or 21x45x80 tokens",
        provenance="Ours: the 1.3B constants on the larger model, which the paper does not try.",
        expected={"blocks": 256, "kept_blocks": 43, "sparsity": 1 - 43 / 256 - 1 / 30},
    ),
    "cogvideox-5b": Preset(
        config=BladeConfig(max_density=0.10, pool=15),
        model="CogVideoX-5b, 13x30x45 video and 226 text tokens",
        provenance=_PUBLISHED.format(density=0.10, pool=15) + " Text blocks kept in both directions; text not pooled.",
        expected={"blocks": 139, "kept_blocks": 13, "forced_blocks": 2},
    ),
    "cogvideox-5b-official": Preset(
        config=_official(0.10, 15, True),
        model="CogVideoX-5b, 13x30x45 video and 226 text tokens",
        provenance=_RELEASE + " Text pooled with the video; its two blocks kept in both directions. The paper reports "
        "sparsity 0.82.",
        expected={"blocks": 139, "kept_blocks": 13, "forced_blocks": 2},
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
        expected={"sparsity": 0.75},
    ),
    "tiny": Preset(
        config=BladeConfig(block=32, max_density=0.2, min_density=0.05, pool=16, samples=8),
        model="The tiny host of the demo, and small test models",
        provenance="Ours: the published proportions on blocks of 32 tokens.",
    ),
}
