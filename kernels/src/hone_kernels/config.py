"""Settings of the verbs. Their modules need the extra ``bench``, the ops do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["BenchConfig", "ProfileConfig", "SanitizeConfig", "SpillsConfig", "TuneConfig"]

Op = Literal[
    "attention",
    "attention_fp8",
    "block_scores",
    "logits",
    "column_mass",
    "ragged_decode",
    "kept_tokens",
    "plane_sweep",
    "pyramid_attention",
    "splat_blend",
]
Dtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn"]
Mode = Literal["forward", "forward pooled", "backward", "prologue", "host"]
Memory = Literal["BHSD", "BSHD"]
Kernel = Literal["attention", "attention_gluon", "attention_fp8", "block_scores"]
Kind = Literal["gluon", "triton", "fp8 triton"]
Tool = Literal["memcheck", "synccheck", "racecheck"]
Backend = Literal["triton", "gluon"]
Ours = Literal["reference", "triton", "gluon"]
Part = Literal[
    "attention",
    "attention_fp8",
    "block_scores",
    "pyramid_attention",
    "ragged_decode",
    "decoding",
    "kept_tokens",
    "splat_blend",
]
Profiled = Literal["attention", "column_mass", "token_select", "ragged_decode"]
Tokens = Literal["whole", "ragged", "padded"]

TAKEN: dict[str, tuple[str, ...]] = {
    "attention": ("shapes", "densities", "dtypes", "backends", "modes", "memory", "block"),
    "attention_fp8": ("shapes", "densities", "modes"),
    "block_scores": ("shapes",),
    "logits": ("shapes", "dtypes"),
    "column_mass": ("shapes",),
    "ragged_decode": ("shapes",),
    "kept_tokens": ("shapes",),
    "plane_sweep": ("shapes",),
    "pyramid_attention": ("shapes",),
    "splat_blend": ("shapes",),
}
"""What each op's bench lets choose; of the rest it measures what it measures."""


def _positive(cfg: object, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to time."""

    op: Op = "attention"
    """Which op: attention beside every other that is installed, FP8's prologue and gradients, BLADE's prober, the
    reading of logits, column masses with the selection of tokens, decoding from ragged caches, what lies around
    blocks that run some tokens only, cost volumes, attention over a pyramid of keys, or the blending of splats."""
    shapes: tuple[str, ...] = ()
    """Names, or HEADSxTOKENSxHEAD_SIZE such as 12x32768x128; of logits ROWSxVOCABULARY, of column_mass and
    ragged_decode BATCHxHEADSxKEY_HEADSxTOKENSxHEAD_SIZE, of kept_tokens ROWSxTOKENSxKEPTxCHANNELS, of plane_sweep
    VIEWSxOTHERSxCHANNELSxHEIGHTxWIDTHxCANDIDATES, of splat_blend PICTURESxGAUSSIANSxHEIGHTxWIDTH (default: the op's
    own)."""
    densities: tuple[float, ...] = ()
    """Shares of blocks listed (default: the op's own)."""
    dtypes: tuple[Dtype, ...] = ()
    """Of q, k and v (default: bfloat16 and float8_e4m3fn), or of logits (default: bfloat16 and float32)."""
    backends: tuple[Ours, ...] = ()
    """Of ours, attention only (default: all that run here)."""
    modes: tuple[Mode, ...] = ()
    """What of attention or attention_fp8 (default: all that it has); host: time of the host for one call of each."""
    memory: tuple[Memory, ...] = ()
    """Orders of q, k and v in memory, attention only (default: both)."""
    block: int | None = None
    """Block size on both sides, attention only (default: 128)."""
    rounds: int = 20
    """Timed calls of each, in random order."""
    plot: bool = True
    """Draw the rate of attention's forward against density into figures/."""
    seed: int = 0
    """Seed of data, lists and order."""

    def __post_init__(self) -> None:
        for name in ("shapes", "densities", "dtypes", "backends", "modes", "memory", "block"):
            if getattr(self, name) not in ((), None) and name not in TAKEN[self.op]:
                raise ValueError(f"the bench of {self.op} has no {name} to choose; it has {', '.join(TAKEN[self.op])}")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"a density lies in (0, 1]; got {density}")
        _positive(self, "block", "rounds")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """Which launch settings to try."""

    kernel: Kernel = "attention"
    """Which kernels: Triton's attention, Gluon's, FP8's with its prologue, or the prober's."""
    shapes: tuple[str, ...] = ()
    """Names of shapes (default: all that the kernel was tuned on)."""
    candidates: int | None = None
    """Only so many of the settings of each kernel (default: all)."""
    rounds: int = 20
    """Timed calls of each, in random order."""
    seed: int = 0
    """Seed of data, lists and order."""

    def __post_init__(self) -> None:
        _positive(self, "candidates", "rounds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """What to count cycles of."""

    op: Profiled = "attention"
    """Which op."""
    shapes: tuple[str, ...] = ()
    """Names, or HEADSxTOKENSxHEAD_SIZE such as 12x32768x128; of the other ops BATCHxHEADSxKEY_HEADSxTOKENSxHEAD_SIZE
    (default: some of Wan and CogVideoX, of Qwen2.5-VL-7B)."""
    kinds: tuple[Kind, ...] = ()
    """Which forward kernels of attention (default: all)."""
    densities: tuple[float, ...] = ()
    """Shares of blocks listed, attention only (default: 1 and 0.1)."""
    seed: int = 0
    """Seed of data and lists."""

    def __post_init__(self) -> None:
        if self.op != "attention" and (self.kinds or self.densities):
            raise ValueError(f"kinds and densities are of attention; {self.op} has one kernel of each kind")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"a density lies in (0, 1]; got {density}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SanitizeConfig:
    """What to run under which tool of compute-sanitizer."""

    tools: tuple[Tool, ...] = get_args(Tool)
    """Tools."""
    backends: tuple[Backend, ...] = get_args(Backend)
    """Kernels of which backend; Gluon has attention and pyramid_attention alone."""
    parts: tuple[Part, ...] = get_args(Part)
    """Kernels of which op; block_scores brings block_select and group_means along, ragged_decode column_mass,
    token_select and draw_codes, decoding few_tokens and prefix_attention, kept_tokens logits and guided_draw,
    splat_blend plane_sweep and nearest_points."""
    timeout: float = 600.0
    """Seconds for one part under one tool."""
    seed: int = 0
    """Seed of data and lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpillsConfig:
    """What to compile; every combination of what is named."""

    backend: Backend = "triton"
    """Whose kernels."""
    sm: int = 90
    """Compute capability times ten."""
    dtypes: tuple[str, ...] = ()
    """Of q, k and v (default: all that the backend takes)."""
    dims: tuple[int, ...] = ()
    """Head sizes (default: all that the backend takes)."""
    blocks: tuple[int, ...] = ()
    """Block sizes, of queries and of keys (default: all that the backend takes)."""
    tokens: tuple[Tokens, ...] = get_args(Tokens)
    """Lengths: whole blocks, a ragged end, padded blocks."""
